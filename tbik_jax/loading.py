"""`load`: a Hugging Face checkpoint as a sharded Flax NNX module."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from .memory import check_parameters
from .mesh import resolve_mesh
from .models.qwen3 import Qwen3, Qwen3Config
from .models.qwen3.checkpoint import ParameterPath, read_parameter, tensor_shapes, tied_duplicates
from .models.qwen3.modules import check_dtype
from .models.qwen3.sharding import QWEN3_SHARDING
from .safetensors_reader import SafetensorsReader


def load(
    path_or_hub_id: str | Path, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Qwen3:
    """Loads a Qwen3 checkpoint onto a mesh; each device reads only its slices.

    Args:
        path_or_hub_id: a folder with config.json and safetensors (one file, or sharded with an index), or a model's id
            on the Hugging Face hub, which is downloaded to the hub's cache.
        mesh: axes data, fsdp, tp; None for the ambient mesh, else one device.
        dtype: of the parameters and activations: bfloat16, float16 or float32. Stored values are rounded to it once.

    Returns:
        The module: a pytree of parameters that knows its config.

    Raises:
        ValueError: the folder or id is wrong; a tensor is missing, unused, misshapen or holds NaN or infinity; a file
            is truncated; the model does not fit the mesh or its devices' memory; the dtype is not supported. Each names
            the culprit.
    """
    check_dtype(dtype)
    mesh = resolve_mesh(mesh)
    folder = local_folder(path_or_hub_id)
    config = Qwen3Config.from_folder(folder)
    abstract = nnx.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    shardings = parameter_shardings(state, mesh)
    check_parameters(_bytes_a_device(state, shardings), list(mesh.devices.flat))
    with SafetensorsReader(folder) as reader:
        reader.check(tensor_shapes(config), tied_duplicates(config))
        rounding = _RoundingReader(reader, dtype)

        def parameter(path: Any, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
            return _read(config, parameter_path(path), leaf, sharding, rounding)

        loaded = jax.tree_util.tree_map_with_path(parameter, state, shardings)
    return nnx.merge(graphdef, loaded)


def parameter_path(path: tuple[Any, ...]) -> ParameterPath:
    """A pytree path of an NNX state as names and indices, e.g. ("layers", 0, "mlp", "down_weight_fd")."""
    parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
    if parts and parts[-1] in ("value", "raw_value"):
        parts = parts[:-1]
    return tuple(part for part in parts if part is not None)


def parameter_shardings(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every parameter of an NNX state, as a tree like it.

    Args:
        state: arrays or shapes.
        mesh: with all of the axes data, fsdp and tp.

    Raises:
        ValueError: tp does not divide a dimension that it cuts.
    """

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = str(parameter_path(path)[-1])
        return NamedSharding(mesh, QWEN3_SHARDING.partition_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _bytes_a_device(state: Any, shardings: Any) -> int:
    """Bytes of the parameters on each device."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(cut.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, cut in pairs)


class _RoundingReader:
    """A reader of a given dtype, which refuses NaN and infinity."""

    def __init__(self, reader: SafetensorsReader, dtype: jax.typing.DTypeLike):
        self._reader, self._dtype = reader, jnp.dtype(dtype)

    def read(self, name: str, *index: slice) -> np.ndarray:
        stored = self._reader.read(name, *index)
        if not np.isfinite(stored).all():
            raise ValueError(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
        with np.errstate(over="ignore"):  # raised in the next line, with the name
            array = stored.astype(self._dtype, copy=False)
        if array is not stored and not np.isfinite(array).all():
            raise ValueError(f"tensor {name} overflows {self._dtype}; load it as float32")
        return array


def _read(
    config: Qwen3Config,
    path: ParameterPath,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
    reader: _RoundingReader,
) -> jax.Array:
    slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # replicas of a slice are read once

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only for arrays without a sharding
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if bounds not in slices:
            part = read_parameter(config, path, tuple(slice(*b) for b in bounds), reader)
            slices[bounds] = np.ascontiguousarray(part)
        return slices[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, callback, dtype=leaf.dtype)


def local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint, which is downloaded to the hub's cache if it is a hub id.

    Raises:
        ValueError: there is no such folder or model, or the hub does not give it; the message says what to do.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; load takes the checkpoint's folder")
    name = str(path_or_hub_id)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(f"{name} is no folder here, and no hub id either (those read 'owner/name')")
    from httpx import HTTPError  # the hub client's: some connection errors reach us as they are
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{name} is no folder here and cannot be downloaded from the hub: {_hub_reason(name, error)}"
        ) from None


def _hub_reason(name: str, error: Exception) -> str:
    """What the hub or the way to it said, in one line, and what to do about it."""
    from httpx import TransportError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    reason = " ".join(str(error).split()) or type(error).__name__
    page = f"https://huggingface.co/{name}"
    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        return f"it is gated; ask for access at {page}, then run: hf auth login (or set HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub knows no such model; check the name at {page}, or run hf auth login if it is private"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a folder"
    if isinstance(error, LocalEntryNotFoundError | TransportError | ConnectionError):
        return (
            "the hub cannot be reached and it is not in the cache; check the network, the proxy and HF_ENDPOINT, or "
            f"name a folder ({reason[:200]})"
        )
    return reason[:300]
