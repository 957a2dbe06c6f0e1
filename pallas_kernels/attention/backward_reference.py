"""The order of the adds of attention's backward pass, in plain JAX: the specification, and the CPU implementation."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..common.rounding import exp, mul, pin, round_to
from ..common.tree import tree_sum

_STEP = 16
#: Keys that are looked at together, for the sake of memory. No sum begins or ends with them, so no bit depends on it.
_BLOCK = 128


def attention_backward_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of causal attention of q, out, dout [B, T, N, H] and lse [B, T, N] over k, v [B, T, K, H].

    For query p of a head, with the keys s at positions 0 .. p of its KV head:
      1. `delta = tree_sum(dout * out)` over h, each product rounded to fp32;
      2. the score is the fp32 sum of `q[h] * k[h]` in ascending h from +0.0, times fp32(scale), rounded, as in the
         forward pass; the weight is `exp(score - lse)`;
      3. `dweight` is the fp32 sum of `dout[h] * v[h]` in ascending h from +0.0; `dscore = weight * (dweight - delta)`,
         rounded after each of the two steps. What is behind the query has weight 0 and dscore 0;
      4. weight and dscore are rounded to q's dtype.
    Then, each an fp32 sum from +0.0 that is rounded to q's dtype once:
      * dq of a query: `dscore * k` key by key in ascending position, times fp32(scale), rounded;
      * dv of a key: `weight * dout`, and dk: `dscore * q`, over the query heads of the group in ascending order, and
        for each over its queries in ascending position: one chain for the whole group. dk times fp32(scale), rounded.
    A term of zero changes no sum from +0.0, so neither the length T, if the gradients behind are 0, nor other rows or
    KV heads enter the bits.
    """
    b, t, heads, h = q.shape
    kv_heads = k.shape[2]
    n, group, dtype = b * kv_heads, heads // kv_heads, q.dtype

    def rows(a: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, N, ...] as [n, (head of the group, query) and some that are no query, ...]."""
        a = a.reshape(b, t, kv_heads, group, -1).transpose(0, 2, 3, 1, 4).reshape(n, group * t, -1)
        return jnp.pad(a, ((0, 0), (0, -a.shape[1] % _STEP), (0, 0)), constant_values=fill)

    def blocks(a: jax.Array) -> jax.Array:
        """[B, T, K, H] as [blocks, n, _BLOCK, H]."""
        a = jnp.pad(a.transpose(0, 2, 1, 3).reshape(n, t, h), ((0, 0), (0, -t % _BLOCK), (0, 0)))
        return a.reshape(n, -1, _BLOCK, h).transpose(1, 0, 2, 3)

    delta = tree_sum(mul(dout.astype(jnp.float32), out.astype(jnp.float32)))
    positions = rows(jnp.broadcast_to(jnp.arange(t)[:, None], (b, t, heads)), fill=-1)
    queries, douts, lses, deltas = rows(q), rows(dout), rows(lse), rows(delta)

    def step(dq: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, kb, vb = block
        seen = start + jnp.arange(_BLOCK) <= positions
        scores = mul(
            _add_products(_zeros(n, queries.shape[1], _BLOCK), queries, _swap(kb)), np.float32(scale)
        )
        weights = jnp.where(seen, exp(scores - lses), 0)
        dweights = _add_products(_zeros(*weights.shape), douts, _swap(vb))
        dscores = jnp.where(seen, mul(weights, dweights - deltas), 0)
        weights, dscores = round_to(weights, dtype), round_to(dscores, dtype)
        dv = _add_products(_zeros(n, _BLOCK, h), _swap(weights), douts)
        dk = _add_products(_zeros(n, _BLOCK, h), _swap(dscores), queries)
        return _add_products(dq, dscores, kb), (dk, dv)

    starts = jnp.arange(0, t, _BLOCK)
    dq, (dk, dv) = lax.scan(step, _zeros(*queries.shape), (starts, blocks(k), blocks(v)))
    dq, dk = (round_to(mul(a, np.float32(scale)), dtype) for a in (dq, dk))
    dq = dq[:, : group * t].reshape(b, kv_heads, group, t, h).transpose(0, 3, 1, 2, 4).reshape(q.shape)

    def cached(a: jax.Array) -> jax.Array:
        a = a.transpose(1, 0, 2, 3).reshape(b, kv_heads, -1, h)
        return a[:, :, :t].transpose(0, 2, 1, 3)

    return dq, cached(dk), cached(round_to(dv, dtype))


def _add_products(acc: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """acc [n, r, c] + left [n, r, i] @ right [n, i, c], product by product in ascending i."""
    exact = left.dtype != jnp.float32  # such products are exact in fp32, and so not worth pinning

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        ls = lax.dynamic_slice_in_dim(left, i * _STEP, _STEP, axis=2).astype(jnp.float32)
        rs = lax.dynamic_slice_in_dim(right, i * _STEP, _STEP, axis=1).astype(jnp.float32)
        for j in range(_STEP):
            product = ls[:, :, j, None] * rs[:, j, None, :]
            acc = acc + (product if exact else pin(product))
        return acc

    return lax.fori_loop(0, left.shape[2] // _STEP, step, acc)


def _zeros(*shape: int) -> jax.Array:
    """Behind a barrier, or XLA would drop the add to zero in a loop of one step, and with it the sign of a zero sum."""
    return lax.optimization_barrier(jnp.zeros(shape, jnp.float32))


def _swap(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, 1, 2)
