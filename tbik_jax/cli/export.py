"""`tbik-jax export`: an Orbax checkpoint as a Hugging Face one."""

from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import typer
from flax import nnx

from ..checkpoint import restore_checkpoint, saved_model
from ..export import export_hugging_face
from ..models import Qwen3
from .errors import command
from .import_ import TOKENIZER_FILES, TOKENIZER_FOLDER, copy_files
from .options import CpuDevicesOption, DebugOption, JsonOption, MeshOption, mesh_of, use_cpu_devices
from .terminal import Terminal

EXAMPLE = "tbik-jax export checkpoints exported"


@command
def export(
    checkpoints: Annotated[
        Path, typer.Argument(help="Folder of checkpoints, of training or of tbik-jax import.")
    ],
    folder: Annotated[Path, typer.Argument(help="To make, for config.json and safetensors.")],
    step: Annotated[int | None, typer.Option(min=0, help="Of the checkpoint; by default the last.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="With tokenizer files to copy, if not the checkpoint's."),
    ] = None,
    mesh: MeshOption = "tp=1",
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint's model as a Hugging Face folder, which transformers and `tbik-jax generate` read.

    Every bit of the parameters is kept. Optimizer and random keys stay behind.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    devices = mesh_of(mesh, terminal)
    if tokenizer is not None and not tokenizer.is_dir():
        raise ValueError(f"--tokenizer {tokenizer} is no folder")
    config, dtype = saved_model(checkpoints, step=step)
    model = nnx.eval_shape(lambda: Qwen3(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    with terminal.working(f"reading {checkpoints}"):
        restored = restore_checkpoint(checkpoints, model=model, step=step, mesh=devices)
    with terminal.working(f"writing {folder}"):
        export_hugging_face(model, folder)
    copied = copy_files(tokenizer or checkpoints / TOKENIZER_FOLDER, folder, TOKENIZER_FILES)
    words = f" and {len(copied)} files of its tokenizer" if copied else "; no tokenizer was found beside it"
    terminal.show(f"step {restored.step} in {dtype}: {folder}{words}", markup=False)
    terminal.emit({"step": restored.step, "dtype": dtype, "folder": str(folder), "tokenizer": copied})
