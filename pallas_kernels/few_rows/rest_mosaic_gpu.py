"""What is left of a decoder layer behind its attention, and the next one's first product, in one launch.

o_proj, gate and up, down_proj and qkv, with the norms and the sums between them, each wait for all of what is before
them. As launches of their own the memory rests from one to the next: no weights are asked for while a kernel ends,
and another begins. In one launch the ring in shared memory fills with the next product's weights while its x is still
being made. CTAs leave x for one another on a board, see `board`.

All CTAs wait for one another, so all have to run at once: nothing may hold a multiprocessor until this launch is over.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows
from ..common.tree import tree_join
from . import board as boards
from .boards import MISSING, Boards
from .config import RestConfig
from .problem import Launch, Product
from .stages import Store, multiply, put, store_to, stream

Ref = rows.Ref

_OUT, _GATE_UP, _DOWN, _NEXT = range(4)  # the products, in order


def rest_of_layer_mosaic_gpu(
    x: jax.Array,
    heads: jax.Array,
    out_w: jax.Array,
    scale: jax.Array,
    gate_up_w: jax.Array,
    down_w: jax.Array,
    next_norm: tuple[jax.Array, jax.Array] | None,
    pair: Boards,
    *,
    leaves: int,
    eps: float,
    config: RestConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Boards]:
    """See `rest_of_layer`, on a Hopper GPU.

    Args:
        x: [1, D], bfloat16 or float16.
        heads: [1, K].
        out_w: [K, D].
        scale: [D].
        gate_up_w: [2F, D].
        down_w: [F, D].
        next_norm: the scale [D] and the weights [N, D] behind down_proj; None for none.
        pair: boards of `config.words(D, F)` words.
        leaves: of K and F.
        eps: of the norms.
        config: See `choose_rest_config`.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly; with one part of each sum.

    Returns:
        The residual stream [1, D], the product [1, N] or, without one, the subtrees of down_proj, float32 [P, 1, D],
        and the boards for the next launch.
    """
    _, d = x.shape
    common: dict[str, Any] = {
        "m": 1,
        "dtype": x.dtype,
        "ctas": 1 if interpret else config.ctas,
        "interpret": interpret,
    }
    float32 = jnp.dtype(jnp.float32)
    normed: dict[str, Any] = {
        "k": d,
        "leaves": 1,
        "out_dtype": x.dtype,
        "transpose_rhs": True,
        "eps": eps,
        "adds": True,
    } | common
    summed: dict[str, Any] = {"n": d, "leaves": leaves, "out_dtype": float32} | common
    products = [
        Product(k=len(out_w), config=config.out, **summed),
        Product(n=len(gate_up_w), gated=True, config=config.gate_up, **normed),
        Product(k=len(down_w), config=config.down, **summed),
    ]
    scales, weights = [scale], [out_w, gate_up_w, down_w]
    if next_norm is not None:
        assert config.next is not None
        products.append(Product(n=len(next_norm[1]), config=config.next, **normed))
        scales.append(next_norm[0])
        weights.append(next_norm[1])
    total, out, pair = _run(heads, x, scales, weights, pair, Launch(tuple(products)))
    out = out[:, :, : products[-1].columns]
    return total, out if next_norm is None else out[0], pair


@functools.partial(jax.jit, static_argnums=5)
def _run(
    heads: jax.Array,
    x: jax.Array,
    scales: list[jax.Array],
    weights: list[jax.Array],
    pair: Boards,
    launch: Launch,
) -> tuple[jax.Array, jax.Array, Boards]:
    kernel = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(_kernel, launch, *refs), collective_axes="wg", **launch.scratch()
        ),
        out_type=[launch.products[_GATE_UP].total, launch.products[-1].out],
        mesh=plgpu.Mesh(grid=(launch.ctas,), grid_names=("cta",), num_threads=2, thread_name="wg"),
        name="rest_of_layer",
        # Where memory passes from one thread or proxy to another, the kernel says so itself.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(launch.interpret) or False,
    )
    board, used = jax.new_ref(pair.blank), jax.new_ref(pair.used)
    total, out = kernel(heads, x, *scales, *weights, board, used)
    return total, out, Boards(blank=jax.freeze(used), used=jax.freeze(board))


def _kernel(launch: Launch, *refs: Ref, **scratch: Ref) -> None:
    count = len(launch.products)
    heads, x, *rest = refs
    scales, weights, (board, used, total, out) = rest[: count // 2], rest[count // 2 : -4], rest[-4:]
    smem = types.SimpleNamespace(**scratch)
    wg = lax.axis_index("wg")

    pl.when(wg == 1)(lambda: stream(launch, weights, smem))
    pl.when(wg == 0)(lambda: _multiply_all(launch, heads, x, scales, board, used, total, out, smem))


def _multiply_all(
    launch: Launch,
    heads: Ref,
    x: Ref,
    scales: list[Ref],
    board: Ref,
    used: Ref,
    total: Ref,
    out: Ref,
    smem: types.SimpleNamespace,
) -> None:
    """Prepares x of each product, and multiplies with it."""
    products, cta = launch.products, lax.axis_index("cta")
    *between, last = products
    places = places_on_board(between)
    size = products[_GATE_UP].chunk
    starts = range(0, products[_GATE_UP].k, size)

    # All that is there from the beginning is asked for at once.
    first = products[_OUT]
    at = lax.rem(first.mine()[0], jnp.int32(first.parts)) * first.part_k  # some have no part, and take any
    attended = [
        rows.load_chunk(heads.at[0], at + start, first.chunk) for start in range(0, first.part_k, first.chunk)
    ]
    plgpu.barrier_arrive(smem.asked)
    residual = [rows.load_chunk(x.at[0], start, size) for start in starts]
    loaded = [[rows.load_chunk(each, start, size) for start in starts] for each in scales]
    if launch.interpret:
        used[...] = jnp.full(used.shape, MISSING, jnp.int32)
    else:
        boards.blank(used, used.shape[0], cta)

    def put_row(chunks: list[jax.Array], chunk: int) -> None:
        for i, each in enumerate(chunks):
            put(launch, smem.x, each, i * chunk, 0)

    def prepare_normed(index: int) -> None:
        """The sum before, added to the residual stream, and its norm; every CTA does all of it."""
        nonlocal residual
        product, before = products[index], products[index - 1]
        start = jnp.int32(places[index - 1])
        subtrees = boards.wait(
            board,
            start,
            rows_=before.parts,
            d=product.k,
            size=size,
            dtype=jnp.float32,
            interpret=launch.interpret,
        )
        sums = [tree_join(list(each)).astype(product.dtype) for each in zip(*subtrees, strict=True)]
        residual = [rows.add(a, b) for a, b in zip(residual, sums, strict=True)]
        if index + 2 >= len(products):  # nothing is added to it any more

            @pl.when(cta == 0)
            def store_total() -> None:
                for start, chunk in zip(starts, residual, strict=True):
                    rows.store_chunk(total.at[0], start, chunk)

        assert product.eps is not None
        put_row(
            rows.normalise(
                residual,
                loaded[index // 2],
                smem.sums.at[0, index // 2],  # the other one may still be read
                d=product.k,
                eps=product.eps,
                interpret=launch.interpret,
            ),
            size,
        )

    def prepare_hidden() -> None:
        """This CTA's part of what gate and up gave."""
        product = products[_DOWN]
        mine = product.mine()

        @pl.when(mine[2] > 0)
        def wait_for_it() -> None:
            start = places[_GATE_UP] + mine[0] * (product.part_k * product.dtype.itemsize)
            [chunks] = boards.wait(
                board,
                start,
                rows_=1,
                d=product.part_k,
                size=product.chunk,
                dtype=product.dtype,
                interpret=launch.interpret,
            )
            put_row(chunks, product.chunk)

    def posted(product: Product, place: int) -> Store:
        size = product.out_dtype.itemsize

        def store(x: jax.Array, row: int, part: jax.Array, column: jax.Array) -> None:
            start = place + (part * product.columns + column) * size
            boards.post(x, board, start, width=product.width, interpret=launch.interpret)

        return store

    steps = lax.optimization_barrier(jnp.int32(0))
    for index, product in enumerate(products):
        if index == _OUT:
            put_row(attended, first.chunk)
        elif index == _DOWN:
            prepare_hidden()
        else:
            prepare_normed(index)
        plgpu.commit_smem()
        store = store_to(product, out) if product is last else posted(product, places[index])
        steps = multiply(launch, index, store, smem, steps)


def places_on_board(products: list[Product]) -> list[int]:
    """The byte of a board where the result of each product begins."""
    places = [0]
    for product in products[:-1]:
        places.append(places[-1] + product.parts * product.columns * product.out_dtype.itemsize)
    return places
