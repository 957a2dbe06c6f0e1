"""One call of the GPU kernel: its sizes and types, its variant, and the memory that follows from them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arithmetic import Product
from .config import ROWS, AttentionConfig, AttentionShape
from .plan import AttentionPlan

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel

WIDTH = 64  # columns of 16 bits that are as wide as the swizzle
JOINED_TILE = 64  # splits that a second launch joins at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: its sizes and types, its order, its variant, and what follows from them."""

    shape: AttentionShape
    dtype: Any
    plan: AttentionPlan
    scale: float
    config: AttentionConfig
    with_lse: bool = False
    interpret: bool

    @property
    def factor(self) -> float:
        """Turns scores into exponents of two."""
        return self.scale * math.log2(math.e)

    @property
    def product(self) -> Product:
        return Product(self.interpret)

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
    def stored_splits(self) -> int:
        """Splits that have a place in global memory: whole tiles, so that a second launch reads only what is there."""
        return pl.cdiv(self.splits, JOINED_TILE) * JOINED_TILE if self.config.second_launch else self.splits

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
        return plgpu.SMEM(shape, self.dtype, transforms=tiling_of(self.dtype.itemsize))

    @property
    def parts(self) -> int:
        """Parts of a head that are as wide as the swizzle."""
        return self.shape.h // WIDTH

    def queries(self, *shape: int) -> Any:
        """Shared memory [*shape, parts, ROWS, WIDTH] for queries, and for the output.

        To have TMA fill tiled memory Pallas tiles the array in global memory as well, and refuses one that does not
        divide into tiles of 8 rows, though TMA clips anywhere. But in a buffer as wide as the swizzle every byte has
        the same place tiled and untiled. So it gets two names, the tiled one for the warpgroups and a plain one for
        TMA, which then takes any number of rows. The interpreter ignores layouts, and would keep two names in two
        buffers; there one name serves both.
        """
        whole, transforms = (*shape, self.parts, ROWS, WIDTH), tiling_of(self.dtype.itemsize)
        tiled = plgpu.SMEM(whole, self.dtype, transforms=transforms)
        if self.interpret:
            return tiled
        return plgpu.RefUnion(tiled, plgpu.SMEM(whole, self.dtype, transforms=transforms[1:]))

    def names(self, ref: _Ref) -> tuple[_Ref, _Ref]:
        """The warpgroups' and TMA's name of such memory."""
        return (ref, ref) if self.interpret else (ref[0], ref[1])

    def sums(self, *shape: int) -> Any:
        """Shared memory for fp32 rows [..., ROWS, H]."""
        return plgpu.SMEM(shape, jnp.float32, transforms=tiling_of(4))

    def rings(self, consumers: int) -> dict[str, Any]:
        """Shared memory and barriers of the streams of keys and values."""
        tile = self.plan.block, self.shape.h
        keys, values = self.config.stages, self.config.value_stages
        stand_ins = {}  # see walk._with_accumulator
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


def tiling_of(itemsize: int) -> tuple[Any, Any]:
    tiling, transform = (8, 128 // itemsize), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    return plgpu.TilingTransform(tiling), transform  # type: ignore[abstract]
