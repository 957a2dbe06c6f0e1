"""The order of every add, said a second time in numpy float32, one IEEE operation a statement.

Nothing here calls the product: a reference and its restatement can only agree bit for bit if both do what the
docstrings of the ops promise. XLA on the CPU flushes subnormals; `flush` says where that can be seen.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

F32 = np.float32


def round_to(x: np.ndarray, dtype: Any) -> np.ndarray:
    """One rounding to nearest even; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)


def tree_join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Balanced binary tree by recursion: the left half of the leaves plus the right half."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return tree_join(parts[:half]) + tree_join(parts[half:])


def tree_sum(x: np.ndarray) -> np.ndarray:
    """Element i plus element i + p/2 of the row padded to a power of two p, by recursion."""
    n = x.shape[-1]
    if n == 1:
        return x[..., 0]
    half = 1
    while 2 * half < n:
        half *= 2
    right = np.zeros((*x.shape[:-1], half), F32)
    right[..., : n - half] = x[..., half:]
    return tree_sum(x[..., :half] + right)


def matmul(x: np.ndarray, w: np.ndarray, leaves: int) -> np.ndarray:
    """x [M, K] @ w [K, N] as float32: a scalar chain a leaf in ascending k, then the tree."""
    x, w = x.astype(F32), w.astype(F32)
    size = x.shape[1] // leaves
    sums = []
    for leaf in range(leaves):
        acc = np.zeros((x.shape[0], w.shape[1]), F32)
        for k in range(leaf * size, (leaf + 1) * size):
            acc = acc + x[:, k, None] * w[k]
        sums.append(acc)
    return tree_join(sums)


def exp(x: np.ndarray) -> np.ndarray:
    """Cephes `expf`: two-part reduction by ln 2, then a polynomial by Horner."""
    x = np.clip(x, F32(-104), F32(89))
    n = np.rint(x * F32(1.4426950408889634))
    r = x - n * F32(0.693359375)
    r = r - n * F32(-2.12194440e-4)
    p = np.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F32(c)
    with np.errstate(over="ignore", under="ignore"):
        return flush(np.ldexp(p * r * r + r + F32(1), n.astype(np.int32)))


def log(x: np.ndarray) -> np.ndarray:
    """Cephes `logf` of positive normal numbers."""
    m, e = np.frexp(x)
    small = m < F32(0.70710678118654752440)
    e = np.where(small, e - 1, e).astype(F32)
    z = np.where(small, m + m, m) - F32(1)
    zz = z * z
    p = np.full_like(z, 7.0376836292e-2)
    for c in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * z + F32(c)
    y = p * z * zz
    y = y + e * F32(-2.12194440e-4)
    y = y - zz * F32(0.5)
    return z + y + e * F32(0.693359375)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x [..., D] over its root mean square, in x's dtype."""
    wide = x.astype(F32)
    mean = tree_sum(wide * wide) * F32(1 / x.shape[-1])
    inverse = F32(1) / np.sqrt(mean + F32(eps))
    return round_to(wide * inverse[..., None] * scale.astype(F32), x.dtype)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [..., heads, H] rotated by halves, in x's dtype."""
    first, second = np.split(x.astype(F32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return round_to(np.concatenate([first * cos - second * sin, second * cos + first * sin], -1), x.dtype)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, in gate's dtype."""
    wide = gate.astype(F32)
    silu = flush(wide / (F32(1) + exp(-wide)))
    return round_to(flush(silu * up.astype(F32)), gate.dtype)


def leaf_sums(x: np.ndarray, leaves: int) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of each leaf, and sum of exp(x - maximum) by `tree_sum`: [..., leaves] each."""
    parts = np.split(x, leaves, axis=-1)
    maxima = np.stack([part.max(axis=-1) for part in parts], axis=-1)
    sums = [tree_sum(exp(part - maxima[..., i, None])) for i, part in enumerate(parts)]
    return maxima, np.stack(sums, axis=-1)


def exp_sum(x: np.ndarray, row_max: np.ndarray, leaves: int) -> np.ndarray:
    """Sum of exp(x - row_max): each leaf about its own maximum, rescaled and rounded, leaves by tree."""
    maxima, sums = leaf_sums(x, leaves)
    scaled = flush(sums * exp(maxima - row_max[..., None]))
    return tree_join([scaled[..., i] for i in range(leaves)])


def log_softmax(x: np.ndarray, leaves: int) -> np.ndarray:
    """(x - max) - log(sum of exp(x - max))."""
    row_max = x.max(axis=-1)
    return (x - row_max[..., None]) - log(exp_sum(x, row_max, leaves))[..., None]


Partial = tuple[np.float32, np.float32, np.ndarray]  # maximum, sum of weights, weighted values [H]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    *,
    block: int,
    blocks_per_split: int,
    scale: float,
) -> np.ndarray:
    """Causal attention, query by query: only the keys that a query sees are ever touched."""
    out = np.empty(q.shape, q.dtype)
    group = q.shape[2] // k.shape[2]
    for b, t, head in np.ndindex(q.shape[:3]):
        seen = slice(0, positions[b, t] + 1)
        keys, values = k[b, seen, head // group], v[b, seen, head // group]
        splits = _splits(q[b, t, head], keys, values, block, block * blocks_per_split, F32(scale))
        _, total, weighted = functools.reduce(_merge, splits)
        out[b, t, head] = round_to(weighted / total, q.dtype)
    return out


def _splits(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, block: int, split: int, scale: np.float32
) -> list[Partial]:
    """One chain of online-softmax steps a split."""
    scores = np.zeros(len(k), F32)
    for h in range(len(q)):
        scores = scores + q[h].astype(F32) * k[:, h].astype(F32)
    scores = scores * scale
    partials = []
    for start in range(0, len(k), split):
        state: Partial = (F32(-np.inf), F32(0), np.zeros(len(q), F32))
        for first in range(start, min(start + split, len(k)), block):
            last = min(first + block, start + split, len(k))
            state = _online_step(state, scores[first:last], v[first:last])
        partials.append(state)
    return partials


def _online_step(state: Partial, scores: np.ndarray, v: np.ndarray) -> Partial:
    """Rescales what there is, then adds key by key."""
    maximum = max(state[0], scores.max())
    shrink = F32(0) if state[0] == -np.inf else exp(state[0] - maximum)
    weights = exp(scores - maximum)
    total, values = state[1] * shrink, state[2] * shrink
    for weight, value in zip(weights, v.astype(F32), strict=True):
        total = total + weight
        values = values + weight.astype(v.dtype).astype(F32) * value
    return maximum, total, values


def _merge(left: Partial, right: Partial) -> Partial:
    maximum = max(left[0], right[0])
    a, b = exp(left[0] - maximum), exp(right[0] - maximum)
    return maximum, left[1] * a + right[1] * b, left[2] * a + right[2] * b


def attention_lse(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, block: int, scale: float) -> np.ndarray:
    """Log-sum-exp of each query's scores, float32 [B, T, N], where all keys are one split; query t at position t."""
    lse = np.empty(q.shape[:3], F32)
    group = q.shape[2] // k.shape[2]
    for b, t, head in np.ndindex(q.shape[:3]):
        keys, values = k[b, : t + 1, head // group], v[b, : t + 1, head // group]
        [(maximum, total, _)] = _splits(q[b, t, head], keys, values, block, q.shape[1] + block, F32(scale))
        lse[b, t, head] = maximum + log(total)
    return lse


def attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dout: np.ndarray,
    *,
    scale: float,
    heads_last: bool = False,
) -> tuple[np.ndarray, ...]:
    """Gradients of causal attention, head by head, query by query and key by key; zero terms are left out.

    With `heads_last` the sums over keys' queries take the other order: for each query all heads of the group.
    """
    group, factor = q.shape[2] // k.shape[2], F32(scale)
    dq, dk, dv = (np.zeros(a.shape, F32) for a in (q, k, v))
    turns = [(head, t) for head in range(group) for t in range(q.shape[1])]
    for b, kv_head in np.ndindex(k.shape[0], k.shape[2]):
        for i, t in sorted(turns, key=lambda turn: turn[::-1]) if heads_last else turns:
            row = b, t, kv_head * group + i
            query, gradient = q[row].astype(F32), dout[row].astype(F32)
            delta = tree_sum(gradient * out[row].astype(F32))
            keys, values = (a[b, : t + 1, kv_head].astype(F32) for a in (k, v))
            scores, dweights = np.zeros(t + 1, F32), np.zeros(t + 1, F32)
            for h in range(len(query)):
                scores = scores + query[h] * keys[:, h]
                dweights = dweights + gradient[h] * values[:, h]
            weights = exp(scores * factor - lse[row])
            dscores = flush(weights * (dweights - delta)).astype(q.dtype).astype(F32)
            weights = weights.astype(q.dtype).astype(F32)
            for s in range(t + 1):
                dq[row] += dscores[s] * keys[s]
            dk[b, : t + 1, kv_head] += dscores[:, None] * query
            dv[b, : t + 1, kv_head] += weights[:, None] * gradient
    return round_to(dq * factor, q.dtype), round_to(dk * factor, q.dtype), round_to(dv, q.dtype)
