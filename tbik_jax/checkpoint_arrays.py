"""A training state as arrays by name: how Orbax writes and reads them, and how they are cut over a mesh."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from .loading import parameter_shardings

#: Arrays are saved and restored in groups of about this many bytes, or of one larger array: no more than a group is in
#: host memory at a time.
GROUP_BYTES = 2 << 30
#: Of a stored chunk. A device whose shard is cut otherwise than the saved one decodes the chunks that it touches.
CHUNK_BYTES = 32 << 20

#: The arrays of a part (model, optimizer, rng) by dotted name. Keys are held as key arrays.
Arrays = dict[str, Any]


def _flat(node: Any) -> dict[tuple[Any, ...], Any]:
    return {path: variable for path, variable in nnx.to_flat_state(nnx.state(node))}


def _name(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def node_arrays(part: str, node: Any, *, abstract: bool = False) -> Arrays:
    """The arrays of a part; `abstract` admits shapes in their place."""
    if isinstance(node, jax.Array):
        return {"key": node}
    arrays = {_name(path): variable.get_value() for path, variable in _flat(node).items()}
    kinds = (jax.Array, jax.ShapeDtypeStruct) if abstract else (jax.Array,)
    for name, value in arrays.items():
        if not isinstance(value, kinds):
            raise ValueError(
                f"{part}.{name} is a {type(value).__name__}; a checkpoint holds arrays of JAX only"
            )
    return arrays


def update_node(node: Any, arrays: Arrays) -> None:
    """Replaces the values of a module, an optimizer or an `nnx.Rngs`."""
    flat = {path: variable.replace(arrays[_name(path)]) for path, variable in _flat(node).items()}
    nnx.update(node, nnx.from_flat_state(flat))


def _is_key(value: Any) -> bool:
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def _data(value: jax.Array) -> jax.Array:
    return jax.random.key_data(value) if _is_key(value) else value


def describe(name: str, value: Any) -> dict[str, Any]:
    """Shape and dtype of an array as the manifest holds them, e.g. [8, 64] and "bfloat16"; "key<fry>" for a key."""
    if 0 in value.shape:
        raise ValueError(f"{name} has shape {value.shape}; Orbax saves no empty arrays")
    return {"shape": list(value.shape), "dtype": str(value.dtype)}


def groups_of(arrays: Arrays) -> list[list[str]]:
    """Names in order, cut where a group would exceed its bytes."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, value in arrays.items():
        if groups[-1] and held + value.nbytes > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += value.nbytes
    return groups


def write_group(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Writes arrays, shard by shard, to a folder that is not there yet."""
    import orbax.checkpoint as ocp  # takes seconds, which only training should wait for

    arrays = {name: _data(value) for name, value in arrays.items()}
    save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays, save_args=save_args))


def read_group(path: Path, wanted: Mapping[str, tuple[Any, Sharding]]) -> Arrays:
    """Reads the arrays of a group, each device its shards.

    Args:
        path: of the group.
        wanted: an array or shape like the stored one, and its sharding, by name.

    Raises:
        ValueError: a file is damaged.
    """
    import orbax.checkpoint as ocp

    shapes = {name: jax.eval_shape(_data, like) for name, (like, _) in wanted.items()}
    restore_args = {
        name: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=shapes[name].shape, dtype=shapes[name].dtype
        )
        for name, (_, sharding) in wanted.items()
    }
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path, args=args)
    except jax.errors.JaxRuntimeError:  # such as a device out of memory: not the checkpoint's fault
        raise
    except Exception as error:  # Orbax wraps what TensorStore raises in a bare Exception
        reason = " ".join(f"{error.__cause__ or error}".split())
        raise ValueError(f"{path} is damaged and cannot be read: {reason}") from error
    for name, (like, _) in wanted.items():
        if _is_key(like):
            zeros = jax.numpy.zeros((), like.dtype)  # `key_impl` takes no shapes
            restored[name] = jax.random.wrap_key_data(restored[name], impl=jax.random.key_impl(zeros))
    return restored


def node_shardings(nodes: Mapping[str, Any], mesh: Mesh) -> dict[str, dict[str, Sharding]]:
    """How each array of each part is cut over the mesh.

    Parameters as `load` cuts them; an array of a parameter's shape whose path ends in the parameter's like that one
    (("opt_state", 0, "mu", "embedding_vd") like ("embedding_vd",)); anything else is replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    state = nnx.state(nodes["model"])
    parameters = {
        path: (variable.get_value(), cut.get_value())
        for (path, variable), (_, cut) in zip(
            nnx.to_flat_state(state),
            nnx.to_flat_state(parameter_shardings(state, mesh)),
            strict=True,
        )
    }

    def like_a_parameter(path: tuple[Any, ...], shape: tuple[int, ...]) -> Sharding:
        for start in range(len(path)):
            parameter, cut = parameters.get(path[start:], (None, replicated))
            if parameter is not None and parameter.shape == shape:
                return cut
        return replicated

    return {
        part: {"key": replicated}
        if isinstance(node, jax.Array)
        else {_name(path): like_a_parameter(path, v.get_value().shape) for path, v in _flat(node).items()}
        for part, node in nodes.items()
    }
