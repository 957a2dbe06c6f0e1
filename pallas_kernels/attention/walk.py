"""A warpgroup's walk over blocks of keys, 64 rows of queries at a time, and what it loads and stores for it."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .accumulators import multiply_into, read_accumulator
from .arithmetic import NEG_INF, Partial, Softmax, choose, merge, rescale, softmax_step
from .config import ROWS
from .problem import WIDTH, Problem

_Ref = Any


def walk_keys(
    problem: Problem,
    smem: types.SimpleNamespace,
    q_smem: _Ref,
    positions: jax.Array,
    count: jax.Array,
    block_at: Callable[[jax.Array], jax.Array],
    first_masked: jax.Array,
    end_split: Callable[[jax.Array, Softmax, jax.Array, Partial], Partial],
) -> Partial:
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
            return lax.optimization_barrier(jnp.where(keys <= seen, scores, NEG_INF))

        return lax.cond(block_at(index) >= first_masked, masked, lambda scores: scores, scores)

    def multiply_keys(acc: _Ref, index: jax.Array) -> None:
        slot = problem.key_slot(index)
        plgpu.barrier_wait(smem.k_full.at[slot])
        for i in range(problem.parts):
            keys = smem.k.at[slot, :, pl.ds(i * WIDTH, WIDTH)].transpose((1, 0))
            multiply_into(problem, acc, q_smem.at[i], keys, first=i == 0)

    def multiply_values(acc: _Ref, weights: jax.Array, index: jax.Array) -> None:
        slot = problem.value_slot(index)
        plgpu.barrier_wait(smem.v_full.at[slot])
        multiply_into(problem, acc, weights, smem.v.at[slot], first=False)

    def take_scores(acc: _Ref, index: jax.Array, running: int) -> jax.Array:
        scores = read_accumulator(problem, acc, running)
        plgpu.barrier_arrive(smem.k_empty.at[problem.key_slot(index)])
        return mask(scores, index)

    def take_values(acc: _Ref, index: jax.Array) -> jax.Array:
        values = read_accumulator(problem, acc, 0)
        plgpu.barrier_arrive(smem.v_empty.at[problem.value_slot(index)])
        return values

    def walk(values_acc: _Ref) -> Partial:
        def first(scores_acc: _Ref) -> jax.Array:
            multiply_keys(scores_acc, jnp.int32(0))
            return take_scores(scores_acc, jnp.int32(0), 0)

        scores = _with_accumulator(problem, block, scores_stand_in, first)
        softmax, weights, _ = softmax_step(Softmax.empty(), scores, problem.factor, problem.product)
        if problem.interpret:
            values_acc[...] = jnp.zeros((ROWS, h), jnp.float32)

        def step(index: jax.Array, carry: tuple[Softmax, jax.Array, Partial]) -> Any:
            old, weights, joined = carry

            def multiply(scores_acc: _Ref) -> jax.Array:
                multiply_keys(scores_acc, index)
                multiply_values(values_acc, weights, index - 1)
                return take_scores(scores_acc, index, 1)

            scores = _with_accumulator(problem, block, scores_stand_in, multiply)
            fresh = lax.rem(index, per_split) == 0
            empty = Softmax.empty()
            base = Softmax(choose(fresh, empty.maximum, old.maximum), choose(fresh, empty.lanes, old.lanes))
            new, unrounded, shrink = softmax_step(base, scores, problem.factor, problem.product)
            values = take_values(values_acc, index - 1)

            def end(values: jax.Array) -> tuple[jax.Array, Partial]:
                zeros = plgpu.layout_cast(jnp.zeros(values.shape, jnp.float32), plgpu.Layout.WGMMA)
                return zeros, end_split(index - 1, old, values, joined)

            values, joined = lax.cond(fresh, end, lambda values: (rescale(values, shrink), joined), values)
            values_acc[...] = values
            return new, unrounded.astype(problem.dtype), joined

        empty = Softmax.empty()
        joined = Partial(empty.maximum, empty.total)
        carry = softmax, weights.astype(problem.dtype), joined
        softmax, weights, joined = lax.fori_loop(1, count, step, carry)
        multiply_values(values_acc, weights, count - 1)
        return end_split(count - 1, softmax, take_values(values_acc, count - 1), joined)

    return _with_accumulator(problem, h, values_stand_in, walk)


def _with_accumulator(problem: Problem, columns: int, stand_in: _Ref, body: Callable[[_Ref], Any]) -> Any:
    """Calls body with a wgmma accumulator [ROWS, columns], zero at first.

    The interpreter cannot store to one, nor multiply from registers, and has `stand_in`, which is not zero at first.
    """
    if problem.interpret:
        return body(stand_in)
    return pl.run_scoped(body, plgpu.ACC((ROWS, columns), jnp.float32))


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


def stream_keys_and_values(
    problem: Problem,
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


def join_in_shared(
    problem: Problem, values_smem: _Ref
) -> Callable[[jax.Array, Softmax, jax.Array, Partial], Partial]:
    """`end_split` of a warpgroup that joins all splits itself; the joined values are in values_smem [ROWS, H]."""

    def end_split(_: jax.Array, softmax: Softmax, values: jax.Array, joined: Partial) -> Partial:
        before = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA)
        split = Partial(softmax.maximum, softmax.total)
        joined, values = merge(joined, split, before, values, problem.product)
        values_smem[...] = values  # every thread reads what it wrote itself: no fence is needed
        return joined

    return end_split


def copy_rows(problem: Problem, src: _Ref, dst: _Ref, full: _Ref) -> None:
    """Copies rows [n, H] to dst [parts, ROWS, WIDTH]."""
    for i in range(problem.parts):
        target = dst.at[i, pl.ds(0, src.shape[0])]
        plgpu.copy_gmem_to_smem(src.at[:, pl.ds(i * WIDTH, WIDTH)], target, full)


def store_rows(problem: Problem, out: jax.Array, names: tuple[_Ref, _Ref], dst: _Ref, rows: int) -> None:
    """Stores `rows` rows of `out` [ROWS, H] through the queries' memory, which no product reads any more."""
    staged, plain = names
    for i in range(problem.parts):
        staged.at[i][...] = out[:, i * WIDTH : (i + 1) * WIDTH]
    plgpu.commit_smem()
    for i in range(problem.parts):
        target = dst.at[pl.ds(0, rows), pl.ds(i * WIDTH, WIDTH)]
        plgpu.copy_smem_to_gmem(plain.at[i, pl.ds(0, rows)], target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def positions_of_rows(position: jax.Array, per_query: int) -> jax.Array:
    """Positions [ROWS] of rows that hold `per_query` heads of a query each, from `position` on."""
    index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    return position + (index if per_query == 1 else lax.div(index, jnp.int32(per_query)))
