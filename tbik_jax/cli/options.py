"""Options that several commands have, and how their texts become values."""

from typing import Annotated, Literal

import jax
import typer
from jax.sharding import Mesh

from ..mesh import AXES, make_mesh
from .terminal import Terminal

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, id on the Hugging Face hub, or 'synthetic': a small Qwen3 with random weights.",
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Folder or id of the tokenizer, if not the model's.")
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"], typer.Option(help="Of parameters and activations.")
]
MeshOption = Annotated[
    str,
    typer.Option(metavar="AXES", help="Devices along each axis, such as tp=2,data=1; axes: data, fsdp, tp."),
]
CpuDevicesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Run on N virtual CPU devices, to try meshes without GPUs."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def use_cpu_devices(count: int | None) -> None:
    """Makes JAX run on `count` virtual CPU devices, which must be asked for before JAX starts; None changes nothing.

    Raises:
        ValueError: JAX runs already, with another number.
    """
    if count is None or jax.config.jax_num_cpu_devices == count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise ValueError(
            f"--cpu-devices {count} comes too late: JAX runs already with {len(jax.devices())} devices"
        ) from None
    jax.config.update("jax_platforms", "cpu")


def parse_mesh(text: str) -> dict[str, int]:
    """ "tp=2,data=1" as sizes by axis.

    Raises:
        ValueError: it is no such list, or names another axis or one twice.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.isdecimal():
            raise ValueError(f"--mesh {text!r} is no list such as tp=2,data=1")
        if name not in AXES or name in sizes:
            problem = "twice" if name in sizes else f"which is none of {', '.join(AXES)}"
            raise ValueError(f"--mesh {text!r} names the axis {name!r}, {problem}; write it as tp=2,data=1")
        sizes[name] = int(size)
    return sizes


def mesh_of(text: str, terminal: Terminal | None = None) -> Mesh:
    """The mesh of the first devices; JAX starts here, if it has not yet.

    Raises:
        ValueError: as `parse_mesh`, or there are too few devices; the message says what to do.
    """
    sizes = parse_mesh(text)
    terminal = terminal or Terminal(as_json=False)
    with terminal.working("starting JAX"):
        on_cpu = jax.devices()[0].platform == "cpu"
    if on_cpu and jax.config.jax_num_cpu_devices < 1:  # nobody asked for CPU devices
        terminal.note("no GPU is used: this runs on the CPU, with references; `tbik-jax verify` says why")
    return make_mesh(sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tp", 1))


def describe_devices() -> str:
    """Such as "4 x NVIDIA H200" or "8 x cpu"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
