"""Tree-ordered matmul for Hopper GPUs, in Pallas Mosaic GPU.

The product is the one `reference.py` specifies. One kernel serves every case: persistent CTAs walk the work items, one
warpgroup of a CTA streams tiles of x and w into a ring of shared-memory stages with TMA, and the others ("consumers")
multiply, each owning `tile_m` rows of the CTA's tile. `MosaicConfig.split` says what an item is:

* 1, "serial": an output tile. The consumers run its leaves one after the other, each in a fresh accumulator, and merge
  them with a binary counter: a finished subtree is added to the complete one on its left, or waits for its right
  sibling. The first tree level waits in registers, the second in shared memory, the third in a per-CTA scratch in
  global memory: the registers hold one level, and shared memory holds one beside enough stages.
* more, "splitk": a part of the leaves of an output tile, so that few tiles still fill the GPU. Parts go to memory as
  fp32 partials [split, M, N], which a second step adds in the same tree.

Every split does the same adds on the same leaves, so it shows in the bits as little as the tile does.

Ragged shapes need no padding in memory: TMA reads zeros outside of an array and writes nothing there. `_Ring` has the
one complication.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.rounding import round_to
from ..common.tree import tree_join
from .plan import check_leaves

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel

_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_FLOAT32 = jnp.dtype(jnp.float32)

_SMS = 132  # of an H100 SXM and an H200
_SMEM_BYTES = 227 * 1024 - 1024  # of a Hopper CTA, less room for barriers
_BLOCK_BYTES = 128  # width of a staged block of the output: the widest swizzle
_PRODUCER_REGISTERS = 40
_REGISTER_LEVELS = 1
_SHARED_LEVELS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """How the product is tiled. No field can change a bit of the result.

    Attributes:
        split: Parts that the leaves of a tile are cut into, each an item of its own: 1, 2, 4 or 8.
        consumers: Warpgroups that multiply. The CTA's tile has consumers * tile_m rows.
        tile_m: Rows of one consumer, a multiple of 64.
        tile_n: Columns of the tile, a multiple of 16.
        tile_k: Depth of one stage, 64, 32 or 16; it divides the leaf.
        stages: Tiles of x and w in flight.
        snake: Width of the snake in which the CTAs walk the output tiles, for hits in L2.
    """

    split: int
    consumers: int
    tile_m: int = 64
    tile_n: int
    tile_k: int
    stages: int
    snake: int = 8

    @property
    def kind(self) -> Literal["serial", "splitk"]:
        return "serial" if self.split == 1 else "splitk"

    @property
    def rows(self) -> int:
        return self.consumers * self.tile_m


def choose_config(m: int, n: int, k: int, leaves: int, *, transpose_rhs: bool = False) -> MosaicConfig:
    """Picks the tiling for x [m, k] @ w. It decides the speed and nothing else.

    Args:
        m: Rows of x.
        n: Columns of the product.
        k: Length of the contraction.
        leaves: Leaves that k is cut into.
        transpose_rhs: Whether w is [n, k].

    Returns:
        A configuration that fits into shared memory for every output type.
    """
    tile_k = next(t for t in (64, 32, 16) if k // leaves % t == 0)
    consumers = 1 if m <= 64 else 2
    m_tiles = pl.cdiv(m, 64 * consumers)
    if not transpose_rhs and not _tiles_evenly(n, tile_k):
        tile_n = tile_k
    elif leaves == 1 and m > 64 and m_tiles * pl.cdiv(n, 256) >= _SMS:
        tile_n = 256  # as many registers as a consumer can spare, with no subtree waiting in them
    else:
        tile_n = 64 if n <= 64 or m_tiles * pl.cdiv(n, 128) * leaves < _SMS else 128
    tiles = m_tiles * pl.cdiv(n, tile_n)

    def cost(split: int) -> float:  # in tiles that an SM does one after the other
        # Writing a part and reading it again takes about as long as 600 k's of a tile.
        moved = split * tiles / _SMS * min(m, 128) / 128 * 600 / k if split > 1 else 0
        return -(-tiles * split // _SMS) / split + moved

    split = min((s for s in (1, 2, 4, 8) if s <= leaves), key=cost)
    config = MosaicConfig(split=split, consumers=consumers, tile_n=tile_n, tile_k=tile_k, stages=0)
    free = _SMEM_BYTES - _smem_bytes(config, leaves, _FLOAT32)
    return dataclasses.replace(config, stages=min(8, free // _stage_bytes(config)))


def tree_matmul_mosaic_gpu(
    x: jax.Array,
    w: jax.Array,
    *,
    leaves: int,
    out_dtype: jax.typing.DTypeLike,
    transpose_rhs: bool = False,
    config: MosaicConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies x and w in tree order on a Hopper GPU.

    Args:
        x: [M, K], bfloat16 or float16, any M >= 1.
        w: [K, N], or [N, K] with `transpose_rhs`, of x's type; N a multiple of 16.
        leaves: 1, 2, 4 or 8 equal slices of K, each a multiple of 16 long.
        out_dtype: bfloat16, float16 or float32; the total is rounded to it once.
        transpose_rhs: Whether w is [N, K]. It is read as it lies, not transposed in memory.
        config: The tiling; `choose_config`'s by default.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly. Shows order and synchronisation, not
            the bits of a GPU.

    Returns:
        [M, N] in `out_dtype`.

    Raises:
        ValueError: If a shape, a type, `leaves`, `config` or the device is not covered.
    """
    m, n, k = _check_operands(x, w, leaves, jnp.dtype(out_dtype), transpose_rhs)
    config = config or choose_config(m, n, k, leaves, transpose_rhs=transpose_rhs)
    problem = _Problem(
        m=m,
        n=n,
        k=k,
        leaves=leaves,
        dtype=x.dtype,
        out_dtype=jnp.dtype(out_dtype),
        transpose_rhs=transpose_rhs,
        config=config,
        interpret=interpret,
    )
    _check_config(problem)
    return _run(x, w, problem, min(2 if interpret else _count_sms(), problem.items))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """One call: its sizes and types, its tiling, and what follows from them."""

    m: int
    n: int
    k: int
    leaves: int
    dtype: Any
    out_dtype: Any
    transpose_rhs: bool
    config: MosaicConfig
    interpret: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Output tiles, down and across."""
        return pl.cdiv(self.m, self.config.rows), pl.cdiv(self.n, self.config.tile_n)

    @property
    def items(self) -> int:
        return self.config.split * self.grid[0] * self.grid[1]

    @property
    def item_leaves(self) -> int:
        return self.leaves // self.config.split

    @property
    def item_steps(self) -> int:
        return self.k // self.config.split // self.config.tile_k

    @property
    def item_dtype(self) -> Any:
        return self.out_dtype if self.config.split == 1 else _FLOAT32

    @property
    def levels(self) -> int:
        """Tree levels of an item at which a subtree waits for its sibling."""
        return self.item_leaves.bit_length() - 1

    @property
    def x_ring(self) -> "_Ring":
        return self._ring(self.config.rows, self.config.tile_k)

    @property
    def w_ring(self) -> "_Ring":
        tile = self.config.tile_k, self.config.tile_n
        return self._ring(*(tile[::-1] if self.transpose_rhs else tile))

    def _ring(self, *tile: int) -> "_Ring":
        # wgmma takes one swizzle for both operands, so x's, as wide as tile_k, also rules a w contiguous along N.
        swizzle = self.config.tile_k * self.dtype.itemsize
        return _Ring((self.config.stages, *tile), self.dtype, swizzle, self.interpret)

    @property
    def out_ring(self) -> "_Ring":
        """Staged blocks of the output, two a consumer where its tile has more than one."""
        config, itemsize = self.config, self.item_dtype.itemsize
        width = min(_BLOCK_BYTES // itemsize, config.tile_n)
        shape = (config.consumers, min(2, config.tile_n // width), config.tile_m, width)
        return _Ring(shape, self.item_dtype, _swizzle(width, itemsize), self.interpret)

    def walk(self, body: Callable[..., jax.Array]) -> jax.Array:
        """Runs body(part, row, column, count) -> count over this CTA's items from 0; row and column in elements."""

        def item(info: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            part, tile = info.index
            mi, ni = plgpu.planar_snake(tile, self.grid, 1, self.config.snake)
            return body(part, mi * self.config.rows, ni * self.config.tile_n, carry)

        space = (self.config.split, self.grid[0] * self.grid[1])
        return plgpu.nd_loop(space, collective_axes="cta", init_carry=jnp.int32(0))(item)


@dataclasses.dataclass(frozen=True)
class _Ring:
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

    def scratch(self) -> Any:
        transforms = _tiled(self.swizzle, self.dtype.itemsize)
        tiled = plgpu.SMEM(self.shape, self.dtype, transforms=transforms)
        if not self.two_names:
            return tiled
        return plgpu.RefUnion(tiled, plgpu.SMEM(self.shape, self.dtype, transforms=transforms[1:]))

    def for_warpgroups(self, ref: _Ref) -> _Ref:
        return ref[0] if self.two_names else ref

    def for_tma(self, ref: _Ref) -> _Ref:
        return ref[1] if self.two_names else ref


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run(x: jax.Array, w: jax.Array, problem: _Problem, ctas: int) -> jax.Array:
    """The product from `ctas` CTAs."""
    config = problem.config
    part_shape = (config.consumers, config.tile_m, config.tile_n)
    shape = (problem.m, problem.n) if config.split == 1 else (config.split, problem.m, problem.n)
    out_type = [jax.ShapeDtypeStruct(shape, problem.item_dtype)]
    spilled = problem.levels - _REGISTER_LEVELS - _SHARED_LEVELS
    if spilled > 0:
        out_type.append(jax.ShapeDtypeStruct((ctas, spilled, *part_shape), jnp.float32))
    scratch: dict[str, Any] = {
        "x": problem.x_ring.scratch(),
        "w": problem.w_ring.scratch(),
        "out": problem.out_ring.scratch(),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),  # one arrival an operand
        "empty": plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages),
    }
    if problem.levels > _REGISTER_LEVELS:
        layout = _tiled(_swizzle(config.tile_n, 4), 4)
        scratch["saved"] = plgpu.SMEM((_SHARED_LEVELS, *part_shape), jnp.float32, transforms=layout)
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=out_type,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=config.consumers + 1,
        thread_name="wg",
        kernel_name="tree_matmul",
        interpret=plgpu.InterpretGPUParams() if problem.interpret else None,
    )
    out = kernel(x, w)[0]
    # XLA neither reorders fp32 adds nor moves the rounding in `round_to`, so the last step may fuse with what follows.
    return out if config.split == 1 else round_to(tree_join(list(out)), problem.out_dtype)


def _kernel(
    problem: _Problem, x_gmem: _Ref, w_gmem: _Ref, out_gmem: _Ref, *spill: _Ref, **scratch: _Ref
) -> None:
    wg, consumers = lax.axis_index("wg"), problem.config.consumers
    smem = types.SimpleNamespace(**{"saved": None} | scratch)

    def set_registers(count: int, action: Literal["decrease", "increase"]) -> None:
        if consumers > 1:  # with one consumer a thread has all the registers it can address from the start
            plgpu.set_max_registers(count, action=action)

    @pl.when(wg == consumers)
    def _() -> None:
        set_registers(_PRODUCER_REGISTERS, "decrease")
        _produce(problem, x_gmem, w_gmem, smem)

    @pl.when(wg < consumers)
    def _() -> None:
        set_registers((512 - _PRODUCER_REGISTERS) // consumers // 8 * 8, "increase")
        _consume(problem, smem, out_gmem, spill)


def _produce(problem: _Problem, x_gmem: _Ref, w_gmem: _Ref, smem: types.SimpleNamespace) -> None:
    """Streams the stages of this CTA's items, each as soon as the consumers have freed its slot."""
    config, stages = problem.config, jnp.int32(problem.config.stages)
    x_dst, w_dst = problem.x_ring.for_tma(smem.x), problem.w_ring.for_tma(smem.w)

    def wait_until_empty(slot: jax.Array) -> None:
        plgpu.barrier_wait(smem.empty.at[slot])

    def item(part: jax.Array, row: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
        rows, columns = pl.ds(row, config.rows), pl.ds(column, config.tile_n)

        def step(i: jax.Array, count: jax.Array) -> jax.Array:
            slot = lax.rem(count, stages)

            pl.when(count >= stages)(lambda: wait_until_empty(slot))
            ks = pl.ds((part * problem.item_steps + i) * config.tile_k, config.tile_k)
            w_src = w_gmem.at[columns, ks] if problem.transpose_rhs else w_gmem.at[ks, columns]
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, ks], x_dst.at[slot], smem.full.at[slot])
            plgpu.copy_gmem_to_smem(w_src, w_dst.at[slot], smem.full.at[slot])
            return count + 1

        return lax.fori_loop(0, problem.item_steps, step, count)

    count = problem.walk(item)
    # No barrier may go away while an arrival is pending: see the last use of every slot freed.
    lax.fori_loop(
        jnp.maximum(count - stages, 0), count, lambda i, _: wait_until_empty(lax.rem(i, stages)), None
    )


def _consume(problem: _Problem, smem: types.SimpleNamespace, out_gmem: _Ref, spill: tuple[_Ref, ...]) -> None:
    """Multiplies, merges and stores this warpgroup's rows of every item."""
    wg, config = lax.axis_index("wg"), problem.config
    x_src, w_src = problem.x_ring.for_warpgroups(smem.x), problem.w_ring.for_warpgroups(smem.w)
    homes: list[_Registers | _Memory] = [_Registers() for _ in range(_REGISTER_LEVELS)]
    if smem.saved is not None:
        homes += [_Memory(smem.saved.at[i, wg], optimized=True) for i in range(_SHARED_LEVELS)]
    for scratch in spill:
        mine = scratch.at[lax.axis_index("cta")]
        homes += [_Memory(mine.at[i, wg], optimized=False) for i in range(scratch.shape[1])]

    def leaf(acc: _Ref, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(_: jax.Array, count: jax.Array) -> jax.Array:
            slot = lax.rem(count, jnp.int32(config.stages))
            plgpu.barrier_wait(smem.full.at[slot])
            b = w_src.at[slot].transpose((1, 0)) if problem.transpose_rhs else w_src.at[slot]
            plgpu.wgmma(acc, x_src.at[slot, pl.ds(wg * config.tile_m, config.tile_m)], b)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem.empty.at[slot])
            return count + 1

        count = lax.fori_loop(0, problem.item_steps // problem.item_leaves, step, count)
        return acc[...], count

    def item(part: jax.Array, row: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
        for index in range(problem.item_leaves):
            acc = plgpu.ACC((config.tile_m, config.tile_n), jnp.float32)  # fresh, and so zero, for every leaf
            value, count = pl.run_scoped(functools.partial(leaf, count=count), acc)
            level = 0
            while index >> level & 1:  # the sibling on the left is complete
                value, level = homes[level].take() + value, level + 1
            if index + 1 < problem.item_leaves:
                homes[level].keep(value)
        _store(problem, value, smem.out, out_gmem, part, row + wg * config.tile_m, column)
        return count

    problem.walk(item)
    plgpu.wait_smem_to_gmem(0)


def _store(
    problem: _Problem,
    value: jax.Array,
    out_smem: _Ref,
    out_gmem: _Ref,
    part: jax.Array,
    row: jax.Array,
    column: jax.Array,
) -> None:
    """Rounds a warpgroup's [tile_m, tile_n] once and stores it through shared memory, block by block."""
    wg, ring = lax.axis_index("wg"), problem.out_ring
    _, slots, height, width = ring.shape
    staged, src = ring.for_warpgroups(out_smem), ring.for_tma(out_smem)
    value = value.astype(problem.item_dtype)
    for block in range(problem.config.tile_n // width):
        slot, start = block % slots, block * width
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # the last copy out of this slot
        staged.at[wg, slot][...] = value[:, start : start + width]
        plgpu.commit_smem()
        window = pl.ds(row, height), pl.ds(column + start, width)
        dst = out_gmem.at[window] if problem.config.split == 1 else out_gmem.at[part, *window]
        plgpu.copy_smem_to_gmem(src.at[wg, slot], dst)


class _Registers:
    """Where a subtree waits: the warpgroup's registers."""

    def keep(self, value: jax.Array) -> None:
        self._value = value

    def take(self) -> jax.Array:
        return self._value


@dataclasses.dataclass(frozen=True)
class _Memory:
    """Where a subtree waits: memory of this warpgroup alone. Every thread reads what it wrote itself: no fences."""

    ref: _Ref
    optimized: bool

    def keep(self, value: jax.Array) -> None:
        self.ref[...] = value

    def take(self) -> jax.Array:
        return plgpu.load(self.ref, layout=plgpu.Layout.WGMMA, optimized=self.optimized)


def _tiled(swizzle: int, itemsize: int) -> tuple[Any, Any]:
    tiling, transform = (8, swizzle // itemsize), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return plgpu.TilingTransform(tiling), transform  # type: ignore[abstract]


def _swizzle(columns: int, itemsize: int) -> int:
    return plgpu.find_swizzle(8 * itemsize * columns)


def _tiles_evenly(n: int, width: int) -> bool:
    """Whether Pallas can tile rows of n contiguous elements by `width` (see `_Ring`)."""
    return n % width == 0 or n < width


def _stage_bytes(config: MosaicConfig) -> int:
    return 2 * config.tile_k * (config.rows + config.tile_n)


def _smem_bytes(config: MosaicConfig, leaves: int, out_dtype: Any) -> int:
    """Shared memory of a CTA: the stages, the staged output, and the subtrees that wait there."""
    width = min(_BLOCK_BYTES // out_dtype.itemsize, config.tile_n)
    staged = min(2 * width, config.tile_n) * config.rows * out_dtype.itemsize
    saved = 4 * config.rows * config.tile_n if leaves // config.split > 2 else 0
    return config.stages * _stage_bytes(config) + staged + saved


def _check_operands(
    x: jax.Array, w: jax.Array, leaves: int, out_dtype: Any, transpose_rhs: bool
) -> tuple[int, int, int]:
    """Returns (m, n, k), or says what is not covered."""
    stored = "[N, K]" if transpose_rhs else "[K, N]"
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError(f"x {x.shape} and w {w.shape} must be matrices [M, K] and {stored}")
    (m, k), (n, w_k) = x.shape, w.shape if transpose_rhs else w.shape[::-1]
    if k != w_k:
        raise ValueError(f"x has K={k} and w {stored} has K={w_k} (shapes {x.shape} and {w.shape})")
    if x.dtype != w.dtype or x.dtype not in _HALF:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; both must be bfloat16, or both float16")
    if out_dtype not in (*_HALF, _FLOAT32):
        raise ValueError(f"out_dtype={out_dtype} is not supported; use bfloat16, float16 or float32")
    check_leaves(k, leaves)
    if m < 1 or n < 16 or n % 16:
        rounded = max(16, -(-n // 16) * 16)
        raise ValueError(f"m={m} must be at least 1 and n={n} a multiple of 16; pad w to {rounded} columns")
    return m, n, k


def _check_config(problem: _Problem) -> None:
    """Says what is wrong with a tiling given by hand; `choose_config`'s pass."""
    config, leaf = problem.config, problem.k // problem.leaves
    if config.split < 1 or problem.leaves % config.split:
        raise ValueError(f"split={config.split} does not cut {problem.leaves} leaves evenly")
    if config.tile_k not in (16, 32, 64) or leaf % config.tile_k:
        raise ValueError(f"tile_k={config.tile_k} must be 16, 32 or 64 and divide the leaf of {leaf}")
    if config.tile_m % 64 or config.rows not in range(64, 257) or config.tile_n not in range(16, 257, 16):
        raise ValueError(
            f"a tile of {config.consumers} * {config.tile_m} rows and {config.tile_n} columns is not possible; "
            "use a multiple of 64 rows a consumer and of 16 columns, at most 256 of each in all"
        )
    even = config.tile_n % config.tile_k == 0 and _tiles_evenly(problem.n, config.tile_k)
    if not (problem.transpose_rhs or even or config.tile_n == config.tile_k):
        raise ValueError(
            f"n={problem.n} columns of w [K, N] do not divide into tile_n={config.tile_n} at "
            f"tile_k={config.tile_k}; use tile_n={config.tile_k}"
        )
    used = _smem_bytes(config, problem.leaves, problem.item_dtype)
    fitting = config.stages + (_SMEM_BYTES - used) // _stage_bytes(config)
    if not 0 < config.stages <= min(fitting, 32):  # 32: phases of a ring's barriers share one register
        raise ValueError(
            f"stages={config.stages} need {used} bytes of shared memory of {_SMEM_BYTES}; use 1 to "
            f"{min(fitting, 32)}, or smaller tiles"
        )


def _count_sms() -> int:
    """SMs of the default device, which must be a Hopper GPU."""
    device = jax.extend.backend.get_default_device()
    capability = str(getattr(device, "compute_capability", "none"))
    if not capability.startswith("9."):
        raise ValueError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.x) and the default device is {device} "
            f"({capability}); use backend='reference' there"
        )
    return getattr(device, "core_count", _SMS)
