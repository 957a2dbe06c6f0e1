"""`dot_product_attention` with the arguments of `jax.nn`'s, in tree order, with gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.attention.backward import attention_backward, attention_with_lse
from ..pallas_kernels.common.dtypes import check_floats
from ..pallas_kernels.tree_matmul.plan import LEAVES
from . import steps
from .contraction import contract
from .softmax import probabilities

_MASKED = np.float32(
    -0.7 * np.finfo(np.float32).max
)  # jax.nn's: a row without keys has equal weights, not NaN


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    leaves: int = LEAVES,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, batch-invariant: the bits of a query depend on its own row of the batch alone.

    There are two orders. Which one it is follows from the arguments and the head, never from the batch:

    * causal attention over whole sequences (`is_causal`, T = S, H a multiple of 16, and neither bias, mask, lengths nor
      window) is `pallas_kernels.attention` and its backward pass, in the order of `docs/numerics.md`: the bits of a
      query do not depend on what follows it either.
    * everything else is `dot_general` over H in fp32, times `fp32(scale)`, plus bias, masks, `softmax` in fp32, weights
      rounded to the dtype, `dot_general` over S, rounded once. Its sums run over all S keys, masked ones with weight 0,
      so their order depends on S: compare calls of one S.

    Args:
        query: [B, T, N, H] or [T, N, H]; bfloat16, float16 or float32.
        key: [B, S, K, H] or [S, K, H] of the same dtype; N is a multiple of K.
        value: like key.
        bias: added to the scaled scores; broadcasts to [B, N, T, S]. A dimension it is broadcast along is summed in its
            gradient, by `tree_sum`.
        mask: bool, broadcasts to [B, N, T, S]; True where the query sees the key.
        scale: of the scores; H**-0.5 by default.
        is_causal: query t sees keys 0 .. t.
        query_seq_lengths: int32 [B]; queries from there on give zeros.
        key_value_seq_lengths: int32 [B]; keys from there on are not seen.
        local_window_size: (left, right), or one number for both: query t sees keys t - left .. t + right.
        leaves: of the contractions of the second order, as in `dot_general`.

    Returns:
        Like query. A query that sees no key gets the mean of all values, as in `jax.nn`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check(query, key, value, mask)
    shape = query.shape
    q, k, v = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = query_seq_lengths, key_value_seq_lengths
    plain = all(x is None for x in (bias, mask, *lengths, local_window_size))
    if plain and is_causal and q.shape[1] == k.shape[1] and not q.shape[3] % 16 and q.size:
        return _causal(scale, q, k, v).reshape(shape)
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    seen = _seen(q.shape[1], k.shape[1], mask, is_causal, lengths, window)
    out = _attend(q, k, v, bias, seen, scale, leaves)
    if query_seq_lengths is not None:
        within = jnp.arange(q.shape[1]) < jnp.asarray(query_seq_lengths)[:, None]
        out = jnp.where(within[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out.reshape(shape)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    seen: jax.Array | None,
    scale: float,
    leaves: int,
) -> jax.Array:
    b, t, heads, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    grouped = q.reshape(b, t, kv_heads, heads // kv_heads, h)
    batch = (0, 2), (0, 2)
    scores = contract(grouped, k, (((4,), (3,)), batch), None, jnp.float32, leaves=leaves)  # [B, K, T, G, S]
    scores = jnp.moveaxis(scores, 3, 2).reshape(b, heads, t, s)
    scores = steps.scale(scores, scale)
    if bias is not None:
        scores = scores + steps.expand(steps.widen(jnp.asarray(bias)), scores.shape)
    if seen is not None:
        scores = jnp.where(seen, scores, _MASKED)
    weights = steps.narrow(probabilities(scores), v.dtype.name)
    weights = weights.reshape(b, kv_heads, heads // kv_heads, t, s)
    out = contract(weights, v, (((4,), (1,)), ((0, 1), (0, 2))), leaves=leaves)  # [B, K, G, T, H]
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, heads, h)


def _seen(
    t: int,
    s: int,
    mask: jax.Array | None,
    is_causal: bool,
    lengths: tuple[jax.Array | None, jax.Array | None],
    window: tuple[int, int] | None,
) -> jax.Array | None:
    """bool, broadcasts to [B, N, T, S]; None where every query sees every key."""
    at, of = jnp.arange(t)[:, None], jnp.arange(s)
    parts = [] if mask is None else [mask]
    if is_causal:
        parts.append(of <= at)
    if window is not None:
        parts.append((at <= of + window[0]) & (at >= of - window[1]))
    for length, index in zip(lengths, (at, of), strict=True):
        if length is not None:
            parts.append(index < jnp.asarray(length)[:, None, None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _causal_fwd(scale, q, k, v)[0]


def _causal_fwd(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # With its log-sum-exp whether or not a gradient is taken, so that both have the same bits on every device.
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    out, lse = attention_with_lse(q, k, v, positions, scale=scale)
    return out, (q, k, v, out, lse)


def _causal_bwd(scale: float, saved: tuple[jax.Array, ...], ct: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = saved
    return attention_backward(q, k, v, out, lse, ct, scale=scale)


_causal.defvjp(_causal_fwd, _causal_bwd)


def _check(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> None:
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    if query.ndim not in (3, 4) or key.ndim != query.ndim or key.shape != value.shape:
        raise ValueError(
            f"dot_product_attention takes [B, T, N, H] and [B, S, K, H], or both without B, not {shapes}"
        )
    if query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"dot_product_attention: {shapes} differ in batch or head size")
    if not math.prod(key.shape) or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"dot_product_attention: query heads must be a multiple of key heads, and keys some: {shapes}"
        )
    check_floats("dot_product_attention", query=query)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"dot_product_attention takes one dtype, not {query.dtype}, {key.dtype} and {value.dtype}; cast them"
        )
    if mask is not None and jnp.asarray(mask).dtype != jnp.bool_:
        raise ValueError(f"dot_product_attention: mask is {jnp.asarray(mask).dtype}; it must be bool")
