"""`residual_add`: checks its operands and chooses a backend."""

import jax

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import residual_add_reference


def residual_add(x: jax.Array, y: jax.Array, *, backend: str | None = None) -> jax.Array:
    """x + y, elementwise; where a norm follows, `add_rms_norm` saves a pass.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        y: like x.
        backend: `reference` or `mosaic_gpu`, which has the bits that the reference has on a CPU; None chooses by
            device, dtype and D.

    Returns:
        Like x, rounded once.

    Raises:
        ValueError: shapes or dtypes differ, another dtype, or the backend does not cover them.
    """
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"x {x.shape} {x.dtype} and y {y.shape} {y.dtype} must be alike")
    check_floats("residual_add", x=x)
    takes_kernel = resolve_row_backend("residual_add", backend, x.dtype, kernel_refusal(x)) == "mosaic_gpu"
    if takes_kernel and x.size:
        from .mosaic_gpu import residual_add_mosaic_gpu  # imports the GPU lowering only where it is used

        rows = (-1, x.shape[-1])
        out = residual_add_mosaic_gpu(x.reshape(rows), y.reshape(rows)).reshape(x.shape)
    else:
        out = residual_add_reference(x, y)
    return inference_only(out, "residual_add")


def kernel_refusal(x: jax.Array) -> str | None:
    """Why the Hopper kernel does not take x, or None if it does."""
    if x.ndim and x.shape[-1] % 16 == 0:
        return None
    return f"takes [..., D] with D a multiple of 16, not {x.shape}"
