"""Joining splits that were left in global memory, in ascending order: among the CTAs of a cluster."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from .arithmetic import NEG_INF, Partial, Product, choose, merge, normalise
from .problem import Problem

_Ref = Any
_BATCH = 16  # splits at most that are loaded at a time


def extent(problem: Problem, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks and splits that the queries from position `start` on see."""
    blocks = lax.div(start + (problem.shape.t - 1), jnp.int32(problem.plan.block)) + 1
    per_split = jnp.int32(problem.plan.blocks_per_split)
    return blocks, lax.div(blocks + per_split - 1, per_split)


def join_rows(problem: Problem, sums: list[_Ref], splits: jax.Array, out: _Ref, first: jax.Array) -> None:
    """Joins all splits of the `joined_rows` rows from `first` on in ascending order, and stores the rows."""
    h, height = problem.shape.h, problem.joined_rows
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    values_gmem, stats_gmem = sums
    product = Product(problem.interpret, layout)
    together = min(_BATCH, problem.splits)

    def full(value: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((height, h), value, jnp.float32), layout)

    def load(split: jax.Array) -> tuple[Partial, jax.Array]:
        """A split, or for one that is not there what changes nothing."""
        there = split < splits
        at = jnp.minimum(split, splits - 1)
        values = plgpu.load(values_gmem.at[at, pl.ds(first, height)], layout=layout, optimized=False)

        def stat(which: int, missing: float) -> jax.Array:
            value = full(stats_gmem[at, which, first])
            index = plgpu.broadcasted_iota(jnp.int32, (height, h), 0, layout=layout)
            for i in range(1, height):
                value = jnp.where(index >= i, full(stats_gmem[at, which, first + i]), value)
            return choose(there, value, full(missing))

        return Partial(stat(0, NEG_INF), stat(1, 0.0)), choose(there, values, full(0.0))

    def batch(i: jax.Array, carry: tuple[Partial, jax.Array]) -> tuple[Partial, jax.Array]:
        joined, values = carry
        # All at once: each takes the L2 cache's latency.
        loaded = [load(i * together + j) for j in range(together)]
        for part, part_values in loaded:
            joined, values = merge(joined, part, values, part_values, product)
        return joined, values

    empty = Partial(full(NEG_INF), full(0.0)), full(0.0)
    batches = lax.div(splits + (together - 1), jnp.int32(together))
    joined, values = lax.fori_loop(0, batches, batch, empty)
    out.at[pl.ds(first, height)][...] = normalise(joined, values, problem.dtype)


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
