"""One product of few rows: its sizes, what follows from them, and its buffers in shared memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows
from ..tree_matmul.mosaic_problem import Ref, Ring
from .config import MOST_ROWS, TILE_K, FewRowsConfig

_SWIZZLE = 128  # bytes of a box's row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product, with the norm before it if it has one.

    Attributes:
        m: rows.
        n: rows or columns of w that belong to the result, gates and values together.
        k: length of the contraction.
        leaves: of it.
        dtype: of x and w.
        out_dtype: of the result.
        transpose_rhs: whether w is [n, k].
        gated: whether the result is the SwiGLU of gates and values.
        eps: of the norm; None without one.
        adds: whether something is added before the norm.
        config: how it is cut.
        ctas: that run at once.
        interpret: whether the interpreter runs it.
    """

    m: int
    n: int
    k: int
    leaves: int
    dtype: Any
    out_dtype: Any
    transpose_rhs: bool = False
    gated: bool = False
    eps: float | None = None
    adds: bool = False
    config: FewRowsConfig
    ctas: int
    interpret: bool

    @property
    def columns(self) -> int:
        return self.n // 2 if self.gated else self.n

    @property
    def width(self) -> int:
        """Columns of the result that a tile makes."""
        return self.config.columns

    @property
    def box_rows(self) -> int:
        return self.config.box_rows(gated=self.gated)

    @property
    def window(self) -> int:
        return self.config.window(gated=self.gated)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.columns, self.width)

    @property
    def parts(self) -> int:
        return self.config.parts

    @property
    def ctas_a_part(self) -> int:
        return min(max(1, self.ctas // self.parts), self.tiles)

    @property
    def part_k(self) -> int:
        return self.k // self.parts

    @property
    def part_leaves(self) -> int:
        return self.leaves // self.parts

    @property
    def depth(self) -> int:
        """k's of a stage."""
        return self.config.boxes * TILE_K

    @property
    def leaf_steps(self) -> int:
        return self.k // self.leaves // self.depth

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.part_leaves * self.leaf_steps

    @property
    def chunk(self) -> int:
        """Elements of a row that a warpgroup holds side by side."""
        return rows.THREADS * rows.vector_size(self.part_k)

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """[parts, m, columns]; the interpreter clips no tile at the edge."""
        columns = self.tiles * self.width if self.interpret else self.columns
        return jax.ShapeDtypeStruct((self.parts, self.m, columns), self.out_dtype)

    @property
    def total(self) -> jax.ShapeDtypeStruct:
        """What is normalised."""
        return jax.ShapeDtypeStruct((self.m, self.k), self.dtype)

    def mine(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The part of this CTA, its first tile, and how many tiles it has."""
        cta, ctas = lax.axis_index("cta"), jnp.int32(self.ctas_a_part)
        part, first = lax.div(cta, ctas), lax.rem(cta, ctas)
        tiles = lax.div(self.tiles - first + ctas - 1, ctas)
        return part, first, jnp.where(part < self.parts, tiles, 0)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Products that one launch runs one after the other, with all CTAs together between two of them."""

    products: tuple[Product, ...]

    @property
    def _first(self) -> Product:
        return self.products[0]

    @property
    def stages(self) -> int:
        return self._first.config.stages

    @property
    def preparers(self) -> int:
        return self._first.config.preparers

    @property
    def paced(self) -> bool:
        """Whether the warp that asks for stages sees them arrive."""
        return self._first.config.flying is not None

    @property
    def interpret(self) -> bool:
        return self._first.interpret

    @property
    def ctas(self) -> int:
        return max(each.parts * each.ctas_a_part for each in self.products)

    @property
    def copies(self) -> int:
        """Of a stage of every product: the barriers that count them are the same."""
        return max(each.config.boxes * (1 + each.gated) for each in self.products)

    @property
    def pitch(self) -> int:
        """Rows of boxes of a stage."""
        return max(each.config.boxes * each.box_rows for each in self.products)

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers, as `stages` names them."""
        each, window = self.products, max(product.window for product in self.products)
        return {
            "x": self._boxes(max(product.config.x_rows(product.k) for product in each)),
            "w": self._boxes(
                self.stages * self.pitch + max(product.window - product.box_rows for product in each)
            ),
            "staged": plgpu.SMEM((MOST_ROWS, window + rows.THREADS), jnp.float32),
            "sums": plgpu.SMEM((self.preparers, 2, max(product.chunk for product in each)), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "empty": plgpu.Barrier(num_arrivals=1, num_barriers=self.stages),
            "ready": plgpu.Barrier(num_arrivals=self.preparers),
            "asked": plgpu.Barrier(num_arrivals=min(self.preparers, self._first.m)),
        }

    def _boxes(self, count: int) -> Any:
        """`count` rows of boxes: under the name that wgmma reads, and under one for TMA and one for threads."""
        ring = Ring((count, TILE_K), self._first.dtype, _SWIZZLE, self.interpret)
        if self.interpret:
            return ring.names()[0]
        return plgpu.RefUnion(*ring.names(), plgpu.SMEM(ring.shape, ring.dtype))

    def tiled(self, ref: Ref) -> Ref:
        """Boxes as wgmma reads them."""
        return ref if self.interpret else ref[0]

    def plain(self, ref: Ref) -> Ref:
        """Boxes as TMA writes them."""
        return ref if self.interpret else ref[1]

    def raw(self, ref: Ref) -> Ref:
        """Boxes as they lie."""
        return ref if self.interpret else ref[2]
