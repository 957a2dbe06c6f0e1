"""`export_hugging_face`: a model as a Hugging Face checkpoint folder, the inverse of `load`."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from flax import nnx

from .checkpoint_folder import flush
from .loading import parameter_path
from .models.qwen3 import Qwen3
from .models.qwen3.checkpoint import ParameterPath, split_parameter, tensor_shapes
from .models.qwen3.modules import check_dtype

_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def export_hugging_face(model: Qwen3, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Writes config.json and the weights of a model as transformers' Qwen3ForCausalLM reads them.

    Parameters go to the host one at a time, from whatever mesh they lie on, and are written as they are, in the model's
    dtype: `load(folder, dtype=model.dtype)` gives the same bits. Nothing gets its name before all of it is on the disk,
    and config.json gets its name last. A tokenizer is no part of a model: copy its files from where the model came
    from.

    Args:
        model: the module.
        folder: to make, or one that holds no config.json and no safetensors files, such as one with a tokenizer.
        max_shard_bytes: of tensors in a file. A larger model gets several files and an index, cut as transformers cuts
            them; a larger tensor gets a file of its own.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds a model or is a file, the model is abstract or not wholly on this host's devices,
            its parameters differ in dtype, a value is NaN or infinite, or `max_shard_bytes` is below 1.
    """
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes!r} must be a whole number of at least 1")
    parameters = _parameters(model)
    target = Path(folder).expanduser().absolute()
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        _write(partial, model, parameters, max_shard_bytes)
        flush(partial)
        _check_target(target)  # somebody may have been faster
        _give_names(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Path(folder)


def _parameters(model: Qwen3) -> dict[ParameterPath, jax.Array]:
    parameters: dict[ParameterPath, jax.Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        name = ".".join(map(str, parameter_path(path)))
        if not isinstance(value, jax.Array):
            raise ValueError(
                f"{name} is a {type(value).__name__}, not an array; load or restore the model first"
            )
        if not value.is_fully_addressable:
            raise ValueError(f"{name} is not wholly on this host's devices; export it from one process")
        if value.dtype != model.dtype:
            raise ValueError(f"{name} is {value.dtype} and the embedding {model.dtype}; cast one of them")
        parameters[parameter_path(path)] = value
    check_dtype(model.dtype)
    return parameters


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder")
    taken = [name for name in (_CONFIG, _INDEX) if (target / name).exists()]
    taken += sorted(path.name for path in target.glob("*.safetensors"))
    if taken:
        raise ValueError(f"{target} holds {taken[0]} already and is not overwritten; name another folder")


def _write(
    folder: Path, model: Qwen3, parameters: Mapping[ParameterPath, jax.Array], max_shard_bytes: int
) -> None:
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    dtype = jax.numpy.dtype(model.dtype)
    _write_json(folder / _CONFIG, model.config.to_dict(dtype=dtype.name))
    shapes = dict(
        sorted(tensor_shapes(model.config).items())
    )  # transformers cuts them into files in this order
    sizes: dict[str, Any] = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=_PATTERN, max_shard_size=max_shard_bytes
    )
    if split.is_sharded:
        metadata = {"total_parameters": sum(map(math.prod, shapes.values())), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / _INDEX, index)
    with ExitStack() as stack:
        places: dict[str, tuple[IO[bytes], int]] = {}
        for file, names in split.filename_to_tensors.items():
            header, starts = _header({name: shapes[name] for name in names}, dtype)
            stream: IO[bytes] = stack.enter_context((folder / file).open("wb"))
            stream.write(header)
            places |= {name: (stream, start) for name, start in starts.items()}
        for name, tensor in _tensors(model, parameters):
            stream, start = places.pop(name)
            stream.seek(start)
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        if places:
            raise ValueError(f"the model holds no parameter with the tensor {min(places)}")


def _tensors(model: Qwen3, parameters: Mapping[ParameterPath, jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
    for path, value in parameters.items():
        whole = _on_host(value)
        for name, tensor in split_parameter(model.config, path, whole).items():
            if not np.isfinite(tensor).all():
                raise ValueError(f"tensor {name} holds NaN or infinity; such a checkpoint is of no use")
            yield name, tensor


def _on_host(value: jax.Array) -> np.ndarray:
    """An array put together on the host from its shards, with no device holding more than it does.

    `np.asarray` would do, but leaves its copy with the array, and so all of the model on the host in the end.
    """
    whole = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            part = shard.data  # the same buffer as an array of its own, which takes the copy with it
            part = jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part])
            whole[shard.index] = np.asarray(part)
    return whole


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where in the file each tensor starts.

    Eight bytes of length, then JSON with blanks up to a multiple of 8; tensors by name, as the safetensors library
    sorts those of one dtype. The library itself would want all tensors of a file in memory.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype.name],
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + entries[name]["data_offsets"][0] for name in shapes}
    return header, starts


def _give_names(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    else:  # config.json last: without it the folder is no checkpoint
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == _CONFIG, path.name)):
            path.rename(target / path.name)
        partial.rmdir()
    for folder in (target, target.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
