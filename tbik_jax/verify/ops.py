"""Every op that a model uses on this device: with the kernel that would be chosen, against what its bits must be.

Three kinds of comparison: with exact arithmetic, on integers, whose sums every order gives alike; with the reference on
a CPU, where the kernel has its bits; and with itself, a row alone against the row in a batch, ranks against the whole.
Inputs of the third kind have exponents so far apart that another order has other bits, and a twin shows it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels import (
    add_rms_norm,
    attention,
    embedding,
    gated_matmul,
    leaf_statistics,
    log_softmax,
    qk_norm_rope,
    residual_add,
    rms_norm,
    rope_tables,
    sample_argmax,
    swiglu_joint,
    tree_join,
    tree_matmul,
)
from ..pallas_kernels.common.backend import device_backend
from ..steps import INVARIANT_OPTIONS
from ..synthetic import random_values
from .checks import Check, differs, same, wide_values

BF16 = jnp.bfloat16
EPS = 1e-6

#: The shapes of Qwen3-8B's o_proj and down_proj, with rows for which other tiles are chosen.
_REAL_PRODUCTS = ((4096, 4096, (1, 16, 128, 1024)), (12288, 4096, (1, 64, 512)))


def op_checks() -> list[Check]:
    """The checks of this device: on a GPU at real widths too, on the CPU at small ones."""
    on_gpu = _on_gpu()
    width = 4096 if on_gpu else 1024
    vocabulary = 151936 if on_gpu else 2048
    checks = [
        Check("tree_matmul exact", "products of integers, against int64", _exact_matmul),
        Check("tree_matmul bfloat16", "rows alone, ranks joined, [N, K]", lambda: _matmul(BF16)),
        Check("tree_matmul float32", "rows alone, ranks joined, [N, K]", lambda: _matmul(jnp.float32)),
        Check("gated_matmul", "one kernel, against matmul and SwiGLU", _gated),
        Check("rms_norm", "with the residual add; against the CPU's reference", lambda: _norms(width)),
        Check("swiglu", "rows alone", lambda: _swiglu(3 * width)),
        Check("qk_norm_rope", "with the cache write; steps against the whole, CPU", _rope),
        Check(
            "attention bfloat16",
            "decode against prefill",
            lambda: _attention(BF16, 128 if on_gpu else 32, 4),
        ),
        Check("log_softmax", "ranks against the whole, the reference", lambda: _log_softmax(vocabulary)),
        Check("sample_argmax", "rows alone, ranks, the reference", lambda: _draws(vocabulary)),
        Check("embedding", "ranks against the whole table", _embedding),
    ]
    if on_gpu:
        checks.append(
            Check(
                "attention float32",
                "decode against prefill",
                lambda: _attention(jnp.float32, 64, 2),
            )
        )
        checks += [
            Check(f"tree_matmul {k} x {n}", f"tiles for {rows} rows", functools.partial(_real, k, n, rows))
            for k, n, rows in _REAL_PRODUCTS
        ]
    return checks


def _compiled(op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`op` as the invariant steps compile it."""
    return jax.jit(functools.partial(op, **options), compiler_options=INVARIANT_OPTIONS)


def _on_gpu() -> bool:
    return device_backend(jax.devices()[0]) != "reference"


def _same_as_on_cpu(found: Any, op: Callable[..., Any], *operands: Any) -> None:
    """Compares a kernel with the reference on a CPU: on a GPU XLA's divisions and roots are not always the nearest.

    Where the op is that reference there is nothing to compare; the bits that are kept take its place.
    """
    if _on_gpu():
        same(found, _on_cpu(op, *operands), "the reference on the CPU")


def _on_cpu(op: Callable[..., Any], *operands: Any) -> Any:
    """What the reference gives on a CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.jit(functools.partial(op, backend="reference"))(*jax.device_put(operands, cpu))


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = BF16) -> jax.Array:
    return jnp.asarray(random_values("x", shape, seed, 1.0), dtype)


def _wide(seed: int, shape: tuple[int, ...], dtype: Any = BF16) -> jax.Array:
    """A spread of 2**-12 .. 2**12 along the last axis, so that sums depend on their order."""
    return jnp.asarray(wide_values(shape, seed), dtype)


# --- products ------------------------------------------------------------------------------------------


def _exact_matmul() -> Any:
    x, w = (np.rint(random_values("x", shape, 0, 3.0)).astype(np.int64) for shape in ((70, 512), (512, 48)))
    product = _compiled(tree_matmul, leaves=8, out_dtype=jnp.float32)(
        jnp.asarray(x, BF16), jnp.asarray(w, BF16)
    )
    same(product, (x @ w).astype(np.float32), "a product of integers against exact arithmetic")
    return product


def _matmul(dtype: Any) -> Any:
    x, w = _wide(1, (130, 512), dtype), _normal(2, (512, 48), dtype)
    product = functools.partial(_compiled, tree_matmul, out_dtype=jnp.float32)
    eight = product(leaves=8)
    whole = eight(x, w)
    for row in (0, 129):
        same(eight(x[row : row + 1], w), whole[row : row + 1], f"row {row} alone")
    same(eight(x[3:67], w), whole[3:67], "rows 3..66 alone")
    same(product(leaves=8, transpose_rhs=True)(x, w.T), whole, "weights stored [N, K]")
    ranks, k, two = 4, 128, product(leaves=2)
    parts = [two(x[:, i * k :][:, :k], w[i * k :][:k]) for i in range(ranks)]
    same(tree_join(parts), whole, f"{ranks} ranks joined")
    differs(product(leaves=1)(x, w), whole, "one leaf in place of eight")
    return whole


def _real(k: int, n: int, rows: tuple[int, ...]) -> Any:
    """One shape of a layer with each number of rows, for which other tiles are chosen."""
    x, w = _wide(3, (max(rows), k)), _normal(4, (n, k))
    product = _compiled(tree_matmul, leaves=8, out_dtype=jnp.float32, transpose_rhs=True)
    whole = product(x, w)
    for count in rows:
        same(product(x[:count], w), whole[:count], f"{count} rows of {max(rows)}")
    return whole[:16]


def _gated() -> Any:
    x, w = _wide(5, (40, 256)), _normal(6, (2 * 96, 256))
    one = _compiled(gated_matmul)(x, w)
    same(
        one,
        _compiled(swiglu_joint)(_compiled(tree_matmul, leaves=1, transpose_rhs=True)(x, w)),
        "its two ops",
    )
    same(_compiled(gated_matmul)(x[7:8], w), one[7:8], "row 7 alone")
    differs(_compiled(gated_matmul)(x, jnp.roll(w, 96, axis=0)), one, "gates and values exchanged")
    return one


# --- rows ----------------------------------------------------------------------------------------------


def _norms(width: int) -> Any:
    x, y, scale = _wide(7, (33, width)), _wide(8, (33, width)), 1 + _normal(9, (width,)) / 5
    fused, norm = _compiled(add_rms_norm, eps=EPS), _compiled(rms_norm, eps=EPS)
    total, normed = fused(x, y, scale)
    same(_compiled(residual_add)(x, y), total, "the residual add alone")
    same(norm(total, scale), normed, "the norm alone")
    same(fused(x[5:6], y[5:6], scale), (total[5:6], normed[5:6]), "row 5 alone")
    _same_as_on_cpu((total, normed), functools.partial(add_rms_norm, eps=EPS), x, y, scale)
    differs(norm(total, jnp.roll(scale, 1)), normed, "another scale")
    return total, normed


def _swiglu(width: int) -> Any:
    gate_up = _normal(10, (33, 2 * width))
    op = _compiled(swiglu_joint)
    whole = op(gate_up)
    same(op(gate_up[8:11]), whole[8:11], "rows 8..10 alone")
    expected = np.asarray(_on_cpu(swiglu_joint, gate_up), np.float32)
    near = np.abs(np.asarray(whole, np.float32) - expected) <= 2.0**-7 * np.abs(expected) + 1e-30
    same(near, np.ones_like(near), "more than an ulp of bfloat16 from the reference on the CPU")
    differs(op(jnp.roll(gate_up, width, axis=1)), whole, "gates and values exchanged")
    return whole


def _rope() -> Any:
    b, t, kv_heads, h, capacity = 2, 5, 4, 64, 32
    qkv, scales = _normal(11, (b, t, kv_heads, 6, h)), [1 + _normal(seed, (h,)) / 5 for seed in (12, 13)]
    tables = [jnp.asarray(table) for table in rope_tables(capacity, h, 1e6)]
    positions = jnp.asarray([[3], [20]], jnp.int32) + jnp.arange(t, dtype=jnp.int32)
    lengths = jnp.asarray([6, 32], jnp.int32)
    caches = [_normal(seed, (b, capacity, kv_heads, h)) for seed in (14, 15)]
    op = _compiled(qk_norm_rope, eps=EPS)
    whole = op(qkv, *scales, *tables, positions, lengths, *caches)
    stepped = caches
    for i in range(t):
        at = (slice(None), slice(i, i + 1))
        q, *stepped = op(qkv[at], *scales, *tables, positions[at], lengths, *stepped)
        same(q, whole[0][at], f"queries of step {i}")
    same(tuple(stepped), whole[1:], "the cache after single steps")
    operands = (qkv, *scales, *tables, positions, lengths, *caches)
    _same_as_on_cpu(whole, functools.partial(qk_norm_rope, eps=EPS), *operands)
    differs(whole[1], caches[0], "the cache of before")
    return whole


def _attention(dtype: Any, h: int, group: int) -> Any:
    length, kv_heads = 600, 2  # two splits
    q = _normal(16, (1, length, kv_heads * group, h), dtype)
    k, v = _normal(17, (1, length, kv_heads, h), dtype), _wide(18, (1, length, kv_heads, h), dtype)
    op = _compiled(attention)

    def at(positions: list[int], count: int) -> jax.Array:
        return jnp.asarray(positions, jnp.int32)[:, None] + jnp.arange(count, dtype=jnp.int32)

    whole = op(q, k, v, at([0], length))
    seams = [0, 127, 128, 511, 512, 599]
    queries = jnp.concatenate([q[:, p : p + 1] for p in seams])
    decode = functools.partial(op, queries, positions=at(seams, 1))
    caches = [jnp.tile(a, (len(seams), 1, 1, 1)) for a in (k, v)]
    same(decode(*caches)[:, 0], jnp.stack([whole[0, p] for p in seams]), "decode")
    if _on_gpu():
        same(op(q[:, 500:533], k, v, at([500], 33)), whole[:, 500:533], "a chunk of 33 queries")
    backwards = [cache[:, ::-1] for cache in caches]  # the last query sees all keys
    differs(decode(*backwards)[-1, 0], whole[0, -1], "keys in another order")
    return whole


# --- the vocabulary --------------------------------------------------------------------------------------


def _log_softmax(vocabulary: int) -> Any:
    x = _normal(19, (6, vocabulary), jnp.float32) * 3
    eight = _compiled(leaf_statistics, leaves=8)
    whole = eight(x)
    if _on_gpu():
        same(whole, _compiled(leaf_statistics, leaves=8, backend="reference")(x), "the reference")
    same(eight(x[2:3]), jax.tree.map(lambda part: part[2:3], whole), "row 2 alone")
    last = _compiled(leaf_statistics, leaves=2)(x[:, -vocabulary // 4 :])
    same(last, jax.tree.map(lambda part: part[:, -2:], whole), "the last of 4 ranks")
    order = np.argsort(random_values("order", (vocabulary // 8,), 0, 1.0))
    mixed = x.reshape(6, 8, -1)[..., order].reshape(x.shape)
    differs(eight(mixed).total, whole.total, "each leaf in another order")
    return whole, _compiled(log_softmax)(x)[:, :64]


def _draws(vocabulary: int) -> Any:
    x = _normal(20, (6, vocabulary), jnp.float32) * 3
    temperature = jnp.asarray([0.6, 1, 1.7, 0.6, 1, 1.7], jnp.float32)
    key = jnp.arange(12, dtype=jnp.uint32).reshape(6, 2)
    rows = (x, x.max(-1), temperature, key, jnp.arange(6, dtype=jnp.int32) * 1000)
    op = _compiled(sample_argmax)
    drawn = op(*rows)
    if _on_gpu():
        reference = _compiled(sample_argmax, backend="reference")(*rows)
        same((drawn.token, drawn.logit), (reference.token, reference.logit), "the reference")
    same(op(*(each[4:5] for each in rows)), jax.tree.map(lambda part: part[4:5], drawn), "row 4 alone")
    half = vocabulary // 2
    parts = [op(x[:, i * half :][:, :half], *rows[1:], offset=i * half) for i in range(2)]
    joined = jnp.where(parts[1].value > parts[0].value, parts[1].token, parts[0].token)
    same(joined, drawn.token, "two ranks")
    differs(op(*rows[:3], key + 1, rows[4]).token, drawn.token, "another seed")
    return drawn


def _embedding() -> Any:
    table, ids = _normal(22, (256, 64)), jnp.asarray([[0, 127, 128, 255]], jnp.int32)
    whole = embedding(ids, table)
    same(whole[0], table[ids[0]], "rows of the table")
    parts = [embedding(ids, table[i * 128 :][:128], offset=i * 128) for i in range(2)]
    same(parts[0] + parts[1], whole, "two ranks, one of which has the row")
    differs(parts[0], whole, "one rank alone")
    return whole
