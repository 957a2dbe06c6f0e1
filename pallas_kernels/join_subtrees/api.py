"""`join_subtrees`: checks its operands and chooses a backend."""

import jax
import jax.numpy as jnp

from ..common.backend import resolve_row_backend
from ..common.gradient import inference_only
from .reference import join_subtrees_reference


def join_subtrees(
    subtrees: jax.Array, dtype: jax.typing.DTypeLike, *, backend: str | None = None
) -> jax.Array:
    """The sum of subtrees, neighbours first, rounded to `dtype` once.

    Args:
        subtrees: float32 [P, ..., D], P a power of two.
        dtype: bfloat16, float16 or float32.
        backend: `reference` or `mosaic_gpu`; None chooses by device, dtype and D.

    Returns:
        [..., D] in `dtype`.

    Raises:
        ValueError: another number of subtrees or dtype, or the backend does not cover them.
    """
    count = subtrees.shape[0] if subtrees.ndim >= 2 else 0
    if subtrees.dtype != jnp.float32 or not count or count & (count - 1):
        raise ValueError(
            f"join_subtrees takes float32 [P, ..., D], P a power of two, not {subtrees.shape} {subtrees.dtype}"
        )
    d = subtrees.shape[-1]
    refusal = None if d >= 128 and d % 16 == 0 else f"takes D from 128 on, a multiple of 16, not {d}"
    if resolve_row_backend("join_subtrees", backend, dtype, refusal) == "mosaic_gpu" and subtrees.size:
        from .mosaic_gpu import join_subtrees_mosaic_gpu  # imports the GPU lowering only where it is used

        rows = subtrees.reshape(count, -1, d)
        out = join_subtrees_mosaic_gpu(rows, dtype).reshape(subtrees.shape[1:])
    else:
        out = join_subtrees_reference(subtrees, dtype)
    return inference_only(out, "join_subtrees")


def check_addend(op: str, x: jax.Array, y: jax.Array) -> None:
    """Raises `ValueError` if y is neither like x nor subtrees of a sum, float32 [P, *x.shape] with P a power of two."""
    if x.shape == y.shape and x.dtype == y.dtype:
        return
    count = y.shape[0] if y.shape[1:] == x.shape and y.dtype == jnp.float32 else 0
    if not count or count & (count - 1):
        raise ValueError(
            f"{op}: x {x.shape} {x.dtype} and y {y.shape} {y.dtype} must be alike, or y subtrees of a sum, float32 "
            f"[P, {', '.join(map(str, x.shape))}] with P a power of two"
        )
