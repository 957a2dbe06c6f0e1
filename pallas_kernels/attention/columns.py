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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import column_ops as ops
from .column_joins import join_alone, join_in_cluster, leave_splits
from .column_walk import TILE, EndSplit, walk_columns
from .config import COLUMNS
from .joins import extent
from .launched_join import join_again
from .problem import WIDTH, Problem, tiling_of

_Ref = Any


@functools.partial(jax.jit, static_argnums=(4,))
def run_columns(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: Problem
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
            jax.ShapeDtypeStruct((heads, problem.stored_splits, *each), jnp.float32)
            for each in ((COLUMNS, h), (2, 64))
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
        out = [join_again(problem, out[0], out[1], positions)]
    out = out[0][:, : problem.rows]
    return out.reshape(b, kv_heads, t, group, h).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _scratch(problem: Problem) -> dict[str, Any]:
    h, config, block = problem.shape.h, problem.config, problem.plan.block
    keys, values, width = config.stages, config.value_stages, h // config.value_parts
    whole, transforms = (problem.parts, COLUMNS, WIDTH), tiling_of(problem.dtype.itemsize)
    q: Any = plgpu.SMEM(whole, problem.dtype, transforms=transforms)
    if not problem.interpret:  # see Problem.queries
        q = plgpu.RefUnion(q, plgpu.SMEM(whole, problem.dtype, transforms=transforms[1:]))
    scratch = {
        "q": q,
        "q_full": plgpu.Barrier(num_arrivals=problem.parts),
        "k": problem.operand(keys, TILE, h),
        "v": problem.operand(values, TILE, width),
        "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=keys),
        "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=values),
        "weights": problem.operand(2, COLUMNS, block),
    }
    if problem.interpret:
        scratch["scores_acc"] = plgpu.SMEM((2, TILE, COLUMNS), jnp.float32)
        scratch["values_acc"] = plgpu.SMEM((width, COLUMNS), jnp.float32)
        if config.parts > 1 and config.in_cluster:
            scratch["sent"] = plgpu.ClusterBarrier(collective_axes=("part",))
    else:
        # One buffer, as each begins at a multiple of 1024 bytes.
        sent = 2 * ops.partial_words(problem.rows, width) if config.parts > 1 and config.in_cluster else 0
        scratch["words"] = plgpu.SMEM((block * COLUMNS + ops.MAXIMA + sent,), jnp.float32)
    return scratch


def _kernel(
    problem: Problem,
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
        smem.unrounded, smem.maxima = (
            smem.words.at[pl.ds(0, weights)],
            smem.words.at[pl.ds(weights, ops.MAXIMA)],
        )
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
        slot, last = lax.rem(tile, jnp.int32(stages)), (shape.s - 1) // TILE
        first = block_at(lax.div(tile, jnp.int32(2))) * 2 + lax.rem(tile, jnp.int32(2))
        keys = pl.ds(jnp.minimum(first, last) * TILE, TILE)  # past the cache nothing is seen
        full = getattr(smem, f"{what}_full").at[slot]
        columns = pl.ds(0, shape.h) if what == "k" else mine_of
        plgpu.copy_gmem_to_smem(src.at[row, keys, kv_head, columns], getattr(smem, what).at[slot], full)

    q_smem, q_plain = (smem.q, smem.q) if problem.interpret else (smem.q[0], smem.q[1])
    # Before it is known how many blocks there are: the first one nearly always is.
    for tile in (0, 1):
        copy("k", tile)
    for i in range(problem.parts):
        target = q_plain.at[i, pl.ds(0, problem.rows)]
        plgpu.copy_gmem_to_smem(q_gmem.at[index, :, pl.ds(i * WIDTH, WIDTH)], target, smem.q_full)
    for tile in (0, 1):
        copy("v", tile)
    start = positions_gmem[row, 0]
    blocks, splits = extent(problem, start)
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

    def walk(end_split: EndSplit, joined: Any) -> Any:
        return walk_columns(
            problem, smem, q_smem, seen, count, block_at, first_masked, copy, end_split, joined
        )

    def idle() -> None:
        for name in ("k_full", "v_full"):
            for slot in (0, 1):
                plgpu.barrier_wait(getattr(smem, name).at[slot])

    if config.parts == 1:
        join_alone(problem, walk, outs[0].at[index, :, mine_of])
    elif config.second_launch:
        left = [outs[0].at[index, :, :, mine_of], outs[1].at[index]]
        end = leave_splits(problem, left, split_at)
        pl.when(count > 0)(lambda: (walk(end, None), None)[1])
        pl.when(count == 0)(idle)
    else:
        exchange = [out.at[index, share] for out in outs[1:]]
        join_in_cluster(
            problem, smem, walk, idle, count, mine, splits, outs[0].at[index, :, mine_of], exchange, part
        )
