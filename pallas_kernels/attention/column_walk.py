"""A warpgroup's walk over blocks of keys that has the queries as columns."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import column_ops as ops
from .accumulators import multiply_into, read_accumulator
from .arithmetic import LANES, NEG_INF, Product, Softmax, choose, rescale
from .config import COLUMNS
from .problem import WIDTH, Problem

_Ref = Any
_Scores = tuple[jax.Array, jax.Array]  # of the two tiles of a block, each [TILE, COLUMNS]
TILE = 64  # keys that a slot of a ring holds
EndSplit = Callable[[jax.Array, Softmax, jax.Array, Any], Any]


def walk_columns(
    problem: Problem,
    smem: types.SimpleNamespace,
    q_smem: _Ref,
    positions: jax.Array,
    count: jax.Array,
    block_at: Callable[[jax.Array], jax.Array],
    first_masked: jax.Array,
    copy: Callable[[str, jax.Array], None],
    end_split: EndSplit,
    joined: Any,
) -> Any:
    """Walks `count` >= 1 blocks; `positions` [COLUMNS] are the columns'. See `walk.walk_keys`."""
    config, block = problem.config, problem.plan.block
    per_split = jnp.int32(problem.plan.blocks_per_split)
    ahead = config.stages >= 4  # the next block's scores are multiplied beside this one's softmax step
    key_products, value_products = 2 * problem.parts, 2
    product = Product(problem.interpret, vector=ops.COLUMN)

    def wait(full: _Ref, index: jax.Array, stages: int) -> None:
        for half in (0, 1):
            plgpu.barrier_wait(full.at[lax.rem(2 * index + half, jnp.int32(stages))])

    def multiply_keys(accs: tuple[_Ref, ...], index: jax.Array) -> None:
        for half in (0, 1):
            slot = lax.rem(2 * index + half, jnp.int32(config.stages))
            for i in range(problem.parts):
                keys = smem.k.at[slot, :, pl.ds(i * WIDTH, WIDTH)]
                multiply_into(problem, accs[half], keys, q_smem.at[i].transpose((1, 0)), first=i == 0)

    def multiply_values(acc: _Ref, index: jax.Array) -> None:
        wait(smem.v_full, index, config.value_stages)
        for half in (0, 1):
            slot = lax.rem(2 * index + half, jnp.int32(config.value_stages))
            weights = smem.weights.at[lax.rem(index, jnp.int32(2)), :, pl.ds(half * TILE, TILE)]
            multiply_into(
                problem, acc, smem.v.at[slot].transpose((1, 0)), weights.transpose((1, 0)), first=False
            )

    def read(accs: tuple[_Ref, ...], running: int) -> _Scores:
        return read_accumulator(problem, accs[0], running), read_accumulator(problem, accs[1], running)

    def mask(scores: _Scores, index: jax.Array) -> _Scores:
        start = block_at(index) * block

        def masked(scores: _Scores) -> _Scores:
            out = []
            for half, tile in enumerate(scores):
                keys = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
                seen = lax.broadcast_in_dim(positions - (start + half * TILE), tile.shape, [1])
                out.append(lax.optimization_barrier(jnp.where(keys <= seen, tile, NEG_INF)))
            return out[0], out[1]

        return lax.cond(block_at(index) >= first_masked, masked, lambda scores: scores, scores)

    def refill(index: jax.Array) -> None:
        """Behind a barrier that says that this block's keys and the last one's values are read."""
        for half in (0, 1):
            key_tile, value_tile = (
                2 * index + config.stages + half,
                2 * index - 2 + config.value_stages + half,
            )
            pl.when(key_tile < 2 * count)(functools.partial(copy, "k", key_tile))
            fresh = (index > 0) & (value_tile < 2 * count)
            pl.when(fresh)(functools.partial(copy, "v", value_tile))

    def weigh(index: jax.Array, scores: _Scores, old: Softmax) -> tuple[jax.Array, _Scores, jax.Array]:
        """The maximum behind a block, its weights, which go to shared memory as well, and what scales older values."""
        scores = mask(scores, index)
        top = _plain_max(scores) if problem.interpret else ops.column_max(scores, smem.maxima)
        maximum, weights, shrink = _weigh(old.maximum, top, scores, problem.factor)
        rounded = weights[0].astype(problem.dtype), weights[1].astype(problem.dtype)
        target = smem.weights.at[lax.rem(index, jnp.int32(2))]
        if problem.interpret:
            for half in (0, 1):
                target.at[:, pl.ds(half * TILE, TILE)][...] = rounded[half].T
        else:
            ops.store_weights(weights, rounded, target, smem.unrounded)
        return maximum, weights, shrink

    def add(old: Softmax, maximum: jax.Array, weights: _Scores, shrink: jax.Array) -> Softmax:
        added = _plain_sum(weights) if problem.interpret else ops.sum_lanes(smem.unrounded)
        lanes = product(old.lanes, lax.broadcast_in_dim(shrink, old.lanes.shape, [1])) + added
        return Softmax(maximum, lanes)

    def step(values_acc: _Ref, index: jax.Array, carry: Any) -> Any:
        def body(*accs: _Ref) -> Any:
            scores, old, joined = carry
            if ahead:
                multiply_values(values_acc, index - 1)
                # Behind the last block this multiplies whatever is in the ring, and is not used.
                pl.when(index + 1 < count)(lambda: wait(smem.k_full, index + 1, config.stages))
                multiply_keys(accs, index + 1)
            else:
                wait(smem.k_full, index, config.stages)
                multiply_keys(accs, index)
                multiply_values(values_acc, index - 1)
                scores = read(accs, value_products)
            fresh, empty = lax.rem(index, per_split) == 0, empty_softmax()
            base = Softmax(choose(fresh, empty.maximum, old.maximum), choose(fresh, empty.lanes, old.lanes))
            maximum, weights, shrink = weigh(index, scores, base)
            values = read_accumulator(problem, values_acc, key_products if ahead else 0)
            plgpu.commit_smem()
            refill(index)
            new = add(base, maximum, weights, shrink)

            def end(values: jax.Array) -> tuple[jax.Array, Any]:
                zeros = plgpu.layout_cast(jnp.zeros(values.shape, jnp.float32), plgpu.Layout.WGMMA)
                return zeros, end_split(index - 1, old, values, joined)

            values, joined = lax.cond(fresh, end, lambda values: (rescale(values, shrink, 1), joined), values)
            values_acc[...] = values
            return read(accs, 0) if ahead else None, new, joined

        return _with_accumulators(problem, smem, body)

    def whole(values_acc: _Ref) -> Any:
        if problem.interpret:
            values_acc[...] = jnp.zeros(values_acc.shape, jnp.float32)

        def first(*accs: _Ref) -> Softmax:
            wait(smem.k_full, jnp.int32(0), config.stages)
            multiply_keys(accs, jnp.int32(0))
            scores, empty = read(accs, 0), empty_softmax()
            maximum, weights, shrink = weigh(jnp.int32(0), scores, empty)
            plgpu.commit_smem()
            refill(jnp.int32(0))
            return add(empty, maximum, weights, shrink)

        def second(*accs: _Ref) -> _Scores:
            pl.when(count > 1)(lambda: wait(smem.k_full, jnp.int32(1), config.stages))
            multiply_keys(accs, jnp.int32(1))
            return read(accs, 0)

        softmax = _with_accumulators(problem, smem, first)
        scores = _with_accumulators(problem, smem, second) if ahead else None
        carry = scores, softmax, joined
        _, softmax, joins = lax.fori_loop(1, count, functools.partial(step, values_acc), carry)
        multiply_values(values_acc, count - 1)
        return end_split(count - 1, softmax, read_accumulator(problem, values_acc, 0), joins)

    if problem.interpret:
        return whole(smem.values_acc)
    return pl.run_scoped(whole, plgpu.ACC((value_width(problem), COLUMNS), jnp.float32))


def value_width(problem: Problem) -> int:
    """Columns of the values that a CTA works on."""
    return problem.shape.h // problem.config.value_parts


def _with_accumulators(problem: Problem, smem: types.SimpleNamespace, body: Callable[..., Any]) -> Any:
    if problem.interpret:
        return body(smem.scores_acc.at[0], smem.scores_acc.at[1])
    acc = plgpu.ACC((TILE, COLUMNS), jnp.float32)
    return pl.run_scoped(body, acc, acc)


def empty_softmax() -> Softmax:
    """`lanes` [64, COLUMNS]: row r has lane r % 8, eight times over, as every warp needs it."""
    maximum = plgpu.layout_cast(jnp.full((COLUMNS,), NEG_INF, jnp.float32), ops.COLUMN)
    lanes = plgpu.layout_cast(jnp.zeros((TILE, COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    return Softmax(maximum, lanes)


def _weigh(
    old: jax.Array, top: jax.Array, scores: _Scores, factor: float
) -> tuple[jax.Array, _Scores, jax.Array]:
    """`arithmetic.softmax_step` but for the sum: the new maximum, the weights, and what scales the old values."""
    maximum = jnp.maximum(old, top * factor)
    finite = jnp.where(maximum == NEG_INF, 0.0, maximum)
    shrink = jnp.exp2(old - finite)
    a, b = (jnp.exp2(tile * factor - lax.broadcast_in_dim(finite, tile.shape, [1])) for tile in scores)
    return maximum, (a, b), shrink


def _plain_max(scores: _Scores) -> jax.Array:
    return jnp.maximum(jnp.max(scores[0], axis=0), jnp.max(scores[1], axis=0))


def _plain_sum(weights: _Scores) -> jax.Array:
    groups = [tile[i : i + LANES] for tile in weights for i in range(0, TILE, LANES)]
    return jnp.tile(functools.reduce(jnp.add, groups), (TILE // LANES, 1))


def total_weight(problem: Problem, softmax: Softmax) -> jax.Array:
    """The lanes in the order of Mosaic's sum over the columns of a tile of 8: neighbours first."""
    if not problem.interpret:
        return ops.total(softmax.lanes)
    lanes = softmax.lanes[:LANES]
    while lanes.shape[0] > 1:
        lanes = lanes[::2] + lanes[1::2]
    return lanes[0]
