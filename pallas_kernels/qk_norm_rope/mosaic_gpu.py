"""QK-norm, RoPE and the cache write for Hopper GPUs, in Pallas Mosaic GPU: one launch, in place.

A CTA of one warpgroup takes one token, or one KV head of it where tokens are few. Half a head lies in a few lanes, and
the elements that RoPE turns together in one lane. So RoPE stays in a thread, and the sum of squares halves as
`tree_sum` does: first the two halves of the head, then lanes, then a lane's neighbours. The caches are written in
place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows

_GATHERED_TOKENS = 128  # up to which XLA gathers their rows of the tables


@dataclasses.dataclass(frozen=True)
class _Problem:
    eps: float
    by_kv_head: (
        bool  # heads side by side: the KV heads', each with one query at a time, or one KV head's queries
    )
    interpret: bool
    ctas: int = 1  # of a token, which share its KV heads
    gathered: bool = False  # the tables have a row a token, not a position


def qk_norm_rope_mosaic_gpu(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
    apart: bool | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises and rotates queries and keys on a Hopper GPU, and writes keys and values to the caches.

    The arguments are those of `api.qk_norm_rope`, bfloat16 or float16, H 32, 64, 128 or 256. The returned caches are
    the given ones, written in place where the caller gives them up (donation, a loop's carry); else XLA copies them
    first. A position outside of the cache is not written.

    Args:
        apart: Whether each KV head has a CTA of its own; None for where that is quicker. No bit depends on it.
        interpret: Run on the CPU, slowly.
    """
    b, t, kv_heads, group, h = qkv.shape
    if apart is None:
        apart = heads_apart(b * t, kv_heads, group - 2)
    ctas = kv_heads if apart else 1
    by_kv_head = rows.heads_at_once(kv_heads // ctas, h // 2) >= rows.heads_at_once(group - 2, h // 2)
    gathered = b * t <= _GATHERED_TOKENS
    if gathered:
        # A kernel reads the position first and then the row. This is once a step, for all layers: the same gather.
        at = positions.reshape(-1)
        cos, sin = (jnp.take(table, at, axis=0, mode="clip") for table in (cos, sin))
    problem = _Problem(eps, by_kv_head, interpret, ctas, gathered)
    return _run(qkv, q_scale, k_scale, cos, sin, positions, lengths, k_cache, v_cache, problem)


def heads_apart(tokens: int, kv_heads: int, queries: int) -> bool:
    """Whether a CTA for each KV head is quicker than one a token.

    On an H200 it is with 8 KV heads of 2, 4 and 8 queries for up to 8, 32 and 128 tokens, and with four times as many
    it is not (`benchmarks/results/qk_norm_rope_ctas_h200.json`): more CTAs share the work, and each has its latencies.
    """
    return tokens * kv_heads <= 16 * queries**2


@functools.partial(jax.jit, static_argnums=(9,))
def _run(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    problem: _Problem,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, t, kv_heads, group, h = qkv.shape
    mesh = plgpu.Mesh(
        grid=(problem.ctas, b * t), grid_names=("heads", "token"), num_threads=1, thread_name="wg"
    )
    kernel = pl.kernel(
        functools.partial(_kernel, problem),
        out_type=[jax.ShapeDtypeStruct((b, t, kv_heads, group - 2, h), qkv.dtype)],
        mesh=mesh,
        name="qk_norm_rope",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True
        ),  # no thread reads what another writes
        interpret=rows.interpreted(problem.interpret) or False,
    )
    k_cache, v_cache = _apart(k_cache, v_cache)
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    [q] = kernel(qkv, q_scale, k_scale, cos, sin, positions, lengths, k_ref, v_ref)
    k_cache, v_cache = _apart(jax.freeze(k_ref), jax.freeze(v_ref))
    return q.reshape(b, t, kv_heads * (group - 2), h), k_cache, v_cache


def _apart(k_cache: jax.Array, v_cache: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The caches, where XLA can fuse no slice of something larger into the kernel.

    In a loop over layers or ranks a cache is a slice of a stack, and goes back into another one. XLA's dynamic slice
    fusion hands a kernel the places in both stacks, and forgets that they must be one: what the kernel writes to the
    first is then missing in the second. The barrier moves nothing.
    """
    k_cache, v_cache = lax.optimization_barrier((k_cache, v_cache))
    return k_cache, v_cache


def _kernel(
    problem: _Problem,
    qkv_ref: rows.Ref,
    q_scale_ref: rows.Ref,
    k_scale_ref: rows.Ref,
    cos_ref: rows.Ref,
    sin_ref: rows.Ref,
    positions_ref: rows.Ref,
    lengths_ref: rows.Ref,
    k_ref: rows.Ref,
    v_ref: rows.Ref,
    q_ref: rows.Ref,
) -> None:
    _, t, kv_heads, group, h = qkv_ref.shape
    queries, kv_heads = group - 2, kv_heads // problem.ctas
    token, mine = lax.axis_index("token"), pl.ds(lax.axis_index("heads") * kv_heads, kv_heads)
    b, i = lax.div(token, jnp.int32(t)), lax.rem(token, jnp.int32(t))
    qkv_ref, q_ref = qkv_ref.at[b, i, mine], q_ref.at[b, i, mine]

    q_heads: list[Any]
    if problem.by_kv_head:  # of all KV heads, one query after the other
        q_heads = [(slice(None), j) for j in range(queries)]
    else:
        q_heads = [(k, slice(0, queries)) for k in range(kv_heads)]
    q_layout = _layout(kv_heads if problem.by_kv_head else queries, h)
    kv_layout = _layout(kv_heads, h)
    load_kv = functools.partial(_load, layout=kv_layout)
    key = load_kv(qkv_ref.at[:, queries])
    value = load_kv(qkv_ref.at[:, queries + 1])
    loaded = [_load(qkv_ref.at[at], layout=q_layout) for at in q_heads]

    position, length = positions_ref[b, i], lengths_ref[b]
    row = token if problem.gathered else jnp.clip(position, 0, cos_ref.shape[0] - 1)

    def rotate(x: list[jax.Array], scale_ref: rows.Ref, layout: Any) -> list[jax.Array]:
        vectors = [
            _load_vector(ref, start, x[0].shape, layout)
            for ref, start in (
                (scale_ref, 0),
                (scale_ref, h // 2),
                (cos_ref.at[row], 0),
                (sin_ref.at[row], 0),
            )
        ]
        return _norm_rope(x, vectors, layout, problem)

    key = rotate(key, k_scale_ref, kv_layout)
    for at, query in zip(q_heads, loaded, strict=True):
        _store(q_ref.at[at], rotate(query, q_scale_ref, q_layout))

    live = position < length

    @pl.when(live & (position >= 0) & (position < k_ref.shape[1]))
    def write() -> None:
        _store(k_ref.at[b, position, mine], key)
        _store(v_ref.at[b, position, mine], value)

    @pl.when(jnp.logical_not(live) & (position >= 0) & (position < k_ref.shape[1]))
    def write_zeros() -> None:
        zeros = [plgpu.layout_cast(jnp.zeros_like(half), kv_layout) for half in value]
        _store(k_ref.at[b, position, mine], zeros)
        _store(v_ref.at[b, position, mine], zeros)


def _layout(heads: int, h: int) -> Any:
    return rows.head_layout(rows.heads_at_once(heads, h // 2), h // 2)


def _load(ref: rows.Ref, layout: Any) -> list[jax.Array]:
    """The two halves of heads [n, H]."""
    half = ref.shape[1] // 2
    return [plgpu.load(ref.at[:, pl.ds(start, half)], layout=layout, optimized=False) for start in (0, half)]


def _store(ref: rows.Ref, halves: list[jax.Array]) -> None:
    half = ref.shape[1] // 2
    for start, x in zip((0, half), halves, strict=True):
        ref.at[:, pl.ds(start, half)][...] = x


def _load_vector(ref: rows.Ref, start: int, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Elements start .. of a row in float32, for each of the heads."""
    x = plgpu.load(ref.at[pl.ds(start, shape[1])], layout=layout.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(x.astype(jnp.float32), shape, (1,)), layout)


def _norm_rope(
    x: list[jax.Array], vectors: list[jax.Array], layout: Any, problem: _Problem
) -> list[jax.Array]:
    """The steps of `rms_norm_reference` and `rope_reference`; `vectors` are the scale's halves, cos and sin."""
    *scales, cos, sin = vectors
    dtype, interpret = x[0].dtype, problem.interpret
    wide = [half.astype(jnp.float32) for half in x]
    inverse = rows.inverse_rms_of_heads(wide[0], wide[1], layout, eps=problem.eps, interpret=interpret)
    first, second = (
        (half * inverse * scale).astype(dtype).astype(jnp.float32)
        for half, scale in zip(wide, scales, strict=True)
    )
    multiply = functools.partial(rows.multiply, layout=layout, interpret=interpret)
    return [
        (multiply(first, cos) - multiply(second, sin)).astype(dtype),
        (multiply(second, cos) + multiply(first, sin)).astype(dtype),
    ]
