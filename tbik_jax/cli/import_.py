"""`tbik-jax import`: a Hugging Face checkpoint as an Orbax one."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import save_checkpoint
from .errors import command
from .model import open_model
from .options import (
    CpuDevicesOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    MeshOption,
    ModelArgument,
    mesh_of,
    use_cpu_devices,
)
from .terminal import Terminal

EXAMPLE = "tbik-jax import synthetic checkpoints"
#: Where the tokenizer's files lie beside the steps, for `tbik-jax export`.
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@command
def import_(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="Of checkpoints, to which one is added.")],
    step: Annotated[int, typer.Option(min=0, help="Of the checkpoint.")] = 0,
    mesh: MeshOption = "tp=1",
    dtype: DtypeOption = "bfloat16",
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a Hugging Face model as a checkpoint that `tbik_jax.restore_checkpoint` reads onto any mesh.

    Values are rounded to the dtype once, or kept. The tokenizer's files go along, for `tbik-jax export`.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    devices = mesh_of(mesh, terminal)
    with open_model(model, terminal) as source:
        _check_tokenizer(source.path, folder / TOKENIZER_FOLDER)
        loaded = source.load(devices, dtype, terminal)
        with terminal.working(f"writing {folder}"):
            path = save_checkpoint(folder, step, model=loaded)
        copied = copy_files(source.path, folder / TOKENIZER_FOLDER, TOKENIZER_FILES)
    tokenizer = f" and {len(copied)} files of its tokenizer" if copied else "; it has no tokenizer"
    terminal.show(f"{model} in {dtype}: {path}{tokenizer}", markup=False)
    terminal.emit({"model": model, "dtype": dtype, "checkpoint": str(path), "tokenizer": copied})


def _check_tokenizer(source: Path, target: Path) -> None:
    """Raises `ValueError` if the checkpoints there are of a model with another tokenizer."""
    for name in TOKENIZER_FILES:
        mine, theirs = source / name, target / name
        if mine.is_file() and theirs.is_file() and mine.read_bytes() != theirs.read_bytes():
            raise ValueError(
                f"{theirs} is of another model than {source}; name another folder of checkpoints"
            )


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copies those files that are there and not yet at the target; returns their names."""
    found = [name for name in names if (source / name).is_file() and not (target / name).exists()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
