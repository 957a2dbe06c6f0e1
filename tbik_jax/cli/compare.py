"""`tbik-jax compare`: one model on many meshes and in many batch sizes, and how far its outputs are apart."""

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax.sharding import Mesh
from rich.table import Table

from ..divergence import Output, Verdict, judge
from ..fingerprint import fingerprint
from ..generation import NumericsName, generate
from ..mesh import make_mesh, mesh_label
from ..models import Qwen3
from ..sampling import SamplingParams
from .errors import BROKEN_PROMISE, command
from .model import encode, load_tokenizer, open_model
from .options import (
    CpuDevicesOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TokenizerOption,
    describe_devices,
    mesh_of,
    use_cpu_devices,
)
from .prompts import EXAMPLES, read_prompts
from .terminal import Terminal

EXAMPLE = (
    "tbik-jax compare synthetic --mesh tp=1 --mesh tp=2,data=3 --batch 3 --cpu-devices 8 --plot compare.png"
)
_MESHES: tuple[dict[str, int], ...] = ({"tp": 1}, {"tp": 2}, {"tp": 4}, {"tp": 8}, {"data": 3, "tp": 2})
_PROMISED = {"invariant": "any mesh and batch", "batch_invariant": "any batch", "plain": "nothing"}


class _Numerics(enum.StrEnum):  # the parser knows no list of literals
    INVARIANT = "invariant"
    BATCH_INVARIANT = "batch_invariant"
    PLAIN = "plain"


#: Outputs of one numerics: [prompt][configuration].
Outputs = list[list[Output]]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A mesh and a batch size."""

    mesh: Mesh
    batch: int

    @property
    def label(self) -> str:
        return f"{mesh_label(self.mesh)}, batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What one numerics came to.

    Attributes:
        numerics: its name.
        verdict: over all configurations.
        kept: whether what it promises held; None where it promises nothing.
    """

    numerics: str
    verdict: Verdict
    kept: bool | None


@command
def compare(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPTS", help="Texts to continue; eight by default.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt a line.")
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(metavar="AXES", help="Such as tp=2,data=1; several. By default all that fit."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch sizes; by default 1, 3 and 8.")
    ] = None,
    numerics: Annotated[list[_Numerics] | None, typer.Option(help="Several; by default all three.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a prompt.")] = 24,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the samples, if the temperature is not 0.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image: distinct outputs, divergence by position.")
    ] = None,
    dtype: DtypeOption = "bfloat16",
    tokenizer: TokenizerOption = None,
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Generate on many meshes and in many batch sizes, and compare the outputs bit by bit.

    For invariant, batch-invariant and plain numerics: distinct outputs of a prompt, the largest difference of a token's
    probability, the first token that differs. Exits with 1 if a promise is broken.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    texts = [*(prompts or ()), *(read_prompts(prompts_file) if prompts_file else ())] or list(EXAMPLES)
    if plot is not None:
        _check_plot(plot)
    sampling = SamplingParams(temperature=temperature, seed=seed)
    with open_model(model, terminal) as folder:
        encoded = encode(load_tokenizer(folder, tokenizer, terminal), texts)
        meshes = (
            [mesh_of(text, terminal) for text in mesh] if mesh else _meshes_that_fit(folder.config, terminal)
        )
        sizes = batch or [n for n in (1, 3, 8) if n <= len(texts)]
        configurations = [Configuration(m, n) for m, n in itertools.product(meshes, sizes)]
        if len(configurations) < 2:
            raise ValueError(
                "one mesh and one batch size give nothing to compare; name a second --mesh or --batch"
            )
        loaded = folder.load(None, dtype, terminal)
        names: list[NumericsName] = [each.value for each in numerics or _Numerics]
        outputs = _collect(loaded, names, configurations, encoded, sampling, max_new_tokens, terminal)
    rows = [_judge(name, outputs[name], configurations) for name in names]
    head = {
        "model": model,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "prompts": len(texts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "configurations": [{"mesh": dict(c.mesh.shape), "batch": c.batch} for c in configurations],
    }
    _report(rows, head, terminal)
    if plot is not None:
        from .compare_plot import draw

        draw(plot, {row.numerics: (row.verdict, outputs[row.numerics]) for row in rows}, _title(head))
        terminal.note(f"plot: {plot}")
    terminal.emit(
        head
        | {
            "results": [_as_dict(row) for row in rows],
            "fingerprint": _fingerprint(outputs.get("invariant")),
        }
    )
    return BROKEN_PROMISE if any(row.kept is False for row in rows) else 0


def _check_plot(path: Path) -> None:
    """Before minutes of work: raises `ValueError` if the image cannot be written."""
    from .compare_plot import ENDINGS  # takes a second to import

    if path.suffix not in ENDINGS:
        raise ValueError(f"--plot {path} ends in none of {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}; make it first")


def _meshes_that_fit(config: Any, terminal: Terminal) -> list[Mesh]:
    """The usual meshes, as far as there are devices and KV heads for them."""
    meshes = []
    for sizes in _MESHES:
        if config.num_key_value_heads % sizes["tp"] == 0 and np.prod(list(sizes.values())) <= len(
            jax.devices()
        ):
            meshes.append(make_mesh(data=sizes.get("data", 1), tp=sizes["tp"]))
    if len(meshes) == 1:
        terminal.note("one device: only batch sizes are compared; --cpu-devices 8 shows meshes without GPUs")
    return meshes


def _batches(prompts: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Prompts of each batch, and how many of them are new: the last batch is filled up from the first prompts."""
    for start in range(0, prompts, size):
        yield [(start + i) % prompts for i in range(size)], min(size, prompts - start)


def _collect(
    model: Qwen3,
    names: Sequence[NumericsName],
    configurations: Sequence[Configuration],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    new_tokens: int,
    terminal: Terminal,
) -> dict[str, Outputs]:
    """Runs everything."""
    outputs: dict[str, Outputs] = {name: [[] for _ in prompts] for name in names}
    calls = sum(-(-len(prompts) // c.batch) for c in configurations) * len(names)
    with terminal.working("comparing", calls) as advance:
        for configuration, name in itertools.product(configurations, names):
            advance(0, what=f"{name}, {configuration.label}")
            for indices, new in _batches(len(prompts), configuration.batch):
                out = generate(
                    model,
                    [prompts[i] for i in indices],
                    mesh=configuration.mesh,
                    max_new_tokens=new_tokens,
                    sampling=[dataclasses.replace(sampling, seed=sampling.seed + i) for i in indices],
                    numerics=name,
                )
                pairs = list(zip(out.tokens, out.logprobs, strict=True))
                for i, pair in zip(indices[:new], pairs[:new], strict=True):
                    outputs[name][i].append(pair)
                advance()
    return outputs


def _judge(name: str, outputs: Outputs, configurations: Sequence[Configuration]) -> Row:
    verdict = judge(outputs)
    if name == "plain":
        return Row(name, verdict, None)
    if name == "invariant":
        return Row(name, verdict, verdict.same_bits)
    of_tp = [c.mesh.shape["tp"] for c in configurations]  # the only axis over which it adds in another order
    groups = [
        [[each[i] for i, tp in enumerate(of_tp) if tp == size] for each in outputs] for size in set(of_tp)
    ]
    return Row(name, verdict, all(judge(group).same_bits for group in groups))


def _fingerprint(outputs: Outputs | None) -> str | None:
    """Of what invariant numerics gave in the first configuration."""
    return None if outputs is None else fingerprint([each[0] for each in outputs])


def _as_dict(row: Row) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "numerics": row.numerics,
        "runs": verdict.configurations,
        "distinct_outputs": verdict.distinct,
        "mean_distinct_outputs": float(np.mean(verdict.distinct)),
        "largest_probability_difference": verdict.divergence,
        "first_diverging_token": verdict.first_token,
        "same_bits": verdict.same_bits,
        "promises": _PROMISED[row.numerics],
        "promise_kept": row.kept,
    }


def _title(head: dict[str, Any]) -> str:
    return (
        f"{head['model']}: {head['prompts']} prompts, {head['max_new_tokens']} new tokens, temperature "
        f"{head['temperature']:g}, {describe_devices()}"
    )


def _report(rows: Sequence[Row], head: dict[str, Any], terminal: Terminal) -> None:
    table = Table(title=_title(head), title_justify="left")
    for name in ("numerics", "runs", "distinct outputs", "probability by", "first token", "promise"):
        table.add_column(name, justify="left" if name in ("numerics", "promise") else "right", no_wrap=True)
    for row in rows:
        verdict = row.verdict
        kept = {True: "[green]kept[/]", False: "[bold red]BROKEN[/]", None: "none"}[row.kept]
        table.add_row(
            row.numerics,
            str(verdict.configurations),
            f"{np.mean(verdict.distinct):.2f} (max {max(verdict.distinct)})",
            f"{verdict.divergence:.1e}" if verdict.divergence else "0",
            "-" if verdict.first_token is None else str(verdict.first_token),
            kept,
        )
    terminal.show(table)
    if any(row.numerics == "plain" and row.verdict.same_bits for row in rows):
        terminal.note("plain numerics did not differ either: with these prompts the comparison shows nothing")
    if any(row.kept is False for row in rows):
        terminal.note(
            "a promise is broken: run `tbik-jax verify` to see which part of the installation it is"
        )
