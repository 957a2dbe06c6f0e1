"""`log_softmax`, and `leaf_statistics`, the part of it that ranks of a sharded vocabulary join by tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..common.backend import resolve_float32_backend
from ..common.gradient import inference_only
from ..common.rounding import log
from .plan import kernel_refusal
from .reference import LeafStatistics, join_totals, leaf_statistics_reference


def leaf_statistics(x: jax.Array, *, leaves: int, backend: str | None = None) -> LeafStatistics:
    """Maximum, sum of exp(x - maximum), index of the maximum and finiteness of each leaf of the last axis.

    A rank that holds V/t of a vocabulary calls it with 8 / t leaves. The ranks' statistics, gathered in rank order, are
    those of the whole vocabulary, for `join_totals`.

    Args:
        x: float32 [..., V].
        leaves: 1, 2, 4 or 8.
        backend: "mosaic_gpu" or "reference", which have the same bits on one device; None takes the kernel on Hopper
            for the leaves that it takes (`kernel_refusal`).

    Returns:
        Arrays [..., leaves].

    Raises:
        ValueError: V does not cut into the leaves, x is not float32, or the named backend does not take them.
    """
    if leaves not in (1, 2, 4, 8) or x.shape[-1] % leaves:
        raise ValueError(
            f"a vocabulary of {x.shape[-1]} cannot be cut into {leaves} equal leaves; use 1, 2, 4 or 8"
        )
    if x.dtype != jnp.float32:
        raise ValueError(f"leaf_statistics takes float32 x [..., V], not {x.dtype} {x.shape}")
    backend = resolve_float32_backend("leaf_statistics", backend, kernel_refusal(x.shape[-1] // leaves))
    if backend == "mosaic_gpu":
        from .mosaic_gpu import leaf_statistics_mosaic_gpu  # imports the GPU lowering only where it is used

        run: Callable[..., Any] = leaf_statistics_mosaic_gpu
    else:
        run = leaf_statistics_reference
    stats = run(x, leaves=leaves)
    total = inference_only(stats.total, "leaf_statistics")
    return stats._replace(maximum=inference_only(stats.maximum, "leaf_statistics"), total=total)


def exp_sum(x: jax.Array, row_max: jax.Array, *, leaves: int, backend: str | None = None) -> jax.Array:
    """Sum of exp(x - row_max): `leaf_statistics`, rescaled to `row_max` and joined in a binary tree (`join_totals`).

    A rank that holds V/t of the vocabulary calls it with 8 / t leaves and adds the ranks with `tree_psum`.

    Args:
        x: float32 [..., V].
        row_max: float32 [...], the maximum over the whole vocabulary.
        leaves: 1, 2, 4 or 8.
        backend: as in `leaf_statistics`.

    Returns:
        float32 [...].

    Raises:
        ValueError: as `leaf_statistics`, or row_max has another shape.
    """
    if row_max.dtype != jnp.float32 or row_max.shape != x.shape[:-1]:
        raise ValueError(
            f"exp_sum takes x [..., V] and float32 row_max [...], not {x.shape} and {row_max.dtype} {row_max.shape}"
        )
    stats = leaf_statistics(x, leaves=leaves, backend=backend)
    return inference_only(join_totals(stats.maximum, stats.total, row_max), "exp_sum")


def log_softmax(x: jax.Array, *, leaves: int = 8, backend: str | None = None) -> jax.Array:
    """Log-softmax over the last axis: `(x - max) - log(exp_sum)`.

    Args:
        x: float32 [..., V], V a multiple of `leaves`.
        leaves: 1, 2, 4 or 8.
        backend: as in `leaf_statistics`.

    Returns:
        float32 [..., V].

    Raises:
        ValueError: as `leaf_statistics`.
    """
    stats = leaf_statistics(x, leaves=leaves, backend=backend)
    row_max = jnp.max(stats.maximum, axis=-1)  # exact in any order
    total = join_totals(stats.maximum, stats.total, row_max)
    return inference_only((x - row_max[..., None]) - log(total)[..., None], "log_softmax")
