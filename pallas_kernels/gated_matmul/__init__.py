"""The matmul of gates and values with SwiGLU as its epilogue."""
