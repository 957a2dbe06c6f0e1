"""Joining splits that have the queries as columns: in the CTA, by a second launch, or among the CTAs of a cluster."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import column_ops as ops
from .arithmetic import NEG_INF, Partial, Product, Softmax, choose, merge, normalise
from .column_walk import EndSplit, empty_softmax, total_weight, value_width
from .config import COLUMNS
from .joins import arrive_in_cluster
from .problem import Problem

_Ref = Any


def join_alone(problem: Problem, walk: Callable[[EndSplit, Any], Any], out: _Ref) -> None:
    product = Product(problem.interpret, vector=ops.COLUMN)

    def end_split(_: jax.Array, softmax: Softmax, values: jax.Array, joined: Any) -> Any:
        before, before_values = joined
        split = Partial(softmax.maximum, total_weight(problem, softmax))
        return merge(before, split, before_values, values, product, 1)

    zero = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), ops.COLUMN)
    values = plgpu.layout_cast(jnp.zeros((value_width(problem), COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    joined, values = walk(end_split, (Partial(empty_softmax().maximum, zero), values))
    _store(problem, normalise(joined, values, problem.dtype, 1), out)


def _store(problem: Problem, values: jax.Array, out: _Ref) -> None:
    """Stores the columns of `values` [H, COLUMNS] as the first rows of `out` [rows, H]."""
    rows = min(out.shape[0], COLUMNS)
    if problem.interpret:
        out.at[pl.ds(0, rows)][...] = values.T[:rows]
    else:
        ops.store_columns(values, out, rows, problem.shape.h)


def leave_splits(problem: Problem, outs: list[_Ref], split_at: Callable[[jax.Array], jax.Array]) -> EndSplit:
    """Leaves a split in global memory, for another kernel to join."""

    def end_split(last: jax.Array, softmax: Softmax, values: jax.Array, joined: None) -> None:
        split, total = split_at(last), total_weight(problem, softmax)
        _store(problem, values, outs[0].at[split])
        if problem.interpret:
            for which, value in enumerate((softmax.maximum, total)):
                outs[1].at[split, which, pl.ds(0, COLUMNS)][...] = value
        else:
            ops.store_stats(softmax.maximum, total, outs[1].at[split])

    return end_split


def join_in_cluster(
    problem: Problem,
    smem: types.SimpleNamespace,
    walk: Callable[[EndSplit, Any], Any],
    idle: Callable[[], None],
    count: jax.Array,
    mine: jax.Array,
    splits: jax.Array,
    out: _Ref,
    exchange: list[_Ref],
    part: jax.Array,
) -> None:
    """Each round the CTAs of a cluster finish a split each, and every one joins all of them, for its share of the rows.

    What a round leaves is joined at the end of the next one, so that nobody waits for the slowest.
    """
    h, parts = value_width(problem), problem.config.parts
    height = 128 // h
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    product = Product(problem.interpret, layout)
    units = pl.cdiv(problem.rows, height)
    per_split = jnp.int32(problem.plan.blocks_per_split)

    def full(value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((height, h), value, jnp.float32), layout)

    def sent(slot: jax.Array) -> _Ref:
        words = ops.partial_words(problem.rows, h)
        return smem.words.at[pl.ds(problem.plan.block * COLUMNS + ops.MAXIMA + slot * words, words)]

    def send(turn: jax.Array, maximum: jax.Array, total: jax.Array, values: jax.Array) -> None:
        slot = lax.rem(turn, jnp.int32(2))
        if problem.interpret:
            exchange[0].at[slot, part][...] = values.T
            for which, value in enumerate((maximum, total)):
                exchange[1].at[slot, part, which][...] = value
        else:
            ops.send(values, maximum, total, sent(slot), problem.rows)

    def arrive() -> None:
        arrive_in_cluster(smem.sent) if problem.interpret else ops.cluster_arrive()

    def wait() -> None:
        plgpu.barrier_wait(smem.sent) if problem.interpret else ops.cluster_wait()

    def receive(slot: jax.Array, peer: int, unit: jax.Array) -> tuple[Partial, jax.Array]:
        if not problem.interpret:
            value, maximum, total = ops.receive(sent(slot), peer, unit, problem.rows, h)
            return Partial(maximum, total), value
        rows = jnp.minimum(unit * height + jnp.arange(height), COLUMNS - 1)
        values, stats = exchange[0].at[slot, peer][...], exchange[1].at[slot, peer][...]
        wide = jnp.broadcast_to(stats[:, rows][..., None], (2, height, h))
        return Partial(wide[0], wide[1]), values[rows]

    def join(turn: jax.Array, joined: Any) -> Any:
        joins = []
        for i, (before, values) in enumerate(joined):
            unit = part + i * parts
            got = [receive(lax.rem(turn, jnp.int32(2)), peer, unit) for peer in range(parts)]
            for peer, (split, split_values) in enumerate(got):
                there = turn * parts + peer < splits
                split = Partial(
                    choose(there, split.maximum, full(NEG_INF)), choose(there, split.total, full(0.0))
                )
                before, values = merge(before, split, values, choose(there, split_values, full(0.0)), product)
            joins.append((before, values))
        return joins

    def end_round(turn: jax.Array, joined: Any, send: Callable[[], None]) -> Any:
        def join_last(joined: Any) -> Any:
            wait()
            return join(turn - 1, joined)

        joined = lax.cond(turn > 0, join_last, lambda joined: joined, joined)
        send()
        arrive()
        return joined

    def end_split(last: jax.Array, softmax: Softmax, values: jax.Array, joined: Any) -> Any:
        turn, total = lax.div(last, per_split), total_weight(problem, softmax)
        return end_round(turn, joined, lambda: send(turn, softmax.maximum, total, values))

    empty = [(Partial(full(NEG_INF), full(0.0)), full(0.0)) for _ in range(pl.cdiv(units, parts))]

    def none(joined: Any) -> Any:
        idle()
        return joined

    joined = lax.cond(count > 0, lambda joined: walk(end_split, joined), none, empty)
    rounds = lax.div(splits + (parts - 1), jnp.int32(parts))
    joined = lax.cond(
        mine < rounds,
        lambda joined: end_round(rounds - 1, joined, lambda: None),
        lambda joined: joined,
        joined,
    )
    wait()
    joined = join(rounds - 1, joined)
    if not problem.interpret:
        # No CTA may end while another one reads its memory. Behind the stores the barrier would wait for them too.
        ops.cluster_arrive()
    for i, (partial, values) in enumerate(joined):
        unit = part + i * parts

        def store(unit: jax.Array = unit, partial: Partial = partial, values: jax.Array = values) -> None:
            out.at[pl.ds(unit * height, height)][...] = normalise(partial, values, problem.dtype)

        pl.when(unit < units)(store)
    if not problem.interpret:
        ops.cluster_wait()
