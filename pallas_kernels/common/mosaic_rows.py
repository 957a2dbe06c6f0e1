"""What the row-wise kernels for Hopper GPUs share: how a row lies in registers, and the halving sum across threads.

A warpgroup of 128 threads holds a chunk of a row, `128 * v` consecutive elements with v <= 8 to a thread, so that a
warp reads and writes whole lines of memory. `tree_sum` halves a row from the top: first chunks meet element by element,
then warps, then lanes, and at last a thread's neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .rounding import mul, reciprocal_sqrt
from .tree import tree_join, tree_sum

Ref = Any  # Pallas has no public type for what its refs become inside a kernel

THREADS = 128
LANES = 32
WARPS = 4
HEAD_VECTOR = 4  # elements of half a head that a lane holds
_WIDEST = 8  # elements of 16 bits in the widest load


def vector_size(d: int) -> int:
    """Elements a thread of a chunk: the most, up to 8, that cut a row of `d`, a multiple of 128, into equal chunks."""
    v = _WIDEST
    while d % (THREADS * v):
        v //= 2
    return v


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How an elementwise kernel cuts rows of `n` >= 128 elements: a CTA takes `chunks` chunks of one row.

    The last chunk ends with its row: where n is no multiple of a chunk it overlaps its neighbour, and both write the
    same values there. Bits do not depend on the cut.
    """

    n: int
    chunks: int

    @classmethod
    def choose(cls, m: int, n: int, chunks: int | None) -> "Tiles":
        """For m rows: many bytes in flight in each CTA where there are many, else as many CTAs as possible."""
        small = cls(n, 1)
        if chunks is None:
            chunks = 4 if m * small.per_row > 1024 else 1
        return cls(n, min(chunks, small.per_row))

    @property
    def size(self) -> int:
        """Elements of a chunk."""
        return THREADS * min(_WIDEST, 1 << ((self.n // THREADS).bit_length() - 1))

    @property
    def per_row(self) -> int:
        return pl.cdiv(self.n, self.size * self.chunks)

    def mine(self) -> tuple[jax.Array, list[jax.Array]]:
        """The row of this CTA, axis "tile" of the grid, and where its chunks begin."""
        tile = lax.axis_index("tile")
        first = lax.rem(tile, jnp.int32(self.per_row)) * (self.chunks * self.size)
        starts = [jnp.minimum(first + i * self.size, self.n - self.size) for i in range(self.chunks)]
        return lax.div(tile, jnp.int32(self.per_row)), starts


def chunk_layout(size: int) -> Any:
    """The layout of a chunk of `size` elements, a multiple of 128."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=size // THREADS)


def load_chunk(ref: Ref, start: Any, size: int) -> jax.Array:
    """Elements start .. start + size of a row in global memory."""
    return plgpu.load(ref.at[pl.ds(start, size)], layout=chunk_layout(size), optimized=False)


def load_term(ref: Ref, row: Any, start: Any, size: int, dtype: Any) -> jax.Array:
    """Elements start .. start + size of a row of [M, D]; or of subtrees of a sum, float32 [P, M, D], joined."""
    if len(ref.shape) == 2:
        return load_chunk(ref.at[row], start, size)
    parts = [load_chunk(ref.at[i, row], start, size) for i in range(ref.shape[0])]
    return tree_join(parts).astype(dtype)


def store_chunk(ref: Ref, start: Any, chunk: jax.Array) -> None:
    """Stores a chunk to a row in global memory from `start` on."""
    ref.at[pl.ds(start, chunk.shape[0])][...] = chunk


def multiply(x: jax.Array, y: jax.Array | np.float32, layout: Any, interpret: bool) -> jax.Array:
    """The fp32 product of two arrays in `layout`, or of one and a constant, rounded by itself.

    Mosaic marks its own multiplications so that LLVM and ptxas may contract them into a later add; an optimisation
    barrier stops only LLVM.
    """
    if interpret:
        return mul(x, y)
    if isinstance(y, np.float32):
        return _multiply_by(x.shape, layout, float(y))(x)
    return _pointwise(_multiply_registers, x.shape, layout)(x, y)


def divide(x: jax.Array, y: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """The fp32 quotient of two arrays in `layout`, correctly rounded; Mosaic's own division is an approximation."""
    return x / y if interpret else _pointwise(_divide_registers, x.shape, layout)(x, y)


@functools.cache
def _pointwise(function: Callable[..., ir.Value], shape: tuple[int, ...], layout: Any) -> Any:
    @plgpu.inline_mgpu(
        arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def body(_: Any, x: Any, y: Any) -> Any:
        return x._pointwise(function, y)

    return body


@functools.cache
def _multiply_by(shape: tuple[int, ...], layout: Any, constant: float) -> Any:
    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def body(_: Any, x: Any) -> Any:
        factor = mgpu.c(constant, ir.F32Type.get())
        return x._pointwise(lambda register: arith.mulf(register, vector.broadcast(register.type, factor)))

    return body


def _multiply_registers(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.mulf(x, y)


def _divide_registers(x: ir.Value, y: ir.Value) -> ir.Value:
    f32 = ir.F32Type.get()
    quotients = [
        llvm.inline_asm(f32, [a, b], "div.rn.f32 $0, $1, $2;", "=f,f,f")
        for a, b in zip(_elements(x), _elements(y), strict=True)
    ]
    return vector.from_elements(x.type, quotients)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in float32, rounded to x's dtype once."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def interpreted(interpret: bool) -> Any:
    """The `interpret` argument of `plgpu.kernel`."""
    return plgpu.InterpretGPUParams(inline_mgpu="ignore") if interpret else None


def inverse_rms(
    chunks: Sequence[jax.Array], scratch: Ref, *, d: int, eps: float, interpret: bool
) -> jax.Array:
    """1 / sqrt(mean of squares + eps) of a row, as a scalar, by the steps and in the order of `rms_norm_reference`.

    A row that is no power of two long is one that zeros continue. Squares are never -0.0, so adding a zero changes
    nothing, and is left out.

    Args:
        chunks: the row, float32, each [128 * v] as `load_chunk` lays it.
        scratch: shared memory, float32 [128 * v]; good for one call, since nothing waits until it has been read.
        d: length of the row.
        eps: added to the mean square.
        interpret: Whether the interpreter runs this; it has no shuffles.
    """
    parts = [x * x for x in chunks]  # exact in fp32, so that contraction into the adds changes nothing
    width = 1 << (len(parts) - 1).bit_length()
    while width > 1:
        width //= 2
        parts = [x + y for x, y in zip(parts, parts[width:], strict=False)] + parts[
            len(parts) - width : width
        ]
    if interpret:
        return reciprocal_sqrt(mul(tree_sum(parts[0]), np.float32(1 / d)) + np.float32(eps))
    return _inverse_rms(parts[0].shape[0], d, eps)(parts[0], scratch)


def normalise(
    chunks: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    scratch: Ref,
    *,
    d: int,
    eps: float,
    interpret: bool,
) -> list[jax.Array]:
    """RMSNorm of a row, rounded to its dtype once, by the steps of `rms_norm_reference`.

    Args:
        chunks: the row, each [128 * v] as `load_chunk` lays it.
        scales: the scale, laid likewise.
        scratch: as `inverse_rms` takes it.
        d: length of the row.
        eps: added to the mean square.
        interpret: Whether the interpreter runs this.
    """
    wide = [chunk.astype(jnp.float32) for chunk in chunks]
    inverse = inverse_rms(wide, scratch, d=d, eps=eps, interpret=interpret)
    return [
        (chunk * inverse * scale.astype(jnp.float32)).astype(chunks[0].dtype)
        for chunk, scale in zip(wide, scales, strict=True)
    ]


@functools.cache
def _inverse_rms(size: int, d: int, eps: float) -> Any:
    """The part of `inverse_rms` that crosses threads, from a chunk of sums of squares."""

    @plgpu.inline_mgpu(
        arg_types=(chunk_layout(size), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def body(_: Any, x: Any, scratch: ir.Value) -> Any:
        [register] = x.registers.flat
        v = size // THREADS
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(THREADS))
        lane = arith.remui(thread, _i32(LANES))
        vector.store(register, scratch, [_index(arith.muli(thread, _i32(v)))])
        mgpu.utils.warpgroup_barrier()
        warps = [
            vector.load(
                register.type, scratch, [_index(arith.muli(arith.addi(lane, _i32(w * LANES)), _i32(v)))]
            )
            for w in range(WARPS)
        ]
        low, high = arith.addf(warps[0], warps[2]), arith.addf(warps[1], warps[3])
        total = sum_lanes(_elements(arith.addf(low, high)), LANES, _Warp())
        return mgpu.FragmentedArray.splat(inverse_root(total, d, eps), ())

    return body


def inverse_root(total: ir.Value, d: int, eps: float) -> ir.Value:
    """1 / sqrt(total / d + eps), every step rounded alone; the compiler's own would be one approximation."""
    f32 = ir.F32Type.get()
    # operations without the `contract` flag that Mosaic gives its own
    mean = arith.mulf(total, mgpu.c(float(np.float32(1 / d)), f32))
    square = arith.addf(mean, mgpu.c(float(np.float32(eps)), f32))
    root = llvm.inline_asm(f32, [square], "sqrt.rn.f32 $0, $1;", "=f,f")
    return llvm.inline_asm(f32, [root], "rcp.rn.f32 $0, $1;", "=f,f")


class Lanes(Protocol):
    """Operations on one float32 a lane."""

    def add(self, x: Any, y: Any) -> Any: ...

    def swap(self, x: Any, distance: int) -> Any:
        """The value of the lane whose number differs by the bit `distance`."""
        ...

    def choose(self, distance: int, clear: Any, set_: Any) -> Any:
        """`set_` in lanes whose number has the bit `distance`, `clear` in the others."""
        ...


def sum_lanes(values: list[Any], lanes: int, ops: Lanes) -> Any:
    """Sums `lanes` * v float32, v <= lanes to a lane in ascending order; every lane gets the total.

    Halving adds a lane's values to those of the lane `lanes / 2` away first, and a lane's own values to one another
    last. Of the pair, each lane takes over one half of the values, so that each step has half the shuffles.
    """
    taken = []
    distance = lanes // 2
    while distance:
        if len(values) > 1:
            low, high = values[: len(values) // 2], values[len(values) // 2 :]
            kept = [ops.choose(distance, a, b) for a, b in zip(low, high, strict=True)]
            sent = [ops.choose(distance, b, a) for a, b in zip(low, high, strict=True)]
            values = [ops.add(a, ops.swap(b, distance)) for a, b in zip(kept, sent, strict=True)]
            taken.append(distance)
        else:
            values = [ops.add(values[0], ops.swap(values[0], distance))]
        distance //= 2
    [value] = values
    for distance in taken:
        value = ops.add(value, ops.swap(value, distance))
    return value


class _Warp:
    """`Lanes` in MLIR; its adds are not marked for contraction."""

    def __init__(self) -> None:
        self._lane = arith.remui(mgpu.utils.thread_idx(), _i32(LANES))

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.addf(x, y)

    def swap(self, x: ir.Value, distance: int) -> ir.Value:
        return mgpu.utils.shfl_bfly(x, distance)

    def choose(self, distance: int, clear: ir.Value, set_: ir.Value) -> ir.Value:
        bit = arith.andi(self._lane, _i32(distance))
        return arith.select(arith.cmpi(arith.CmpIPredicate.ne, bit, _i32(0)), set_, clear)


def head_layout(heads: int, half: int) -> Any:
    """The layout of halves of heads, [n * heads, half]: `half / 4` lanes to a head, 4 consecutive elements to a lane.

    Args:
        heads: that a warpgroup holds side by side, a power of two up to 512 / half; fewer are held several times.
        half: elements of half a head, 32 or 64.
    """
    lanes = half // HEAD_VECTOR
    by_lanes = min(heads, LANES // lanes)
    by_warps = heads // by_lanes
    layout = mgpu.TiledLayout(
        plgpu.Tiling(((heads, half), (by_lanes, half), (1, HEAD_VECTOR))),
        warp_dims=(-6, plgpu.Replicated(WARPS // by_warps)),
        lane_dims=(-4, plgpu.Replicated(LANES // lanes // by_lanes), -3),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def heads_at_once(heads: int, half: int) -> int:
    """The most heads that `head_layout` lays side by side and that divide `heads`."""
    return min(heads & -heads, THREADS * HEAD_VECTOR // half)


def inverse_rms_of_heads(
    first: jax.Array, second: jax.Array, layout: Any, *, eps: float, interpret: bool
) -> jax.Array:
    """`inverse_rms` of each head from its halves, float32 [heads, half] in `head_layout`, repeated to that shape."""
    squares = first * first + second * second  # exact squares, as in `inverse_rms`
    d = 2 * first.shape[1]
    if interpret:
        mean = mul(tree_sum(squares), np.float32(1 / d))
        return jnp.broadcast_to(reciprocal_sqrt(mean + np.float32(eps))[:, None], first.shape)
    return _inverse_rms_of_heads(first.shape, layout, d, eps)(squares)


@functools.cache
def _inverse_rms_of_heads(shape: tuple[int, int], layout: Any, d: int, eps: float) -> Any:
    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def body(_: Any, x: Any) -> Any:
        warp = _Warp()
        registers = np.empty_like(x.registers)
        for index, register in np.ndenumerate(x.registers):
            total = sum_lanes(_elements(register), shape[1] // HEAD_VECTOR, warp)
            registers[index] = vector.broadcast(register.type, inverse_root(total, d, eps))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return body


def sums_of_heads(first: jax.Array, second: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """`tree_sum` of each head, float32 [heads], whose halves are float32 [heads, half] in `head_layout`."""
    halved = first + second
    if interpret:
        return tree_sum(halved)
    # Every lane of a head has its sum; the maximum of equal numbers is one of them.
    return jnp.max(_sums_of_heads(halved.shape, layout)(halved), axis=1)


@functools.cache
def _sums_of_heads(shape: tuple[int, int], layout: Any) -> Any:
    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def body(_: Any, x: Any) -> Any:
        warp = _Warp()
        registers = np.empty_like(x.registers)
        for index, register in np.ndenumerate(x.registers):
            total = sum_lanes(_elements(register), shape[1] // HEAD_VECTOR, warp)
            registers[index] = vector.broadcast(register.type, total)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return body


def _elements(x: ir.Value) -> list[ir.Value]:
    return [
        vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(ir.VectorType(x.type).shape[0])
    ]


def _i32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
