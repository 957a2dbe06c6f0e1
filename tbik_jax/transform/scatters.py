"""Scatters whose indices may meet: what meets at a place is joined in the order of the updates, and in one tree.

Updates are sorted by their place, stably. Those of one place then stand next to each other, in the order of the
updates, and meet by doubling distances, as in `prefix.doubled`. So what a place gets depends on the updates that are
meant for it and on their order among themselves: not on how many others there are, nor where those go.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..pallas_kernels.common import rounding

#: Primitives, by what joins two updates of one place.
KINDS = {
    "scatter": "last",
    "scatter-add": "add",
    "scatter_add": "add",
    "scatter-sub": "sub",
    "scatter_sub": "sub",
    "scatter-mul": "mul",
    "scatter_mul": "mul",
    "scatter-max": "max",
    "scatter_max": "max",
    "scatter-min": "min",
    "scatter_min": "min",
}
_JOINS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "add": lambda left, right: left + right,
    "sub": lambda left, right: left - right,
    "mul": rounding.mul,
    "max": jnp.maximum,
    "min": jnp.minimum,
}


def scatter(eqn: Any, operand: jax.Array, indices: jax.Array, updates: jax.Array) -> jax.Array:
    """The scatter `eqn` in one order, in fp32; `operand` meets the joined updates, and is rounded once."""
    if not updates.size or not operand.size:
        return operand
    dnums = eqn.params["dimension_numbers"]
    clip = lax.GatherScatterMode.from_any(eqn.params["mode"]) == lax.GatherScatterMode.CLIP
    sizes = _window_sizes(dnums, operand, updates)
    places = _places(dnums, clip, operand, indices, sizes).reshape(-1)
    window = _offsets(operand, sizes)
    scattered = [i for i in range(updates.ndim) if i not in dnums.update_window_dims]
    rows = jnp.transpose(updates, (*scattered, *dnums.update_window_dims)).reshape(places.shape[0], -1)
    if any(
        sizes[i] > 1 for i in dnums.scatter_dims_to_operand_dims
    ):  # windows may overlap: element by element
        each = jnp.where(places[:, None] < 0, -1, places[:, None] + window)
        places, rows, window = each.reshape(-1), rows.reshape(-1, 1), np.zeros(1, np.int32)
    return place(KINDS[eqn.primitive.name], operand, places, rows, window)


def place(
    kind: str, operand: jax.Array, places: jax.Array, updates: jax.Array, window: np.ndarray | None = None
) -> jax.Array:
    """Joins updates [n, w] into `operand`, at its flat places `places[:, None] + window`.

    Args:
        kind: "add", "sub", "mul", "max", "min", or "last" for the last update of a place.
        operand: any shape; the result is like it.
        places: int32 [n], flat index of the first element of an update; negative if it is dropped.
        updates: [n, w], of operand's dtype.
        window: int32 [w], flat offsets of an update's elements; None for w = 1. Two updates have all places in common,
            or none.
    """
    n = places.shape[0]
    places, order = lax.sort((places, lax.iota(jnp.int32, n)), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones(1, bool), places[1:] != places[:-1]])
    last = jnp.concatenate([first[1:], jnp.ones(1, bool)])
    taken = updates[order]
    at = places[:, None] + (np.zeros(1, np.int32) if window is None else window)
    target = operand.reshape(-1)
    if kind != "last":
        alone = first | (places < 0)  # what is dropped joins nothing
        start = lax.cummax(jnp.where(alone, lax.iota(jnp.int32, n), 0))
        joined = _joined(kind, taken.astype(jnp.float32), start)
        before = target.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(jnp.float32)
        taken = rounding.round_to(_JOINS[kind](before, joined), operand.dtype)
    kept = (last & (places >= 0))[:, None]
    at = jnp.where(kept, at, target.shape[0])  # out of range: dropped
    out = target.at[at].set(taken, mode="drop", wrap_negative_indices=False)
    return out.reshape(operand.shape)


def _joined(kind: str, x: jax.Array, start: jax.Array) -> jax.Array:
    """What stands before and at each of x [n, w] since `start` [n], the first of its place."""
    join = _JOINS["add" if kind == "sub" else kind]
    index = lax.iota(jnp.int32, x.shape[0])
    longest = jnp.max(index - start)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        distance, x = state
        earlier = x[jnp.maximum(index - distance, 0)]
        meets = (index - distance >= start)[:, None]
        return distance * 2, jnp.where(meets, join(earlier, x), x)

    return lax.while_loop(lambda state: state[0] <= longest, body, (jnp.int32(1), x))[1]


def _places(
    dnums: lax.ScatterDimensionNumbers,
    clip: bool,
    operand: jax.Array,
    indices: jax.Array,
    sizes: tuple[int, ...],
) -> jax.Array:
    """The flat place of each update's first element; -1 where part of the update is out of range, which drops it."""
    strides = _strides(operand)
    found = jnp.zeros(indices.shape[:-1], jnp.int32)
    inside = jnp.ones(indices.shape[:-1], bool)
    for j, dim in enumerate(dnums.scatter_dims_to_operand_dims):
        most = operand.shape[dim] - sizes[dim]
        start = _as_int32(indices[..., j])
        inside &= (start >= 0) & (start <= most) | clip
        found += jnp.clip(start, 0, most) * strides[dim]
    pairs = zip(dnums.operand_batching_dims, dnums.scatter_indices_batching_dims, strict=True)
    for dim, of_indices in pairs:
        found += lax.broadcasted_iota(jnp.int32, found.shape, of_indices) * strides[dim]
    return jnp.where(inside, found, -1)


def _as_int32(x: jax.Array) -> jax.Array:
    """Indices of any integer dtype; what int32 does not hold is out of range either way."""
    info = jnp.iinfo(x.dtype)
    least, most = (max(info.min, -(2**31)), min(info.max, 2**31 - 1))
    return jnp.clip(x, np.asarray(least, x.dtype), np.asarray(most, x.dtype)).astype(jnp.int32)


def _offsets(operand: jax.Array, sizes: tuple[int, ...]) -> np.ndarray:
    """Flat offsets [w] of a window's elements from its first."""
    offsets = np.zeros((), np.int32)
    for size, stride in zip(sizes, _strides(operand), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int32) * stride
    return offsets.reshape(-1)


def _strides(operand: jax.Array) -> list[np.int32]:
    if operand.size >= 2**31:
        raise ValueError(f"a scatter into {operand.shape} has {operand.size} places; 2**31 - 1 are covered")
    return [np.int32(math.prod(operand.shape[i + 1 :])) for i in range(operand.ndim)]


def _window_sizes(
    dnums: lax.ScatterDimensionNumbers, operand: jax.Array, updates: jax.Array
) -> tuple[int, ...]:
    """The extent of an update in each dimension of the operand."""
    windows = iter([updates.shape[i] for i in dnums.update_window_dims])
    taken = {*dnums.inserted_window_dims, *dnums.operand_batching_dims}
    return tuple(1 if i in taken else next(windows) for i in range(operand.ndim))
