"""Statistics of the leaves of a vocabulary for Hopper GPUs, in Pallas Mosaic GPU.

One CTA of one warpgroup takes one leaf of one row. TMA copies the leaf to shared memory, where it is read twice: for
the maximum, and for the sum of exp(x - maximum). So the logits cross the memory bus once. Two CTAs share an SM (for a
vocabulary of 151,936), and one copies while the other computes.

The sum has the order of `tree_sum`, which pairs element i with element i + p/2, and the bits of the reference: see
`LeafPlan` for the rows that a thread adds up alone. The last 128 sums meet through shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.kernel_math import LANES, LAYOUT, KernelMath, vector
from .plan import COLUMNS, LeafPlan, kernel_refusal
from .reference import LeafStatistics

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel


def leaf_statistics_mosaic_gpu(x: jax.Array, *, leaves: int, interpret: bool = False) -> LeafStatistics:
    """`leaf_statistics_reference` on a Hopper GPU, with its bits.

    Args:
        x: float32 [..., V].
        leaves: equal slices of V, each a multiple of 16 elements, at least 128 of them.
        interpret: Run on the CPU with the kernel's barriers, slowly.

    Raises:
        ValueError: If the kernel does not take leaves of this length.
    """
    size = x.shape[-1] // leaves
    refusal = kernel_refusal(size)
    if refusal:
        raise ValueError(f"mosaic_gpu: {refusal}; use backend='reference', which has the same bits there")
    shape = (*x.shape[:-1], leaves)
    out = _run(x.reshape(-1, COLUMNS), LeafPlan(size=size), interpret)
    maximum, total, best, finite = (part.reshape(shape) for part in out)
    return LeafStatistics(maximum, total, best, finite != 0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _run(x: jax.Array, plan: LeafPlan, interpret: bool) -> tuple[jax.Array, ...]:
    """Statistics of the leaves that follow one another in x [leaves * size / COLUMNS, COLUMNS]."""
    count = x.size // plan.size
    number, whole = (jax.ShapeDtypeStruct((count,), dtype) for dtype in (jnp.float32, jnp.int32))
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, KernelMath(interpret)),
        out_type=(number, number, whole, whole),
        scratch_types={
            "x_smem": plgpu.SMEM((plan.smem_rows, COLUMNS), jnp.float32),
            "sums": plgpu.SMEM((plan.lows, LANES), jnp.float32),
            "meeting": plgpu.SMEM((2 * LANES,), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=plan.boxes),
        },
        grid=(count,),
        grid_names=("leaf",),
        kernel_name="leaf_statistics",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if interpret else None,
    )
    return kernel(x)


def _kernel(
    plan: LeafPlan,
    math: KernelMath,
    x_gmem: _Ref,
    max_gmem: _Ref,
    total_gmem: _Ref,
    index_gmem: _Ref,
    finite_gmem: _Ref,
    *,
    x_smem: _Ref,
    sums: _Ref,
    meeting: _Ref,
    full: _Ref,
) -> None:
    leaf = lax.axis_index("leaf")
    for i in range(plan.boxes):  # past the leaf's end lies the next one, or nothing: then TMA fills in zeros
        rows = pl.ds(leaf * (plan.size // COLUMNS) + i * plan.box, plan.box)
        plgpu.copy_gmem_to_smem(x_gmem.at[rows], x_smem.at[pl.ds(i * plan.box, plan.box)], full)
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)
    # Not a constant to the compiler, which would unroll the loops over it.
    lows = lax.optimization_barrier(jnp.int32(plan.lows))
    plgpu.barrier_wait(full)

    def row(high: int, low: jax.Array, outside: Any) -> tuple[jax.Array, jax.Array]:
        """A row of the leaf, `outside` where it is past the end, and the index of its first element."""
        first = (high * plan.lows + low) * LANES
        value = x_smem[pl.ds(first // COLUMNS, LANES // COLUMNS)].reshape(LANES)
        if (high + 1) * plan.lows * LANES > plan.size:
            value = jnp.where(first + lane < plan.size, value, outside)
        return value, first

    def extremes(low: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        most, least = (
            [row(high, low, np.float32(outside))[0] for high in range(plan.highs)]
            for outside in (-np.inf, np.inf)
        )
        return jnp.maximum(carry[0], _fold(jnp.maximum, most)), jnp.minimum(
            carry[1], _fold(jnp.minimum, least)
        )

    most, least = lax.fori_loop(0, lows, extremes, (vector(-np.inf), vector(np.inf)))
    maximum, minimum = jnp.max(most), jnp.min(least)
    origin = jnp.where(maximum == -np.inf, np.float32(0), maximum)

    def add_up(low: jax.Array, index: jax.Array) -> jax.Array:
        """Adds up the rows of one low index, and looks for the maximum."""

        def subtree(first: int, stride: int) -> jax.Array:
            """The sum of rows first, first + stride, ...; what is past the last row adds nothing."""
            nonlocal index
            if first + stride < plan.highs and stride < plan.full_highs:
                return subtree(first, 2 * stride) + subtree(first + stride, 2 * stride)
            if stride < plan.full_highs:
                return subtree(first, 2 * stride)
            value, start = row(first, low, np.float32(-np.inf))
            index = jnp.minimum(index, jnp.where(value == maximum, start + lane, plan.size - 1))
            return math.exp_of_nonpositive(value - origin)

        sums[low] = subtree(0, 1)
        return index

    index = lax.fori_loop(0, lows, add_up, vector(plan.size - 1, jnp.int32))
    total = _meet(plan, sums, meeting)
    known = maximum < np.inf  # neither NaN nor infinity
    max_gmem[leaf] = maximum
    total_gmem[leaf] = jnp.where(known, total, np.float32(np.nan))
    index_gmem[leaf] = jnp.min(index)
    finite_gmem[leaf] = jnp.where(known & (minimum > -np.inf), 1, 0)


def _fold(op: Callable[[jax.Array, jax.Array], jax.Array], values: list[jax.Array]) -> jax.Array:
    """Joins values in pairs: exact in any order, and quicker than a chain."""
    while len(values) > 1:
        odd = values[len(values) & ~1 :]
        values = [op(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + odd
    return values[0]


def _meet(plan: LeafPlan, sums: _Ref, meeting: _Ref) -> jax.Array:
    """The sum of `sums` [lows, LANES]: halves of the rows, then halves of the lanes."""
    rows = [sums[i] for i in range(plan.lows)]
    while len(rows) > 1:
        half = len(rows) // 2
        rows = [left + right for left, right in zip(rows[:half], rows[half:], strict=True)]
    value, width = rows[0], LANES
    while width > 1:  # lanes past the width add up what is never looked at
        width //= 2
        meeting[pl.ds(0, LANES)] = value
        value = value + meeting[pl.ds(width, LANES)]
    meeting[pl.ds(0, LANES)] = value
    return meeting[0]
