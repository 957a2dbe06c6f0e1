"""Where sums of leaves wait for their siblings, and how CTAs exchange them."""

import dataclasses
import functools
import types
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from ..common.tree import tree_join
from .config import MosaicConfig
from .mosaic_problem import Problem, Ref

Value = list[jax.Array]  # a warpgroup's rows of a tile, as blocks of columns

LINE = 8  # columns of a saved block that lie together in global memory: a warp then writes 256 bytes in a row


def columns_of(value: jax.Array, width: int) -> Value:
    return [value[:, i : i + width] for i in range(0, value.shape[1], width)]


class Home(Protocol):
    """Where a block of a subtree waits for its sibling. Every thread reads what it wrote itself: no fence is needed."""

    def keep(self, block: jax.Array) -> None: ...

    def take(self) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class _SharedHome:
    """Shared memory of this warpgroup alone."""

    ref: Ref

    def keep(self, block: jax.Array) -> None:
        self.ref[...] = block

    def take(self) -> jax.Array:
        return plgpu.load(self.ref, layout=plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class _GlobalHome:
    """Global memory of this warpgroup alone, [block / LINE, tile_m, LINE]; it stays in L2."""

    ref: Ref

    def keep(self, block: jax.Array) -> None:
        _store_lines(self.ref, block)

    def take(self) -> jax.Array:
        return _load_lines(self.ref, self.ref.shape[0])


def _store_lines(ref: Ref, block: jax.Array) -> None:
    for i, line in enumerate(columns_of(block, LINE)):
        ref.at[i][...] = line


def _load_lines(ref: Ref, count: int) -> jax.Array:
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
    return jnp.concatenate([load(ref.at[i]) for i in range(count)], axis=1)


def homes_of(problem: Problem, saved: Ref | None, in_global: tuple[Ref, ...]) -> list[list[Home]]:
    """The homes of each level's blocks. The lowest are used most, and get the nearest."""
    wg, config = lax.axis_index("wg"), problem.config
    homes: list[Home] = []
    if saved is not None:
        homes += [_SharedHome(saved.at[i, wg]) for i in range(config.shared_blocks(problem.leaves))]
    if count := config.global_blocks(problem.leaves):
        parts = config.split * config.last_split
        cta = (lax.axis_index("cluster") * config.multicast + lax.axis_index("pair")) * parts
        mine = in_global[0].at[cta + lax.axis_index("part")]
        homes += [_GlobalHome(mine.at[i, wg]) for i in range(count)]
    return [homes[i * problem.blocks : (i + 1) * problem.blocks] for i in range(problem.levels)]


class Exchange:
    """Gives every CTA of a cluster the sums that all of them have for its share of the columns.

    They go through global memory, where they stay in L2: stores into another CTA's shared memory, 8 bytes each with an
    arrival of their own, took 4 to 25 us. `sent` says that everyone has written, `free` that everyone has read.
    """

    def __init__(self, problem: Problem, smem: types.SimpleNamespace, in_global: tuple[Ref, ...]):
        cluster = lax.axis_index("cluster") * problem.config.multicast + lax.axis_index("pair")
        self._parts, self._wg, self._part = (
            in_global[-1].at[cluster],
            lax.axis_index("wg"),
            lax.axis_index("part"),
        )
        self._sent, self._free = smem.sent.at[self._wg], smem.free.at[self._wg]
        self._split = problem.config.split * problem.config.last_split
        self._width = problem.config.out_columns

    @staticmethod
    def barriers(config: MosaicConfig) -> dict[str, Any]:
        in_cluster = plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=config.consumers)
        return {"sent": in_cluster, "free": in_cluster}

    @staticmethod
    def parts(config: MosaicConfig, clusters: int) -> jax.ShapeDtypeStruct:
        lines = (config.tile_n // LINE, config.tile_m, LINE)
        shape = (clusters * config.multicast, config.split * config.last_split, config.consumers, *lines)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def join(self, value: Value, tiles: jax.Array) -> Value:
        """Shares a warpgroup's rows [tile_m, tile_n] and returns the total of this CTA's columns."""
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(self._free))
        _fence()
        total = self.join_once(value)
        self._arrive(self._free)
        return total

    def join_once(self, value: Value) -> Value:
        """As `join`, for the only tile: nothing is written again, so nobody waits for its readers."""
        mine = self._parts.at[self._part, self._wg]
        lines = value[0].shape[1] // LINE
        for i, block in enumerate(value):
            _store_lines(mine.at[pl.ds(i * lines, lines)], block)
        self._arrive(self._sent)
        plgpu.barrier_wait(self._sent)
        _fence()
        lines = self._width // LINE
        share = pl.ds(self._part * lines, lines)
        parts = [_load_lines(self._parts.at[i, self._wg, share], lines) for i in range(self._split)]
        return [tree_join(parts)]

    def _arrive(self, barrier: Ref) -> None:
        plgpu.commit_smem()  # the whole warpgroup: one of its threads arrives for all
        _fence()
        plgpu.barrier_arrive(barrier)

    def drain(self, tiles: jax.Array) -> None:
        """Sees the last arrivals: no barrier may go away while one is pending."""
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(self._free))


@plgpu.inline_mgpu()
def _fence(_: Any) -> None:
    """Orders this thread's accesses to global memory before and after it, for all threads of the GPU."""
    llvm.inline_asm(None, [], "fence.acq_rel.gpu;", "~{memory}", has_side_effects=True)
