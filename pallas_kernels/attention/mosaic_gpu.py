"""Causal attention for Hopper GPUs, in Pallas Mosaic GPU: prefill, chunks of it and decode with one set of bits.

A consumer warpgroup owns 64 rows, each a query of one head. It walks blocks of keys: scores by wgmma, softmax step in
registers, values by a wgmma whose left operand, the weights, never leaves the registers. The scores of the next block
are multiplied beside the values of this one. A split of the keys has an accumulator of its own, and splits are joined
in ascending order (`_merge`).

* "tiles" (prefill): two consumers a CTA with 64 queries of one head each. They walk all keys and join the splits as
  they come; the joined ones wait in shared memory.
* "split" (decode, short chunks): one consumer, whose rows are the queries and the heads of one KV head. `parts` CTAs
  take every parts-th split and leave it in global memory. Then, if they are a cluster, each joins all splits of some
  of the rows, else a second launch does. One part alone joins them in shared memory like "tiles".

A row's bits do not depend on its place among the 64, nor on the rows beside it, and blocks and splits that a row does
not see change nothing in it: so both variants, every tile and every number of CTAs give a query the same bits. What is
multiplied, rounded and added in which order stands once, in `_softmax_step`, `_rescale`, `_merge` and `_normalise`.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from .config import COLUMNS, ROWS, AttentionConfig, AttentionShape, choose_config
from .plan import AttentionPlan

__all__ = ["attention_mosaic_gpu"]

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel

_PRODUCER_REGISTERS = 24
_WIDTH = 64  # columns of 16 bits that are as wide as the swizzle
_LANES = 8  # partial sums of a row's weights: key j of a block goes to lane j % 8
_BATCH = 16  # splits at most that are loaded at a time where CTAs join what others left
_NEG_INF = float("-inf")


def attention_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    plan: AttentionPlan,
    scale: float,
    config: AttentionConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention on a Hopper GPU.

    Args:
        q: [B, T, N, H], bfloat16 or float16; H is 64 or 128.
        k: [B, S, K, H] of the same type, key s at absolute position s; N is a multiple of K, at most 64 times K. S is
            at least `plan.block` and a multiple of 8.
        v: like k. Values past a query's position may hold anything finite.
        positions: integers [B, T], the absolute position of each query, below S. Only positions[b, 0] is read: the
            others follow one by one.
        plan: blocks of 128 keys; any number of them a split.
        scale: multiplies the scores; positive.
        config: The variant; `choose_config`'s by default.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly. Shows order and synchronisation, not
            the bits of a GPU.

    Returns:
        [B, T, N, H] in q's dtype.

    Raises:
        ValueError: If a shape, a type, `scale`, `plan`, `config` or the device is not covered.
    """
    shape = _check_operands(q, k, v, positions, plan, scale)
    config = config or choose_config(shape, pl.cdiv(shape.s, plan.split))
    if config.variant == "split" and shape.t * shape.group > ROWS:
        raise ValueError(
            f"variant='split' takes up to {ROWS} rows, not T={shape.t} times N/K={shape.group}; use 'tiles'"
        )
    if config.variant == "columns" and shape.t * shape.group > COLUMNS:
        raise ValueError(
            f"variant='columns' takes up to {COLUMNS} rows, not T={shape.t} times N/K={shape.group}; use 'split'"
        )
    if not interpret:
        _check_device()
    problem = _Problem(shape=shape, dtype=q.dtype, plan=plan, scale=scale, config=config, interpret=interpret)
    from .columns import run_columns

    run = {"tiles": _run_tiles, "split": _run_split, "columns": run_columns}[config.variant]
    return run(q, k, v, positions.astype(jnp.int32), problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """One call: its sizes and types, its order, its variant, and what follows from them."""

    shape: AttentionShape
    dtype: Any
    plan: AttentionPlan
    scale: float
    config: AttentionConfig
    interpret: bool

    @property
    def factor(self) -> float:
        """Turns scores into exponents of two."""
        return self.scale * math.log2(math.e)

    @property
    def product(self) -> "_Product":
        return _Product(self.interpret)

    @property
    def rows(self) -> int:
        """Rows of a KV head in the "split" variant: (query, head) pairs."""
        return self.shape.t * self.shape.group

    @property
    def stored_rows(self) -> int:
        """Rows that are copied for them, in eights, as the tiles in shared memory are."""
        return pl.cdiv(self.rows, 8) * 8

    @property
    def splits(self) -> int:
        return pl.cdiv(self.shape.s, self.plan.split)

    @property
    def joined_rows(self) -> int:
        """Rows that a CTA joins at a time: 128 numbers, or twice as many where it has them, to wait half as often."""
        least = 128 // self.shape.h
        joiners = self.config.parts if self.config.in_cluster else pl.cdiv(self.rows, least)
        return 2 * least if self.rows > least * joiners else least

    @property
    def tile_pairs(self) -> int:
        """CTAs of a KV head in the "tiles" variant; each takes two (tile of queries, head of the group) pairs."""
        return pl.cdiv(pl.cdiv(self.shape.t, ROWS) * self.shape.group, 2)

    def operand(self, *shape: int) -> Any:
        """Shared memory that wgmma multiplies."""
        return plgpu.SMEM(shape, self.dtype, transforms=_tiled(self.dtype.itemsize))

    @property
    def parts(self) -> int:
        """Parts of a head that are as wide as the swizzle."""
        return self.shape.h // _WIDTH

    def queries(self, *shape: int) -> Any:
        """Shared memory [*shape, parts, ROWS, _WIDTH] for queries, and for the output.

        To have TMA fill tiled memory Pallas tiles the array in global memory as well, and refuses one that does not
        divide into tiles of 8 rows, though TMA clips anywhere. But in a buffer as wide as the swizzle every byte has
        the same place tiled and untiled. So it gets two names, the tiled one for the warpgroups and a plain one for
        TMA, which then takes any number of rows. The interpreter ignores layouts, and would keep two names in two
        buffers; there one name serves both.
        """
        whole, transforms = (*shape, self.parts, ROWS, _WIDTH), _tiled(self.dtype.itemsize)
        tiled = plgpu.SMEM(whole, self.dtype, transforms=transforms)
        if self.interpret:
            return tiled
        return plgpu.RefUnion(tiled, plgpu.SMEM(whole, self.dtype, transforms=transforms[1:]))

    def names(self, ref: _Ref) -> tuple[_Ref, _Ref]:
        """The warpgroups' and TMA's name of such memory."""
        return (ref, ref) if self.interpret else (ref[0], ref[1])

    def sums(self, *shape: int) -> Any:
        """Shared memory for fp32 rows [..., ROWS, H]."""
        return plgpu.SMEM(shape, jnp.float32, transforms=_tiled(4))

    def rings(self, consumers: int) -> dict[str, Any]:
        """Shared memory and barriers of the streams of keys and values."""
        tile = self.plan.block, self.shape.h
        keys, values = self.config.stages, self.config.value_stages
        stand_ins = {}  # see _with_accumulator
        if self.interpret:
            stand_ins["scores_acc"] = plgpu.SMEM((consumers, ROWS, self.plan.block), jnp.float32)
            stand_ins["values_acc"] = plgpu.SMEM((consumers, ROWS, self.shape.h), jnp.float32)
        return stand_ins | {
            "k": self.operand(keys, *tile),
            "v": self.operand(values, *tile),
            "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=keys),
            "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=values),
            "k_empty": plgpu.Barrier(num_arrivals=consumers, num_barriers=keys),
            "v_empty": plgpu.Barrier(num_arrivals=consumers, num_barriers=values),
        }

    def key_slot(self, index: jax.Array) -> jax.Array:
        """Where the ring of keys has its index-th block."""
        return lax.rem(index, jnp.int32(self.config.stages))

    def value_slot(self, index: jax.Array) -> jax.Array:
        """Where the ring of values has its index-th block."""
        return lax.rem(index, jnp.int32(self.config.value_stages))

    def kernel(self, body: Callable[..., None], name: str, **kwargs: Any) -> Callable[..., Any]:
        # Where memory passes from one thread or proxy to another, the kernel says so itself.
        params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
        interpret = plgpu.InterpretGPUParams(inline_mgpu="ignore") if self.interpret else None
        return plgpu.kernel(
            functools.partial(body, self),
            thread_name="wg",
            kernel_name=f"attention_{name}",
            compiler_params=params,
            interpret=interpret,
            **kwargs,
        )


# --- the arithmetic: everything that is rounded, apart from the two matrix products -------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["maximum", "lanes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Softmax:
    """A split so far: maximum [rows] of its exponents and the sum of its weights in lanes [rows, _LANES]."""

    maximum: jax.Array
    lanes: jax.Array

    @staticmethod
    def empty() -> "_Softmax":
        maximum = plgpu.layout_cast(jnp.full((ROWS,), _NEG_INF, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        lanes = plgpu.layout_cast(jnp.zeros((ROWS, _LANES), jnp.float32), plgpu.Layout.WGMMA)
        return _Softmax(maximum, lanes)

    @property
    def total(self) -> jax.Array:
        return jnp.sum(self.lanes, axis=1)


def _softmax_step(
    old: _Softmax, scores: jax.Array, factor: float, product: "_Product"
) -> tuple[_Softmax, jax.Array, jax.Array]:
    """Takes a block's scores [rows, block]; returns the weights as well, and what scales the old values [rows].

    A row without a visible key in the block keeps its bits: weights 0, scale 1 (or 0 on values that are 0).
    """
    maximum = jnp.maximum(old.maximum, jnp.max(scores, axis=1) * factor)
    finite = jnp.where(maximum == _NEG_INF, 0.0, maximum)  # no -inf - -inf where a row has seen no key yet
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(finite, scores.shape, [0]))
    shrink = jnp.exp2(old.maximum - finite)
    added = weights[:, :_LANES]
    for i in range(_LANES, weights.shape[1], _LANES):
        added = added + weights[:, i : i + _LANES]
    lanes = product(old.lanes, lax.broadcast_in_dim(shrink, old.lanes.shape, [0])) + added
    return _Softmax(maximum, lanes), weights, shrink


def _rescale(values: jax.Array, shrink: jax.Array, axis: int = 0) -> jax.Array:
    return values * lax.broadcast_in_dim(shrink, values.shape, [axis])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["maximum", "total"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Partial:
    """Splits that were joined, or one split: maximum and sum of weights, both [rows]. The values go beside it."""

    maximum: jax.Array
    total: jax.Array


def _merge(
    left: _Partial,
    right: _Partial,
    left_values: jax.Array,
    right_values: jax.Array,
    product: "_Product",
    axis: int = 0,
) -> tuple[_Partial, jax.Array]:
    """Joins a split, on the right, to those before it. A side without keys leaves the other one's bits as they are.

    `axis` of the values counts the rows that have a maximum and a total each.
    """
    maximum = jnp.maximum(left.maximum, right.maximum)
    a, b = jnp.exp2(left.maximum - maximum), jnp.exp2(right.maximum - maximum)

    def join(x: jax.Array, y: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return product(x, a) + product(y, b)

    wide_a, wide_b = a, b
    if left_values.ndim > a.ndim:
        wide_a, wide_b = (lax.broadcast_in_dim(x, left_values.shape, [axis]) for x in (a, b))
    total = join(left.total, right.total, a, b)
    return _Partial(maximum, total), join(left_values, right_values, wide_a, wide_b)


def _normalise(partial: _Partial, values: jax.Array, dtype: Any, axis: int = 0) -> jax.Array:
    inverse = 1.0 / partial.total
    if values.ndim > inverse.ndim:
        inverse = lax.broadcast_in_dim(inverse, values.shape, [axis])
    # A split that a row does not see can turn its -0.0 into +0.0; the add leaves no -0.0 to any variant.
    return ((values + 0.0) * inverse).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Products of fp32 arrays, each rounded by itself.

    LLVM and ptxas both contract `a * b + c * d` to a fused multiply-add, of either product, unless a multiplication
    says its rounding. The interpreter has no such instruction and no such compilers.
    """

    interpret: bool
    matrix: Any = plgpu.Layout.WGMMA
    vector: Any = plgpu.Layout.WGMMA.reduce(1)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if self.interpret:
            return lax.optimization_barrier(a * b)
        layout = self.matrix if a.ndim == 2 else self.vector
        result = plgpu.ShapeDtypeStruct(a.shape, jnp.float32, layout=layout)

        @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=result)
        def multiply(_: Any, x: Any, y: Any) -> Any:
            return x._pointwise(x._lift_fast_instr("mul.rn.f32"), y)

        return multiply(a, b)


def _choose(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """a or b, whole; the Mosaic lowering does not broadcast a scalar condition itself."""
    return jnp.where(lax.broadcast_in_dim(condition, a.shape, ()), a, b)


# --- a consumer's walk over the keys --------------------------------------------------------------------------------


def _walk(
    problem: _Problem,
    smem: types.SimpleNamespace,
    q_smem: _Ref,
    positions: jax.Array,
    count: jax.Array,
    block_at: Callable[[jax.Array], jax.Array],
    first_masked: jax.Array,
    end_split: Callable[[jax.Array, _Softmax, jax.Array, _Partial], _Partial],
) -> _Partial:
    """Walks `count` >= 1 blocks of keys, the i-th of them at block_at(i), for the queries in q_smem [ROWS, H].

    `positions` [ROWS] are those of the rows; blocks from `first_masked` on hold keys that some row does not see.
    After each split, end_split(index of its last block, its softmax, its values, joined splits) -> joined splits.
    """
    per_split = jnp.int32(problem.plan.blocks_per_split)
    block, h = problem.plan.block, problem.shape.h
    scores_stand_in = values_stand_in = None
    if problem.interpret:
        wg = lax.axis_index("wg")
        scores_stand_in, values_stand_in = smem.scores_acc.at[wg], smem.values_acc.at[wg]

    def mask(scores: jax.Array, index: jax.Array) -> jax.Array:
        start = block_at(index) * block

        def masked(scores: jax.Array) -> jax.Array:
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=plgpu.Layout.WGMMA)
            seen = lax.broadcast_in_dim(positions - start, keys.shape, [0])
            # Without the barrier LLVM makes selects of the branch, and every block pays for the mask.
            return lax.optimization_barrier(jnp.where(keys <= seen, scores, _NEG_INF))

        return lax.cond(block_at(index) >= first_masked, masked, lambda scores: scores, scores)

    def multiply_keys(acc: _Ref, index: jax.Array) -> None:
        slot = problem.key_slot(index)
        plgpu.barrier_wait(smem.k_full.at[slot])
        for i in range(problem.parts):
            keys = smem.k.at[slot, :, pl.ds(i * _WIDTH, _WIDTH)].transpose((1, 0))
            _multiply(problem, acc, q_smem.at[i], keys, first=i == 0)

    def multiply_values(acc: _Ref, weights: jax.Array, index: jax.Array) -> None:
        slot = problem.value_slot(index)
        plgpu.barrier_wait(smem.v_full.at[slot])
        _multiply(problem, acc, weights, smem.v.at[slot], first=False)

    def take_scores(acc: _Ref, index: jax.Array, running: int) -> jax.Array:
        scores = _read(problem, acc, running)
        plgpu.barrier_arrive(smem.k_empty.at[problem.key_slot(index)])
        return mask(scores, index)

    def take_values(acc: _Ref, index: jax.Array) -> jax.Array:
        values = _read(problem, acc, 0)
        plgpu.barrier_arrive(smem.v_empty.at[problem.value_slot(index)])
        return values

    def walk(values_acc: _Ref) -> _Partial:
        def first(scores_acc: _Ref) -> jax.Array:
            multiply_keys(scores_acc, jnp.int32(0))
            return take_scores(scores_acc, jnp.int32(0), 0)

        scores = _with_accumulator(problem, block, scores_stand_in, first)
        softmax, weights, _ = _softmax_step(_Softmax.empty(), scores, problem.factor, problem.product)
        if problem.interpret:
            values_acc[...] = jnp.zeros((ROWS, h), jnp.float32)

        def step(index: jax.Array, carry: tuple[_Softmax, jax.Array, _Partial]) -> Any:
            old, weights, joined = carry

            def multiply(scores_acc: _Ref) -> jax.Array:
                multiply_keys(scores_acc, index)
                multiply_values(values_acc, weights, index - 1)
                return take_scores(scores_acc, index, 1)

            scores = _with_accumulator(problem, block, scores_stand_in, multiply)
            fresh = lax.rem(index, per_split) == 0
            empty = _Softmax.empty()
            base = _Softmax(
                _choose(fresh, empty.maximum, old.maximum), _choose(fresh, empty.lanes, old.lanes)
            )
            new, unrounded, shrink = _softmax_step(base, scores, problem.factor, problem.product)
            values = take_values(values_acc, index - 1)

            def end(values: jax.Array) -> tuple[jax.Array, _Partial]:
                zeros = plgpu.layout_cast(jnp.zeros(values.shape, jnp.float32), plgpu.Layout.WGMMA)
                return zeros, end_split(index - 1, old, values, joined)

            values, joined = lax.cond(fresh, end, lambda values: (_rescale(values, shrink), joined), values)
            values_acc[...] = values
            return new, unrounded.astype(problem.dtype), joined

        empty = _Softmax.empty()
        joined = _Partial(empty.maximum, empty.total)
        carry = softmax, weights.astype(problem.dtype), joined
        softmax, weights, joined = lax.fori_loop(1, count, step, carry)
        multiply_values(values_acc, weights, count - 1)
        return end_split(count - 1, softmax, take_values(values_acc, count - 1), joined)

    return _with_accumulator(problem, h, values_stand_in, walk)


def _with_accumulator(problem: _Problem, columns: int, stand_in: _Ref, body: Callable[[_Ref], Any]) -> Any:
    """Calls body with a wgmma accumulator [ROWS, columns], zero at first.

    The interpreter cannot store to one, nor multiply from registers, and has `stand_in`, which is not zero at first.
    """
    if problem.interpret:
        return body(stand_in)
    return pl.run_scoped(body, plgpu.ACC((ROWS, columns), jnp.float32))


def _multiply(problem: _Problem, acc: _Ref, a: Any, b: _Ref, *, first: bool) -> None:
    """acc += a @ b, in the background; a in shared memory or in registers. acc is zero if this is its `first`."""
    if not problem.interpret:
        plgpu.wgmma(acc, a, b)
        return
    left = a if isinstance(a, jax.Array) else a[...]
    product = jnp.dot(left.astype(jnp.float32), b[...].astype(jnp.float32))
    acc[...] = product if first else acc[...] + product  # this memory is not zero at first


def _read(problem: _Problem, acc: _Ref, running: int) -> jax.Array:
    """The accumulator, once all but `running` products are done."""
    return acc[...] if problem.interpret else plgpu.wgmma_accumulator_load(acc, wait_n=running)


def _stream(ring: int, empty: _Ref, count: jax.Array, copy: Callable[[jax.Array, jax.Array], None]) -> None:
    """One warp: calls copy(index, slot) for `count` blocks, each when the consumers have freed its slot of `ring`."""
    stages = jnp.int32(ring)
    # Not a constant to the compiler: unrolled, the loop would need more registers than these warps have.
    count = lax.optimization_barrier(count)

    def wait_until_empty(index: jax.Array) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(index, stages)])

    def step(index: jax.Array, _: None) -> None:
        pl.when(index >= stages)(lambda: wait_until_empty(index))
        copy(index, lax.rem(index, stages))

    lax.fori_loop(0, count, step, None)
    # No barrier may go away while an arrival is pending: see the last use of every slot freed.
    lax.fori_loop(jnp.maximum(count - stages, 0), count, lambda i, _: wait_until_empty(i), None)


def _stream_keys_and_values(
    problem: _Problem,
    smem: types.SimpleNamespace,
    k_gmem: _Ref,
    v_gmem: _Ref,
    row: jax.Array,
    head: jax.Array,
    count: jax.Array,
    block_at: Callable[[jax.Array], jax.Array],
    copy_queries: Callable[[], None],
) -> None:
    def copies(src: _Ref, dst: _Ref, full: _Ref) -> Callable[[jax.Array, jax.Array], None]:
        def copy(index: jax.Array, slot: jax.Array) -> None:
            keys = pl.ds(block_at(index) * problem.plan.block, problem.plan.block)
            plgpu.copy_gmem_to_smem(src.at[row, keys, head], dst.at[slot], full.at[slot])

        return copy

    def stream_keys() -> None:
        copy_queries()
        _stream(problem.config.stages, smem.k_empty, count, copies(k_gmem, smem.k, smem.k_full))

    def stream_values() -> None:
        _stream(problem.config.value_stages, smem.v_empty, count, copies(v_gmem, smem.v, smem.v_full))

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        pl.when(warp == 0)(stream_keys)
        pl.when(warp == 1)(stream_values)


def _join_in_shared(
    problem: _Problem, values_smem: _Ref
) -> Callable[[jax.Array, _Softmax, jax.Array, _Partial], _Partial]:
    """`end_split` of a warpgroup that joins all splits itself; the joined values are in values_smem [ROWS, H]."""

    def end_split(_: jax.Array, softmax: _Softmax, values: jax.Array, joined: _Partial) -> _Partial:
        before = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA)
        split = _Partial(softmax.maximum, softmax.total)
        joined, values = _merge(joined, split, before, values, problem.product)
        values_smem[...] = values  # every thread reads what it wrote itself: no fence is needed
        return joined

    return end_split


def _copy_queries(problem: _Problem, src: _Ref, dst: _Ref, full: _Ref) -> None:
    """Copies rows [n, H] to dst [parts, ROWS, _WIDTH]."""
    for i in range(problem.parts):
        target = dst.at[i, pl.ds(0, src.shape[0])]
        plgpu.copy_gmem_to_smem(src.at[:, pl.ds(i * _WIDTH, _WIDTH)], target, full)


def _store(problem: _Problem, out: jax.Array, names: tuple[_Ref, _Ref], dst: _Ref, rows: int) -> None:
    """Stores `rows` rows of `out` [ROWS, H] through the queries' memory, which no product reads any more."""
    staged, plain = names
    for i in range(problem.parts):
        staged.at[i][...] = out[:, i * _WIDTH : (i + 1) * _WIDTH]
    plgpu.commit_smem()
    for i in range(problem.parts):
        target = dst.at[pl.ds(0, rows), pl.ds(i * _WIDTH, _WIDTH)]
        plgpu.copy_smem_to_gmem(plain.at[i, pl.ds(0, rows)], target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows_of(position: jax.Array, per_query: int) -> jax.Array:
    """Positions [ROWS] of rows that hold `per_query` heads of a query each, from `position` on."""
    index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    return position + (index if per_query == 1 else lax.div(index, jnp.int32(per_query)))


# --- the variant for many queries -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(4,))
def _run_tiles(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: _Problem
) -> jax.Array:
    shape, consumers = problem.shape, 2
    scratch = problem.rings(consumers) | {
        "q": problem.queries(consumers),
        "q_full": plgpu.Barrier(num_arrivals=problem.parts, num_barriers=consumers),
        "joined": problem.sums(consumers, ROWS, shape.h),
    }
    kernel = problem.kernel(
        _tiles_kernel,
        "tiles",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(shape.b * shape.kv_heads * problem.tile_pairs,),
        grid_names=("cta",),
        num_threads=consumers + 1,
    )
    return kernel(q, k, v, positions)


def _tiles_kernel(
    problem: _Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    positions_gmem: _Ref,
    out_gmem: _Ref,
    **scratch: _Ref,
) -> None:
    smem, shape, block = types.SimpleNamespace(**scratch), problem.shape, jnp.int32(problem.plan.block)
    wg = lax.axis_index("wg")
    pair, row, kv_head = _tile_of(problem, lax.axis_index("cta"))
    start = positions_gmem[row, 0]
    group, last_tile = jnp.int32(shape.group), jnp.int32(pl.cdiv(shape.t, ROWS) - 1)

    def unit(index: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First query, head and blocks of a warpgroup. One too many does the last tile's work, and stores nothing."""
        number = 2 * pair + index
        tile = lax.div(number, group)
        last = jnp.minimum(jnp.minimum(tile, last_tile) * ROWS + ROWS - 1, shape.t - 1)
        return tile * ROWS, kv_head * group + lax.rem(number, group), lax.div(start + last, block) + 1

    count = unit(1)[2]  # the later tile has the most blocks
    q_smem, q_plain = problem.names(smem.q)

    @pl.when(wg == 2)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def copy_queries() -> None:
            for i in range(2):
                first, head, _ = unit(i)
                src = q_gmem.at[row, pl.ds(first, ROWS), head]
                _copy_queries(problem, src, q_plain.at[i], smem.q_full.at[i])

        _stream_keys_and_values(problem, smem, k_gmem, v_gmem, row, kv_head, count, lambda i: i, copy_queries)

    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers((512 - _PRODUCER_REGISTERS) // 2 // 8 * 8, action="increase")
        first, head, mine = unit(wg)
        joined_smem = smem.joined.at[wg]
        joined_smem[...] = plgpu.layout_cast(jnp.zeros((ROWS, shape.h), jnp.float32), plgpu.Layout.WGMMA)
        plgpu.barrier_wait(smem.q_full.at[wg])
        joined = _walk(
            problem,
            smem,
            q_smem.at[wg],
            _rows_of(start + first, 1),
            mine,
            lambda i: i,
            lax.div(start + first + 1, block),
            _join_in_shared(problem, joined_smem),
        )

        def drain(index: jax.Array, _: None) -> None:
            for full, empty, slot in (
                (smem.k_full, smem.k_empty, problem.key_slot(index)),
                (smem.v_full, smem.v_empty, problem.value_slot(index)),
            ):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        lax.fori_loop(mine, count, drain, None)  # blocks that only the other warpgroup needs
        values = plgpu.load(joined_smem, layout=plgpu.Layout.WGMMA)
        out = _normalise(joined, values, problem.dtype)
        _store(
            problem, out, (q_smem.at[wg], q_plain.at[wg]), out_gmem.at[row, pl.ds(first, ROWS), head], ROWS
        )


def _tile_of(problem: _Problem, cta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pair of tiles, batch row, KV head) of a CTA.

    The last tiles, which see the most keys, start first. `kv_group` KV heads go side by side, so that their keys and
    values stay in the L2 cache.
    """
    shape, together = problem.shape, problem.config.kv_group
    heads, pairs = shape.b * shape.kv_heads, problem.tile_pairs
    turn = lax.div(cta, jnp.int32(together * pairs))
    width = jnp.minimum(jnp.int32(together), heads - turn * together)  # the last turn may have fewer
    within = cta - turn * (together * pairs)
    pair = pairs - 1 - lax.div(within, width)
    index = turn * together + lax.rem(within, width)
    return pair, lax.div(index, jnp.int32(shape.kv_heads)), lax.rem(index, jnp.int32(shape.kv_heads))


# --- the variant for few queries ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(4,))
def _run_split(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: _Problem
) -> jax.Array:
    shape, config = problem.shape, problem.config
    b, t, kv_heads, group, h = shape.b, shape.t, shape.kv_heads, shape.group, shape.h
    # With one query this moves nothing.
    rows = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(b * kv_heads, t * group, h)
    scratch = problem.rings(1) | {
        "q": problem.queries(),
        "q_full": plgpu.Barrier(num_arrivals=problem.parts),
        "values": problem.sums(ROWS, h),
    }
    joined = jax.ShapeDtypeStruct(
        (b * kv_heads, pl.cdiv(problem.rows, problem.joined_rows) * problem.joined_rows, h), q.dtype
    )
    parts = [
        jax.ShapeDtypeStruct((b * kv_heads, problem.splits, *each), jnp.float32)
        for each in ((problem.stored_rows, h), (2, ROWS))
    ]
    cluster: dict[str, Any] = {}
    if config.parts > 1:
        scratch["stats"] = plgpu.SMEM((2, ROWS), jnp.float32)
    if config.in_cluster:
        scratch["sent"] = plgpu.ClusterBarrier(collective_axes=("part",))
        cluster = {"cluster": (config.parts,), "cluster_names": ("part",)}
    kernel = problem.kernel(
        _split_kernel,
        "split",
        out_type=[joined] if config.parts == 1 else [joined, *parts] if config.in_cluster else parts,
        scratch_types=scratch,
        grid=(b * kv_heads,) if config.in_cluster else (config.parts, b * kv_heads),
        grid_names=("head",) if config.in_cluster else ("part", "head"),
        num_threads=2,
        **cluster,
    )
    out = kernel(rows, k, v, positions)
    if config.second_launch:
        join = problem.kernel(
            _join_kernel,
            "join",
            out_type=joined,
            grid=(joined.shape[1] // problem.joined_rows, b * kv_heads),
            grid_names=("turn", "head"),
            num_threads=1,
        )
        out = [join(*out, positions)]
    out = out[0][:, : problem.rows]
    return out.reshape(b, kv_heads, t, group, h).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _split_kernel(
    problem: _Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    positions_gmem: _Ref,
    *outs: _Ref,
    **scratch: _Ref,
) -> None:
    smem, shape, plan = types.SimpleNamespace(**scratch), problem.shape, problem.plan
    parts, per_split = jnp.int32(problem.config.parts), jnp.int32(plan.blocks_per_split)
    index, part, wg = lax.axis_index("head"), lax.axis_index("part"), lax.axis_index("wg")
    row, kv_head = lax.div(index, jnp.int32(shape.kv_heads)), lax.rem(index, jnp.int32(shape.kv_heads))
    start = positions_gmem[row, 0]
    q_smem, q_plain = problem.names(smem.q)
    blocks, splits = _extent(problem, start)
    mine = lax.div(splits - part + parts - 1, parts)  # part, part + parts, ...
    short = jnp.where(lax.rem(splits - 1, parts) == part, splits * per_split - blocks, 0)
    count = mine * per_split - short
    sums = [out.at[index] for out in outs[-2:]]

    def split_at(i: jax.Array) -> jax.Array:
        return part + lax.div(i, per_split) * parts

    def block_at(i: jax.Array) -> jax.Array:
        return split_at(i) * per_split + lax.rem(i, per_split)

    @pl.when(wg == 1)
    def _() -> None:
        def copy_queries() -> None:
            # The rows behind hold whatever is there, and are never stored.
            _copy_queries(problem, q_gmem.at[index], q_plain, smem.q_full)

        _stream_keys_and_values(problem, smem, k_gmem, v_gmem, row, kv_head, count, block_at, copy_queries)

    @pl.when(wg == 0)
    def _() -> None:
        alone = problem.config.parts == 1
        if alone:
            zeros = jnp.zeros((ROWS, shape.h), jnp.float32)
            smem.values[...] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            end_split = _join_in_shared(problem, smem.values)
        else:
            end_split = _send(problem, smem, sums, split_at)
        plgpu.barrier_wait(smem.q_full)

        def walk() -> _Partial:
            first_masked = lax.div(start + 1, jnp.int32(plan.block))
            positions = _rows_of(start, shape.group)
            return _walk(problem, smem, q_smem, positions, count, block_at, first_masked, end_split)

        if alone:
            joined = walk()
            out = _normalise(joined, plgpu.load(smem.values, layout=plgpu.Layout.WGMMA), problem.dtype)
            _store(problem, out, (q_smem, q_plain), outs[0].at[index], problem.rows)
            return
        pl.when(count > 0)(lambda: (walk(), None)[1])
        plgpu.wait_smem_to_gmem(0)
        if problem.config.second_launch:
            return
        _arrive_in_cluster(smem.sent)
        plgpu.barrier_wait(smem.sent)
        _fence()
        height = problem.joined_rows
        turns = lax.div(pl.cdiv(problem.rows, height) - part + (parts - 1), parts)

        def turn(i: jax.Array, _: None) -> None:
            _join_rows(problem, sums, splits, outs[0].at[index], (part + i * parts) * height)

        lax.fori_loop(0, turns, turn, None)


def _join_kernel(
    problem: _Problem, values_gmem: _Ref, stats_gmem: _Ref, positions_gmem: _Ref, out_gmem: _Ref
) -> None:
    index, first = lax.axis_index("head"), lax.axis_index("turn") * problem.joined_rows
    start = positions_gmem[lax.div(index, jnp.int32(problem.shape.kv_heads)), 0]
    sums = [values_gmem.at[index], stats_gmem.at[index]]
    _join_rows(problem, sums, _extent(problem, start)[1], out_gmem.at[index], first)


def _extent(problem: _Problem, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks and splits that the queries from position `start` on see."""
    blocks = lax.div(start + (problem.shape.t - 1), jnp.int32(problem.plan.block)) + 1
    per_split = jnp.int32(problem.plan.blocks_per_split)
    return blocks, lax.div(blocks + per_split - 1, per_split)


def _send(
    problem: _Problem,
    smem: types.SimpleNamespace,
    parts: list[_Ref],
    split_at: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, _Softmax, jax.Array, _Partial], _Partial]:
    """`end_split` of one CTA of several: a split's values, and maximum and total, go to global memory."""

    def end_split(last: jax.Array, softmax: _Softmax, values: jax.Array, joined: _Partial) -> _Partial:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.values[...] = values
        smem.stats.at[0][...] = softmax.maximum
        smem.stats.at[1][...] = softmax.total
        plgpu.commit_smem()
        split, height = split_at(last), problem.stored_rows
        plgpu.copy_smem_to_gmem(smem.values.at[pl.ds(0, height)], parts[0].at[split])
        plgpu.copy_smem_to_gmem(smem.stats, parts[1].at[split])
        return joined

    return end_split


def _join_rows(problem: _Problem, sums: list[_Ref], splits: jax.Array, out: _Ref, first: jax.Array) -> None:
    """Joins all splits of the `joined_rows` rows from `first` on in ascending order, and stores the rows."""
    h, height = problem.shape.h, problem.joined_rows
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    values_gmem, stats_gmem = sums
    product = _Product(problem.interpret, layout)
    together = min(_BATCH, problem.splits)

    def full(value: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((height, h), value, jnp.float32), layout)

    def load(split: jax.Array) -> tuple[_Partial, jax.Array]:
        """A split, or for one that is not there what changes nothing."""
        there = split < splits
        at = jnp.minimum(split, splits - 1)
        values = plgpu.load(values_gmem.at[at, pl.ds(first, height)], layout=layout, optimized=False)

        def stat(which: int, missing: float) -> jax.Array:
            value = full(stats_gmem[at, which, first])
            index = plgpu.broadcasted_iota(jnp.int32, (height, h), 0, layout=layout)
            for i in range(1, height):
                value = jnp.where(index >= i, full(stats_gmem[at, which, first + i]), value)
            return _choose(there, value, full(missing))

        return _Partial(stat(0, _NEG_INF), stat(1, 0.0)), _choose(there, values, full(0.0))

    def batch(i: jax.Array, carry: tuple[_Partial, jax.Array]) -> tuple[_Partial, jax.Array]:
        joined, values = carry
        # All at once: each takes the L2 cache's latency.
        loaded = [load(i * together + j) for j in range(together)]
        for part, part_values in loaded:
            joined, values = _merge(joined, part, values, part_values, product)
        return joined, values

    empty = _Partial(full(_NEG_INF), full(0.0)), full(0.0)
    batches = lax.div(splits + (together - 1), jnp.int32(together))
    joined, values = lax.fori_loop(0, batches, batch, empty)
    out.at[pl.ds(first, height)][...] = _normalise(joined, values, problem.dtype)


def _arrive_in_cluster(barrier: _Ref) -> None:
    """Says that this warpgroup's copies to global memory are done, to every CTA of the cluster."""
    _fence()
    plgpu.commit_smem()  # the whole warpgroup: one of its threads arrives for all
    _fence()
    plgpu.barrier_arrive(barrier)


@plgpu.inline_mgpu()
def _fence(_: Any) -> None:
    """Orders this thread's accesses to global memory, TMA's too, before and after it, for all threads of the GPU."""
    for instruction in ("fence.proxy.async.global;", "fence.acq_rel.gpu;"):
        llvm.inline_asm(None, [], instruction, "~{memory}", has_side_effects=True)


def _tiled(itemsize: int) -> tuple[Any, Any]:
    tiling, transform = (8, 128 // itemsize), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    return plgpu.TilingTransform(tiling), transform  # type: ignore[abstract]


# --- what is covered ------------------------------------------------------------------------------------------------


def _check_operands(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, plan: AttentionPlan, scale: float
) -> AttentionShape:
    (b, t, n, h), (s, kv_heads) = q.shape, k.shape[1:3]
    if k.shape != (b, s, kv_heads, h) or v.shape != k.shape or positions.shape != (b, t) or n % kv_heads:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} and positions {positions.shape} do not fit together"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; all must be bfloat16, or all float16; use "
            "backend='reference' for float32"
        )
    if h not in (64, 128):
        raise ValueError(f"head_dim={h} must be 64 or 128; use backend='reference'")
    if plan.block != 128:
        raise ValueError(
            f"the GPU kernel walks blocks of 128 keys, not {plan.block}; use backend='reference'"
        )
    if n // kv_heads > ROWS:
        raise ValueError(
            f"{n // kv_heads} query heads a KV head are more than {ROWS}; use backend='reference'"
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale} must be positive; negate q, or use backend='reference'")
    if t < 1 or b < 1 or s < plan.block or s % 8:
        raise ValueError(
            f"B={b} and T={t} must be at least 1 and S={s} at least {plan.block} and a multiple of 8; pad the cache"
        )
    return AttentionShape(b=b, t=t, s=s, kv_heads=kv_heads, group=n // kv_heads, h=h)


def _check_device() -> None:
    device = jax.extend.backend.get_default_device()
    capability = str(getattr(device, "compute_capability", "none"))
    if not capability.startswith("9."):
        raise ValueError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.x) and the default device is {device} "
            f"({capability}); use backend='reference' there"
        )
