"""Training checkpoints: model, optimizer state and random keys, saved from one mesh and restored onto any other."""

import dataclasses
import json
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from .checkpoint_arrays import (
    Arrays,
    describe,
    groups_of,
    node_arrays,
    node_shardings,
    read_group,
    update_node,
    write_group,
)
from .checkpoint_folder import (
    IncompleteCheckpoint,
    check_contents,
    delete_older,
    new_step,
    partial_paths,
    read_manifest,
    step_path,
    step_paths,
)
from .mesh import resolve_mesh
from .models.qwen3 import Qwen3, Qwen3Config

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoredCheckpoint:
    """What `restore_checkpoint` found beside the model and the optimizer.

    Attributes:
        step: of the checkpoint.
        rng: the key, or the `nnx.Rngs` that was passed (updated in place); None if none was asked for.
        extra: as it was saved.
        versions: of the packages that saved it, by name.
    """

    step: int
    rng: Any
    extra: dict[str, Any] | None
    versions: dict[str, str]


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: Qwen3,
    optimizer: nnx.Optimizer | None = None,
    rng: jax.Array | nnx.Rngs | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Saves a training state, from whatever mesh it lies on.

    The checkpoint is written under a temporary name and appears as `folder/step_<step>` when all of it is on the disk.
    Shards go to the host one group of arrays at a time (about 2 GiB), and no array is gathered on a device.

    Args:
        folder: of all of the run's checkpoints; made if it is not there. One run writes to it at a time.
        step: at least 0, not there yet.
        model: the module; its config is saved too.
        optimizer: its step and Optax state.
        rng: a key (of `jax.random.key` or `PRNGKey`, any shape) or the streams of an `nnx.Rngs`.
        extra: what else the run wants back, such as the position in its data; a small dict that JSON can hold.
        keep: how many checkpoints up to this step to keep; the older ones are deleted when this one is whole, and so is
            what interrupted saves left. None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the step is there already or below 0, `keep` is below 1, `extra` does not survive JSON, an array of
            the state is abstract or empty, or JAX runs in more than one process.
    """
    _check_whole_number("step", step, 0)
    if keep is not None:
        _check_whole_number("keep", keep, 1)
    _check_one_process()
    _check_json(extra)
    rng_kind = _rng_kind(rng)
    parts = {name: node_arrays(name, node) for name, node in _nodes(model, optimizer, rng).items()}
    folder = Path(folder).expanduser().absolute()
    with new_step(folder, int(step)) as (partial, manifest):
        manifest["model"] = {"class": type(model).__name__, "config": _config(model)}
        manifest["rng"] = rng_kind
        manifest["extra"] = None if extra is None else dict(extra)
        manifest["versions"] = _versions()
        manifest["arrays"] = {
            part: {name: describe(f"{part}.{name}", value) for name, value in arrays.items()}
            for part, arrays in parts.items()
        }
        manifest["groups"] = {}
        for part, arrays in parts.items():
            for i, names in enumerate(groups_of(arrays)):
                group = f"{part}-{i:04d}"
                manifest["groups"][group] = names
                write_group(partial / group, {name: arrays[name] for name in names})
    if keep is not None:
        delete_older(folder, int(step), int(keep))
    return step_path(folder, int(step))


def restore_checkpoint(
    folder: str | Path,
    *,
    model: Qwen3,
    optimizer: nnx.Optimizer | None = None,
    rng: jax.Array | nnx.Rngs | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> RestoredCheckpoint:
    """Puts a saved training state into a model and its optimizer, on any mesh; every bit is as it was saved.

    Each device reads its shards and no others, after the host has compared the files' checksums. Parameters are cut as
    `load` cuts them, arrays of the optimizer that have a parameter's place and shape (moments, accumulated gradients)
    like that parameter, and all else is replicated. Nothing is changed unless all of it was read.

    Args:
        folder: of all of the run's checkpoints.
        model: of the same config and dtype. Its values are replaced; to save memory let it be abstract, as
            `nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))` makes it.
        optimizer: of the same Optax transformation, possibly abstract; None to leave the saved one unread.
        rng: a key of the saved one's kind and shape, or an `nnx.Rngs` with its streams, which is updated in place.
        step: which one; None for the last whole one. A newer one that was interrupted or lacks files is passed over,
            with a warning that names it.
        mesh: axes data, fsdp, tp; None for the ambient mesh, else one device.

    Returns:
        Step, rng, extra and versions.

    Raises:
        ValueError: there is no such checkpoint, or it is not whole or cannot be read; its config, or the name, shape or
            dtype of an array, is not the model's or the optimizer's; it holds no optimizer or rng and one is asked for;
            tp does not cut the model; or JAX runs in more than one process. Each names the culprit.
    """
    _check_one_process()
    mesh = resolve_mesh(mesh)
    path, manifest = _choose(Path(folder).expanduser().absolute(), step)
    _check_model(path, manifest, model)
    _check_rng(path, manifest, rng)
    nodes = _nodes(model, optimizer, rng)
    parts = {part: node_arrays(part, node, abstract=True) for part, node in nodes.items()}
    for part, arrays in parts.items():
        _check_arrays(path, part, manifest["arrays"].get(part), arrays)
    shardings = node_shardings(nodes, mesh)
    groups = {name: part for name in manifest["groups"] if (part := name.rsplit("-", 1)[0]) in parts}
    check_contents(path, manifest, groups)
    restored: dict[str, Arrays] = {part: {} for part in parts}
    for group, part in groups.items():
        wanted = {name: (parts[part][name], shardings[part][name]) for name in manifest["groups"][group]}
        restored[part] |= read_group(path / group, wanted)
    for part, node in nodes.items():
        if isinstance(node, jax.Array):
            rng = restored[part]["key"]
        else:
            update_node(node, restored[part])
    return RestoredCheckpoint(
        step=manifest["step"], rng=rng, extra=manifest["extra"], versions=manifest["versions"]
    )


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps of a folder's whole checkpoints, ascending; none where there is no such folder.

    Raises:
        ValueError: the path is a file.
    """
    steps = []
    for step, path in step_paths(Path(folder).expanduser().absolute()).items():
        try:
            read_manifest(path)
        except IncompleteCheckpoint:
            continue
        steps.append(step)
    return steps


def saved_model(folder: str | Path, *, step: int | None = None) -> tuple[Qwen3Config, str]:
    """What a checkpoint's model was built from, to build an abstract one for `restore_checkpoint`.

    Args:
        folder: of all of the run's checkpoints.
        step: which one; None for the last whole one, as `restore_checkpoint` chooses it.

    Returns:
        The config, and the name of the parameters' dtype.

    Raises:
        ValueError: there is no such checkpoint, it is not whole, or its model is none of ours.
    """
    path, manifest = _choose(Path(folder).expanduser().absolute(), step)
    if manifest["model"]["class"] != Qwen3.__name__:
        raise ValueError(f"{path} is of a {manifest['model']['class']}, not of a {Qwen3.__name__}")
    fields = dict(manifest["model"]["config"])
    fields["eos_token_id"] = tuple(fields["eos_token_id"])
    dtypes = {entry["dtype"] for entry in manifest["arrays"]["model"].values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{path} holds parameters of several dtypes ({', '.join(sorted(dtypes))}); cast one of them"
        )
    return Qwen3Config(**fields), dtypes.pop()


# --- which checkpoint ----------------------------------------------------------------------------------


def _choose(folder: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a step, or the last whole one, and its manifest."""
    found = step_paths(folder)
    if step is not None:
        return _named(folder, found, step)
    passed_over: list[str] = []
    for number, path in sorted(found.items(), reverse=True):
        try:
            manifest = read_manifest(path)
        except IncompleteCheckpoint as error:
            passed_over.append(f"{error}")
            continue
        passed_over += [
            f"{p} was interrupted or is under way" for n, p in partial_paths(folder) if n > number
        ]
        for reason in passed_over:
            warnings.warn(f"{reason}; step {number} is restored instead", UserWarning, stacklevel=3)
        return path, manifest
    passed_over += [f"{path} was interrupted or is under way" for _, path in partial_paths(folder)]
    reasons = "; ".join(passed_over) or "it is empty" if folder.exists() else "there is no such folder"
    raise ValueError(f"{folder} holds no whole checkpoint: {reasons}")


def _named(folder: Path, found: Mapping[int, Path], step: int) -> tuple[Path, dict[str, Any]]:
    _check_whole_number("step", step, 0)
    if step in found:
        try:
            return found[step], read_manifest(found[step])
        except IncompleteCheckpoint as error:
            raise ValueError(f"step {step} is not whole: {error}; whole are {_whole(folder)}") from None
    interrupted = [path for number, path in partial_paths(folder) if number == step]
    if interrupted:
        raise ValueError(
            f"step {step} is not whole: {interrupted[0]} was interrupted or is under way; whole are {_whole(folder)}"
        )
    raise ValueError(f"{folder} holds no checkpoint of step {step}; whole are {_whole(folder)}")


def _whole(folder: Path) -> str:
    return ", ".join(f"step {step}" for step in checkpoint_steps(folder)) or "none"


def _nodes(model: Qwen3, optimizer: nnx.Optimizer | None, rng: jax.Array | nnx.Rngs | None) -> dict[str, Any]:
    nodes = {"model": model, "optimizer": optimizer, "rng": rng}
    return {part: node for part, node in nodes.items() if node is not None}


# --- checks --------------------------------------------------------------------------------------------


def _config(model: Qwen3) -> dict[str, Any]:
    """The config as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(model.config)))


def _check_model(path: Path, manifest: Mapping[str, Any], model: Qwen3) -> None:
    if manifest["model"]["class"] != type(model).__name__:
        raise ValueError(f"{path} is of a {manifest['model']['class']}, not of a {type(model).__name__}")
    saved, mine = manifest["model"]["config"], _config(model)
    for field in sorted(saved.keys() | mine.keys()):
        if saved.get(field) != mine.get(field):
            raise ValueError(
                f"{path} was saved with {field}={saved.get(field)!r} and the model has {field}={mine.get(field)!r}; "
                "build it from the saved config"
            )


def _rng_kind(rng: jax.Array | nnx.Rngs | None) -> str | None:
    if rng is None or isinstance(rng, nnx.Rngs):
        return None if rng is None else "Rngs"
    if not isinstance(rng, jax.Array):
        raise ValueError(f"rng is a {type(rng).__name__}; pass a key of jax.random.key, or an nnx.Rngs")
    return "key"


def _check_rng(path: Path, manifest: Mapping[str, Any], rng: jax.Array | nnx.Rngs | None) -> None:
    saved, mine = manifest["rng"], _rng_kind(rng)
    if saved is not None and mine is not None and saved != mine:
        words = {"Rngs": "an nnx.Rngs", "key": "a key"}
        raise ValueError(f"{path} holds {words[saved]} and rng is {words[mine]}; pass {words[saved]}")


def _check_arrays(
    path: Path, part: str, saved: Mapping[str, Mapping[str, Any]] | None, arrays: Arrays
) -> None:
    if saved is None:
        raise ValueError(f"{path} was saved without {part}; pass {part}=None, or restore another checkpoint")
    for name, value in arrays.items():
        full = f"{part}.{name}"
        if name not in saved:
            raise ValueError(f"{path} lacks {full} of shape {value.shape} {value.dtype}")
        mine = describe(full, value)
        if tuple(saved[name]["shape"]) != value.shape:
            raise ValueError(
                f"{full} has shape {tuple(saved[name]['shape'])} in {path} and {value.shape} here"
            )
        if saved[name]["dtype"] != mine["dtype"]:
            raise ValueError(f"{full} is {saved[name]['dtype']} in {path} and {mine['dtype']} here")
    for name in saved:
        if name not in arrays:
            raise ValueError(
                f"{path} holds {part}.{name} of shape {tuple(saved[name]['shape'])} {saved[name]['dtype']}, "
                f"which the {part} here lacks"
            )


def _check_whole_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _check_one_process() -> None:
    if jax.process_count() > 1:
        raise ValueError(f"JAX runs in {jax.process_count()} processes; checkpoints are written by one")


def _check_json(extra: Mapping[str, Any] | None) -> None:
    if extra is None:
        return
    try:
        survives = isinstance(extra, Mapping) and json.loads(json.dumps(dict(extra))) == dict(extra)
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(
            f"extra={extra!r} does not come back from JSON as it went in; use a dict with keys of str, and values of "
            "str, int, finite float, bool, None, list and dict"
        )


def _versions() -> dict[str, str]:
    from . import __version__  # the package imports this module first

    return {
        "python": platform.python_version(),
        "tbik-jax": __version__,
        **{name: version(name) for name in _PACKAGES},
    }
