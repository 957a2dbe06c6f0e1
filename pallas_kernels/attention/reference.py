"""The order of the adds of attention, in plain JAX: the specification, and the CPU implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..common.rounding import div, exp, log, mul, pin, round_to
from .plan import AttentionPlan

_STEP = 16
_NEG_INF = np.float32(-np.inf)


class _Partial(NamedTuple):
    """Softmax over some of the keys: running maximum [n, r], sum of weights [n, r], weighted values [n, r, h].

    n counts (batch row, KV head), r counts (query head of that KV head, query).
    """

    maximum: jax.Array
    total: jax.Array
    values: jax.Array


def attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, plan: AttentionPlan, scale: float
) -> jax.Array:
    """Causal attention of q [B, T, N, H] at `positions` [B, T] over k, v [B, S, K, H], S a multiple of `plan.block`.

    For each query, with the keys at positions 0 .. position:
      1. a score is the fp32 sum of `q[h] * k[h]` in ascending h from +0.0, times fp32(scale), rounded;
      2. a split starts from maximum -inf, total 0, values 0 and takes its blocks in ascending order: the maximum
         becomes the larger of itself and the block's scores; weights are `exp(score - maximum)`, 0 for keys after the
         query; total and values are multiplied by `exp(old maximum - maximum)` and then add the weights, and
         `weight * v` with the weight rounded to v's dtype, key by key in ascending position;
      3. splits are joined in ascending order, ((s0, s1), s2), ...: each side times `exp(its maximum - joint maximum)`;
         a split without keys for the query leaves those before it untouched;
      4. values / total, rounded to q's dtype once.
    Blocks beyond the query's position do nothing, so neither the length of the cache nor other queries enter the bits.
    """
    return attention_with_lse_reference(q, k, v, positions, plan=plan, scale=scale)[0]


def attention_with_lse_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, plan: AttentionPlan, scale: float
) -> tuple[jax.Array, jax.Array]:
    """`attention_reference`, and the log of each query's sum of exp(score), float32 [B, T, N].

    That is `maximum + log(total)` of the joined splits, rounded after each of the two steps.
    """
    b, t, heads, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, group * t, h)
    keys, values = (a.transpose(0, 2, 1, 3).reshape(b * kv_heads, s, h) for a in (k, v))
    at = jnp.broadcast_to(positions[:, None, None], (b, kv_heads, group, t)).reshape(b * kv_heads, group * t)
    needed = jnp.max(positions) // plan.block + 1  # blocks past every query would change nothing
    partials = []
    for first in range(0, s // plan.block, plan.blocks_per_split):
        last = jnp.clip(needed, first, min(first + plan.blocks_per_split, s // plan.block))
        partials.append(_split(rows.astype(jnp.float32), keys, values, at, first, last, plan, scale))
    joint = partials[0]
    for i, partial in enumerate(partials[1:], start=1):
        joint = _merge(joint, partial, i * plan.split <= at)
    out = round_to(div(joint.values, joint.total[..., None]), q.dtype)
    lse = joint.maximum + log(joint.total)
    return (
        out.reshape(b, kv_heads, group, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, h),
        lse.reshape(b, heads, t).transpose(0, 2, 1),
    )


def _split(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    first: int,
    last: jax.Array,
    plan: AttentionPlan,
    scale: float,
) -> _Partial:
    """One chain of online-softmax steps over the blocks first .. last - 1."""

    def step(index: jax.Array, old: _Partial) -> _Partial:
        start = index * plan.block
        kb = lax.dynamic_slice_in_dim(k, start, plan.block, axis=1)
        vb = lax.dynamic_slice_in_dim(v, start, plan.block, axis=1)
        visible = start + jnp.arange(plan.block) <= positions[..., None]  # [n, r, block]
        new = _online_step(old, _scores(q, kb, scale), vb, visible)
        reached = start <= positions
        return _Partial(
            jnp.where(reached, new.maximum, old.maximum),
            jnp.where(reached, new.total, old.total),
            jnp.where(reached[..., None], new.values, old.values),
        )

    row = q.shape[:-1]
    empty = _Partial(jnp.full(row, _NEG_INF), jnp.zeros(row, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    return lax.fori_loop(first, last, step, empty)


def _scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """Scaled scores [n, r, block] of q [n, r, h] and k [n, block, h], ascending h."""

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        qs = lax.dynamic_slice_in_dim(q, i * _STEP, _STEP, axis=2)
        ks = lax.dynamic_slice_in_dim(k, i * _STEP, _STEP, axis=2).astype(jnp.float32)
        for j in range(_STEP):
            acc = acc + _product(qs[:, :, j, None], ks[:, None, :, j], k.dtype)
        return acc

    acc = jnp.zeros((*q.shape[:2], k.shape[1]), jnp.float32)
    return mul(lax.fori_loop(0, q.shape[2] // _STEP, step, acc), np.float32(scale))


def _online_step(old: _Partial, scores: jax.Array, v: jax.Array, visible: jax.Array) -> _Partial:
    """Takes a block of keys into a partial softmax; v [n, block, h]."""
    maximum = jnp.maximum(old.maximum, jnp.max(jnp.where(visible, scores, _NEG_INF), axis=-1))
    weights = jnp.where(visible, exp(scores - maximum[..., None]), 0)
    rounded = round_to(weights, v.dtype).astype(jnp.float32)
    shrink = jnp.where(old.maximum == _NEG_INF, 0, exp(old.maximum - maximum))

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, values = carry
        ps = lax.dynamic_slice_in_dim(weights, i * _STEP, _STEP, axis=2)
        rs = lax.dynamic_slice_in_dim(rounded, i * _STEP, _STEP, axis=2)
        seen = lax.dynamic_slice_in_dim(visible, i * _STEP, _STEP, axis=2)
        vs = lax.dynamic_slice_in_dim(v, i * _STEP, _STEP, axis=1).astype(jnp.float32)
        for j in range(_STEP):
            total = total + ps[:, :, j]
            # a select, not a weight of zero: 0 times infinity in the value of a later token would be NaN
            longer = values + _product(rs[:, :, j, None], vs[:, None, j], v.dtype)
            values = jnp.where(seen[:, :, j, None], longer, values)
        return total, values

    start = mul(old.total, shrink), mul(old.values, shrink[..., None])
    total, values = lax.fori_loop(0, v.shape[1] // _STEP, step, start)
    return _Partial(maximum, total, values)


def _merge(left: _Partial, right: _Partial, reached: jax.Array) -> _Partial:
    """Joins a split, on the right, to those before it where the query reaches it."""
    maximum = jnp.maximum(left.maximum, right.maximum)
    a, b = exp(left.maximum - maximum), exp(right.maximum - maximum)
    total = mul(left.total, a) + mul(right.total, b)
    values = mul(left.values, a[..., None]) + mul(right.values, b[..., None])
    return _Partial(
        jnp.where(reached, maximum, left.maximum),
        jnp.where(reached, total, left.total),
        jnp.where(reached[..., None], values, left.values),
    )


def _product(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """a * b in fp32; exact, and so not worth pinning, where the operands hold bfloat16 or float16 values."""
    return a * b if jnp.dtype(dtype) != jnp.float32 else pin(a * b)
