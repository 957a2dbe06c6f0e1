"""What a warpgroup does with tiles of 64 rows of keys by 8 columns of queries that Pallas has no operation for.

In wgmma's layout thread 32 * w + 4 * r + c has rows 16 * w + r and 16 * w + r + 8, columns 2 * c and 2 * c + 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .config import COLUMNS

_Ref = Any
_Value = Any  # of MLIR
_PAD = 4  # words behind a row of `send`, so that the 8 rows begin in different banks
MAXIMA = 32  # words of scratch of `column_max`
WGMMA = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a number a column
_COLUMN_TYPE = plgpu.ShapeDtypeStruct((COLUMNS,), jnp.float32, layout=COLUMN)


def column_max(scores: tuple[jax.Array, jax.Array], scratch: _Ref) -> jax.Array:
    """The largest of each column of two tiles, [8]; scratch [32]. Every warp waits for the others here."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, WGMMA), return_type=_COLUMN_TYPE)
    def run(_: Any, ref: Any, a: fa.FragmentedArray, b: fa.FragmentedArray) -> fa.FragmentedArray:
        registers = [*a.registers.flat, *b.registers.flat]
        pair = [_larger([_part(register, i) for register in registers]) for i in (0, 1)]
        for distance in (4, 8, 16):
            pair = [_larger([x, utils.shfl_bfly(x, distance)]) for x in pair]
        warp, _, column = _place()
        base = _add(_address(ref), _times(column, 8))
        _store_pair(_add(base, _times(warp, 4 * COLUMNS)), pair)
        utils.warpgroup_barrier()
        parts = [_load_pair(_add(base, _const(4 * COLUMNS * i))) for i in range(4)]
        return _column([_larger([part[i] for part in parts]) for i in (0, 1)])

    return run(scratch, *scores)


def store_weights(
    weights: tuple[jax.Array, jax.Array], rounded: tuple[jax.Array, jax.Array], target: _Ref, unrounded: _Ref
) -> None:
    """Stores two tiles of weights: rounded, transposed, to `target` [8, 128], and as they are to `unrounded`."""
    tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    transforms = (tiling, swizzle)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), *[WGMMA] * 4))
    def run(_: Any, target: Any, unrounded: Any, *tiles: fa.FragmentedArray) -> None:
        warp, row, column = _place()
        first = _add(_times(warp, 16), row)
        for tile in (0, 1):
            whole, narrow = list(tiles[tile].registers.flat), list(tiles[2 + tile].registers.flat)
            for half in (0, 1):
                key = _add(first, _const(8 * half))
                place = _add(_times(key, 4 * COLUMNS), _times(column, 8))
                base = _add(_address(unrounded), _const(64 * 4 * COLUMNS * tile))
                _store_pair(_add(base, place), [_part(whole[half], i) for i in (0, 1)])
                for i in (0, 1):
                    head = _add(_times(column, 2), _const(i))
                    swizzled = arith.xori(_times(key, 2), _times(head, 16))
                    to = _add(_add(_address(target), _const(1024 * tile)), _add(_times(head, 128), swizzled))
                    _store16(to, _part(narrow[half], i), "shared", "r")

    run(target, unrounded, *weights, *rounded)


def sum_lanes(unrounded: _Ref) -> jax.Array:
    """[64, 8]: row r has the sum of the weights of keys r % 8, r % 8 + 8, ... of a block, in ascending order."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, 8), jnp.float32, layout=WGMMA)
    )
    def run(_: Any, ref: Any) -> fa.FragmentedArray:
        _, row, column = _place()
        base = _add(_address(ref), _add(_times(row, 4 * COLUMNS), _times(column, 8)))
        groups = [_load_pair(_add(base, _const(8 * 4 * COLUMNS * i))) for i in range(16)]
        pair = groups[0]
        for group in groups[1:]:
            pair = [arith.addf(x, y) for x, y in zip(pair, group, strict=True)]
        register = _pack(pair)
        shape = fa.WGMMA_LAYOUT.registers_shape((64, 8))
        registers = np.empty(shape, dtype=object)
        registers.fill(register)
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return run(unrounded)


def total(lanes: jax.Array) -> jax.Array:
    """The sum [8] of 8 lanes, neighbours first; `lanes` as in `sum_lanes`."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=_COLUMN_TYPE)
    def run(_: Any, lanes: fa.FragmentedArray) -> fa.FragmentedArray:
        pair = [_part(lanes.registers.flat[0], i) for i in (0, 1)]
        for distance in (4, 8, 16):
            pair = [arith.addf(x, utils.shfl_bfly(x, distance)) for x in pair]
        return _column(pair)

    return run(lanes)


def store_columns(values: jax.Array, out: _Ref, rows: int, stride: int) -> None:
    """Stores the first `rows` columns of values [n, 8] as rows of `out` [rows, n], `stride` apart in global memory."""
    size = values.dtype.itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
    def run(_: Any, out: Any, values: fa.FragmentedArray) -> None:
        warp, row, column = _place()
        base = _global_address(out)
        first = _add(_times(warp, 16), row)
        for number, register in enumerate(values.registers.flat):
            where = _add(first, _const(64 * (number // 2) + 8 * (number % 2)))
            for i in (0, 1):
                head = _add(_times(column, 2), _const(i))
                offset = _times(_add(_times(head, stride), where), size)
                there = arith.cmpi(arith.CmpIPredicate.ult, head, _const(rows))
                to = arith.addi(base, arith.extui(ir.IntegerType.get_signless(64), offset))
                value = _part(register, i)
                if size == 2:
                    _store16(to, value, "global", "l", there)
                else:
                    _assembly("st.global.f32 [$0], $1;", [to, value], "l,f", predicate=there)

    run(out, values)


def store_stats(maximum: jax.Array, total: jax.Array, out: _Ref) -> None:
    """Stores both [8] to the first columns of `out` [2, ROWS] in global memory."""
    width = out.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMN, COLUMN))
    def run(_: Any, out: Any, *both: fa.FragmentedArray) -> None:
        _, _, column = _place()
        base = _global_address(out)
        for which, array in enumerate(both):
            for i in (0, 1):
                offset = _times(_add(_times(column, 2), _const(width * which + i)), 4)
                to = arith.addi(base, arith.extui(ir.IntegerType.get_signless(64), offset))
                _assembly("st.global.f32 [$0], $1;", [to, _part(array.registers.flat[0], i)], "l,f")

    run(out, maximum, total)


def partial_words(rows: int, h: int) -> int:
    """32-bit words that `send` writes."""
    return rows * (h + _PAD) + 2 * COLUMNS


def send(values: jax.Array, maximum: jax.Array, total: jax.Array, ref: _Ref, rows: int) -> None:
    """Leaves a split in this CTA's shared memory: `rows` columns of values [H, 8], maximum and total [8]."""
    h = values.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, COLUMN, COLUMN))
    def run(
        _: Any, ref: Any, values: fa.FragmentedArray, maximum: fa.FragmentedArray, total: fa.FragmentedArray
    ) -> None:
        warp, row, column = _place()
        base = _address(ref)
        first = _add(_times(warp, 16), row)
        for number, register in enumerate(values.registers.flat):
            where = _add(first, _const(64 * (number // 2) + 8 * (number % 2)))
            for i in (0, 1):
                head = _add(_times(column, 2), _const(i))
                there = arith.cmpi(arith.CmpIPredicate.ult, head, _const(rows))
                to = _add(base, _times(_add(_times(head, h + _PAD), where), 4))
                _assembly("st.shared.f32 [$0], $1;", [to, _part(register, i)], "r,f", predicate=there)
        for which, array in enumerate((maximum, total)):
            to = _add(base, _const(4 * (rows * (h + _PAD) + COLUMNS * which)))
            _store_pair(_add(to, _times(column, 8)), [_part(array.registers.flat[0], i) for i in (0, 1)])

    run(ref, values, maximum, total)


def receive(
    ref: _Ref, peer: int, unit: jax.Array, rows: int, h: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """128 numbers from 128 * unit on of what CTA `peer` of the cluster sent, and their rows' maximum and total."""
    height = 128 // h
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    result = plgpu.ShapeDtypeStruct((height, h), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=(result,) * 3)
    def run(_: Any, ref: Any, unit: fa.FragmentedArray) -> tuple[fa.FragmentedArray, ...]:
        thread = utils.thread_idx()
        row = arith.divui(thread, _const(h)) if height > 1 else _const(0)
        place = arith.remui(thread, _const(h)) if height > 1 else thread
        row = arith.minui(_add(_times(unit.registers.item(), height), row), _const(rows - 1))
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        base = _assembly("mapa.shared::cluster.u32 $0, $1, $2;", [_address(ref), _const(peer)], "=r,r,r", i32)
        offsets = [
            _times(_add(_times(row, h + _PAD), place), 4),
            *(_add(_const(4 * (rows * (h + _PAD) + COLUMNS * which)), _times(row, 4)) for which in (0, 1)),
        ]
        out = []
        for offset in offsets:
            number = _assembly("ld.shared::cluster.f32 $0, [$1];", [_add(base, offset)], "=f,r", f32)
            register = vector.broadcast(ir.VectorType.get((1,), f32), number)
            strided = layout.to_mgpu()
            registers = np.full(strided.registers_shape((height, h)), register, dtype=object)
            out.append(fa.FragmentedArray(_registers=registers, _layout=strided, _is_signed=None))
        return tuple(out)

    return run(ref, unit)


@plgpu.inline_mgpu()
def cluster_arrive(_: Any) -> None:
    """Says that this thread is done with what it read and wrote of the cluster's shared memory."""
    _assembly("barrier.cluster.arrive.release.aligned;", [], "")


@plgpu.inline_mgpu()
def cluster_wait(_: Any) -> None:
    """Waits for all threads of the cluster to arrive."""
    _assembly("barrier.cluster.wait.acquire.aligned;", [], "")


# --- MLIR -----------------------------------------------------------------------------------------------------------


def _const(value: int) -> _Value:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _add(x: _Value, y: _Value) -> _Value:
    return arith.addi(x, y)


def _times(x: _Value, factor: int) -> _Value:
    return x if factor == 1 else arith.muli(x, _const(factor))


def _place() -> tuple[_Value, _Value, _Value]:
    """w, r and c of this thread."""
    thread = utils.thread_idx()
    lane = arith.andi(thread, _const(31))
    warp = arith.andi(arith.shrui(thread, _const(5)), _const(3))
    return warp, arith.shrui(lane, _const(2)), arith.andi(lane, _const(3))


def _address(ref: _Value) -> _Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _global_address(ref: _Value) -> _Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def _part(register: _Value, i: int) -> _Value:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _pack(pair: list[_Value]) -> _Value:
    out = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for i, x in enumerate(pair):
        out = vector.insert(x, out, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
    return out


def _column(pair: list[_Value]) -> fa.FragmentedArray:
    layout = COLUMN.to_mgpu()
    registers = np.full(layout.registers_shape((COLUMNS,)), _pack(pair), dtype=object)
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _larger(numbers: list[_Value]) -> _Value:
    out = numbers[0]
    for x in numbers[1:]:
        out = llvm.inline_asm(ir.F32Type.get(), [out, x], "max.NaN.f32 $0, $1, $2;", "=f,f,f")
    return out


def _assembly(
    text: str, operands: list[_Value], constraints: str, result: Any = None, predicate: _Value | None = None
) -> _Value:
    if predicate is not None:
        flag = arith.extui(ir.IntegerType.get_signless(32), predicate)
        number = len(operands)
        text = f"{{ .reg .pred p; setp.ne.u32 p, ${number}, 0; @p {text} }}"
        operands, constraints = [*operands, flag], f"{constraints},r"
    constraints = f"{constraints},~{{memory}}" if constraints else "~{memory}"
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True)


def _store_pair(address: _Value, pair: list[_Value]) -> None:
    _assembly("st.shared.v2.f32 [$0], {$1, $2};", [address, *pair], "r,f,f")


def _load_pair(address: _Value) -> list[_Value]:
    f32 = ir.F32Type.get()
    both = llvm.StructType.get_literal([f32, f32])
    out = _assembly("ld.shared.v2.f32 {$0, $1}, [$2];", [address], "=f,=f,r", both)
    return [llvm.extractvalue(f32, out, [i]) for i in (0, 1)]


def _store16(
    address: _Value, value: _Value, space: str, constraint: str, predicate: _Value | None = None
) -> None:
    bits = utils.bitcast(value, ir.IntegerType.get_signless(16))
    _assembly(f"st.{space}.b16 [$0], $1;", [address, bits], f"{constraint},h", predicate=predicate)
