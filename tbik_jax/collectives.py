"""Float collectives in tree order, for use inside `jax.shard_map`.

Ranks meet in a binary tree, partner `rank ^ 1` first, then `rank ^ 2`, then `rank ^ 4`. That is the upper part of the
binary tree whose lower part a rank adds up in its own `tree_matmul`. Bits move by `ppermute`, `all_gather` or
`all_to_all`, which add nothing, and every add is an explicit fp32 one; which of them carries a sum is a matter of its
size (`choose_transport`) and of no bit. Each has its own VJP in the same order, because JAX's transposes of collectives
insert reductions of unspecified order.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .pallas_kernels.common.rounding import round_to
from .pallas_kernels.common.tree import tree_join

AxisName = str | Sequence[str]
Transport = Literal["butterfly", "all_gather", "all_to_all"]
TRANSPORTS: tuple[Transport, ...] = ("butterfly", "all_gather", "all_to_all")

#: Bytes of fp32 partial sums a rank, up to which gathering all of them is quickest: one step, bound by latency. For two
#: ranks measured on H200s with NVLink (benchmarks/results/collectives_speed_2xh200.json), for more of them estimated.
_GATHERED_BYTES = {2: 1 << 20, 4: 1 << 19, 8: 1 << 18}
#: Up to which recursive doubling is: with two ranks it moves as much as gathering, in a quicker protocol.
_DOUBLED_BYTES = {2: 1 << 24}


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    """`axis_name` as a tuple, major axis first; `ValueError` if an axis is named twice."""
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"axes {axes} name an axis twice, whose ranks would be counted twice; name each once"
        )
    return axes


def choose_transport(size: int, ranks: int) -> Transport:
    """What carries a sum of `size` fp32 elements over `ranks` ranks: a pure function of both, which changes no bit.

    Small sums take one step; for large ones every rank adds up its share and hands out the rounded result, which moves
    the fewest bytes. What does not cut into equal shares meets by recursive doubling.
    """
    if 4 * size <= _GATHERED_BYTES.get(ranks, 0):
        return "all_gather"
    doubled = 4 * size <= _DOUBLED_BYTES.get(ranks, 0)
    return "butterfly" if doubled or size % ranks else "all_to_all"


def tree_psum(
    x: jax.Array,
    axis_name: AxisName,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    transport: Transport | None = None,
) -> jax.Array:
    """Sums `x` over mesh axes in one binary tree, neighbours first; every rank gets the same bits.

    The bits are those of `tree_join` over the ranks' values in rank order, whatever the axis' place in the mesh; NaN is
    the canonical one. For several axes the rank order is lexicographic, first name slowest. The gradient is `tree_psum`
    of the cotangents, as `lax.psum`'s is under `check_vma=False`.

    Args:
        x: float32, bfloat16 or float16 [...]; added in fp32 and rounded once, at the end.
        axis_name: an axis, or several.
        out_dtype: of the result; x's by default.
        transport: what carries the same tree: "butterfly" (recursive doubling by `ppermute`), "all_gather" (every rank
            adds up everything) or "all_to_all" (every rank adds up its share and hands out the rounded sums; the number
            of elements must divide by the ranks). None chooses by size.

    Returns:
        Like x, in `out_dtype`.

    Raises:
        ValueError: an axis size is no power of two, x is not floating point, or a transport that cannot carry x.

    Source: TBIK (arXiv 2511.17826), the tree all-reduce, with fp32 nodes.
    """
    axes = _checked_axes(x, axis_name, "tree_psum")
    ranks = _rank_count(axes)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if out_dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"tree_psum rounds to float32, bfloat16 or float16, not to {out_dtype}")
    if transport is None:
        transport = choose_transport(x.size, ranks)
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r} is unknown; use one of {', '.join(TRANSPORTS)}, or None")
    if transport == "all_to_all" and x.size % ranks:
        raise ValueError(
            f"all_to_all cannot cut {x.size} elements into {ranks} equal shares; use 'butterfly' or 'all_gather'"
        )
    return _psum(x.astype(jnp.float32), axes, transport, out_dtype)


def tree_psum_scatter(
    x: jax.Array, axis_name: AxisName, *, scatter_dimension: int = 0, tiled: bool = False
) -> jax.Array:
    """The slice of `tree_psum` that belongs to this rank, by recursive halving: half the data of each step moves.

    Same tree, same bits as slicing `tree_psum`. The gradient is an all-gather, which adds nothing.

    Args:
        x: float32, bfloat16 or float16; added in fp32 and rounded once.
        axis_name: an axis, or several (lexicographic rank order).
        scatter_dimension: dimension that is cut into one chunk a rank.
        tiled: keep the dimension (its size divided by the ranks); otherwise its size must equal the number of ranks and
            it is removed, as in `lax.psum_scatter`.

    Returns:
        This rank's chunk.

    Raises:
        ValueError: an axis size is no power of two, the dimension does not divide, or x is not floating point.
    """
    axes = _checked_axes(x, axis_name, "tree_psum_scatter")
    ranks = _rank_count(axes)
    dim = _dimension(scatter_dimension, x.ndim)
    size = x.shape[dim]
    if size % ranks if tiled else size != ranks:
        need = f"a multiple of {ranks}" if tiled else f"{ranks}, or pass tiled=True"
        raise ValueError(
            f"tree_psum_scatter over {ranks} ranks: dimension {dim} has size {size}; it must be {need}"
        )
    chunks = jnp.moveaxis(x, dim, 0).reshape(
        ranks, size // ranks, *(n for i, n in enumerate(x.shape) if i != dim)
    )
    mine = round_to(_scatter(chunks.astype(jnp.float32), axes), x.dtype)  # [size / ranks, ...]
    return jnp.moveaxis(mine, 0, dim) if tiled else mine[0]


def tree_all_gather(x: jax.Array, axis_name: AxisName, *, axis: int = 0, tiled: bool = False) -> jax.Array:
    """`lax.all_gather` (which moves bits) whose gradient is `tree_psum_scatter`, not XLA's reduce-scatter.

    Args:
        x: any dtype; a gradient needs a floating-point one.
        axis_name: an axis, or several (lexicographic rank order).
        axis: dimension along which the ranks' values are stacked, or concatenated with `tiled`.
        tiled: concatenate instead of stacking.

    Returns:
        The values of all ranks in rank order, on every rank.

    Raises:
        ValueError: in the gradient, an axis size that is no power of two.
    """
    return _all_gather(x, axis_tuple(axis_name), _dimension(axis, x.ndim + (not tiled)), tiled)


def _checked_axes(x: jax.Array, axis_name: AxisName, what: str) -> tuple[str, ...]:
    axes = axis_tuple(axis_name)
    if x.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"{what} adds float32, bfloat16 or float16, not {x.dtype}; integers: lax.psum is exact"
        )
    for axis in axes:
        size = lax.axis_size(axis)
        if size & (size - 1):
            raise ValueError(
                f"{what}: axis {axis!r} has {size} ranks, which form no binary tree; use 1, 2, 4 or 8"
            )
    return axes


def _rank_count(axes: tuple[str, ...]) -> int:
    return math.prod(lax.axis_size(a) for a in axes)


def _dimension(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise ValueError(f"dimension {dim} is out of range for an array of {ndim} dimensions")
    return dim % ndim


def _levels(axes: tuple[str, ...]) -> list[tuple[str, int]]:
    """(axis, bit) of each step of recursive doubling: the minor axis' lowest bit first."""
    return [(axis, bit) for axis in reversed(axes) for bit in range((lax.axis_size(axis) - 1).bit_length())]


def _exchange(x: jax.Array, axis: str, bit: int) -> jax.Array:
    """The partner's `x`, the partner being this rank's index with one bit flipped."""
    return lax.ppermute(x, axis, [(rank, rank ^ (1 << bit)) for rank in range(lax.axis_size(axis))])


def _one_nan(x: jax.Array) -> jax.Array:
    """`x` with every NaN the canonical one, as the two ranks of a pair may keep different payloads of x + y."""
    return jnp.where(x == x, x, np.float32(np.nan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _psum(x: jax.Array, axes: tuple[str, ...], transport: Transport, dtype: jnp.dtype) -> jax.Array:
    ranks = _rank_count(axes)
    if ranks == 1:
        return round_to(_one_nan(x), dtype)
    if transport == "all_gather":
        every = lax.all_gather(x, axes)
        return round_to(_one_nan(tree_join([every[i] for i in range(ranks)])), dtype)
    if transport == "all_to_all":
        return gather_shares(join_shares(exchange_shares(x, axes), dtype), axes).reshape(x.shape)
    for axis, bit in _levels(axes):
        x = x + _exchange(x, axis, bit)  # commutative but for NaN
    return round_to(_one_nan(x), dtype)


def exchange_shares(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """What the ranks have, fp32, of the share of x that this one adds up: [ranks, x.size / ranks]."""
    ranks = _rank_count(axes)
    return lax.all_to_all(x.reshape(ranks, x.size // ranks), axes, split_axis=0, concat_axis=0)


def join_shares(shares: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tree's sum of what the ranks have [ranks, n], rounded once, [n]."""
    return round_to(_one_nan(tree_join(list(shares))), dtype)


def gather_shares(x: jax.Array, axes: tuple[str, ...], *, copied: bool = False) -> jax.Array:
    """The ranks' sums [n] end to end. They travel as integers: XLA would widen small floats on some backends.

    Args:
        x: this rank's.
        axes: of the ranks.
        copied: hand a copy to each rank by an all-to-all instead, which copy engines can carry beside other work.
    """
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned)
    if copied:
        ranks = _rank_count(axes)
        # The barrier keeps the copies from being computed once each.
        copies = jnp.broadcast_to(lax.optimization_barrier(bits), (ranks, x.size))
        bits = lax.all_to_all(copies, axes, split_axis=0, concat_axis=0).reshape(-1)
    else:
        bits = lax.all_gather(bits, axes, tiled=True)
    return lax.bitcast_convert_type(bits, x.dtype)


def _psum_transposed(
    axes: tuple[str, ...], transport: Transport, dtype: jnp.dtype, _: None, ct: jax.Array
) -> tuple[jax.Array]:
    return (_psum(ct.astype(jnp.float32), axes, transport, jnp.dtype(jnp.float32)),)


_psum.defvjp(lambda x, axes, transport, dtype: (_psum(x, axes, transport, dtype), None), _psum_transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter(chunks: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[ranks, ...] -> this rank's chunk of the tree sum.

    Chunks are numbered by rank, so the chunks that a rank keeps at a step are those whose lowest remaining index bit is
    its own: strided, not contiguous. That is what keeps the neighbours-first order.
    """
    for axis, bit in _levels(axes):
        mine = (lax.axis_index(axis) >> bit) & 1
        pairs = chunks.reshape(chunks.shape[0] // 2, 2, *chunks.shape[1:])
        keep = lax.dynamic_index_in_dim(pairs, mine, axis=1, keepdims=False)
        give = lax.dynamic_index_in_dim(pairs, 1 - mine, axis=1, keepdims=False)
        chunks = keep + _exchange(give, axis, bit)
    return _one_nan(chunks[0])


_scatter.defvjp(
    lambda chunks, axes: (_scatter(chunks, axes), None),
    lambda axes, _, ct: (lax.all_gather(ct, axes, axis=0),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(x: jax.Array, axes: tuple[str, ...], dim: int, tiled: bool) -> jax.Array:
    # Gathered along the first dimension and moved: along another one XLA transposes elements before and after.
    stacked = jnp.moveaxis(lax.all_gather(x, axes), 0, dim)
    return lax.collapse(stacked, dim, dim + 2) if tiled else stacked


_all_gather.defvjp(
    lambda x, axes, dim, tiled: (_all_gather(x, axes, dim, tiled), None),
    lambda axes, dim, tiled, _, ct: (tree_psum_scatter(ct, axes, scatter_dimension=dim, tiled=tiled),),
)
