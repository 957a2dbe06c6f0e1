"""`tbik-jax bisect`: which op is the first whose bits differ between two runs."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ..bisect import Bisection, Configuration, Trace, compare, load_trace, plot, trace_model
from ..generation import TokenIds
from ..models import Qwen3
from ..steps import NUMERICS
from .errors import BROKEN_PROMISE, command
from .model import ModelFolder, encode, load_tokenizer, open_model
from .options import (
    CpuDevicesOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    TokenizerOption,
    mesh_of,
    use_cpu_devices,
)
from .terminal import Terminal

EXAMPLE = (
    "tbik-jax bisect tp=1,numerics=plain tp=4,numerics=plain,batch=8 --model synthetic --cpu-devices 8 "
    "--plot bisect.png"
)
_AXES = ("data", "fsdp", "tp")
_KNOWN = (*_AXES, "numerics", "batch", "chunk")
_SHOWN = 12  # ops of the table


@command
def bisect(
    left: Annotated[
        str,
        typer.Argument(metavar="LEFT", help="How to run it, such as tp=1,numerics=plain; or a trace's file."),
    ],
    right: Annotated[
        str | None, typer.Argument(metavar="RIGHT", help="Likewise: data, fsdp, tp, numerics, batch, chunk.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",  # which typer 0.27 would spell as the metavar
            metavar="MODEL",
            help="Checkpoint folder, hub id or 'synthetic', for sides that are run.",
        ),
    ] = "synthetic",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Texts to run; several. By default random tokens.")
    ] = None,
    random: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Lengths of random sequences, if there is no --prompt.")
    ] = "24,17,9",
    save: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Keep the traces: one for each side that is run."),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="What is kept whole: all, fingerprints, or a pattern such as 'layer 3/*'.")
    ] = "all",
    check: Annotated[
        bool, typer.Option(help="Run without taps as well, to see that they change no bit.")
    ] = True,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Image: what differs, by layer and op.")
    ] = None,
    dtype: DtypeOption = "bfloat16",
    tokenizer: TokenizerOption = None,
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Run a model twice with taps after every op, and name the first op whose bits differ.

    A side is axes of a mesh, numerics (invariant, plain, batch_invariant), batch (rows that run together) and chunk
    (tokens a pass; 1 is what decoding does), with commas; or the file of a trace from this or another machine. With
    LEFT and --save alone it makes a trace. Exits with 1 if two runs differ that are promised the same bits.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    sides = [left] if right is None else [left, right]
    read = [load_trace(side) if Path(side).is_file() else None for side in sides]
    to_run = [parse_side(side) for side, trace in zip(sides, read, strict=True) if trace is None]
    files = save or []
    if right is None and not (to_run and files):
        raise ValueError(
            "one side gives nothing to compare; name RIGHT, or --save FILE to keep the trace of LEFT"
        )
    if files and len(files) != len(to_run):
        raise ValueError(
            f"--save is given {len(files)} times and {len(to_run)} sides are run; give it once for each"
        )
    made: list[Trace] = []
    if to_run:
        with open_model(model, terminal) as folder:
            sequences = _sequences(folder, prompt, tokenizer, random)
            loaded = folder.load(None, dtype, terminal)
        for number, configuration in enumerate(to_run):
            made.append(_traced(loaded, sequences, configuration, keep, check, terminal))
            if files:
                made[number].save(files[number])
    if right is None:
        return _kept(made[0], files[0], terminal)
    rest = iter(made)
    traces = [next(rest) if trace is None else trace for trace in read]
    found = compare(*traces)
    if plot_file is not None:
        plot(found, plot_file)
    terminal.show(_table(found))
    terminal.show(str(found), markup=False)
    terminal.emit(found.to_dict())
    return BROKEN_PROMISE if found.broken else 0


def parse_side(text: str) -> Configuration:
    """ "tp=4,data=2,numerics=plain,batch=8,chunk=1" as a configuration.

    Raises:
        ValueError: it is neither such a list nor a file, or its mesh needs more devices than there are.
    """
    given: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"{text!r} is no file, and no list such as tp=4,numerics=plain,batch=8")
        if name not in _KNOWN or name in given:
            problem = "twice" if name in given else f"which is none of {', '.join(_KNOWN)}"
            raise ValueError(f"{text!r} names {name!r}, {problem}; write it as tp=4,numerics=plain,batch=8")
        given[name] = value
    numerics = given.get("numerics", "invariant").replace("-", "_")
    if numerics not in NUMERICS:
        raise ValueError(f"{text!r}: numerics={numerics} is unknown; use one of {', '.join(NUMERICS)}")
    for name in ("batch", "chunk"):
        if not given.get(name, "1").isdecimal():
            raise ValueError(f"{text!r}: {name}={given[name]} must be a whole number of at least 1")
    axes = ",".join(f"{name}={given[name]}" for name in _AXES if name in given)
    return Configuration(
        mesh=mesh_of(axes or "tp=1"),
        numerics=numerics,  # type: ignore[arg-type]  # one of the names
        batch_size=int(given["batch"]) if "batch" in given else None,
        chunk=int(given["chunk"]) if "chunk" in given else None,
    )


def _sequences(
    folder: ModelFolder, prompts: list[str] | None, tokenizer: str | None, lengths: str
) -> list[TokenIds]:
    if prompts:
        return list(encode(load_tokenizer(folder, tokenizer), prompts))
    parts = lengths.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 2 for part in parts):
        raise ValueError(f"--random {lengths} is no list of whole numbers of at least 2, such as 24,17,9")
    rng = np.random.default_rng(0)
    return [rng.integers(0, folder.config.vocab_size, int(part)) for part in parts]


def _traced(
    model: Qwen3,
    sequences: list[TokenIds],
    configuration: Configuration,
    keep: str,
    check: bool,
    terminal: Terminal,
) -> Trace:
    with terminal.working(f"compiling and running {configuration.label}"):
        return trace_model(model, sequences, configuration, keep=keep, check=check)


def _kept(trace: Trace, file: Path, terminal: Terminal) -> int:
    terminal.show(f"{trace.label}: {len(trace.ops)} ops kept in {file}", markup=False)
    terminal.emit(
        {"label": trace.label, "ops": len(trace.ops), "file": str(file), "faithful": trace.faithful}
    )
    return 0


def _table(found: Bisection) -> Table:
    """The ops around the first that differs."""
    names = [op.name for op in found.ops]
    start = max(0, names.index(found.first.name) - 3) if found.first is not None else 0
    table = Table()
    table.add_column("op", no_wrap=True)
    for name in ("elements", "differ", "largest ulp", "largest difference"):
        table.add_column(name, justify="right")
    for op in found.ops[start : start + _SHOWN]:
        count = f"{op.differing_rows} rows" if op.differing is None else str(op.differing)
        table.add_row(
            op.name,
            str(op.elements),
            count if op.differs else "0",
            "" if op.max_ulp is None else str(op.max_ulp),
            "" if op.max_abs is None else f"{op.max_abs:.3g}",
            style="bold red" if found.first is op else "" if op.differs else "dim",
        )
    if start + _SHOWN < len(names):
        table.add_row(f"... {len(names) - start - _SHOWN} more", style="dim")
    return table
