"""`rms_norm`: checks its operands and calls the reference."""

import jax

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import rms_norm_reference


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """RMSNorm over the last axis; a row's bits depend on the row alone.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        scale: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype, rounded once.

    Raises:
        ValueError: the shapes do not fit, another dtype, or eps is not positive.
    """
    if x.ndim < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm takes x [..., D] and scale [D], not shapes {x.shape} and {scale.shape}")
    check_floats("rms_norm", x=x, scale=scale)
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    return inference_only(rms_norm_reference(x, scale, eps=eps), "rms_norm")
