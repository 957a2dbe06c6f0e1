"""`rms_norm` and `add_rms_norm`: check their operands and choose a backend."""

import math

import jax

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..join_subtrees.api import check_addend
from .reference import add_rms_norm_reference, rms_norm_reference


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, backend: str | None = None) -> jax.Array:
    """RMSNorm over the last axis; a row's bits depend on the row alone.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        scale: [D].
        eps: added to the mean square.
        backend: `reference` or `mosaic_gpu`, which has the bits that the reference has on a CPU; None chooses by
            device, dtype and D.

    Returns:
        [..., D] in x's dtype, rounded once.

    Raises:
        ValueError: the shapes do not fit, another dtype, eps is not positive, or the backend does not cover them.
    """
    _check("rms_norm", x, scale, eps)
    if _takes_kernel("rms_norm", x, scale, backend):
        from .mosaic_gpu import rms_norm_mosaic_gpu  # imports the GPU lowering only where it is used

        out = rms_norm_mosaic_gpu(x.reshape(-1, x.shape[-1]), scale, eps=eps).reshape(x.shape)
    else:
        out = rms_norm_reference(x, scale, eps=eps)
    return inference_only(out, "rms_norm")


def add_rms_norm(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The residual add, and RMSNorm of its sum: one pass over the rows.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        y: like x; or subtrees of a sum, float32 [P, ..., D] as `matmul_subtrees` gives them, which are joined and
            rounded to x's dtype first.
        scale: [D].
        eps: added to the mean square.
        backend: `reference` or `mosaic_gpu`, which has the bits that the reference has on a CPU; None chooses by
            device, dtype and D.

    Returns:
        x + y rounded to x's dtype once, and `rms_norm` of that; the bits of the two ops one after the other.

    Raises:
        ValueError: as `rms_norm`; or x and y are not alike.
    """
    check_addend("add_rms_norm", x, y)
    _check("add_rms_norm", x, scale, eps)
    if _takes_kernel("add_rms_norm", x, scale, backend):
        from .mosaic_gpu import rms_norm_mosaic_gpu

        d = x.shape[-1]
        total, out = rms_norm_mosaic_gpu(
            x.reshape(-1, d), scale, eps=eps, y=y.reshape(*y.shape[: y.ndim - x.ndim], -1, d)
        )
        total, out = total.reshape(x.shape), out.reshape(x.shape)
    else:
        total, out = add_rms_norm_reference(x, y, scale, eps=eps)
    return inference_only(total, "add_rms_norm"), inference_only(out, "add_rms_norm")


def _check(op: str, x: jax.Array, scale: jax.Array, eps: float) -> None:
    if x.ndim < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(f"{op} takes x [..., D] and scale [D], not shapes {x.shape} and {scale.shape}")
    check_floats(op, x=x, scale=scale)
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")


def kernel_refusal(x: jax.Array, scale: jax.Array) -> str | None:
    """Why the Hopper kernel does not take x [..., D] and scale [D], or None if it does."""
    d = x.shape[-1]
    if not d % 16 and 0 < d <= 8192 and scale.dtype == x.dtype:
        return None
    return (
        "takes rows of a multiple of 16 up to 8192 elements and a scale of their dtype, not "
        f"D={d}, {x.dtype} and {scale.dtype}"
    )


def _takes_kernel(op: str, x: jax.Array, scale: jax.Array, backend: str | None) -> bool:
    resolved = resolve_row_backend(op, backend, x.dtype, kernel_refusal(x, scale))
    return resolved == "mosaic_gpu" and math.prod(x.shape) > 0
