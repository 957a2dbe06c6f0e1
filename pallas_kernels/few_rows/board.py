"""Memory in which the CTAs of a launch leave results for one another, and wait for them word by word.

A word is not there yet while all of its bits are set. No result is: that would be a NaN, and is stored as another NaN.
So whoever reads a word knows by itself whether it has come, and nobody waits for a counter, nor for a fence: a fence
waits until nothing is under way from memory any more, in the launch that this is for until the ring is full of weights
and the memory idle. A board has to be blank before the launch; each launch blanks the board of the next one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ..common import mosaic_rows as rows
from .boards import MISSING

Ref = rows.Ref

_WORD = 4  # bytes
_LANES = 4  # words that a thread reads at once


def blank(board: Ref, words: int, cta: jax.Array) -> None:
    """Blanks this CTA's share of a board; all CTAs of `CTA_WORDS` words each blank it together."""
    _blank(words)(board, cta)


#: Words that a CTA blanks.
CTA_WORDS = rows.THREADS * _LANES


@functools.cache
def _blank(words: int) -> Callable[..., Any]:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def store(_: Any, board: ir.Value, cta: Any) -> None:
        first = arith.muli(cta.registers.item(), _i32(CTA_WORDS))
        word = arith.addi(first, arith.muli(_thread(), _i32(_LANES)))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, word, _i32(words))):
            bits = ", ".join([str(MISSING)] * _LANES)
            _assembly(f"st.global.v4.s32 [$0], {{{bits}}};", _address(board, arith.muli(word, _i32(_WORD))))

    return store


def post(x: jax.Array, board: Ref, start: jax.Array, *, width: int, interpret: bool) -> None:
    """Leaves the first `width` of 128 elements from byte `start` of a board on."""
    if interpret:
        words = width * x.dtype.itemsize // _WORD
        bits = lax.bitcast_convert_type(x[:width].reshape(words, -1), jnp.int32).reshape(words)
        board.at[pl.ds(start // _WORD, words)][...] = bits
        return
    _post(width, x.dtype.itemsize)(x, board, start)


@functools.cache
def _post(width: int, size: int) -> Callable[..., Any]:
    bits = 8 * size

    @plgpu.inline_mgpu(
        arg_types=(rows.chunk_layout(rows.THREADS), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def store(_: Any, x: Any, board: ir.Value, start: Any) -> None:
        [register] = x.registers.flat
        integer = ir.IntegerType.get_signless(bits)
        first = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
        value = arith.bitcast(integer, first)
        missing = arith.cmpi(arith.CmpIPredicate.eq, value, mgpu.c(MISSING, integer))
        value = arith.select(missing, mgpu.c((1 << (bits - 1)) - 1, integer), value)  # a NaN too
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, _thread(), _i32(width))):
            place = arith.addi(start.registers.item(), arith.muli(_thread(), _i32(size)))
            kind = "r" if bits == 32 else "h"
            _assembly(f"st.relaxed.gpu.global.u{bits} [$0], $1;", _address(board, place), value, kinds=kind)

    return store


def wait(
    board: Ref, start: jax.Array, *, rows_: int, d: int, size: int, dtype: Any, interpret: bool
) -> list[list[jax.Array]]:
    """Rows of d elements, one behind the other from byte `start` of a board on, as soon as they are there.

    Returns:
        The chunks of each row, `size` elements each as `mosaic_rows.load_chunk` lays them.
    """
    per_row = d // size
    if interpret:
        chunks: Sequence[jax.Array] = _wait_interpreted(board, start, rows_ * per_row, size, dtype)
    else:
        chunks = _wait(rows_ * per_row, size, jnp.dtype(dtype).name)(board, start)
    return [list(chunks[i * per_row : (i + 1) * per_row]) for i in range(rows_)]


def _wait_interpreted(board: Ref, start: jax.Array, count: int, size: int, dtype: Any) -> list[jax.Array]:
    """`wait` where one CTA has run before the next one does: all is there."""
    words = size * jnp.dtype(dtype).itemsize // _WORD
    bits = [board[pl.ds(start // _WORD + i * words, words)] for i in range(count)]
    return [lax.bitcast_convert_type(each, dtype).reshape(size) for each in bits]


@functools.cache
def _wait(count: int, size: int, dtype: str) -> Callable[..., Any]:
    """`wait` for `count` chunks."""
    v, item = size // rows.THREADS, jnp.dtype(dtype).itemsize
    words = v * item // _WORD  # of a chunk that a thread has
    assert words, "halves of words are not waited for"
    out = plgpu.ShapeDtypeStruct((size,), jnp.dtype(dtype), layout=rows.chunk_layout(size))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=(out,) * count)
    def load(_: Any, board: ir.Value, start: Any) -> tuple[Any, ...]:
        place = arith.addi(start.registers.item(), arith.muli(_thread(), _i32(v * item)))
        read = _load_when_there(_address(board, place), count, words, size * item, halves=item == 2)
        names: dict[str, Any] = {"float32": ir.F32Type, "bfloat16": ir.BF16Type, "float16": ir.F16Type}
        packed, unpacked = (
            ir.VectorType.get((words,), read[0].type),
            ir.VectorType.get((v,), names[dtype].get()),
        )
        chunks = []
        for i in range(count):
            bits = vector.from_elements(packed, read[i * words : (i + 1) * words])
            registers = np.empty((1,), dtype=object)
            registers[0] = vector.bitcast(unpacked, bits)
            layout = mgpu.WGStridedFragLayout((size,), v)
            chunks.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return tuple(chunks)

    return load


def _load_when_there(
    address: ir.Value, count: int, words: int, pitch: int, *, halves: bool
) -> list[ir.Value]:
    """`words` words of each of `count` chunks, `pitch` bytes from one to the next, as soon as none is missing.

    All are asked for at once, again and again; before that only the first word is, so that those who wait take little
    of what the weights come through.
    """
    i32, total = ir.IntegerType.get_signless(32), count * words
    wide = min(words, _LANES)
    kind = {1: "u32", 2: "v2.u32", 4: "v4.u32"}[wide]
    lines = [
        f"early: ld.relaxed.gpu.global.u32 t, [${total}];",
        "setp.eq.u32 p, t, -1;",
        "@p bra early;",
        "again:",
    ]
    for number in range(0, total, wide):
        chunk, word = divmod(number, words)
        names = ", ".join(f"${number + i}" for i in range(wide))
        to = names if wide == 1 else f"{{ {names} }}"
        lines.append(f"ld.relaxed.gpu.global.{kind} {to}, [${total} + {chunk * pitch + word * _WORD}];")
    lines.append("setp.ne.u32 p, 0, 0;")
    for number in range(total):
        if halves:  # two elements, which may be those of two CTAs
            lines.append(f"and.b32 t, ${number}, 0xffff; setp.eq.or.u32 p, t, 0xffff, p;")
            lines.append(f"setp.ge.or.u32 p, ${number}, 0xffff0000, p;")
        else:
            lines.append(f"setp.eq.or.u32 p, ${number}, -1, p;")
    text = "{ .reg .pred p; .reg .u32 t; " + " ".join(lines) + " @p bra again; }"
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join(["i32"] * total) + ")>")
    constraints = ",".join(["=&r"] * total) + ",l,~{memory}"
    result = llvm.inline_asm(struct, [address], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(i32, result, [i]) for i in range(total)]


def _assembly(text: str, address: ir.Value, *values: ir.Value, kinds: str = "") -> None:
    constraints = ",".join(["l", *kinds, "~{memory}"])
    llvm.inline_asm(None, [address, *values], text, constraints, has_side_effects=True)


def _address(board: ir.Value, place: ir.Value) -> ir.Value:
    """Of byte `place` of a board."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(board)), arith.extui(i64, place))


def _thread() -> ir.Value:
    """Its number in the warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), _i32(rows.THREADS))


def _i32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))
