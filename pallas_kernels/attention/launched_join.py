"""Joining splits that were left in global memory by a second launch, in ascending order.

The order, the products and the sums are those of `merge`, one split after the other. What they are multiplied by
follows from the splits' maxima, and is computed for a tile of splits at once, while TMA brings their values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arithmetic import NEG_INF, Partial, Product, normalise
from .joins import extent
from .problem import JOINED_TILE, Problem

_Ref = Any
_UNROLLED = 8  # splits; more make JAX's inference of layouts, a recursion, deep, and gain nothing
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_SQUARE = (JOINED_TILE, JOINED_TILE)


def join_again(problem: Problem, values: jax.Array, stats: jax.Array, positions: jax.Array) -> jax.Array:
    """Joins what CTAs left.

    Args:
        problem: the call.
        values: float32 [B * K, `stored_splits`, rows, H], of each split.
        stats: float32 [B * K, `stored_splits`, 2, rows], maxima and totals.
        positions: int32 [B, T].

    Returns:
        [B * K, a multiple of `joined_rows` that holds all rows, H].
    """
    height, h = problem.joined_rows, problem.shape.h
    turns = pl.cdiv(problem.rows, height)
    slots = min(2, problem.stored_splits // JOINED_TILE)
    join = problem.kernel(
        _join_kernel,
        "join",
        out_type=jax.ShapeDtypeStruct((values.shape[0], turns * height, h), problem.dtype),
        scratch_types={
            "tiles": plgpu.SMEM((slots, min(JOINED_TILE, problem.splits), height, h), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            "factors": plgpu.SMEM((3, height, JOINED_TILE), jnp.float32),
        },
        grid=(turns, values.shape[0]),
        grid_names=("turn", "head"),
        num_threads=1,
    )
    return join(values, stats, positions)


def _join_kernel(
    problem: Problem,
    values_gmem: _Ref,
    stats_gmem: _Ref,
    positions_gmem: _Ref,
    out_gmem: _Ref,
    *,
    tiles: _Ref,
    full: _Ref,
    factors: _Ref,
) -> None:
    h, height = problem.shape.h, problem.joined_rows
    index, first = lax.axis_index("head"), lax.axis_index("turn") * height
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    product = Product(problem.interpret, layout)
    several = problem.stored_splits > JOINED_TILE

    def slot(tile: jax.Array) -> jax.Array:
        return lax.rem(tile, jnp.int32(tiles.shape[0]))

    def fetch(tile: jax.Array) -> None:
        splits = pl.ds(tile * JOINED_TILE, tiles.shape[1])
        rows = values_gmem.at[index, splits, pl.ds(first, height)]
        plgpu.copy_gmem_to_smem(rows, tiles.at[slot(tile)], full.at[slot(tile)])

    fetch(jnp.int32(0))  # before it is known how many splits there are: the first one always is
    splits = extent(problem, positions_gmem[lax.div(index, jnp.int32(problem.shape.kv_heads)), 0])[1]

    def wide(value: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((height, h), value, jnp.float32), layout)

    def factor(which: int, split: jax.Array) -> jax.Array:
        """One for each row."""
        value = wide(factors[which, 0, split])
        row = plgpu.broadcasted_iota(jnp.int32, (height, h), 0, layout=layout)
        for i in range(1, height):
            value = jnp.where(row >= i, wide(factors[which, i, split]), value)
        return value

    def join(tile: jax.Array, carry: Any) -> Any:
        values, total, largest = carry
        plgpu.commit_smem()  # the tile before and its factors have been read

        if several:
            pl.when((tile + 1) * JOINED_TILE < splits)(lambda: fetch(tile + 1))
        largest = _store_factors(problem, stats_gmem.at[index], first, tile, largest, factors)
        plgpu.commit_smem()
        plgpu.barrier_wait(full.at[slot(tile)])
        count = jnp.minimum(splits - tile * JOINED_TILE, JOINED_TILE)

        def some(begin: jax.Array, size: int, carry: Any) -> Any:
            values, total = carry
            for split in [begin + j for j in range(size)]:
                added = plgpu.load(tiles.at[slot(tile), split], layout=layout, optimized=False)
                old = factor(0, split)
                values = product(values, old) + product(added, factor(1, split))
                total = product(total, old) + factor(2, split)
            return values, total

        whole = lax.div(count, jnp.int32(_UNROLLED))
        carry = lax.fori_loop(0, whole, lambda i, c: some(i * _UNROLLED, _UNROLLED, c), (values, total))
        values, total = lax.fori_loop(whole * _UNROLLED, count, lambda i, c: some(i, 1, c), carry)
        return values, total, largest

    nothing = plgpu.layout_cast(jnp.full((JOINED_TILE,), NEG_INF, jnp.float32), _ROW)
    empty = wide(0.0), wide(0.0), (nothing,) * height
    if several:
        count = lax.div(splits + (JOINED_TILE - 1), jnp.int32(JOINED_TILE))
        values, total, _ = lax.fori_loop(0, count, join, empty)
    else:  # nothing of its factors waits for the position
        values, total, _ = join(jnp.int32(0), empty)
    joined = Partial(total, total)  # the maximum is in the factors
    out_gmem.at[index, pl.ds(first, height)][...] = normalise(joined, values, problem.dtype)


def _store_factors(
    problem: Problem,
    stats_gmem: _Ref,
    first: jax.Array,
    tile: jax.Array,
    largest: tuple[jax.Array, ...],
    factors: _Ref,
) -> tuple[jax.Array, ...]:
    """Leaves, of each row and split of a tile, what the splits before are multiplied by, what it is, and its total so.

    `largest` is each row's maximum of the tiles before, JOINED_TILE times; the new one is returned. Splits that are not
    there, whose memory may hold anything, spoil only what is left for themselves and what is returned: they
    come last, in the last tile.
    """
    product = Product(problem.interpret)
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32)

    def stat(which: int, row: int) -> jax.Array:
        ref = stats_gmem.at[pl.ds(tile * JOINED_TILE, JOINED_TILE), which, first + row]
        return plgpu.load(ref, layout=_ROW, optimized=False)

    rows = range(problem.joined_rows)
    # All at once: each takes the L2 cache's latency.
    maxima, totals = ([stat(which, i) for i in rows] for which in (0, 1))
    for i in rows:
        factors.at[0, i][...] = maxima[i]
    plgpu.commit_smem()
    across = [plgpu.load(factors.at[0, i], layout=_COLUMN, optimized=False) for i in rows]
    plgpu.commit_smem()  # they are read before the factors take their place
    new = []
    for i in rows:
        all_of_tile = lax.broadcast_in_dim(across[i], _SQUARE, [1])
        earlier = iota(_SQUARE, 1, layout=plgpu.Layout.WGMMA) < iota(_SQUARE, 0, layout=plgpu.Layout.WGMMA)
        nothing = plgpu.layout_cast(jnp.full(_SQUARE, NEG_INF, jnp.float32), plgpu.Layout.WGMMA)
        before = jnp.maximum(largest[i], jnp.max(jnp.where(earlier, all_of_tile, nothing), axis=1))
        joined = jnp.maximum(before, maxima[i])
        factor = jnp.exp2(maxima[i] - joined)
        for which, value in enumerate((jnp.exp2(before - joined), factor, product(totals[i], factor))):
            factors.at[which, i][...] = value
        new.append(jnp.maximum(largest[i], jnp.max(all_of_tile, axis=1)))
    return tuple(new)
