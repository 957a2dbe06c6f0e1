"""What the CTAs of a product of few rows do: stream w, prepare x, multiply, store."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from ..common import mosaic_rows as rows
from ..common.activation import silu
from ..tree_matmul.mosaic_leaves import LeafLoop
from .config import MOST_ROWS, TILE_K
from .problem import Launch, Product

Ref = rows.Ref


def stream(launch: Launch, weights: Sequence[Ref], smem: types.SimpleNamespace) -> None:
    """Keeps the ring full of w, from the first moment on, but for letting what x is made of go before most of it."""

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            count = seen = jnp.int32(0)
            for index, w in enumerate(weights):
                count, seen = _stream_product(launch, index, w, smem, count, seen)
            # No barrier may go away while an arrival is pending: see the last use of every slot freed.
            _wait_each(smem.empty, jnp.maximum(count - launch.stages, 0), count, launch.stages)
            if launch.paced:
                _wait_each(smem.full, seen, count, launch.stages)


def _wait_each(barriers: Ref, first: jax.Array, end: jax.Array, stages: int) -> None:
    """Waits for the barriers of the stages number first .. end - 1."""
    lax.fori_loop(
        first, end, lambda i, _: plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(stages))]), None
    )


def _stream_product(
    launch: Launch, index: int, w_gmem: Ref, smem: types.SimpleNamespace, count: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Streams what this CTA needs for one product, from stage number `count` on.

    Returns:
        The number after the last stage, and that of the first one which this warp has not seen arrive.
    """
    product, stages = launch.products[index], jnp.int32(launch.stages)
    config = product.config
    part, first, tiles = product.mine()
    ring = launch.plain(smem.w)
    height = product.box_rows // (launch.copies // config.boxes)  # of a copy
    # Not a constant to the compiler: unrolled, the loop would need more registers than a thread has.
    steps = lax.optimization_barrier(jnp.int32(product.steps))

    def copy(slot: jax.Array, k: jax.Array, column: jax.Array, box: int) -> None:
        for start in range(0, product.box_rows, height):
            if not product.transpose_rhs:
                src = w_gmem.at[pl.ds(k + start, height), pl.ds(column, product.width)]
            else:  # gates, and then the values that belong to them
                values = product.columns - product.width if start >= product.width else 0
                src = w_gmem.at[pl.ds(column + start + values, height), pl.ds(k, TILE_K)]
            to = ring.at[pl.ds(slot * launch.pitch + box * product.box_rows + start, height)]
            plgpu.copy_gmem_to_smem(src, to, smem.full.at[slot])

    begun = count

    def wait_for_earlier(count: jax.Array, seen: jax.Array) -> jax.Array:
        """Lets no more stages be under way than may be: whatever else is asked for queues behind them."""
        if config.flying is None:
            return seen
        allowed = jnp.int32(config.flying)
        if index and config.ahead is not None:
            allowed = jnp.where(count - begun < stages, jnp.int32(config.ahead), allowed)
        until = jnp.maximum(seen, count - allowed + 1)
        _wait_each(smem.full, seen, until, launch.stages)
        return until

    def tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        column = (first + i * product.ctas_a_part) * product.width

        def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            count, seen = carry
            slot = lax.rem(count, stages)
            pl.when(count >= stages)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
            if index == 0:
                pl.when(count == config.head)(lambda: plgpu.barrier_wait(smem.asked))
            seen = wait_for_earlier(count, seen)
            for box in range(config.boxes):
                copy(slot, part * product.part_k + j * product.depth + box * TILE_K, column, box)
            return count + 1, seen

        return lax.fori_loop(0, steps, step, carry)

    return lax.fori_loop(0, tiles, tile, (count, seen))


def prepare(
    launch: Launch,
    terms: tuple[Ref, ...],
    scale: Ref | None,
    total: Ref | None,
    smem: types.SimpleNamespace,
) -> None:
    """Puts this warpgroup's rows of the first product, as they are to be multiplied, into shared memory."""
    product = launch.products[0]
    wg, size, preparers = lax.axis_index("wg"), product.chunk, launch.preparers
    part, _, _ = product.mine()
    starts = range(0, product.part_k, size)
    scales = None if scale is None else [rows.load_chunk(scale, start, size) for start in starts]

    def asked(turn: int) -> None:
        """What this warpgroup's first row is made of is on its way."""
        if not turn:
            plgpu.barrier_arrive(smem.asked)

    def prepare_row(turn: int) -> None:
        row = turn * preparers + wg
        at = [part * product.part_k + start for start in starts]
        chunks = [rows.load_chunk(terms[0].at[row], start, size) for start in at]
        if not product.adds:
            asked(turn)
        if scales is not None and product.eps is not None:
            if product.adds:
                added = [rows.load_term(terms[1], row, start, size, product.dtype) for start in starts]
                asked(turn)
                chunks = [rows.add(a, b) for a, b in zip(chunks, added, strict=True)]
            if total is not None:

                @pl.when(lax.axis_index("cta") == 0)
                def _() -> None:
                    for start, chunk in zip(starts, chunks, strict=True):
                        rows.store_chunk(total.at[row], start, chunk)

            chunks = rows.normalise(
                chunks,
                scales,
                smem.sums.at[wg, turn % 2],  # the other one may still be read
                d=product.k,
                eps=product.eps,
                interpret=product.interpret,
            )
        for start, chunk in zip(starts, chunks, strict=True):
            put(launch, smem.x, chunk, start, turn)

    for turn in range(pl.cdiv(product.m, preparers)):
        whole = (turn + 1) * preparers <= product.m
        prepare_row(turn) if whole else pl.when(turn * preparers + wg < product.m)(
            functools.partial(prepare_row, turn)
        )


def put(launch: Launch, x_smem: Ref, chunk: jax.Array, start: int, turn: int) -> None:
    """Stores elements start .. of row turn * preparers + wg to its boxes, 64 to a box."""
    if launch.interpret:
        row = turn * launch.preparers + lax.axis_index("wg")
        for i in range(0, chunk.shape[0], TILE_K):
            x_smem.at[(start + i) // TILE_K * MOST_ROWS + row][...] = chunk[i : i + TILE_K]
        return
    _put_swizzled(chunk.shape[0], start, turn * launch.preparers)(chunk, launch.raw(x_smem))


@functools.cache
def _put_swizzled(size: int, start: int, first_row: int) -> Any:
    """`put` where 128 bytes of a row lie as wgmma's widest swizzle has them: pieces of 16 bytes, by row exchanged."""

    @plgpu.inline_mgpu(arg_types=(rows.chunk_layout(size), plgpu.RefType()))
    def put(_: Any, chunk: Any, ref: ir.Value) -> None:
        [register] = chunk.registers.flat
        v = size // rows.THREADS
        thread = mgpu.utils.thread_idx()
        row = arith.addi(arith.divui(thread, _i32(rows.THREADS)), _i32(first_row))
        element = arith.addi(arith.muli(arith.remui(thread, _i32(rows.THREADS)), _i32(v)), _i32(start))
        box = arith.divui(element, _i32(TILE_K))
        column = arith.remui(element, _i32(TILE_K))
        piece = arith.xori(arith.divui(column, _i32(8)), row)
        place = arith.addi(arith.muli(piece, _i32(8)), arith.remui(column, _i32(8)))
        line = arith.addi(arith.muli(box, _i32(MOST_ROWS)), row)
        vector.store(register, ref, [_index(line), _index(place)])

    return put


#: Stores a row of a tile's result, the first `width` of 128 elements, given its number, the part of K that it is the
#: sum of, and the column of the result where it begins.
type Store = Callable[[jax.Array, int, jax.Array, jax.Array], None]


def store_to(product: Product, out: Ref) -> Store:
    """Stores results to out [parts, m, columns] in global memory."""

    def store(x: jax.Array, row: int, part: jax.Array, column: jax.Array) -> None:
        if product.interpret:
            out.at[part, row, pl.ds(column, product.width)][...] = x[: product.width]
        else:
            _store_line(product.width, product.columns)(x, out.at[part, row], column)

    return store


def multiply(
    launch: Launch, index: int, store: Store, smem: types.SimpleNamespace, count: jax.Array
) -> jax.Array:
    """Multiplies all rows with this CTA's tiles of w, from stage number `count` on, and stores them.

    Returns:
        The number after the last stage.
    """
    product, begun = launch.products[index], count
    config = product.config
    part, first, tiles = product.mine()
    x, w = launch.tiled(smem.x), launch.tiled(smem.w)

    def multiply_step(acc: Ref, count: jax.Array) -> jax.Array:
        slot, step = (
            lax.rem(count, jnp.int32(launch.stages)),
            lax.rem(count - begun, jnp.int32(product.steps)),
        )
        plgpu.barrier_wait(smem.full.at[slot])
        for box in range(config.boxes):
            # w is the left operand: it has the more rows. The tensor cores read whole tiles, and behind a box whatever
            # is there: a row of the result depends on its own row of w alone, and those of others are never stored.
            start = slot * launch.pitch + box * product.box_rows
            a = w.at[pl.ds(start, product.window)]
            rows_of_x = x.at[pl.ds((step * config.boxes + box) * MOST_ROWS, MOST_ROWS)]
            plgpu.wgmma(acc, a if product.transpose_rhs else a.transpose((1, 0)), rows_of_x.transpose((1, 0)))
        return slot

    loop = LeafLoop(
        multiply=multiply_step,
        free=lambda slot: plgpu.barrier_arrive(smem.empty.at[slot]),
        products=config.boxes,
        steps=product.leaf_steps,
        shape=(product.window, MOST_ROWS),
        block=MOST_ROWS,
    )

    def tile(i: jax.Array, count: jax.Array) -> jax.Array:
        [value] = loop.group(count, product.part_leaves, lambda: None)
        column = (first + i * product.ctas_a_part) * product.width
        _store(product, value, smem.staged, lambda x, row: store(x, row, part, column))
        return count + product.steps

    return lax.fori_loop(0, tiles, tile, count)


def _store(product: Product, value: jax.Array, staged: Ref, store: Callable[[jax.Array, int], None]) -> None:
    """Stores the sums of a tile, [window, 8], row by row, gated if they are."""
    _turn(product, value, staged)
    for row in range(product.m):
        line = staged.at[row]
        x = rows.load_chunk(line, 0, rows.THREADS)
        if product.gated:
            gate, up = x, rows.load_chunk(line, product.width, rows.THREADS)
            gate, up = (each.astype(product.out_dtype).astype(jnp.float32) for each in (gate, up))
            x = silu(gate) * up
        store(x.astype(product.out_dtype), row)


def _turn(product: Product, value: jax.Array, staged: Ref) -> None:
    """Puts a tile's sums [window, 8] into shared memory, one row of the result a line."""
    if product.interpret:
        for row in range(product.m):
            staged.at[row, pl.ds(0, product.window)][...] = value[:, row]
        return
    _turn_registers(product.m)(value, staged)


@functools.cache
def _turn_registers(m: int) -> Any:
    """`_turn` from the accumulator's layout: two neighbouring columns to a lane, and every eighth row."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def turn(_: Any, value: Any, ref: ir.Value) -> None:
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(rows.THREADS))
        warp, lane = arith.divui(thread, _i32(rows.LANES)), arith.remui(thread, _i32(rows.LANES))
        first = arith.addi(arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4)))
        pair = arith.muli(arith.remui(lane, _i32(4)), _i32(2))
        mgpu.utils.warpgroup_barrier()  # the last tile's lines have been read
        for number, register in enumerate(value.registers.flat):
            at = arith.addi(first, _i32(64 * (number // 2) + 8 * (number % 2)))
            for i in (0, 1):
                row = arith.addi(pair, _i32(i))
                with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))):
                    one = vector.extract(
                        register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
                    )
                    memref.store(one, ref, [_index(row), _index(at)])
        mgpu.utils.warpgroup_barrier()

    return turn


@functools.cache
def _store_line(width: int, columns: int) -> Any:
    """Stores the first `width` of 128 elements to a row of `columns` elements, from `column` on."""

    @plgpu.inline_mgpu(
        arg_types=(rows.chunk_layout(rows.THREADS), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def store(_: Any, chunk: Any, ref: ir.Value, column: Any) -> None:
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(rows.THREADS))
        at = arith.addi(column.registers.item(), thread)
        mine = arith.cmpi(arith.CmpIPredicate.ult, thread, _i32(width))
        inside = arith.cmpi(arith.CmpIPredicate.ult, at, _i32(columns))
        [register] = chunk.registers.flat
        with mgpu.utils.when(arith.andi(mine, inside)):
            vector.store(register, ref, [_index(at)])

    return store


def _i32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
