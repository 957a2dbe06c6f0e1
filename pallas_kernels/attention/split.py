"""The variant for few queries: one warpgroup has all heads of a KV head, and CTAs share out the splits of the keys."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arithmetic import Partial, Softmax, normalise
from .config import ROWS
from .joins import arrive_in_cluster, extent, fence, join_rows
from .launched_join import join_again
from .problem import Problem
from .walk import copy_rows, join_in_shared, positions_of_rows, store_rows, stream_keys_and_values, walk_keys

_Ref = Any


@functools.partial(jax.jit, static_argnums=(4,))
def run_split(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: Problem) -> jax.Array:
    shape, config = problem.shape, problem.config
    b, t, kv_heads, group, h = shape.b, shape.t, shape.kv_heads, shape.group, shape.h
    # With one query this moves nothing.
    rows = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(b * kv_heads, t * group, h)
    scratch = problem.rings(1) | {
        "q": problem.queries(),
        "q_full": plgpu.Barrier(num_arrivals=problem.parts),
        "values": problem.sums(ROWS, h),
    }
    joined = jax.ShapeDtypeStruct(
        (b * kv_heads, pl.cdiv(problem.rows, problem.joined_rows) * problem.joined_rows, h), q.dtype
    )
    parts = [
        jax.ShapeDtypeStruct((b * kv_heads, problem.stored_splits, *each), jnp.float32)
        for each in ((problem.stored_rows, h), (2, ROWS))
    ]
    cluster: dict[str, Any] = {}
    if config.parts > 1:
        scratch["stats"] = plgpu.SMEM((2, ROWS), jnp.float32)
    if config.in_cluster:
        scratch["sent"] = plgpu.ClusterBarrier(collective_axes=("part",))
        cluster = {"cluster": (config.parts,), "cluster_names": ("part",)}
    kernel = problem.kernel(
        _split_kernel,
        "split",
        out_type=[joined] if config.parts == 1 else [joined, *parts] if config.in_cluster else parts,
        scratch_types=scratch,
        grid=(b * kv_heads,) if config.in_cluster else (config.parts, b * kv_heads),
        grid_names=("head",) if config.in_cluster else ("part", "head"),
        num_threads=2,
        **cluster,
    )
    out = kernel(rows, k, v, positions)
    if config.second_launch:
        out = [join_again(problem, out[0], out[1], positions)]
    out = out[0][:, : problem.rows]
    return out.reshape(b, kv_heads, t, group, h).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _split_kernel(
    problem: Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    positions_gmem: _Ref,
    *outs: _Ref,
    **scratch: _Ref,
) -> None:
    smem, shape, plan = types.SimpleNamespace(**scratch), problem.shape, problem.plan
    parts, per_split = jnp.int32(problem.config.parts), jnp.int32(plan.blocks_per_split)
    index, part, wg = lax.axis_index("head"), lax.axis_index("part"), lax.axis_index("wg")
    row, kv_head = lax.div(index, jnp.int32(shape.kv_heads)), lax.rem(index, jnp.int32(shape.kv_heads))
    start = positions_gmem[row, 0]
    q_smem, q_plain = problem.names(smem.q)
    blocks, splits = extent(problem, start)
    mine = lax.div(splits - part + parts - 1, parts)  # part, part + parts, ...
    short = jnp.where(lax.rem(splits - 1, parts) == part, splits * per_split - blocks, 0)
    count = mine * per_split - short
    sums = [out.at[index] for out in outs[-2:]]

    def split_at(i: jax.Array) -> jax.Array:
        return part + lax.div(i, per_split) * parts

    def block_at(i: jax.Array) -> jax.Array:
        return split_at(i) * per_split + lax.rem(i, per_split)

    @pl.when(wg == 1)
    def _() -> None:
        def copy_queries() -> None:
            # The rows behind hold whatever is there, and are never stored.
            copy_rows(problem, q_gmem.at[index], q_plain, smem.q_full)

        stream_keys_and_values(problem, smem, k_gmem, v_gmem, row, kv_head, count, block_at, copy_queries)

    @pl.when(wg == 0)
    def _() -> None:
        alone = problem.config.parts == 1
        if alone:
            zeros = jnp.zeros((ROWS, shape.h), jnp.float32)
            smem.values[...] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            end_split = join_in_shared(problem, smem.values)
        else:
            end_split = _send(problem, smem, sums, split_at)
        plgpu.barrier_wait(smem.q_full)

        def walk() -> Partial:
            first_masked = lax.div(start + 1, jnp.int32(plan.block))
            positions = positions_of_rows(start, shape.group)
            return walk_keys(problem, smem, q_smem, positions, count, block_at, first_masked, end_split)

        if alone:
            joined = walk()
            out = normalise(joined, plgpu.load(smem.values, layout=plgpu.Layout.WGMMA), problem.dtype)
            store_rows(problem, out, (q_smem, q_plain), outs[0].at[index], problem.rows)
            return
        pl.when(count > 0)(lambda: (walk(), None)[1])
        plgpu.wait_smem_to_gmem(0)
        if problem.config.second_launch:
            return
        arrive_in_cluster(smem.sent)
        plgpu.barrier_wait(smem.sent)
        fence()
        height = problem.joined_rows
        turns = lax.div(pl.cdiv(problem.rows, height) - part + (parts - 1), parts)

        def turn(i: jax.Array, _: None) -> None:
            join_rows(problem, sums, splits, outs[0].at[index], (part + i * parts) * height)

        lax.fori_loop(0, turns, turn, None)


def _send(
    problem: Problem,
    smem: types.SimpleNamespace,
    parts: list[_Ref],
    split_at: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, Softmax, jax.Array, Partial], Partial]:
    """`end_split` of one CTA of several: a split's values, and maximum and total, go to global memory."""

    def end_split(last: jax.Array, softmax: Softmax, values: jax.Array, joined: Partial) -> Partial:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.values[...] = values
        smem.stats.at[0][...] = softmax.maximum
        smem.stats.at[1][...] = softmax.total
        plgpu.commit_smem()
        split, height = split_at(last), problem.stored_rows
        plgpu.copy_smem_to_gmem(smem.values.at[pl.ds(0, height)], parts[0].at[split])
        plgpu.copy_smem_to_gmem(smem.stats, parts[1].at[split])
        return joined

    return end_split
