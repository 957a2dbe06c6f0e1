"""What the tests of the backward passes share: the orders said a second time in numpy, and the cut of tokens."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests import orders
from tests.helpers import assert_same_bits, normal

F32 = np.float32


def token_leaf_sums(x: np.ndarray, leaves: int) -> np.ndarray:
    """Sums over the tokens (first axis) of each of `leaves` runs, in the order of `tree_sum`."""
    return np.stack([orders.tree_sum(np.moveaxis(part, 0, -1)) for part in np.split(x, leaves)])


def rms_norm_rows(x: np.ndarray, scale: np.ndarray, dy: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """Each row's dx and share of dscale, in float32."""
    x, dy = x.astype(F32), dy.astype(F32)
    one_over_d = F32(1 / x.shape[-1])
    inverse = (F32(1) / np.sqrt(orders.tree_sum(x * x) * one_over_d + F32(eps)))[..., None]
    n = x * inverse
    g = dy * scale.astype(F32)
    mean = (orders.tree_sum(g * n) * one_over_d)[..., None]
    return (g - n * mean) * inverse, dy * n


def rms_norm(
    x: np.ndarray, scale: np.ndarray, dy: np.ndarray, residual: np.ndarray | None, eps: float, leaves: int
) -> tuple[np.ndarray, ...]:
    """dx in x's dtype and dscale of each leaf."""
    dx, share = rms_norm_rows(x, scale, dy, eps)
    dx = dx if residual is None else dx + residual.astype(F32)
    return orders.round_to(dx, x.dtype), token_leaf_sums(share.reshape(-1, x.shape[-1]), leaves)


def rope(dy: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """dy [..., heads, H] rotated back, in float32."""
    first, second = np.split(dy.astype(F32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], -1)


def qk_norm_rope(
    qkv: np.ndarray,
    q_scale: np.ndarray,
    k_scale: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    eps: float,
    leaves: int,
) -> tuple[np.ndarray, ...]:
    """dqkv in qkv's dtype, and the gradients of the scales of each leaf and KV head."""
    b, t, kv_heads, group, h = qkv.shape
    cos, sin = cos[positions], sin[positions]
    dqkv = np.empty(qkv.shape, F32)
    share = np.empty((b, t, kv_heads, group - 1, h), F32)
    for head in range(group - 1):  # the queries, then the key
        scale, dy = (q_scale, dq[:, :, head :: group - 2]) if head < group - 2 else (k_scale, dk)
        dx, share[..., head, :] = rms_norm_rows(qkv[..., head, :], scale, rope(dy, cos, sin), eps)
        dqkv[..., head, :] = dx
    dqkv[..., -1, :] = dv.astype(F32)
    of_queries = orders.tree_sum(np.moveaxis(share[..., :-1, :], 3, -1))
    sums = [token_leaf_sums(x.reshape(b * t, kv_heads, h), leaves) for x in (of_queries, share[..., -1, :])]
    return orders.round_to(dqkv, qkv.dtype), *sums


def swiglu(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dgate and dup in gate's dtype."""
    g, u, c = (x.astype(F32) for x in (gate, up, dy))
    t = orders.exp(-np.abs(g))
    near, far = F32(1) / (F32(1) + t), orders.flush(t / (F32(1) + t))
    sigmoid, complement = np.where(g < 0, far, near), np.where(g < 0, near, far)
    slope = orders.flush(sigmoid * (F32(1) + orders.flush(g * complement)))
    dgate = orders.flush(orders.flush(c * u) * slope)
    dup = orders.flush(c * orders.flush(g * sigmoid))
    return orders.round_to(dgate, gate.dtype), orders.round_to(dup, gate.dtype)


def token_logprob(
    logits: np.ndarray,
    targets: np.ndarray,
    row_max: np.ndarray,
    log_total: np.ndarray,
    ct: np.ndarray,
    dtype: Any,
) -> np.ndarray:
    """ct * (one-hot - softmax) in `dtype`."""
    p = orders.exp((logits - row_max[..., None]) - log_total[..., None])
    hot = (np.arange(logits.shape[-1]) == targets[..., None]).astype(F32)
    return orders.round_to(orders.flush(ct[..., None] * (hot - p)), dtype)


def embedding(ids: np.ndarray, dy: np.ndarray, vocabulary: int, leaves: int) -> np.ndarray:
    """Token by token into the row of its id, leaf by leaf; the leaves by the tree."""
    sums = []
    for some_ids, some_dy in zip(np.split(ids, leaves), np.split(dy.astype(F32), leaves), strict=True):
        table = np.zeros((vocabulary, dy.shape[-1]), F32)
        for token, row in zip(some_ids, some_dy, strict=True):
            table[token] = table[token] + row
        sums.append(table)
    return orders.tree_join(sums)


def assert_leaves_stand_alone(op: Callable[..., Any], tokens: tuple[np.ndarray, ...]) -> np.ndarray:
    """`op(*tokens, leaves=n)` gives a leaf the same bits in one call of 8 leaves, 2 of 4, 4 of 2 and 8 of 1.

    Args:
        op: returns the sums of its leaves [leaves, ...].
        tokens: arrays whose first axis is cut.

    Returns:
        The eight sums.
    """
    whole = np.asarray(op(*tokens, leaves=8))
    for calls in (2, 4, 8):
        cut = zip(*(np.split(x, calls) for x in tokens), strict=True)
        assert_same_bits(np.concatenate([np.asarray(op(*part, leaves=8 // calls)) for part in cut]), whole)
    return whole


def wide_tokens(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = F32) -> np.ndarray:
    """Tokens (first axis) with a spread of 2**-12 .. 2**12, the odd ones nearly the negative of the one before."""
    x = normal(rng, shape) * (2.0 ** rng.uniform(-12, 12, (shape[0], *[1] * (len(shape) - 1))))
    pairs = x[: shape[0] // 2 * 2]
    pairs[1::2] = -pairs[::2] + normal(rng, pairs[::2].shape) * 2.0**-8
    return x.astype(dtype)


def in_float64(function: Callable[..., Any], operands: tuple[np.ndarray, ...], cotangents: Any) -> Any:
    """The gradient of plain JAX `function` in float64 with respect to all operands, as numpy arrays."""
    with jax.enable_x64(True):
        _, pull = jax.vjp(function, *(np.asarray(x, np.float64) for x in operands))
        return jax.tree.map(np.asarray, pull(jax.tree.map(lambda c: np.asarray(c, np.float64), cotangents)))
