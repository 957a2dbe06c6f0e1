"""QK-norm, RoPE and the cache write in one op."""
