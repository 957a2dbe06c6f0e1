"""The demonstration behind `make demo`: one Qwen3 on many meshes, with invariant and with plain numerics.

Generates from text prompts over several meshes and batch sizes, greedy and sampled, and counts how many different
outputs a prompt gets. `python -m tbik_jax.demo --help` lists the options.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import synthetic, synthetic_tokenizer
from .cli.prompts import EXAMPLES, read_prompts
from .divergence import Output, Verdict, judge
from .fingerprint import fingerprint
from .generation import GenerateOutput, NumericsName, generate
from .loading import load
from .mesh import make_mesh, mesh_label
from .models import Qwen3
from .sampling import SamplingParams

_FOLDER = Path(".demo") / "qwen3-small"
_MESHES: tuple[dict[str, int], ...] = ({"tp": 1}, {"tp": 2}, {"tp": 4}, {"tp": 8}, {"data": 3, "tp": 2})
_BATCHES = (1, 3, 8)
_NUMERICS: tuple[NumericsName, ...] = ("invariant", "plain")


@dataclasses.dataclass(frozen=True)
class _Case:
    """One call of `generate`: prompts `indices` as a batch on a mesh. Outputs of `new` are kept."""

    mesh: Mesh
    batch: int
    numerics: NumericsName
    mode: str
    indices: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.numerics}, {mesh_label(self.mesh)}, batch {self.batch}, {self.mode}"


def _cases(meshes: Sequence[Mesh], prompts: int) -> Iterator[_Case]:
    for mesh, batch, numerics in itertools.product(meshes, _BATCHES, _NUMERICS):
        for mode, start in itertools.product(("greedy", "sampled"), range(0, prompts, batch)):
            # the last batch is filled up from the first prompts, so that every batch has its full size
            indices = tuple((start + i) % prompts for i in range(batch))
            yield _Case(mesh, batch, numerics, mode, indices, indices[: prompts - start])


def _run(
    model: Qwen3, case: _Case, prompts: Sequence[Sequence[int]], new_tokens: int, eos: tuple[int, ...]
) -> GenerateOutput:
    hot = case.mode == "sampled"
    sampling = [SamplingParams(temperature=0.8 if hot else 0.0, seed=i) for i in case.indices]
    return generate(
        model,
        [prompts[i] for i in case.indices],
        mesh=case.mesh,
        max_new_tokens=new_tokens,
        sampling=sampling,
        eos_id=eos or None,
        numerics=case.numerics,
    )


def _possible_meshes(model: Qwen3, console: Console) -> list[Mesh]:
    meshes = []
    for sizes in _MESHES:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if model.config.num_key_value_heads % sizes["tp"]:
            console.print(f"mesh {text} left out: the model has {model.config.num_key_value_heads} KV heads")
            continue
        try:
            meshes.append(make_mesh(data=sizes.get("data", 1), tp=sizes["tp"]))
        except ValueError as error:
            console.print(f"mesh {text} left out: {error}")
    return meshes


def _prepare(model: Path | None, console: Console) -> tuple[Path, Any]:
    from transformers import AutoTokenizer

    if model is None:
        model = _FOLDER
        if not (model / "tokenizer_config.json").is_file():
            console.print(f"making a small Qwen3 checkpoint with random weights in {model}")
            synthetic.write_checkpoint(model, synthetic.small_config(num_hidden_layers=2), overwrite=True)
            synthetic_tokenizer.write_tokenizer(model)
    try:
        return model, AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {model}: {str(error).splitlines()[0]}") from None


def _collect(
    model: Qwen3,
    cases: Sequence[_Case],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    eos: tuple[int, ...],
    console: Console,
) -> dict[tuple[str, str], list[list[Output]]]:
    """Outputs by (mode, numerics), prompt and configuration."""
    collected: dict[tuple[str, str], list[list[Output]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for (mesh, _), group in itertools.groupby(cases, key=lambda case: (mesh_label(case.mesh), case.mesh)):
            began = time.perf_counter()
            for case in group:
                progress.update(task, description=case.label)
                out = _run(model, case, prompts, new_tokens, eos)
                rows = collected.setdefault((case.mode, case.numerics), [[] for _ in prompts])
                for i, pair in zip(case.new, zip(out.tokens, out.logprobs, strict=True), strict=False):
                    rows[i].append(pair)
                progress.advance(task)
            if not console.is_terminal:
                console.print(f"{mesh}: {time.perf_counter() - began:.0f} s")
        progress.update(task, description="done")
    return collected


def _table(verdicts: dict[tuple[str, str], Verdict]) -> Table:
    table = Table(
        title="Outputs of one prompt over all meshes and batch sizes: mean and maximum over the prompts"
    )
    for name in ("sampling", "numerics", "runs", "distinct outputs", "probability differs by", "result"):
        table.add_column(name, justify="left" if name in ("sampling", "numerics", "result") else "right")
    for (mode, numerics), verdict in verdicts.items():
        result = "PASS" if verdict.same_bits else "FAIL"
        table.add_row(
            mode,
            numerics,
            str(verdict.configurations),
            f"{np.mean(verdict.distinct):.2f} (max {max(verdict.distinct)})",
            f"{verdict.divergence:.2e}" if verdict.divergence else "0",
            f"[bold {'green' if verdict.same_bits else 'red'}]{result}[/]",
        )
    return table


def main(
    model: Annotated[
        Path | None,
        typer.Option(help="Qwen3 checkpoint folder with tokenizer. [default: a small one is made]"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line. [default: eight]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate a prompt.")] = 24,
) -> None:
    """One Qwen3 on meshes of 1 to 8 devices: the same bits with invariant numerics, others with plain ones."""
    console = Console(soft_wrap=True)
    try:
        code = _demo(model, prompts, new_tokens, console)
    except (ValueError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        code = 2
    raise typer.Exit(code)


def _demo(model_path: Path | None, prompts_path: Path | None, new_tokens: int, console: Console) -> int:
    if jax.config.jax_num_cpu_devices < 8:
        jax.config.update("jax_num_cpu_devices", 8)
    texts = list(EXAMPLES) if prompts_path is None else read_prompts(prompts_path)
    folder, tokenizer = _prepare(model_path, console)
    model = load(folder)
    eos = model.config.eos_token_id if model_path is not None else ()
    encoded = [tokenizer.encode(text) for text in texts]
    meshes = _possible_meshes(model, console)
    device = jax.devices()[0]
    console.print(
        f"{folder}: {len(texts)} prompts, {new_tokens} new tokens, on {len(jax.devices())} x {device.device_kind}"
    )
    collected = _collect(model, list(_cases(meshes, len(texts))), encoded, new_tokens, eos, console)
    verdicts = {key: judge(rows) for key, rows in sorted(collected.items())}
    console.print(_table(verdicts))
    tokens = collected["sampled", "invariant"][0][0][0]
    console.print(f"\n[bold]{texts[0]}[/]{tokenizer.decode(tokens)}\n", highlight=False)
    results = [collected[mode, "invariant"] for mode in ("greedy", "sampled")]
    console.print(f"fingerprint of the invariant outputs: {fingerprint(results)}", highlight=False)
    if all(verdict.same_bits for (_, numerics), verdict in verdicts.items() if numerics == "plain"):
        console.print(
            "note: plain numerics did not differ either; with these prompts the comparison shows nothing"
        )
    equal = all(verdict.same_bits for (_, numerics), verdict in verdicts.items() if numerics == "invariant")
    return 0 if equal else 1


if __name__ == "__main__":
    typer.run(main)
