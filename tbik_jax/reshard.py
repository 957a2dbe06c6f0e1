"""Arrays from one mesh to another, on the devices.

`jax.device_put` makes a copy of the whole array on the host where source and target cut it differently. This does not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

_Box = tuple[tuple[int, int], ...]


def reshard(tree: Any, shardings: Any) -> Any:
    """Copies of arrays, cut as asked for; bits move from device to device and never to the host.

    If all arrays lie on the target's devices in the same order, that is one compiled program. Otherwise each device
    gets the pieces that make up its part, one by one.

    Args:
        tree: a pytree of arrays.
        shardings: the `NamedSharding` of each, as a tree like it.

    Returns:
        A tree of arrays that share no buffer with `tree`, so that either can be donated.
    """
    values, treedef = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(shardings)
    if all(_devices(x) == list(w.mesh.devices.flat) for x, w in zip(values, wanted, strict=True)):
        return jax.tree.unflatten(treedef, _program(tuple(wanted))(values))
    return jax.tree.unflatten(treedef, [_assembled(x, w) for x, w in zip(values, wanted, strict=True)])


def _devices(x: jax.Array) -> list[jax.Device]:
    where = x.sharding
    return list(where.mesh.devices.flat) if isinstance(where, NamedSharding) else list(where.device_set)


@functools.lru_cache(maxsize=16)
def _program(shardings: tuple[NamedSharding, ...]) -> Any:
    return jax.jit(lambda values: values, out_shardings=list(shardings))


def _assembled(x: jax.Array, wanted: NamedSharding) -> jax.Array:
    sources: dict[_Box, dict[jax.Device, jax.Array]] = {}  # part -> where there is a replica of it
    for shard in x.addressable_shards:
        sources.setdefault(_box(shard.index, x.shape), {})[shard.device] = shard.data
    targets = wanted.addressable_devices_indices_map(x.shape)
    parts = [_part(_box(index or (), x.shape), device, sources, x.dtype) for device, index in targets.items()]
    return jax.make_array_from_single_device_arrays(x.shape, wanted, parts)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Box:
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def _part(
    box: _Box, device: jax.Device, sources: dict[_Box, dict[jax.Device, jax.Array]], dtype: jnp.dtype
) -> jax.Array:
    """The elements in `box`, on `device`."""
    if box in sources:
        return _copied(sources[box], device)
    part = jnp.zeros([stop - start for start, stop in box], dtype, device=device)
    for source, replicas in sources.items():
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, source, strict=True)]
        if any(start >= stop for start, stop in common):
            continue
        cut = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, source, strict=True))
        piece = _copied({where: x[cut] for where, x in replicas.items()}, device)
        part = _placed(part, piece, tuple(a - c for (a, _), (c, _) in zip(common, box, strict=True)))
    return part


def _copied(replicas: dict[jax.Device, jax.Array], device: jax.Device) -> jax.Array:
    if device in replicas:
        return jnp.copy(replicas[device])
    return jax.device_put(next(iter(replicas.values())), device)


@functools.partial(jax.jit, donate_argnums=0)
def _placed(whole: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_update_slice(whole, piece, start)
