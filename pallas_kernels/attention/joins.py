"""Joining splits that were left in global memory, in ascending order: in a cluster or by a second launch."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from .arithmetic import NEG_INF, Partial, Product, choose, normalise
from .problem import Problem

_Ref = Any
_BATCHES = (64, 16)  # splits that are loaded at a time
_TILE = 64  # splits whose factors are computed at a time


def extent(problem: Problem, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks and splits that the queries from position `start` on see."""
    blocks = lax.div(start + (problem.shape.t - 1), jnp.int32(problem.plan.block)) + 1
    per_split = jnp.int32(problem.plan.blocks_per_split)
    return blocks, lax.div(blocks + per_split - 1, per_split)


def factors_of(problem: Problem) -> Any:
    """Shared memory of `join_rows`."""
    return plgpu.SMEM((3, problem.joined_rows, problem.stored_splits), jnp.float32)


def join_kernel(
    problem: Problem,
    values_gmem: _Ref,
    stats_gmem: _Ref,
    positions_gmem: _Ref,
    out_gmem: _Ref,
    *,
    factors: _Ref,
) -> None:
    index, first = lax.axis_index("head"), lax.axis_index("turn") * problem.joined_rows
    start = positions_gmem[lax.div(index, jnp.int32(problem.shape.kv_heads)), 0]
    sums = [values_gmem.at[index], stats_gmem.at[index]]
    join_rows(problem, sums, extent(problem, start)[1], out_gmem.at[index], first, factors)


def join_rows(
    problem: Problem, sums: list[_Ref], splits: jax.Array, out: _Ref, first: jax.Array, factors: _Ref
) -> None:
    """Joins all splits of the `joined_rows` rows from `first` on in ascending order, and stores the rows.

    The order, the products and the sums are those of `merge`, one split after the other. What they are multiplied by
    follows from the splits' maxima, and is computed for all splits at once.
    """
    h, height = problem.shape.h, problem.joined_rows
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    values_gmem, stats_gmem = sums
    product = Product(problem.interpret, layout)
    _store_factors(problem, stats_gmem, splits, first, factors)

    def full(value: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((height, h), value, jnp.float32), layout)

    def factor(which: int, split: jax.Array) -> jax.Array:
        """One for each row."""
        value = full(factors[which, 0, split])
        index = plgpu.broadcasted_iota(jnp.int32, (height, h), 0, layout=layout)
        for i in range(1, height):
            value = jnp.where(index >= i, full(factors[which, i, split]), value)
        return value

    def batch(size: int, whole: bool, begin: jax.Array, carry: Any) -> Any:
        """Joins splits begin .. begin + size - 1, of which the last may not be there if the batch is not whole."""
        at = [begin + j for j in range(size)]
        refs = [values_gmem.at[i if whole else jnp.minimum(i, splits - 1)] for i in at]
        # All at once: each takes the L2 cache's latency.
        loaded = [plgpu.load(ref.at[pl.ds(first, height)], layout=layout, optimized=False) for ref in refs]
        values, total = carry
        for i, split_values in zip(at, loaded, strict=True):
            if not whole:
                split_values = choose(i < splits, split_values, full(0.0))
            old, new = factor(0, i), factor(1, i)
            values = product(values, old) + product(split_values, new)
            total = product(total, old) + product(factor(2, i), new)
        return values, total

    carry, begin = (full(0.0), full(0.0)), jnp.int32(0)
    for size in _BATCHES:
        if size <= problem.splits:
            count, run = lax.div(splits - begin, jnp.int32(size)), functools.partial(batch, size, True)

            def step(i: jax.Array, carry: Any, size: int = size, run: Any = run, begin: Any = begin) -> Any:
                return run(begin + i * size, carry)

            carry, begin = lax.fori_loop(0, count, step, carry), begin + count * size
    rest = functools.partial(batch, min(_BATCHES[-1], problem.splits), False, begin)
    values, total = lax.cond(begin < splits, rest, lambda carry: carry, carry)
    # The maximum is in the factors.
    joined = Partial(total, total)
    out.at[pl.ds(first, height)][...] = normalise(joined, values, problem.dtype)


def _store_factors(
    problem: Problem, stats_gmem: _Ref, splits: jax.Array, first: jax.Array, factors: _Ref
) -> None:
    """Leaves, of each row and split, what the splits before it are multiplied by, what it is, and its total.

    Splits that are not there change nothing: they leave the others as they are, and have a total of 0.
    """
    row, column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    tiles = range(0, problem.stored_splits, _TILE)
    square = (_TILE, _TILE)

    def missing(shape: tuple[int, ...], layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, NEG_INF, jnp.float32), layout)

    plgpu.commit_smem()  # what was there has been read
    maxima: dict[tuple[int, int], jax.Array] = {}
    totals: dict[tuple[int, int], jax.Array] = {}
    for i, start in itertools.product(range(problem.joined_rows), tiles):
        there = plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=row) < splits - start
        stats = [stats_gmem.at[pl.ds(start, _TILE), which, first + i] for which in (0, 1)]
        maximum, total = (plgpu.load(ref, layout=row, optimized=False) for ref in stats)
        maxima[i, start] = jnp.where(there, maximum, missing((_TILE,), row))
        totals[i, start] = jnp.where(there, total, plgpu.layout_cast(jnp.zeros((_TILE,), jnp.float32), row))
        factors.at[0, i, pl.ds(start, _TILE)][...] = maxima[i, start]
    plgpu.commit_smem()
    below = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA) < plgpu.broadcasted_iota(
        jnp.int32, square, 0, layout=plgpu.Layout.WGMMA
    )
    pairs = {}
    for i in range(problem.joined_rows):
        largest = missing((_TILE,), row)  # maximum of the tiles before
        for start in tiles:
            ref = factors.at[0, i, pl.ds(start, _TILE)]
            all_of_tile = lax.broadcast_in_dim(plgpu.load(ref, layout=column, optimized=False), square, [1])
            earlier = jnp.where(below, all_of_tile, missing(square, plgpu.Layout.WGMMA))
            before = jnp.maximum(largest, jnp.max(earlier, axis=1))
            joined = jnp.maximum(before, maxima[i, start])
            pairs[i, start] = jnp.exp2(before - joined), jnp.exp2(maxima[i, start] - joined)
            if start != tiles[-1]:
                largest = jnp.maximum(largest, jnp.max(all_of_tile, axis=1))
    plgpu.commit_smem()
    for (i, start), pair in pairs.items():
        for which, value in enumerate((*pair, totals[i, start])):
            factors.at[which, i, pl.ds(start, _TILE)][...] = value
    plgpu.commit_smem()


def arrive_in_cluster(barrier: _Ref) -> None:
    """Says that this warpgroup's copies to global memory are done, to every CTA of the cluster."""
    fence()
    plgpu.commit_smem()  # the whole warpgroup: one of its threads arrives for all
    fence()
    plgpu.barrier_arrive(barrier)


@plgpu.inline_mgpu()
def fence(_: Any) -> None:
    """Orders this thread's accesses to global memory, TMA's too, before and after it, for all threads of the GPU."""
    for instruction in ("fence.proxy.async.global;", "fence.acq_rel.gpu;"):
        llvm.inline_asm(None, [], instruction, "~{memory}", has_side_effects=True)
