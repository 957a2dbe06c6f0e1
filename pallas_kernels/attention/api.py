"""`attention`: checks its operands, pads the cache where a backend needs it and calls the backend."""

import jax
import jax.numpy as jnp

from ..common.backend import resolve_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .plan import AttentionPlan
from .reference import attention_reference

__all__ = ["AttentionPlan", "attention", "attention_backend"]

_KERNEL_HEAD_DIMS = (64, 128)
_KERNEL_GROUP = 64  # most query heads a KV head


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Causal grouped-query attention; a query's bits depend on the query, its position and the keys up to it.

    Not on the number of queries in the call, the other rows, or the length of the cache: prefill, chunked prefill and
    decode give the same bits.

    Args:
        q: [B, T, N, H], bfloat16, float16 or float32.
        k: [B, S, K, H] of the same dtype; the cache, key s at absolute position s. N is a multiple of K. Keys past a
            query's position do not enter, whatever they hold.
        v: like k. Values past a query's position do not enter either; on `mosaic_gpu` they must be finite, since the
            tensor cores multiply them by a weight of 0.
        positions: int32 [B, T], the absolute position of each query, below S. Consecutive within a row:
            positions[b, t] = positions[b, 0] + t. `mosaic_gpu` looks at positions[b, 0] alone.
        scale: multiplies the scores; H**-0.5 by default. Positive on `mosaic_gpu`.
        plan: block and split sizes; the default of `AttentionPlan`. `mosaic_gpu` has blocks of 128 keys.
        backend: "reference" or "mosaic_gpu" (Hopper; bfloat16 and float16, H 64 or 128). None chooses by device, dtype,
            H and N / K, so that all calls of a model have one backend.

    Returns:
        [B, T, N, H] in q's dtype, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run here or does not cover them.
    """
    check_attention(q, k, v, positions)
    plan = AttentionPlan() if plan is None else plan
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if backend is None:
        chosen = resolve_backend(None, q.dtype)
        backend = attention_backend(chosen, head_dim=q.shape[3], group=q.shape[2] // k.shape[2])
    if resolve_backend(backend, q.dtype) == "triton":
        raise ValueError("attention has no backend 'triton'; use 'reference', or None to choose")
    if backend == "mosaic_gpu":
        from .mosaic_gpu import attention_mosaic_gpu  # imports the GPU lowering only where it is used

        k, v = pad_cache(k, v, max(plan.block - k.shape[1], -k.shape[1] % 8))
        out = attention_mosaic_gpu(q, k, v, positions, plan=plan, scale=scale)
    else:
        k, v = pad_cache(k, v, -k.shape[1] % plan.block)
        out = attention_reference(q, k, v, positions, plan=plan, scale=scale)
    return inference_only(out, "attention")


def attention_backend(backend: str, *, head_dim: int, group: int) -> str:
    """The backend of `attention` in a model that runs on `backend`: the kernel where it covers the heads.

    Args:
        backend: of the model, "reference", "mosaic_gpu" or "triton".
        head_dim: H.
        group: query heads a KV head.
    """
    covered = backend == "mosaic_gpu" and head_dim in _KERNEL_HEAD_DIMS and group <= _KERNEL_GROUP
    return "mosaic_gpu" if covered else "reference"


def pad_cache(k: jax.Array, v: jax.Array, missing: int) -> tuple[jax.Array, jax.Array]:
    """Appends `missing` zeros that no query sees."""
    if missing <= 0:
        return k, v
    k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (k, v))
    return k, v


def check_attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or positions.shape != q.shape[:2]:
        raise ValueError(
            f"attention takes q [B, T, N, H], k and v [B, S, K, H] and positions [B, T], not shapes "
            f"{q.shape}, {k.shape}, {v.shape} and {positions.shape}"
        )
    if not (q.size and k.size):
        raise ValueError(f"attention takes at least one of everything, not q {q.shape} and k {k.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head_dim, or N is no multiple of K")
    if q.shape[3] % 16:
        raise ValueError(f"head_dim={q.shape[3]} must be a multiple of 16")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    check_floats("attention", q=q)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"attention takes integer positions, not {positions.dtype}")
