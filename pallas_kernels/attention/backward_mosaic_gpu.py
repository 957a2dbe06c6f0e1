"""The backward pass of causal attention for Hopper GPUs, in Pallas Mosaic GPU: two kernels, no atomic adds.

Both multiply scores again by wgmma, turn them into weights with the log-sum-exp that the forward pass kept, and hold
their gradients in wgmma accumulators until the end. Weights and their gradients never leave the registers: they are the
left operand of the next product. Two consumer warpgroups a CTA work on 64 rows each; while one is at its exponents the
other multiplies.

* "dkv": a warpgroup owns 64 keys of a KV head and walks the query heads of its group in ascending order, and for each
  the blocks of 64 queries from the first that sees its keys: `S^T = K Q^T`, `dP^T = V dO^T`, `dV += P^T dO`,
  `dK += dS^T Q`. That is one accumulator chain for the whole group.
* "dq": a warpgroup owns 64 queries of a head and walks blocks of 128 keys in ascending order: `S = Q K^T`,
  `dP = dO V^T`, `dQ += dS K`.

A gradient's bits follow from its own chain. Which CTA, warpgroup and row of a tile have it does not enter, nor what the
CTAs beside do, and products with weights of 0 change nothing in a chain.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows
from .accumulators import multiply_into, read_accumulator

__all__ = ["attention_backward_mosaic_gpu", "refusal"]

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel

_ROWS = 64  # of a warpgroup: keys in "dkv", queries in "dq"
_QUERIES = 64  # a block of "dkv"
_KEYS = 128  # a block of "dq"
_CONSUMERS = 2
_DELTAS = 64  # heads of queries whose delta a CTA computes
_PRODUCER_REGISTERS = 24
_NEG_INF = float("-inf")
_L2_BYTES = 24_000_000  # that CTAs which run at the same time may walk


def attention_backward_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of causal attention on a Hopper GPU.

    Args:
        q: [B, T, N, H], bfloat16 or float16; H is 64 or 128; query t at position t.
        k: [B, T, K, H] of the same type; N is a multiple of K.
        v: like k.
        out: like q, the output of the forward pass.
        lse: float32 [B, T, N], the log-sum-exp of the scaled scores.
        dout: like q, the gradient of `out`.
        scale: multiplies the scores; positive.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly. Shows order and synchronisation, not
            the bits of a GPU.

    Returns:
        The gradients of q, k and v.

    Raises:
        ValueError: If a shape, a type or `scale` is not covered.
    """
    if why := refusal(q.dtype, q.shape[3], scale):
        raise ValueError(f"attention_backward: backend 'mosaic_gpu' {why}; use backend='reference'")
    (b, t, n, h), kv_heads = q.shape, k.shape[2]
    problem = _Problem(
        b=b,
        t=t + -t % 8,  # tiles in shared memory have 8 rows
        kv_heads=kv_heads,
        group=n // kv_heads,
        h=h,
        dtype=q.dtype,
        scale=scale,
        interpret=interpret,
    )
    return _run(q, k, v, out, lse, dout, problem)


def refusal(dtype: jax.typing.DTypeLike, h: int, scale: float) -> str | None:
    """Why the kernels do not take such operands, or None if they do."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if h not in (64, 128):
        return f"takes head_dim 64 and 128, not {h}"
    if not (scale > 0 and math.isfinite(scale)):
        return f"takes a positive scale, not {scale}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """Sizes of a call, and what follows from them: q [b, t, kv_heads * group, h]."""

    b: int
    t: int
    kv_heads: int
    group: int
    h: int
    dtype: Any
    scale: float
    interpret: bool

    @property
    def factor(self) -> float:
        """Turns scores into exponents of two."""
        return self.scale * math.log2(math.e)

    @property
    def pairs(self) -> int:
        """Pairs of 64 rows, one for each consumer."""
        return pl.cdiv(self.t, _ROWS * _CONSUMERS)

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.t, _QUERIES)

    def operand(self, *shape: int) -> Any:
        """Shared memory that wgmma multiplies."""
        tiling = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
        return plgpu.SMEM(shape, self.dtype, transforms=tiling)

    def stand_ins(self, **columns: int) -> dict[str, Any]:
        """What the interpreter has for accumulators, by name: it can neither store to one nor multiply registers."""
        return {
            name: plgpu.SMEM((_CONSUMERS, _ROWS, width), jnp.float32)
            for name, width in columns.items()
            if self.interpret
        }

    def kernel(self, body: Callable[..., None], name: str, **kwargs: Any) -> Callable[..., Any]:
        return plgpu.kernel(
            functools.partial(body, self),
            grid=(self.b * self.kv_heads * self.pairs * (self.group if name == "dq" else 1),),
            grid_names=("cta",),
            num_threads=_CONSUMERS + 1,
            thread_name="wg",
            kernel_name=f"attention_backward_{name}",
            # Where memory passes from one thread or proxy to another, the kernel says so itself.
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if self.interpret else None,
            **kwargs,
        )


@functools.partial(jax.jit, static_argnums=(6,))
def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    problem: _Problem,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    t, h = q.shape[1], problem.h
    delta = _delta(dout, out, problem.interpret)
    statistics = _statistics(lse * jnp.float32(math.log2(math.e)), delta, problem)
    if missing := problem.t - t:
        q, k, v, dout = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (q, k, v, dout))
    stages = 4 if h == 128 else 6
    dkv = problem.kernel(
        _dkv_kernel,
        "dkv",
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        scratch_types=problem.stand_ins(s_acc=_QUERIES, dp_acc=_QUERIES, dk_acc=h, dv_acc=h)
        | {
            "k": problem.operand(_CONSUMERS, _ROWS, h),
            "v": problem.operand(_CONSUMERS, _ROWS, h),
            "q": problem.operand(stages, _QUERIES, h),
            "dout": problem.operand(stages, _QUERIES, h),
            "statistics": plgpu.SMEM((stages, 2, _QUERIES), jnp.float32),
            "kv_full": plgpu.Barrier(num_arrivals=2, num_barriers=_CONSUMERS),
            "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "dout_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        },
    )
    stages = 2 if h == 128 else 4
    dq = problem.kernel(
        _dq_kernel,
        "dq",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=problem.stand_ins(s_acc=_KEYS, dp_acc=_KEYS, dq_acc=h)
        | {
            "q": problem.operand(_CONSUMERS, _ROWS, h),
            "dout": problem.operand(_CONSUMERS, _ROWS, h),
            "statistics": plgpu.SMEM((_CONSUMERS, 2, _ROWS), jnp.float32),
            "k": problem.operand(stages, _KEYS, h),
            "v": problem.operand(stages, _KEYS, h),
            "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=_CONSUMERS),
            "k_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            "k_empty": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            "v_empty": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        },
    )
    operands = q, k, v, dout, statistics
    gradients = [dq(*operands), *dkv(*operands)]
    dq, dk, dv = (gradient[:, :t] for gradient in gradients)
    return dq, dk, dv


def _delta(dout: jax.Array, out: jax.Array, interpret: bool) -> jax.Array:
    """`tree_sum(dout * out)` of each head, [B, T, N]; the products are exact."""
    count, h = dout.size // dout.shape[3], dout.shape[3]
    heads = [jnp.pad(a.reshape(count, h), ((0, max(0, _DELTAS - count)), (0, 0))) for a in (dout, out)]
    delta = plgpu.kernel(
        functools.partial(_delta_kernel, interpret),
        out_type=jax.ShapeDtypeStruct((heads[0].shape[0],), jnp.float32),
        grid=(pl.cdiv(count, _DELTAS),),
        grid_names=("tile",),
        num_threads=1,
        thread_name="wg",
        kernel_name="attention_backward_delta",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(interpret),
    )(*heads)
    return delta[:count].reshape(dout.shape[:3])


def _delta_kernel(interpret: bool, dout_gmem: _Ref, out_gmem: _Ref, delta_gmem: _Ref) -> None:
    half = dout_gmem.shape[1] // 2
    layout = rows.head_layout(rows.heads_at_once(_DELTAS, half), half)
    # The last tile overlaps its neighbour, and both write the same values there.
    heads = pl.ds(jnp.minimum(lax.axis_index("tile") * _DELTAS, dout_gmem.shape[0] - _DELTAS), _DELTAS)

    def load(ref: _Ref, start: int) -> jax.Array:
        return plgpu.load(ref.at[heads, pl.ds(start, half)], layout=layout, optimized=False)

    loaded = [(load(dout_gmem, start), load(out_gmem, start)) for start in (0, half)]
    first, second = (a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in loaded)
    delta_gmem.at[heads][...] = rows.sums_of_heads(first, second, layout, interpret=interpret)


def _statistics(lse: jax.Array, delta: jax.Array, problem: _Problem) -> jax.Array:
    """Both, [B, T, N], as blocks [B, N, blocks, 2, 64] that a copy takes whole; an even number of blocks."""
    (b, _, n), missing = lse.shape, problem.pairs * _CONSUMERS * _ROWS - lse.shape[1]
    # Queries that are not there have exponents of -inf.
    lse = jnp.pad(lse, ((0, 0), (0, missing), (0, 0)), constant_values=float("inf"))
    both = jnp.stack([lse, jnp.pad(delta, ((0, 0), (0, missing), (0, 0)))])
    return both.reshape(2, b, -1, _ROWS, n).transpose(1, 4, 2, 0, 3)


# --- gradients of keys and values -----------------------------------------------------------------------------------


def _dkv_kernel(
    problem: _Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    dout_gmem: _Ref,
    statistics_gmem: _Ref,
    dk_gmem: _Ref,
    dv_gmem: _Ref,
    **scratch: _Ref,
) -> None:
    smem, wg = types.SimpleNamespace(**scratch), lax.axis_index("wg")
    walked = 4 * problem.group * problem.t * problem.h  # bytes of queries and gradients of a KV head
    pair, row, kv_head = _unit(problem, lax.axis_index("cta"), 1, walked)
    first, blocks = pair * (_CONSUMERS * _ROWS // _QUERIES), jnp.int32(problem.query_blocks)
    count = (blocks - first) * problem.group
    stages = smem.q.shape[0]

    def next_block(block: jax.Array) -> jax.Array:
        return jnp.where(block + 1 == blocks, first, block + 1)

    @pl.when(wg == _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def copy_keys() -> None:
            for i in range(_CONSUMERS):
                keys = pl.ds((pair * _CONSUMERS + i) * _ROWS, _ROWS)
                for src, dst in ((k_gmem, smem.k), (v_gmem, smem.v)):
                    plgpu.copy_gmem_to_smem(src.at[row, keys, kv_head], dst.at[i], smem.kv_full.at[i])

        def copy_block(slot: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            head, block = at
            queries = pl.ds(block * _QUERIES, _QUERIES)
            plgpu.copy_gmem_to_smem(q_gmem.at[row, queries, head], smem.q.at[slot], smem.q_full.at[slot])
            plgpu.copy_gmem_to_smem(
                statistics_gmem.at[row, head, block], smem.statistics.at[slot], smem.q_full.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                dout_gmem.at[row, queries, head], smem.dout.at[slot], smem.dout_full.at[slot]
            )
            following = next_block(block)
            return head + (following <= block).astype(jnp.int32), following

        @plgpu.warp_map
        def _(warp: jax.Array) -> None:
            @pl.when(warp == 0)
            def _() -> None:
                copy_keys()
                start = kv_head * problem.group, first
                _stream(stages, [smem.empty], count, copy_block, start)

    @pl.when(wg < _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_consumer_registers(), action="increase")
        kw, vw = smem.k.at[wg], smem.v.at[wg]
        own = (
            pair * (_CONSUMERS * _ROWS // _QUERIES) + wg
        )  # the block of queries that stand beside these keys

        def mask(scores: jax.Array, block: jax.Array) -> jax.Array:
            def masked(scores: jax.Array) -> jax.Array:
                queries = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                keys = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
                keys = lax.broadcast_in_dim(keys + (own - block) * _ROWS, scores.shape, [0])
                # Without the barrier LLVM makes selects of the branch, and every block pays for the mask.
                return lax.optimization_barrier(jnp.where(keys <= queries, scores, _NEG_INF))

            return lax.cond(block <= own, masked, lambda scores: scores, scores)

        def walk(dk_acc: _Ref, dv_acc: _Ref) -> None:
            plgpu.barrier_wait(smem.kv_full.at[wg])

            def step(index: jax.Array, block: jax.Array) -> jax.Array:
                slot = lax.rem(index, jnp.int32(stages))
                qb, db, statistics = smem.q.at[slot], smem.dout.at[slot], smem.statistics.at[slot]

                def multiply(s_acc: _Ref, dp_acc: _Ref) -> None:
                    plgpu.barrier_wait(smem.q_full.at[slot])
                    multiply_into(problem, s_acc, kw, qb.transpose((1, 0)), first=True)
                    plgpu.barrier_wait(smem.dout_full.at[slot])
                    multiply_into(problem, dp_acc, vw, db.transpose((1, 0)), first=True)
                    scores = mask(read_accumulator(problem, s_acc, 1), block)
                    weights = jnp.exp2(scores * problem.factor - _per_query(statistics.at[0], scores.shape))
                    multiply_into(problem, dv_acc, weights.astype(problem.dtype), db)
                    dweights = read_accumulator(problem, dp_acc, 1)
                    dscores = weights * (dweights - _per_query(statistics.at[1], scores.shape))
                    multiply_into(problem, dk_acc, dscores.astype(problem.dtype), qb)

                _with_accumulators(problem, smem, {"s_acc": _QUERIES, "dp_acc": _QUERIES}, multiply)
                _wait(problem)
                plgpu.barrier_arrive(smem.empty.at[slot])
                return next_block(block)

            lax.fori_loop(0, count, step, first)
            keys = pl.ds((pair * _CONSUMERS + wg) * _ROWS, _ROWS)
            dk = read_accumulator(problem, dk_acc, 0) * problem.scale
            # Of shared memory a warpgroup overwrites what it alone has read.
            for staged, gradient in ((kw, dk), (vw, read_accumulator(problem, dv_acc, 0))):
                staged[...] = gradient.astype(problem.dtype)
            plgpu.commit_smem()
            for staged, dst in ((kw, dk_gmem), (vw, dv_gmem)):
                plgpu.copy_smem_to_gmem(staged, dst.at[row, keys, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        _with_accumulators(problem, smem, {"dk_acc": problem.h, "dv_acc": problem.h}, walk, zero=True)


def _per_query(statistic: _Ref, shape: tuple[int, ...]) -> jax.Array:
    """A statistic [queries] in shared memory, for each of `shape` [keys, queries]."""
    return lax.broadcast_in_dim(plgpu.load(statistic, layout=plgpu.Layout.WGMMA.reduce(0)), shape, [1])


# --- the gradient of queries ----------------------------------------------------------------------------------------


def _dq_kernel(
    problem: _Problem,
    q_gmem: _Ref,
    k_gmem: _Ref,
    v_gmem: _Ref,
    dout_gmem: _Ref,
    statistics_gmem: _Ref,
    dq_gmem: _Ref,
    **scratch: _Ref,
) -> None:
    smem, wg = types.SimpleNamespace(**scratch), lax.axis_index("wg")
    walked = 4 * problem.t * problem.h  # bytes of keys and values of a KV head
    pair, row, head = _unit(problem, lax.axis_index("cta"), problem.group, walked)
    pair = problem.pairs - 1 - pair  # the last queries see the most keys, and start first
    count = pair + 1  # a pair of 64 queries is as long as a block of keys
    stages = smem.k.shape[0]

    @pl.when(wg == _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        kv_head = lax.div(head, jnp.int32(problem.group))

        def copy_queries() -> None:
            for i in range(_CONSUMERS):
                tile, full = pair * _CONSUMERS + i, smem.q_full.at[i]
                queries = pl.ds(tile * _ROWS, _ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[row, queries, head], smem.q.at[i], full)
                plgpu.copy_gmem_to_smem(dout_gmem.at[row, queries, head], smem.dout.at[i], full)
                plgpu.copy_gmem_to_smem(statistics_gmem.at[row, head, tile], smem.statistics.at[i], full)

        def copies(src: _Ref, dst: _Ref, full: _Ref) -> Callable[[jax.Array, jax.Array], jax.Array]:
            def copy(slot: jax.Array, block: jax.Array) -> jax.Array:
                keys = pl.ds(block * _KEYS, _KEYS)
                plgpu.copy_gmem_to_smem(src.at[row, keys, kv_head], dst.at[slot], full.at[slot])
                return block + 1

            return copy

        @plgpu.warp_map
        def _(warp: jax.Array) -> None:
            @pl.when(warp == 0)
            def _() -> None:
                copy_queries()
                copy = copies(k_gmem, smem.k, smem.k_full)
                _stream(stages, [smem.k_empty], count, copy, jnp.int32(0))

            @pl.when(warp == 1)
            def _() -> None:
                copy = copies(v_gmem, smem.v, smem.v_full)
                _stream(stages, [smem.v_empty], count, copy, jnp.int32(0))

    @pl.when(wg < _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_consumer_registers(), action="increase")
        qw, dw, statistics = smem.q.at[wg], smem.dout.at[wg], smem.statistics.at[wg]

        def mask(scores: jax.Array, block: jax.Array) -> jax.Array:
            def masked(scores: jax.Array) -> jax.Array:
                keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                queries = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
                queries = lax.broadcast_in_dim(queries + wg * _ROWS, scores.shape, [0])
                return lax.optimization_barrier(jnp.where(keys <= queries, scores, _NEG_INF))

            return lax.cond(block == pair, masked, lambda scores: scores, scores)

        def walk(dq_acc: _Ref) -> None:
            plgpu.barrier_wait(smem.q_full.at[wg])
            lse, delta = (plgpu.load(statistics.at[i], layout=plgpu.Layout.WGMMA.reduce(1)) for i in range(2))

            def step(block: jax.Array, _: None) -> None:
                slot = lax.rem(block, jnp.int32(stages))
                kb, vb = smem.k.at[slot], smem.v.at[slot]

                def multiply(s_acc: _Ref, dp_acc: _Ref) -> None:
                    plgpu.barrier_wait(smem.k_full.at[slot])
                    multiply_into(problem, s_acc, qw, kb.transpose((1, 0)), first=True)
                    plgpu.barrier_wait(smem.v_full.at[slot])
                    multiply_into(problem, dp_acc, dw, vb.transpose((1, 0)), first=True)
                    scores = mask(read_accumulator(problem, s_acc, 1), block)
                    weights = jnp.exp2(scores * problem.factor - lax.broadcast_in_dim(lse, scores.shape, [0]))
                    dweights = read_accumulator(problem, dp_acc, 0)
                    plgpu.barrier_arrive(smem.v_empty.at[slot])
                    dscores = weights * (dweights - lax.broadcast_in_dim(delta, scores.shape, [0]))
                    multiply_into(problem, dq_acc, dscores.astype(problem.dtype), kb)

                _with_accumulators(problem, smem, {"s_acc": _KEYS, "dp_acc": _KEYS}, multiply)
                _wait(problem)
                plgpu.barrier_arrive(smem.k_empty.at[slot])

            lax.fori_loop(0, count, step, None)
            qw[...] = (read_accumulator(problem, dq_acc, 0) * problem.scale).astype(problem.dtype)
            plgpu.commit_smem()
            queries = pl.ds((pair * _CONSUMERS + wg) * _ROWS, _ROWS)
            plgpu.copy_smem_to_gmem(qw, dq_gmem.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        _with_accumulators(problem, smem, {"dq_acc": problem.h}, walk, zero=True)


# --- what both share ------------------------------------------------------------------------------------------------


def _unit(
    problem: _Problem, cta: jax.Array, heads: int, walked: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pair of tiles, batch row, head) of a CTA, with `heads` heads a KV head.

    CTAs with low pairs, which walk the most, start first. As many KV heads go side by side as leave what they walk,
    `walked` bytes each, in the L2 cache.
    """
    total = problem.b * problem.kv_heads * heads
    together = max(1, min(problem.b * problem.kv_heads, _L2_BYTES // walked)) * heads
    turn = lax.div(cta, jnp.int32(together * problem.pairs))
    width = jnp.minimum(jnp.int32(together), total - turn * together)  # the last turn may have fewer
    within = cta - turn * (together * problem.pairs)
    index = turn * together + lax.rem(within, width)
    a_row = jnp.int32(problem.kv_heads * heads)
    return lax.div(within, width), lax.div(index, a_row), lax.rem(index, a_row)


def _consumer_registers() -> int:
    return (512 - _PRODUCER_REGISTERS) // _CONSUMERS // 8 * 8


def _stream(
    ring: int,
    empties: list[_Ref],
    count: jax.Array,
    copy: Callable[[jax.Array, Any], Any],
    start: Any,
) -> None:
    """One warp: calls copy(slot, state) -> state `count` times, each when the consumers have freed its slot."""
    stages = jnp.int32(ring)
    # Not a constant to the compiler: unrolled, the loop would need more registers than these warps have.
    count = lax.optimization_barrier(count)

    def wait_until_empty(index: jax.Array) -> None:
        for empty in empties:
            plgpu.barrier_wait(empty.at[lax.rem(index, stages)])

    def step(index: jax.Array, state: Any) -> Any:
        pl.when(index >= stages)(lambda: wait_until_empty(index))
        return copy(lax.rem(index, stages), state)

    lax.fori_loop(0, count, step, start)
    # No barrier may go away while an arrival is pending: see the last use of every slot freed.
    lax.fori_loop(jnp.maximum(count - stages, 0), count, lambda i, _: wait_until_empty(i), None)


def _with_accumulators(
    problem: _Problem,
    smem: types.SimpleNamespace,
    columns: dict[str, int],
    body: Callable[..., None],
    *,
    zero: bool = False,
) -> None:
    """Calls body with wgmma accumulators [_ROWS, columns], zero at first; stand-ins are zero with `zero`."""
    if not problem.interpret:
        accumulators = [plgpu.ACC((_ROWS, width), jnp.float32) for width in columns.values()]
        pl.run_scoped(body, *accumulators)
        return
    stand_ins = [getattr(smem, name).at[lax.axis_index("wg")] for name in columns]
    if zero:
        for stand_in in stand_ins:
            stand_in[...] = jnp.zeros(stand_in.shape, jnp.float32)
    body(*stand_ins)


def _wait(problem: _Problem) -> None:
    """Until all products are done."""
    if not problem.interpret:
        plgpu.wgmma_wait(0)
