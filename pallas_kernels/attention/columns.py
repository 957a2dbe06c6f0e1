"""Decode: up to 8 queries of a KV head are the columns of the products, and the keys their rows.

"tiles" and "split" give wgmma 64 rows of queries; in decode all but a few of them are empty. Here a block's scores are
`K q^T`, 128 rows of keys by 8 columns, and its values `V^T w^T`. The products, their order and the softmax step are the
same, so the bits are; but a thread has 8 scores of a block rather than 64, the accumulators are a few registers, and
the queries' memory is 2 KiB. So several CTAs, of one warpgroup each, fit an SM and hide each other's latencies.

The warpgroup copies its keys and values itself: a slot of a ring is filled again behind the barrier at which every warp
is seen to be done with it.
"""

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
from .config import COLUMNS
from .mosaic_gpu import (
    _LANES,
    _NEG_INF,
    _WIDTH,
    _arrive_in_cluster,
    _choose,
    _extent,
    _join_kernel,
    _merge,
    _multiply,
    _normalise,
    _Partial,
    _Problem,
    _Product,
    _read,
    _rescale,
    _Softmax,
    _tiled,
)

_Ref = Any
_Scores = tuple[jax.Array, jax.Array]  # of the two tiles of a block, each [TILE, COLUMNS]
_TILE = 64  # keys that a slot of a ring holds
_EndSplit = Callable[[jax.Array, _Softmax, jax.Array, Any], Any]


@functools.partial(jax.jit, static_argnums=(4,))
def run_columns(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: _Problem
) -> jax.Array:
    shape, config = problem.shape, problem.config
    b, t, kv_heads, group, h = shape.b, shape.t, shape.kv_heads, shape.group, shape.h
    heads, parts = b * kv_heads, config.parts
    rows = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(heads, t * group, h)
    width = h // config.value_parts
    height = 128 // width
    joined = jax.ShapeDtypeStruct((heads, pl.cdiv(problem.rows, height) * height, h), q.dtype)
    outs: list[Any] = [joined]
    if config.second_launch:
        outs = [
            jax.ShapeDtypeStruct((heads, problem.splits, *each), jnp.float32) for each in ((COLUMNS, h), (2, 64))
        ]
    elif parts > 1 and problem.interpret:
        outs += [
            jax.ShapeDtypeStruct((heads, config.value_parts, 2, parts, *each), jnp.float32)
            for each in ((COLUMNS, width), (2, COLUMNS))
        ]
    cluster: dict[str, Any] = {}
    if config.in_cluster:
        cluster = {"cluster": (parts,), "cluster_names": ("part",)}
    kernel = problem.kernel(
        _kernel,
        "columns",
        out_type=outs,
        scratch_types=_scratch(problem),
        grid=(heads * config.value_parts,) if config.in_cluster else (parts, heads * config.value_parts),
        grid_names=("head",) if config.in_cluster else ("part", "head"),
        num_threads=1,
        **cluster,
    )
    out = kernel(rows, k, v, positions)
    if config.second_launch:
        join = problem.kernel(
            _join_kernel,
            "join",
            out_type=jax.ShapeDtypeStruct(
                (heads, pl.cdiv(problem.rows, problem.joined_rows) * problem.joined_rows, h), q.dtype
            ),
            grid=(pl.cdiv(problem.rows, problem.joined_rows), heads),
            grid_names=("turn", "head"),
            num_threads=1,
        )
        out = [join(*out, positions)]
    out = out[0][:, : problem.rows]
    return out.reshape(b, kv_heads, t, group, h).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _scratch(problem: _Problem) -> dict[str, Any]:
    h, config, block = problem.shape.h, problem.config, problem.plan.block
    keys, values, width = config.stages, config.value_stages, h // config.value_parts
    whole, transforms = (problem.parts, COLUMNS, _WIDTH), _tiled(problem.dtype.itemsize)
    q: Any = plgpu.SMEM(whole, problem.dtype, transforms=transforms)
    if not problem.interpret:  # see _Problem.queries
        q = plgpu.RefUnion(q, plgpu.SMEM(whole, problem.dtype, transforms=transforms[1:]))
    scratch = {
        "q": q,
        "q_full": plgpu.Barrier(num_arrivals=problem.parts),
        "k": problem.operand(keys, _TILE, h),
        "v": problem.operand(values, _TILE, width),
        "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=keys),
        "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=values),
        "weights": problem.operand(2, COLUMNS, block),
    }
    if problem.interpret:
        scratch["scores_acc"] = plgpu.SMEM((2, _TILE, COLUMNS), jnp.float32)
        scratch["values_acc"] = plgpu.SMEM((width, COLUMNS), jnp.float32)
        if config.parts > 1 and config.in_cluster:
            scratch["sent"] = plgpu.ClusterBarrier(collective_axes=("part",))
    else:
        # One buffer, as each begins at a multiple of 1024 bytes.
        sent = 2 * ops.partial_words(problem.rows, width) if config.parts > 1 and config.in_cluster else 0
        scratch["words"] = plgpu.SMEM((block * COLUMNS + ops.MAXIMA + sent,), jnp.float32)
    return scratch


def _kernel(
    problem: _Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    positions_gmem: _Ref,
    *outs: _Ref,
    **scratch: _Ref,
) -> None:
    smem, shape, config = types.SimpleNamespace(**scratch), problem.shape, problem.config
    if not problem.interpret:
        weights = problem.plan.block * COLUMNS
        smem.unrounded, smem.maxima = smem.words.at[pl.ds(0, weights)], smem.words.at[pl.ds(weights, ops.MAXIMA)]
    parts, per_split = jnp.int32(config.parts), jnp.int32(problem.plan.blocks_per_split)
    part = lax.axis_index("part")
    index, share = (f(lax.axis_index("head"), jnp.int32(config.value_parts)) for f in (lax.div, lax.rem))
    width = shape.h // config.value_parts
    mine_of = pl.ds(share * width, width)  # columns of the values
    row, kv_head = lax.div(index, jnp.int32(shape.kv_heads)), lax.rem(index, jnp.int32(shape.kv_heads))

    def split_at(i: jax.Array) -> jax.Array:
        return part + lax.div(i, per_split) * parts

    def block_at(i: jax.Array) -> jax.Array:
        return split_at(i) * per_split + lax.rem(i, per_split)

    def copy(what: str, tile: jax.Array | int) -> None:
        src = {"k": k_gmem, "v": v_gmem}[what]
        stages = {"k": config.stages, "v": config.value_stages}[what]
        tile = jnp.int32(tile)
        slot, last = lax.rem(tile, jnp.int32(stages)), (shape.s - 1) // _TILE
        first = block_at(lax.div(tile, jnp.int32(2))) * 2 + lax.rem(tile, jnp.int32(2))
        keys = pl.ds(jnp.minimum(first, last) * _TILE, _TILE)  # past the cache nothing is seen
        full = getattr(smem, f"{what}_full").at[slot]
        columns = pl.ds(0, shape.h) if what == "k" else mine_of
        plgpu.copy_gmem_to_smem(src.at[row, keys, kv_head, columns], getattr(smem, what).at[slot], full)

    q_smem, q_plain = (smem.q, smem.q) if problem.interpret else (smem.q[0], smem.q[1])
    # Before it is known how many blocks there are: the first one nearly always is.
    for tile in (0, 1):
        copy("k", tile)
    for i in range(problem.parts):
        target = q_plain.at[i, pl.ds(0, problem.rows)]
        plgpu.copy_gmem_to_smem(q_gmem.at[index, :, pl.ds(i * _WIDTH, _WIDTH)], target, smem.q_full)
    for tile in (0, 1):
        copy("v", tile)
    start = positions_gmem[row, 0]
    blocks, splits = _extent(problem, start)
    mine = lax.div(splits - part + parts - 1, parts)  # part, part + parts, ...
    short = jnp.where(lax.rem(splits - 1, parts) == part, splits * per_split - blocks, 0)
    count = mine * per_split - short

    def fill(tile: jax.Array, _: None) -> None:
        for what, stages in (("k", config.stages), ("v", config.value_stages)):
            pl.when(tile < stages)(functools.partial(copy, what, tile))

    most = max(config.stages, config.value_stages)
    lax.fori_loop(2, lax.optimization_barrier(jnp.minimum(2 * count, most)), fill, None)
    plgpu.barrier_wait(smem.q_full)
    first_masked = lax.div(start + 1, jnp.int32(problem.plan.block))
    column = plgpu.broadcasted_iota(jnp.int32, (COLUMNS,), 0, layout=ops.COLUMN)
    seen = start + lax.div(column, jnp.int32(shape.group))

    def walk(end_split: _EndSplit, joined: Any) -> Any:
        return _walk(problem, smem, q_smem, seen, count, block_at, first_masked, copy, end_split, joined)

    def idle() -> None:
        for name in ("k_full", "v_full"):
            for slot in (0, 1):
                plgpu.barrier_wait(getattr(smem, name).at[slot])

    if config.parts == 1:
        _alone(problem, walk, outs[0].at[index, :, mine_of])
    elif config.second_launch:
        left = [outs[0].at[index, :, :, mine_of], outs[1].at[index]]
        end = _leave(problem, left, split_at)
        pl.when(count > 0)(lambda: (walk(end, None), None)[1])
        pl.when(count == 0)(idle)
    else:
        exchange = [out.at[index, share] for out in outs[1:]]
        _in_cluster(
            problem, smem, walk, idle, count, mine, splits, outs[0].at[index, :, mine_of], exchange, part
        )


# --- a walk over the keys -------------------------------------------------------------------------------------------


def _walk(
    problem: _Problem,
    smem: types.SimpleNamespace,
    q_smem: _Ref,
    positions: jax.Array,
    count: jax.Array,
    block_at: Callable[[jax.Array], jax.Array],
    first_masked: jax.Array,
    copy: Callable[[str, jax.Array], None],
    end_split: _EndSplit,
    joined: Any,
) -> Any:
    """Walks `count` >= 1 blocks; `positions` [COLUMNS] are the columns'. See `mosaic_gpu._walk`."""
    config, block = problem.config, problem.plan.block
    per_split = jnp.int32(problem.plan.blocks_per_split)
    ahead = config.stages >= 4  # the next block's scores are multiplied beside this one's softmax step
    key_products, value_products = 2 * problem.parts, 2
    product = _Product(problem.interpret, vector=ops.COLUMN)

    def wait(full: _Ref, index: jax.Array, stages: int) -> None:
        for half in (0, 1):
            plgpu.barrier_wait(full.at[lax.rem(2 * index + half, jnp.int32(stages))])

    def multiply_keys(accs: tuple[_Ref, ...], index: jax.Array) -> None:
        for half in (0, 1):
            slot = lax.rem(2 * index + half, jnp.int32(config.stages))
            for i in range(problem.parts):
                keys = smem.k.at[slot, :, pl.ds(i * _WIDTH, _WIDTH)]
                _multiply(problem, accs[half], keys, q_smem.at[i].transpose((1, 0)), first=i == 0)

    def multiply_values(acc: _Ref, index: jax.Array) -> None:
        wait(smem.v_full, index, config.value_stages)
        for half in (0, 1):
            slot = lax.rem(2 * index + half, jnp.int32(config.value_stages))
            weights = smem.weights.at[lax.rem(index, jnp.int32(2)), :, pl.ds(half * _TILE, _TILE)]
            _multiply(
                problem, acc, smem.v.at[slot].transpose((1, 0)), weights.transpose((1, 0)), first=False
            )

    def read(accs: tuple[_Ref, ...], running: int) -> _Scores:
        return _read(problem, accs[0], running), _read(problem, accs[1], running)

    def mask(scores: _Scores, index: jax.Array) -> _Scores:
        start = block_at(index) * block

        def masked(scores: _Scores) -> _Scores:
            out = []
            for half, tile in enumerate(scores):
                keys = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
                seen = lax.broadcast_in_dim(positions - (start + half * _TILE), tile.shape, [1])
                out.append(lax.optimization_barrier(jnp.where(keys <= seen, tile, _NEG_INF)))
            return out[0], out[1]

        return lax.cond(block_at(index) >= first_masked, masked, lambda scores: scores, scores)

    def refill(index: jax.Array) -> None:
        """Behind a barrier that says that this block's keys and the last one's values are read."""
        for half in (0, 1):
            key_tile, value_tile = 2 * index + config.stages + half, 2 * index - 2 + config.value_stages + half
            pl.when(key_tile < 2 * count)(functools.partial(copy, "k", key_tile))
            fresh = (index > 0) & (value_tile < 2 * count)
            pl.when(fresh)(functools.partial(copy, "v", value_tile))

    def weigh(index: jax.Array, scores: _Scores, old: _Softmax) -> tuple[jax.Array, _Scores, jax.Array]:
        """The maximum behind a block, its weights, which go to shared memory as well, and what scales older values."""
        scores = mask(scores, index)
        top = _plain_max(scores) if problem.interpret else ops.column_max(scores, smem.maxima)
        maximum, weights, shrink = _weigh(old.maximum, top, scores, problem.factor)
        rounded = weights[0].astype(problem.dtype), weights[1].astype(problem.dtype)
        target = smem.weights.at[lax.rem(index, jnp.int32(2))]
        if problem.interpret:
            for half in (0, 1):
                target.at[:, pl.ds(half * _TILE, _TILE)][...] = rounded[half].T
        else:
            ops.store_weights(weights, rounded, target, smem.unrounded)
        return maximum, weights, shrink

    def add(old: _Softmax, maximum: jax.Array, weights: _Scores, shrink: jax.Array) -> _Softmax:
        added = _plain_sum(weights) if problem.interpret else ops.sum_lanes(smem.unrounded)
        lanes = product(old.lanes, lax.broadcast_in_dim(shrink, old.lanes.shape, [1])) + added
        return _Softmax(maximum, lanes)

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
            fresh, empty = lax.rem(index, per_split) == 0, _empty()
            base = _Softmax(
                _choose(fresh, empty.maximum, old.maximum), _choose(fresh, empty.lanes, old.lanes)
            )
            maximum, weights, shrink = weigh(index, scores, base)
            values = _read(problem, values_acc, key_products if ahead else 0)
            plgpu.commit_smem()
            refill(index)
            new = add(base, maximum, weights, shrink)

            def end(values: jax.Array) -> tuple[jax.Array, Any]:
                zeros = plgpu.layout_cast(jnp.zeros(values.shape, jnp.float32), plgpu.Layout.WGMMA)
                return zeros, end_split(index - 1, old, values, joined)

            values, joined = lax.cond(fresh, end, lambda values: (_rescale(values, shrink, 1), joined), values)
            values_acc[...] = values
            return read(accs, 0) if ahead else None, new, joined

        return _with_accumulators(problem, smem, body)

    def whole(values_acc: _Ref) -> Any:
        if problem.interpret:
            values_acc[...] = jnp.zeros(values_acc.shape, jnp.float32)

        def first(*accs: _Ref) -> _Softmax:
            wait(smem.k_full, jnp.int32(0), config.stages)
            multiply_keys(accs, jnp.int32(0))
            scores, empty = read(accs, 0), _empty()
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
        return end_split(count - 1, softmax, _read(problem, values_acc, 0), joins)

    if problem.interpret:
        return whole(smem.values_acc)
    return pl.run_scoped(whole, plgpu.ACC((_width(problem), COLUMNS), jnp.float32))


def _width(problem: _Problem) -> int:
    """Columns of the values that a CTA works on."""
    return problem.shape.h // problem.config.value_parts


def _with_accumulators(problem: _Problem, smem: types.SimpleNamespace, body: Callable[..., Any]) -> Any:
    if problem.interpret:
        return body(smem.scores_acc.at[0], smem.scores_acc.at[1])
    acc = plgpu.ACC((_TILE, COLUMNS), jnp.float32)
    return pl.run_scoped(body, acc, acc)


def _empty() -> _Softmax:
    """`lanes` [64, COLUMNS]: row r has lane r % 8, eight times over, as every warp needs it."""
    maximum = plgpu.layout_cast(jnp.full((COLUMNS,), _NEG_INF, jnp.float32), ops.COLUMN)
    lanes = plgpu.layout_cast(jnp.zeros((_TILE, COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    return _Softmax(maximum, lanes)


def _weigh(
    old: jax.Array, top: jax.Array, scores: _Scores, factor: float
) -> tuple[jax.Array, _Scores, jax.Array]:
    """`mosaic_gpu._softmax_step` but for the sum: the new maximum, the weights, and what scales the old values."""
    maximum = jnp.maximum(old, top * factor)
    finite = jnp.where(maximum == _NEG_INF, 0.0, maximum)
    shrink = jnp.exp2(old - finite)
    a, b = (jnp.exp2(tile * factor - lax.broadcast_in_dim(finite, tile.shape, [1])) for tile in scores)
    return maximum, (a, b), shrink


def _plain_max(scores: _Scores) -> jax.Array:
    return jnp.maximum(jnp.max(scores[0], axis=0), jnp.max(scores[1], axis=0))


def _plain_sum(weights: _Scores) -> jax.Array:
    groups = [tile[i : i + _LANES] for tile in weights for i in range(0, _TILE, _LANES)]
    return jnp.tile(functools.reduce(jnp.add, groups), (_TILE // _LANES, 1))


def _total(problem: _Problem, softmax: _Softmax) -> jax.Array:
    """The lanes in the order of Mosaic's sum over the columns of a tile of 8: neighbours first."""
    if not problem.interpret:
        return ops.total(softmax.lanes)
    lanes = softmax.lanes[:_LANES]
    while lanes.shape[0] > 1:
        lanes = lanes[::2] + lanes[1::2]
    return lanes[0]


# --- joining the splits ---------------------------------------------------------------------------------------------


def _alone(problem: _Problem, walk: Callable[[_EndSplit, Any], Any], out: _Ref) -> None:
    product = _Product(problem.interpret, vector=ops.COLUMN)

    def end_split(_: jax.Array, softmax: _Softmax, values: jax.Array, joined: Any) -> Any:
        before, before_values = joined
        split = _Partial(softmax.maximum, _total(problem, softmax))
        return _merge(before, split, before_values, values, product, 1)

    zero = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), ops.COLUMN)
    values = plgpu.layout_cast(jnp.zeros((_width(problem), COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    joined, values = walk(end_split, (_Partial(_empty().maximum, zero), values))
    _store(problem, _normalise(joined, values, problem.dtype, 1), out)


def _store(problem: _Problem, values: jax.Array, out: _Ref) -> None:
    """Stores the columns of `values` [H, COLUMNS] as the first rows of `out` [rows, H]."""
    rows = min(out.shape[0], COLUMNS)
    if problem.interpret:
        out.at[pl.ds(0, rows)][...] = values.T[:rows]
    else:
        ops.store_columns(values, out, rows, problem.shape.h)


def _leave(problem: _Problem, outs: list[_Ref], split_at: Callable[[jax.Array], jax.Array]) -> _EndSplit:
    """Leaves a split in global memory, for another kernel to join."""

    def end_split(last: jax.Array, softmax: _Softmax, values: jax.Array, joined: None) -> None:
        split, total = split_at(last), _total(problem, softmax)
        _store(problem, values, outs[0].at[split])
        if problem.interpret:
            for which, value in enumerate((softmax.maximum, total)):
                outs[1].at[split, which, pl.ds(0, COLUMNS)][...] = value
        else:
            ops.store_stats(softmax.maximum, total, outs[1].at[split])

    return end_split


def _in_cluster(
    problem: _Problem,
    smem: types.SimpleNamespace,
    walk: Callable[[_EndSplit, Any], Any],
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
    h, parts = _width(problem), problem.config.parts
    height = 128 // h
    layout = plgpu.Layout.WG_STRIDED((height, h), vec_size=1)
    product = _Product(problem.interpret, layout)
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
        _arrive_in_cluster(smem.sent) if problem.interpret else ops.cluster_arrive()

    def wait() -> None:
        plgpu.barrier_wait(smem.sent) if problem.interpret else ops.cluster_wait()

    def receive(slot: jax.Array, peer: int, unit: jax.Array) -> tuple[_Partial, jax.Array]:
        if not problem.interpret:
            value, maximum, total = ops.receive(sent(slot), peer, unit, problem.rows, h)
            return _Partial(maximum, total), value
        rows = jnp.minimum(unit * height + jnp.arange(height), COLUMNS - 1)
        values, stats = exchange[0].at[slot, peer][...], exchange[1].at[slot, peer][...]
        wide = jnp.broadcast_to(stats[:, rows][..., None], (2, height, h))
        return _Partial(wide[0], wide[1]), values[rows]

    def join(turn: jax.Array, joined: Any) -> Any:
        joins = []
        for i, (before, values) in enumerate(joined):
            unit = part + i * parts
            got = [receive(lax.rem(turn, jnp.int32(2)), peer, unit) for peer in range(parts)]
            for peer, (split, split_values) in enumerate(got):
                there = turn * parts + peer < splits
                split = _Partial(
                    _choose(there, split.maximum, full(_NEG_INF)), _choose(there, split.total, full(0.0))
                )
                before, values = _merge(
                    before, split, values, _choose(there, split_values, full(0.0)), product
                )
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

    def end_split(last: jax.Array, softmax: _Softmax, values: jax.Array, joined: Any) -> Any:
        turn, total = lax.div(last, per_split), _total(problem, softmax)
        return end_round(turn, joined, lambda: send(turn, softmax.maximum, total, values))

    empty = [(_Partial(full(_NEG_INF), full(0.0)), full(0.0)) for _ in range(pl.cdiv(units, parts))]

    def none(joined: Any) -> Any:
        idle()
        return joined

    joined = lax.cond(count > 0, lambda joined: walk(end_split, joined), none, empty)
    rounds = lax.div(splits + (parts - 1), jnp.int32(parts))
    joined = lax.cond(
        mine < rounds, lambda joined: end_round(rounds - 1, joined, lambda: None), lambda joined: joined, joined
    )
    wait()
    joined = join(rounds - 1, joined)
    for i, (partial, values) in enumerate(joined):
        unit = part + i * parts

        def store(unit: jax.Array = unit, partial: _Partial = partial, values: jax.Array = values) -> None:
            out.at[pl.ds(unit * height, height)][...] = _normalise(partial, values, problem.dtype)

        pl.when(unit < units)(store)
    if not problem.interpret:
        ops.cluster_arrive()  # no CTA may end while another one reads its memory
        ops.cluster_wait()

