"""`swiglu`: checks its operands and calls the reference."""

import jax

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import swiglu_reference


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise.

    Args:
        gate: [...], bfloat16, float16 or float32.
        up: like gate.

    Returns:
        Like gate, rounded once.

    Raises:
        ValueError: shapes or dtypes differ, or another dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} must be alike")
    check_floats("swiglu", gate=gate)
    return inference_only(swiglu_reference(gate, up), "swiglu")
