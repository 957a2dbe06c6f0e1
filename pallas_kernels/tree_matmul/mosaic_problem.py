"""One call of the Hopper kernel: its sizes, the walk over its tiles, and its buffers in shared memory."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import MosaicConfig

Ref = Any  # Pallas has no public type for what its refs become inside a kernel


class Place(NamedTuple):
    """Where a tile of the output begins.

    Attributes:
        row: in elements.
        column: likewise.
        product: the number of the product that it belongs to, as an index; () where there is one product alone.
    """

    row: jax.Array
    column: jax.Array
    product: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: its sizes and types, its tiling, the clusters that run at once, and what follows from them.

    With `batch` the operands and the result have a first dimension for as many products of the same sizes. Their tiles
    are walked one product after the other.
    """

    m: int
    n: int
    k: int
    leaves: int
    dtype: Any
    out_dtype: Any
    transpose_rhs: bool
    config: MosaicConfig
    resident: int
    interpret: bool
    transpose_lhs: bool = False
    batch: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Output tiles of a cluster, down and across, of one product."""
        return pl.cdiv(self.m, self.config.rows * self.config.multicast), pl.cdiv(
            self.columns, self.config.half
        )

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.n // 2 if self.config.gated else self.n

    @property
    def tiles_each(self) -> int:
        """Output tiles of one product."""
        return self.grid[0] * self.grid[1]

    @property
    def tiles(self) -> int:
        return self.tiles_each * (self.batch or 1)

    @property
    def lead(self) -> tuple[int, ...]:
        """The first dimensions of operands and result."""
        return () if self.batch is None else (self.batch,)

    @property
    def clusters(self) -> int:
        return min(self.resident, self.tiles)

    @property
    def whole_tiles(self) -> int:
        """Tiles of the rounds that `last_split` does not cut."""
        return self.config.whole_tiles(self.tiles, self.clusters)

    @property
    def cut_tiles(self) -> int:
        """Tiles of the round that it cuts, at most one a cluster."""
        return self.tiles - self.whole_tiles

    @property
    def cut_leaves(self) -> int:
        """Leaves of such a tile that a CTA takes."""
        return self.leaves // self.config.last_split

    @property
    def part_leaves(self) -> int:
        return self.leaves // self.config.split

    @property
    def leaf(self) -> int:
        return self.k // self.leaves

    @property
    def leaf_steps(self) -> int:
        return pl.cdiv(self.leaf, self.config.depth)

    @property
    def ragged(self) -> bool:
        """Whether a leaf's last step has less than the others.

        Then leaves are a dimension of their own of x and w, and TMA fills up both with zeros behind a leaf. They change
        no sum, but perhaps, where every product underflows, the sign of a zero.
        """
        return self.leaf % self.config.depth > 0

    def with_leaves(self, x: jax.Array, axis: int) -> jax.Array:
        """An operand as the kernel takes it, K the dimension `axis` of its matrices."""
        if not self.ragged:
            return x
        axis += len(self.lead)
        return x.reshape(*x.shape[:axis], self.leaves, self.leaf, *x.shape[axis + 1 :])

    def depths(self, step: jax.Array, box: int) -> tuple[Any, ...]:
        """The indices along K, as `with_leaves` has it, of a box of a step of the whole contraction."""
        config = self.config
        if not self.ragged:
            return (pl.ds(step * config.depth + box * config.tile_k, config.tile_k),)
        steps = jnp.int32(self.leaf_steps)
        start = lax.rem(step, steps) * config.depth + box * config.tile_k
        return lax.div(step, steps), pl.ds(start, config.tile_k)

    @property
    def part_steps(self) -> int:
        return self.part_leaves * self.leaf_steps

    @property
    def group(self) -> int:
        return min(self.config.group, self.part_leaves)

    @property
    def levels(self) -> int:
        """Tree levels inside a CTA at which a group's sum climbs."""
        return (self.part_leaves // self.group).bit_length() - 1

    @property
    def blocks(self) -> int:
        return self.config.tile_n // self.config.block

    @property
    def shares(self) -> bool:
        return self.config.shares(self.leaves)

    @property
    def joins(self) -> bool:
        """Whether CTAs add up one another's parts of a tile."""
        return self.config.split > 1 or self.cut_tiles > 0

    @property
    def x_rows(self) -> int:
        """Rows of x that are copied for a tile."""
        return self.config.x_rows(self.m)

    @property
    def x_ring(self) -> "Ring":
        """Boxes of x one below the other, x_rows apart.

        The tensor cores read as many rows as the tile has. Where x has fewer, they read into the boxes behind, whatever
        is there: a row of the product depends on its own row of x alone, and these rows are never stored.
        """
        config = self.config
        if self.transpose_lhs:  # a consumer's columns of x beside those of the next
            return self._ring(config.stages, config.boxes, config.consumers, config.tile_k, config.tile_m)
        rows = config.stages * config.boxes * self.x_rows + config.rows - self.x_rows
        return self._ring(rows, config.tile_k)

    @property
    def x_copies(self) -> int:
        """Copies of x in a box."""
        return self.config.consumers if self.transpose_lhs else 1

    def x_window(self, ref: Ref, slot: jax.Array, box: int, wg: jax.Array) -> Ref:
        """A consumer's rows in a box of `x_ring`."""
        if self.transpose_lhs:
            return ref.at[slot, box, wg].transpose((1, 0))
        start = self.x_start(slot, box) + wg * self.config.tile_m
        return ref.at[pl.ds(start, self.config.tile_m)]

    def x_start(self, slot: jax.Array, box: int) -> jax.Array:
        return (slot * self.config.boxes + box) * self.x_rows

    @property
    def w_ring(self) -> "Ring":
        tile = self.config.tile_k, self.config.tile_n
        ordered = tile[::-1] if self.transpose_rhs else tile
        return self._ring(self.config.stages, self.config.boxes, *ordered)

    def _ring(self, *shape: int) -> "Ring":
        # wgmma takes one swizzle for both operands, so x's, as wide as tile_k, also rules a w contiguous along N. An x
        # that is contiguous along M is as wide as tile_m, and tile_k is the same.
        return Ring(shape, self.dtype, self.config.tile_k * self.dtype.itemsize, self.interpret)

    @property
    def out_ring(self) -> "Ring":
        itemsize = self.out_dtype.itemsize
        slots, width = self.config.staged(self.leaves, itemsize)
        shape = (self.config.consumers, slots, self.config.tile_m, width)
        return Ring(shape, self.out_dtype, swizzle_of(width, itemsize), self.interpret)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        return self.config.consumers, self.config.tile_m, self.config.block

    def walk(self, body: Callable[..., Any], carry: Any) -> Any:
        """Runs body(place, carry) -> carry over this CTA's tiles, but for one that is cut."""

        def tile(info: plgpu.NDLoopInfo, carry: Any) -> Any:
            return body(self.place(info.index[0]), carry)

        if not self.whole_tiles:
            return carry
        axes = ("cluster", "part") if self.config.last_split > 1 else "cluster"
        return plgpu.nd_loop((self.whole_tiles,), collective_axes=axes, init_carry=carry)(tile)

    def cut_place(self) -> Place:
        """The cut tile of this CTA's cluster, if it has one."""
        return self.place(self.whole_tiles + lax.axis_index("cluster"))

    def has_cut_tile(self) -> jax.Array:
        return lax.axis_index("cluster") < self.cut_tiles

    def place(self, tile: jax.Array) -> Place:
        """This CTA's tile with a number on the snake."""
        config, minor = self.config, 0 if self.config.snake_rows else 1
        product: tuple[jax.Array, ...] = ()
        if self.batch is not None:
            each = jnp.int32(self.tiles_each)
            product, tile = (lax.div(tile, each),), lax.rem(tile, each)
        mi, ni = plgpu.planar_snake(tile, self.grid, minor, config.snake)
        mi = mi * config.multicast + lax.axis_index("pair")
        return Place(mi * config.rows, ni * config.half, product)


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of shared-memory tiles that TMA and the warpgroups share.

    wgmma wants its operands in tiles of (8, swizzle). To have TMA fill them Pallas tiles the array in memory as well,
    and refuses one that does not divide into tiles, though TMA clips anywhere. But in a buffer as wide as the swizzle
    every byte has the same place tiled and untiled. Such a buffer gets two names, the tiled one for the warpgroups and
    a plain one for TMA, which then takes any number of rows and columns.

    The interpreter ignores layouts, and would keep two names in two buffers; there one name serves both.
    """

    shape: tuple[int, ...]
    dtype: Any
    swizzle: int
    interpret: bool

    @property
    def two_names(self) -> bool:
        return self.shape[-1] * self.dtype.itemsize == self.swizzle and not self.interpret

    def names(self) -> tuple[Any, ...]:
        transforms = tiling(self.swizzle, self.dtype.itemsize)
        tiled = plgpu.SMEM(self.shape, self.dtype, transforms=transforms)
        if not self.two_names:
            return (tiled,)
        return tiled, plgpu.SMEM(self.shape, self.dtype, transforms=transforms[1:])


def named_buffer(*names: Any) -> Any:
    return names[0] if len(names) == 1 else plgpu.RefUnion(*names)


def names_of(ref: Ref, count: int) -> tuple[Ref, ...]:
    return (ref,) if count == 1 else tuple(ref[i] for i in range(count))


def tiling(swizzle: int, itemsize: int) -> tuple[Any, Any]:
    """The layout in shared memory that wgmma reads and TMA writes."""
    tile, transform = (8, swizzle // itemsize), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return plgpu.TilingTransform(tile), transform  # type: ignore[abstract]


def swizzle_of(columns: int, itemsize: int) -> int:
    return plgpu.find_swizzle(8 * itemsize * columns)
