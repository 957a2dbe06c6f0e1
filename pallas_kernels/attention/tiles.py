"""The variant for many queries: two warpgroups a CTA with 64 queries of one head each, which walk all keys."""

import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arithmetic import normalise
from .config import ROWS
from .problem import Problem
from .walk import copy_rows, join_in_shared, positions_of_rows, store_rows, stream_keys_and_values, walk_keys

_Ref = Any
_PRODUCER_REGISTERS = 24


@functools.partial(jax.jit, static_argnums=(4,))
def run_tiles(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, problem: Problem) -> Any:
    shape, consumers = problem.shape, 2
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    scratch = problem.rings(consumers) | {
        "q": problem.queries(consumers),
        "q_full": plgpu.Barrier(num_arrivals=problem.parts, num_barriers=consumers),
        "joined": problem.sums(consumers, ROWS, shape.h),
    }
    if problem.with_lse:  # of whole tiles, and of the one that may be too many; no copy clips these stores
        rows = (pl.cdiv(shape.t, ROWS) + 1) * ROWS
        out.append(jax.ShapeDtypeStruct((shape.b, q.shape[2], rows), jnp.float32))
    kernel = problem.kernel(
        _tiles_kernel,
        "tiles",
        out_type=out,
        scratch_types=scratch,
        grid=(shape.b * shape.kv_heads * problem.tile_pairs,),
        grid_names=("cta",),
        num_threads=consumers + 1,
    )
    results = kernel(q, k, v, positions)
    if problem.with_lse:
        return results[0], results[1][:, :, : shape.t].transpose(0, 2, 1)
    return results[0]


def _tiles_kernel(
    problem: Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    positions_gmem: _Ref,
    out_gmem: _Ref,
    *lse_gmem: _Ref,
    **scratch: _Ref,
) -> None:
    smem, shape, block = types.SimpleNamespace(**scratch), problem.shape, jnp.int32(problem.plan.block)
    wg = lax.axis_index("wg")
    pair, row, kv_head = _tile_of(problem, lax.axis_index("cta"))
    start = positions_gmem[row, 0]
    group, last_tile = jnp.int32(shape.group), jnp.int32(pl.cdiv(shape.t, ROWS) - 1)

    def unit(index: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First query, head and blocks of a warpgroup. One too many does the last tile's work, and stores nothing."""
        number = 2 * pair + index
        tile = lax.div(number, group)
        last = jnp.minimum(jnp.minimum(tile, last_tile) * ROWS + ROWS - 1, shape.t - 1)
        return tile * ROWS, kv_head * group + lax.rem(number, group), lax.div(start + last, block) + 1

    count = unit(1)[2]  # the later tile has the most blocks
    q_smem, q_plain = problem.names(smem.q)

    @pl.when(wg == 2)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def copy_queries() -> None:
            for i in range(2):
                first, head, _ = unit(i)
                src = q_gmem.at[row, pl.ds(first, ROWS), head]
                copy_rows(problem, src, q_plain.at[i], smem.q_full.at[i])

        stream_keys_and_values(problem, smem, k_gmem, v_gmem, row, kv_head, count, lambda i: i, copy_queries)

    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers((512 - _PRODUCER_REGISTERS) // 2 // 8 * 8, action="increase")
        first, head, mine = unit(wg)
        joined_smem = smem.joined.at[wg]
        joined_smem[...] = plgpu.layout_cast(jnp.zeros((ROWS, shape.h), jnp.float32), plgpu.Layout.WGMMA)
        plgpu.barrier_wait(smem.q_full.at[wg])
        joined = walk_keys(
            problem,
            smem,
            q_smem.at[wg],
            positions_of_rows(start + first, 1),
            mine,
            lambda i: i,
            lax.div(start + first + 1, block),
            join_in_shared(problem, joined_smem),
        )

        def drain(index: jax.Array, _: None) -> None:
            for full, empty, slot in (
                (smem.k_full, smem.k_empty, problem.key_slot(index)),
                (smem.v_full, smem.v_empty, problem.value_slot(index)),
            ):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        lax.fori_loop(mine, count, drain, None)  # blocks that only the other warpgroup needs
        values = plgpu.load(joined_smem, layout=plgpu.Layout.WGMMA)
        out = normalise(joined, values, problem.dtype)
        for lse in lse_gmem:  # one, or none
            value = (joined.maximum + jnp.log2(joined.total)) * math.log(2)
            lse.at[row, head, pl.ds(first, ROWS)][...] = value
        store_rows(
            problem, out, (q_smem.at[wg], q_plain.at[wg]), out_gmem.at[row, pl.ds(first, ROWS), head], ROWS
        )


def _tile_of(problem: Problem, cta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pair of tiles, batch row, KV head) of a CTA.

    The last tiles, which see the most keys, start first. `kv_group` KV heads go side by side, so that their keys and
    values stay in the L2 cache.
    """
    shape, together = problem.shape, problem.config.kv_group
    heads, pairs = shape.b * shape.kv_heads, problem.tile_pairs
    turn = lax.div(cta, jnp.int32(together * pairs))
    width = jnp.minimum(jnp.int32(together), heads - turn * together)  # the last turn may have fewer
    within = cta - turn * (together * pairs)
    pair = pairs - 1 - lax.div(within, width)
    index = turn * together + lax.rem(within, width)
    return pair, lax.div(index, jnp.int32(shape.kv_heads)), lax.rem(index, jnp.int32(shape.kv_heads))
