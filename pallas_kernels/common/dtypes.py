"""The dtypes that the reduction contract covers."""

import jax

FLOATS = ("bfloat16", "float16", "float32")


def check_floats(op: str, **operands: jax.Array) -> None:
    """Raises `ValueError`, naming the operand, for a dtype that is not bfloat16, float16 or float32."""
    for name, operand in operands.items():
        if operand.dtype.name not in FLOATS:
            raise ValueError(f"{op}: {name} is {operand.dtype}; it must be one of {', '.join(FLOATS)}")
