"""Products of few rows for Hopper GPUs, in Pallas Mosaic GPU: as many bytes of w in flight as fit, from the start.

What a decoding step multiplies is a few rows, and what it takes is the time to read w. Between two products w waits for
a norm, for a launch, and for the sums of a cluster. Here it does not:

* The norm, with the residual add before it, is a prologue. Every CTA normalises all rows for itself, while the ring in
  shared memory fills with w. Rows stay in shared memory; only w streams.
* CTAs that take a part of the leaves of a tile do not wait for one another. Each stores the sum of its subtree, and
  who reads them, the next prologue, adds them up: the same tree.

Rows are normalised as `rms_norm` does, leaves multiplied as `tree_matmul`'s kernel does: by the same code.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from ..common import mosaic_rows as rows
from ..common.activation import silu
from ..tree_matmul.config import RESIDENT_CLUSTERS
from ..tree_matmul.mosaic_leaves import LeafLoop
from ..tree_matmul.mosaic_problem import Ring, named_buffer, names_of, tiling
from .config import MOST_ROWS, TILE_K, TILE_M, FewRowsConfig

Ref = rows.Ref

_SWIZZLE = 128  # bytes of a box's row
_INTERPRETED_CTAS = 2  # the threads of more could wait for each other forever: see `tree_matmul.mosaic_gpu`


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """One call, and what follows from its sizes."""

    m: int
    n: int
    k: int
    leaves: int
    dtype: Any
    out_dtype: Any
    transpose_rhs: bool
    gated: bool
    eps: float | None  # of the norm; None without one
    adds: bool  # whether something is added before the norm
    config: FewRowsConfig
    interpret: bool

    @property
    def columns(self) -> int:
        return self.n // 2 if self.gated else self.n

    @property
    def width(self) -> int:
        """Columns of the result that a tile makes."""
        return self.config.tile_n // 2 if self.gated else self.config.tile_n

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.columns, self.width)

    @property
    def parts(self) -> int:
        return self.config.parts

    @property
    def ctas_a_part(self) -> int:
        available = _INTERPRETED_CTAS if self.interpret else RESIDENT_CLUSTERS[1]
        return min(max(1, available // self.parts), self.tiles)

    @property
    def part_k(self) -> int:
        return self.k // self.parts

    @property
    def part_leaves(self) -> int:
        return self.leaves // self.parts

    @property
    def depth(self) -> int:
        return self.config.boxes * TILE_K

    @property
    def leaf_steps(self) -> int:
        return self.k // self.leaves // self.depth

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.part_leaves * self.leaf_steps

    @property
    def w_ring(self) -> Ring:
        box = (TILE_K, self.config.tile_n)
        box = box[::-1] if self.transpose_rhs else box
        return Ring((self.config.stages, self.config.boxes, *box), self.dtype, _SWIZZLE, self.interpret)

    @property
    def chunk(self) -> int:
        """Elements of a row that a warpgroup holds side by side."""
        return rows.THREADS * rows.vector_size(self.part_k)

    def x_buffer(self) -> Any:
        """x in the tiles that wgmma reads, under a name that says so and one for the threads that write."""
        shape = (self.config.x_rows(self.k), TILE_K)
        if self.interpret:
            return plgpu.SMEM(shape, self.dtype)
        tiled = plgpu.SMEM(shape, self.dtype, transforms=tiling(_SWIZZLE, 2))
        return plgpu.RefUnion(tiled, plgpu.SMEM(shape, self.dtype))

    def mine(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The part of this CTA, its first tile, and how many tiles it has."""
        cta = lax.axis_index("cta")
        part, first = lax.div(cta, jnp.int32(self.ctas_a_part)), lax.rem(cta, jnp.int32(self.ctas_a_part))
        return part, first, lax.div(self.tiles - first + self.ctas_a_part - 1, jnp.int32(self.ctas_a_part))


def norm_matmul_mosaic_gpu(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    w: jax.Array,
    *,
    eps: float,
    gated: bool,
    config: FewRowsConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with y added, and the product of its norm and w, on a Hopper GPU.

    Args:
        x: [M, D], bfloat16 or float16, M up to 8, D a multiple of 128 up to 8192.
        y: like x, or the subtrees of a sum, float32 [P, M, D]; None for nothing.
        scale: [D].
        w: [N, D], N a multiple of 16.
        eps: of the norm.
        gated: Whether the result is the SwiGLU of gates and values, [M, N / 2].
        config: See `choose_norm_config`.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly.
    """
    problem = _Problem(
        m=x.shape[0],
        n=w.shape[0],
        k=x.shape[1],
        leaves=1,
        dtype=x.dtype,
        out_dtype=x.dtype,
        transpose_rhs=True,
        gated=gated,
        eps=eps,
        adds=y is not None,
        config=config,
        interpret=interpret,
    )
    outs = _run([x] if y is None else [x, y], [scale], w, problem)
    return (x if y is None else outs[1]), outs[0][0]


def matmul_subtrees_mosaic_gpu(
    x: jax.Array, w: jax.Array, *, leaves: int, config: FewRowsConfig, interpret: bool = False
) -> jax.Array:
    """The sums of the subtrees of x @ w, float32 [config.parts, M, N], on a Hopper GPU.

    Args:
        x: [M, K], bfloat16 or float16, M up to 8.
        w: [K, N], N a multiple of `config.tile_n`.
        leaves: of K.
        config: See `choose_subtree_config`.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly.
    """
    problem = _Problem(
        m=x.shape[0],
        n=w.shape[1],
        k=x.shape[1],
        leaves=leaves,
        dtype=x.dtype,
        out_dtype=jnp.dtype(jnp.float32),
        transpose_rhs=False,
        gated=False,
        eps=None,
        adds=False,
        config=config,
        interpret=interpret,
    )
    return _run([x], [], w, problem)[0]


@functools.partial(jax.jit, static_argnums=3)
def _run(terms: list[jax.Array], scales: list[jax.Array], w: jax.Array, problem: _Problem) -> list[jax.Array]:
    config = problem.config
    # The interpreter clips no tile at the edge.
    columns = problem.tiles * problem.width if problem.interpret else problem.columns
    out_type = [jax.ShapeDtypeStruct((problem.parts, problem.m, columns), problem.out_dtype)]
    if len(terms) == 2:
        out_type.append(jax.ShapeDtypeStruct((problem.m, problem.k), problem.dtype))
    ready = plgpu.Barrier(num_arrivals=config.preparers)
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=out_type,
        scratch_types={
            "x": problem.x_buffer(),
            "w": named_buffer(*problem.w_ring.names()),
            "sums": plgpu.SMEM((config.preparers, 2, problem.chunk), jnp.float32),
            "full": plgpu.Barrier(
                num_arrivals=(1 + problem.gated) * config.boxes, num_barriers=config.stages
            ),
            "empty": plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
            "ready": ready,
        },
        grid=(problem.parts * problem.ctas_a_part,),
        grid_names=("cta",),
        num_threads=config.preparers + 1,
        thread_name="wg",
        kernel_name="matmul_subtrees" if problem.eps is None else "norm_matmul",
        # Where memory passes from one thread or proxy to another, the kernel says so itself.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(problem.interpret),
    )
    product, *total = kernel(*terms, *scales, w)
    return [product[:, :, : problem.columns], *total]


def _kernel(problem: _Problem, *refs: Ref, **scratch: Ref) -> None:
    count = 1 + problem.adds
    terms, rest = refs[:count], list(refs[count:])
    scale = None if problem.eps is None else rest.pop(0)
    w_gmem, out, *total = rest
    smem = types.SimpleNamespace(**scratch)
    wg = lax.axis_index("wg")

    @pl.when(wg == problem.config.preparers)
    def _() -> None:
        _stream(problem, w_gmem, smem)

    @pl.when(wg < problem.config.preparers)
    def _() -> None:
        _prepare(problem, terms, scale, total[0] if total else None, smem)
        plgpu.commit_smem()  # the whole warpgroup: one of its threads arrives for all
        plgpu.barrier_arrive(smem.ready)
        pl.when(wg == 0)(lambda: _multiply(problem, out, smem))


def _stream(problem: _Problem, w_gmem: Ref, smem: types.SimpleNamespace) -> None:
    """Keeps the ring full of w, from the first moment on."""
    config, stages = problem.config, jnp.int32(problem.config.stages)
    part, first, tiles = problem.mine()
    ring = names_of(smem.w, len(problem.w_ring.names()))[-1]
    # Not a constant to the compiler: unrolled, the loop would need more registers than a thread has.
    steps = lax.optimization_barrier(jnp.int32(problem.steps))

    def copy(slot: jax.Array, k: jax.Array, column: jax.Array, box: int) -> None:
        ks, to = pl.ds(k + box * TILE_K, TILE_K), ring.at[slot, box]
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=smem.full.at[slot])
        if problem.gated:  # gates, and then the values beside them
            half = problem.width
            copy(w_gmem.at[pl.ds(column, half), ks], to.at[pl.ds(0, half)])
            copy(w_gmem.at[pl.ds(problem.columns + column, half), ks], to.at[pl.ds(half, half)])
        else:
            columns = pl.ds(column, config.tile_n)
            copy(w_gmem.at[columns, ks] if problem.transpose_rhs else w_gmem.at[ks, columns], to)

    def tile(i: jax.Array, count: jax.Array) -> jax.Array:
        column = (first + i * problem.ctas_a_part) * problem.width

        def step(j: jax.Array, count: jax.Array) -> jax.Array:
            slot = lax.rem(count, stages)
            pl.when(count >= stages)(lambda: plgpu.barrier_wait(smem.empty.at[slot]))
            for box in range(config.boxes):
                copy(slot, part * problem.part_k + j * problem.depth, column, box)
            return count + 1

        return lax.fori_loop(0, steps, step, count)

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            count = lax.fori_loop(0, tiles, tile, jnp.int32(0))
            # No barrier may go away while an arrival is pending: see the last use of every slot freed.
            lax.fori_loop(
                jnp.maximum(count - stages, 0),
                count,
                lambda i, _: plgpu.barrier_wait(smem.empty.at[lax.rem(i, stages)]),
                None,
            )


def _prepare(
    problem: _Problem,
    terms: tuple[Ref, ...],
    scale: Ref | None,
    total: Ref | None,
    smem: types.SimpleNamespace,
) -> None:
    """Puts this warpgroup's rows, as they are to be multiplied, into shared memory."""
    wg, size, preparers = lax.axis_index("wg"), problem.chunk, problem.config.preparers
    part, _, _ = problem.mine()
    starts = range(0, problem.part_k, size)
    scales = None if scale is None else [rows.load_chunk(scale, start, size) for start in starts]

    def prepare(turn: int) -> None:
        row = turn * preparers + wg
        at = [part * problem.part_k + start for start in starts]
        chunks = [rows.load_chunk(terms[0].at[row], start, size) for start in at]
        if scales is not None and problem.eps is not None:
            if problem.adds:
                added = [rows.load_term(terms[1], row, start, size, problem.dtype) for start in starts]
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
                d=problem.k,
                eps=problem.eps,
                interpret=problem.interpret,
            )
        for start, chunk in zip(starts, chunks, strict=True):
            _put(problem, smem.x, chunk, start, turn)

    for turn in range(pl.cdiv(problem.m, preparers)):
        whole = (turn + 1) * preparers <= problem.m
        prepare(turn) if whole else pl.when(turn * preparers + wg < problem.m)(
            functools.partial(prepare, turn)
        )


def _put(problem: _Problem, x_smem: Ref, chunk: jax.Array, start: int, turn: int) -> None:
    """Stores elements start .. of row turn * preparers + wg to its boxes, 64 to a box."""
    preparers = problem.config.preparers
    if problem.interpret:
        row = turn * preparers + lax.axis_index("wg")
        for i in range(0, chunk.shape[0], TILE_K):
            x_smem.at[(start + i) // TILE_K * MOST_ROWS + row][...] = chunk[i : i + TILE_K]
        return
    _put_swizzled(chunk.shape[0], start, turn * preparers)(chunk, x_smem[1])


@functools.cache
def _put_swizzled(size: int, start: int, first_row: int) -> Any:
    """`_put` where 128 bytes of a row lie as wgmma's widest swizzle has them: pieces of 16 bytes, by row exchanged."""

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


def _multiply(problem: _Problem, out: Ref, smem: types.SimpleNamespace) -> None:
    """Multiplies all rows with this CTA's tiles of w, and stores them."""
    config = problem.config
    part, first, tiles = problem.mine()
    x = smem.x if problem.interpret else smem.x[0]
    w = names_of(smem.w, len(problem.w_ring.names()))[0]
    plgpu.barrier_wait(smem.ready)

    def multiply(acc: Ref, count: jax.Array) -> jax.Array:
        slot, step = lax.rem(count, jnp.int32(config.stages)), lax.rem(count, jnp.int32(problem.steps))
        plgpu.barrier_wait(smem.full.at[slot])
        for box in range(config.boxes):
            b = w.at[slot, box]
            window = _x_window(x, step * config.boxes + box)
            plgpu.wgmma(acc, window, b.transpose((1, 0)) if problem.transpose_rhs else b)
        return slot

    loop = LeafLoop(
        multiply=multiply,
        free=lambda slot: plgpu.barrier_arrive(smem.empty.at[slot]),
        products=config.boxes,
        steps=problem.leaf_steps,
        shape=(TILE_M, config.tile_n),
        block=problem.width,
    )

    def tile(i: jax.Array, count: jax.Array) -> jax.Array:
        value = loop.group(count, problem.part_leaves, lambda: None)
        if problem.gated:
            gates, values = (each.astype(problem.out_dtype).astype(jnp.float32) for each in value)
            value = [silu(gates) * values]
        column = (first + i * problem.ctas_a_part) * problem.width
        _store(problem, value[0].astype(problem.out_dtype), out.at[part], column)
        return count + problem.steps

    lax.fori_loop(0, tiles, tile, lax.optimization_barrier(jnp.int32(0)))


def _x_window(x: Ref, box: jax.Array) -> Ref:
    """The rows of a box, and those behind them, which the tensor cores read too, whatever is there.

    A row of the product depends on its own row of x alone, and those of the other rows are never stored.
    """
    return x.at[pl.ds(box * MOST_ROWS, TILE_M)]


def _store(problem: _Problem, value: jax.Array, out: Ref, column: jax.Array) -> None:
    """Stores the first m rows of a tile [64, width] to out [m, columns] from `column` on."""
    if problem.interpret:
        out.at[:, pl.ds(column, problem.width)][...] = value[: problem.m]
        return
    _store_rows(value.shape[1], problem.m, problem.columns)(value, out, column)


@functools.cache
def _store_rows(width: int, m: int, columns: int) -> Any:
    """`_store` from the accumulator's layout: the first warp has the rows 0 to 7, two neighbours of one to a lane."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def store(_: Any, value: Any, ref: ir.Value, column: Any) -> None:
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(rows.THREADS))
        row = arith.divui(thread, _i32(4))  # of the first warp
        pair = arith.addi(column.registers.item(), arith.muli(arith.remui(thread, _i32(4)), _i32(2)))
        mine = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))
        for number, register in enumerate(value.registers.flat[::2]):  # every other one has the rows 8 to 15
            at = arith.addi(pair, _i32(8 * number))
            inside = arith.cmpi(arith.CmpIPredicate.ult, at, _i32(columns))
            with mgpu.utils.when(arith.andi(mine, inside)):
                vector.store(register, ref, [_index(row), _index(at)])

    return store


def _i32(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
