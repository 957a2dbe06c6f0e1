"""`attention`: checks its operands, pads the cache to whole blocks and calls the reference."""

import jax
import jax.numpy as jnp

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .plan import AttentionPlan
from .reference import attention_reference

__all__ = ["AttentionPlan", "attention"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> jax.Array:
    """Causal grouped-query attention; a query's bits depend on the query, its position and the keys up to it.

    Not on the number of queries in the call, the other rows, or the length of the cache: prefill, chunked prefill and
    decode give the same bits.

    Args:
        q: [B, T, N, H], bfloat16, float16 or float32.
        k: [B, S, K, H] of the same dtype; the cache, key s at absolute position s. N is a multiple of K. Keys past a
            query's position do not enter, whatever they hold.
        v: like k.
        positions: int32 [B, T], the absolute position of each query, below S.
        scale: multiplies the scores; H**-0.5 by default.
        plan: block and split sizes; the default of `AttentionPlan`.

    Returns:
        [B, T, N, H] in q's dtype, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or positions.shape != q.shape[:2]:
        raise ValueError(
            f"attention takes q [B, T, N, H], k and v [B, S, K, H] and positions [B, T], not shapes "
            f"{q.shape}, {k.shape}, {v.shape} and {positions.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head_dim, or N is no multiple of K")
    if q.shape[3] % 16:
        raise ValueError(f"head_dim={q.shape[3]} must be a multiple of 16")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    check_floats("attention", q=q)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"attention takes integer positions, not {positions.dtype}")
    plan = AttentionPlan() if plan is None else plan
    missing = -k.shape[1] % plan.block
    if missing:  # zeros that no query sees
        k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return inference_only(attention_reference(q, k, v, positions, plan=plan, scale=scale), "attention")
