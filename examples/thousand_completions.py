"""1000 completions of one prompt at temperature 0: how many different ones are there?

    python examples/thousand_completions.py --completions 200 --plot completions.png
    python examples/thousand_completions.py --model qwen3-8b --out completions.json --plot completions.png

The completions are asked for as a server would see them: in batches of random size, the prompt at random places among
other prompts, over several meshes. Nothing about the request changes, so there should be one answer. With
`numerics="invariant"` there is one, bit for bit, or the exit status is 1; with "plain" there are several. What was done
so far is in the files at any time. Without a checkpoint the weights are random: "small" is a tiny model, "qwen3-8b"
and the like have the real shapes. Without GPUs it runs on eight virtual CPU devices.
"""

import collections
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import typer
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import tbik_jax
from tbik_jax import synthetic
from tbik_jax.bench.environment import environment
from tbik_jax.buckets import bucket, capacity_bucket
from tbik_jax.generation import NumericsName
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import SamplingParams, sampling_arrays
from tbik_jax.steps import NUMERICS, Engine

# ---------------------------------------------------------------------------------------------------------------------
# The requests: a function of the seed, and the same for all numerics.

NO_END = np.asarray([-1], np.int32)  # no token ends a row, so that all completions are as long


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the experiment, as on the command line."""

    completions: int
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    seed: int
    scan_layers: bool | None


def plan(settings: Settings, completions: int, part: int) -> Iterator[np.ndarray]:
    """Batches that hold the prompt so many times together: bool [batch size], True where it stands.

    Sizes are drawn from the list, since each is a program to compile; from 1 to all rows are the prompt.
    """
    rng = np.random.default_rng((settings.seed, 1, part))
    while completions > 0:
        size = int(rng.choice(settings.batches))
        copies = min(int(rng.integers(1, size + 1)), completions)
        completions -= copies
        yield rng.permutation(np.arange(size) < copies)


def the_prompt(settings: Settings, vocabulary: int) -> np.ndarray:
    """Random token ids, int32 [prompt_tokens]."""
    rng = np.random.default_rng((settings.seed, 0))
    return rng.integers(0, vocabulary, settings.prompt_tokens).astype(np.int32)


def company(settings: Settings, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    """Another prompt, not longer than the one."""
    length = int(rng.integers(1, settings.prompt_tokens + 1))
    return rng.integers(0, vocabulary, length).astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The model.


def make_model(name: str, mesh: Mesh) -> Qwen3:
    """A checkpoint, "small", or the shapes of a published size such as "qwen3-8b" with random weights.

    Raises:
        ValueError: there is no such model.
    """
    if name == "small":
        with tempfile.TemporaryDirectory() as folder:
            path = synthetic.write_checkpoint(Path(folder) / name, synthetic.small_config())
            return tbik_jax.load(path, mesh=mesh)
    if not name.lower().startswith("qwen3-"):
        return tbik_jax.load(name, mesh=mesh)
    raw = synthetic.qwen3_config(name[len("qwen3-") :].upper())
    return tbik_jax.shard_model(Qwen3(Qwen3Config.from_dict(raw), rngs=nnx.Rngs(0)), mesh)


def start_compiling(model: Qwen3, mesh: Mesh, numerics: NumericsName, settings: Settings) -> None:
    """Lets the programs of all batch sizes compile beside each other; `generate` finds them."""
    engine = Engine.create(model, mesh, numerics, settings.scan_layers)
    longest, width = settings.prompt_tokens, prefill_width(settings)
    for size in settings.batches:
        batch = Padded.of([np.zeros((longest,), np.int32)] * size, mesh)
        run = Run(engine, batch, capacity_bucket(max(longest + settings.new_tokens, width)), model.config)
        if longest > 1:
            run.prepare_prefill(width)
        greedy = sampling_arrays([SamplingParams()] * batch.size, model.config.vocab_size)
        run.prepare_decode(bucket(settings.new_tokens), greedy, False, NO_END)


def prefill_width(settings: Settings) -> int:
    """Tokens of a pass of prefill: one pass takes the prompt."""
    return bucket(max(1, settings.prompt_tokens - 1))


# ---------------------------------------------------------------------------------------------------------------------
# What came of it.


@dataclasses.dataclass(kw_only=True)
class Completions:
    """All completions of one kind of numerics.

    Attributes:
        tokens: int32 [new_tokens] each.
        logprobs: float32 [new_tokens] each.
        sources: of each, the mesh and the batch size.
        seconds: of all calls, waiting for compilers included.
    """

    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    sources: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def prefixes(self) -> list[int]:
        """Number of different beginnings of t + 1 tokens, for each t."""
        tokens = np.stack(self.tokens)
        ids = np.zeros(len(tokens), np.int64)
        counts = []
        for column in tokens.T:
            ids = np.unique(np.stack([ids, column], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
            counts.append(int(ids.max()) + 1)
        return counts

    @property
    def same_bits(self) -> bool:
        """Whether tokens and log-probabilities of all are equal bit for bit."""
        return self._distinct_bits() == 1

    def _distinct_bits(self) -> int:
        pairs = zip(self.tokens, self.logprobs, strict=True)
        return len({(tokens.tobytes(), logprobs.tobytes()) for tokens, logprobs in pairs})

    def summary(self, numerics: str) -> dict[str, Any]:
        """What there is to say of them, for JSON."""
        counts = collections.Counter(each.tobytes() for each in self.tokens)
        ranks = {each: rank for rank, (each, _) in enumerate(counts.most_common())}
        where: dict[str, collections.Counter[int]] = {}
        for (mesh, size), each in zip(self.sources, self.tokens, strict=True):
            where.setdefault(f"{mesh}, batch {size}", collections.Counter())[ranks[each.tobytes()]] += 1
        prefixes = self.prefixes
        bits = [np.unique(column).size > 1 for column in np.stack(self.logprobs).view(np.uint32).T]
        return {
            "numerics": numerics,
            "completions": len(self.tokens),
            "distinct": len(counts),
            "distinct_bits": self._distinct_bits(),
            "first_token_that_differs": next((t for t, n in enumerate(prefixes) if n > 1), None),
            "first_logprob_that_differs": next((t for t, differs in enumerate(bits) if differs), None),
            "counts": [count for _, count in counts.most_common()],
            "prefixes": prefixes,
            "by_source": {name: dict(sorted(each.items())) for name, each in sorted(where.items())},
            "seconds": round(self.seconds, 2),
            "fingerprint": tbik_jax.fingerprint([self.tokens[0], self.logprobs[0]])
            if self.same_bits
            else None,
        }


def write(out: Path | None, head: dict[str, Any], collected: dict[str, Completions]) -> None:
    """JSON with a line a result; a file is replaced as a whole, so that it can be read at any time."""
    if out is None:
        return
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    results = [json.dumps(each.summary(name)) for name, each in collected.items() if each.tokens]
    lines.append(' "results": [\n  ' + ",\n  ".join(results) + "\n ]")
    partial = out.with_name(out.name + ".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(out)


def draw(results: list[dict[str, Any]], title: str, file: Path) -> None:
    """How often each completion came, and into how many beginnings they part, token by token."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for color, each in enumerate(results):
        counts, label = each["counts"], f"{each['numerics']}: {each['distinct']} distinct"
        left.plot(np.arange(1, len(counts) + 1), counts, "o-", color=f"C{color}", markersize=4, label=label)
        tokens = np.arange(1, len(each["prefixes"]) + 1)
        right.step(tokens, each["prefixes"], where="mid", color=f"C{color}", label=each["numerics"])
    left.set(xlabel="distinct completion, most frequent first", ylabel="times it came")
    left.loglog()  # one that came a thousand times beside hundreds that came once
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:.0f}")
    right.set(xlabel="token", ylabel="distinct beginnings so far", ylim=(0, None))
    right.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def main(
    model: Annotated[
        str, typer.Option(help="small, qwen3-0.6b to qwen3-32b (random weights), a folder or a hub id")
    ] = "small",
    completions: Annotated[int, typer.Option(min=1, help="of the prompt, all meshes together")] = 1000,
    mesh: Annotated[
        list[str] | None,
        typer.Option(help="axes, e.g. data=3,tp=2; may be repeated [default: all of a few that fit]"),
    ] = None,
    batches: Annotated[str, typer.Option(help="sizes to draw from")] = "1,8,32,128",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of the prompt; others are shorter")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="of each completion")] = 96,
    numerics: Annotated[str, typer.Option(help="several with commas")] = "invariant,plain",
    scan_layers: Annotated[
        bool, typer.Option("--scan-layers", help="compile one layer: quick, also with many batch sizes")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="of the prompts and the batches")] = 0,
    limit: Annotated[float, typer.Option(min=0, help="seconds after which no batch begins")] = 3600,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
    plot: Annotated[Path | None, typer.Option(help="image of the result")] = None,
) -> None:
    """Counts the distinct completions of one prompt at temperature 0."""
    console = Console(soft_wrap=True)
    end = time.monotonic() + limit
    try:
        settings = Settings(
            completions=completions,
            batches=numbers("--batches", batches),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=seed,
            scan_layers=True if scan_layers else None,
        )
        names = kinds(numerics)
        meshes = [parse_mesh(text) for text in mesh] if mesh else default_meshes()
        head = {"environment": environment(), "model": model, "meshes": [mesh_label(m) for m in meshes]}
        head |= dataclasses.asdict(settings)
        collected = experiment(model, meshes, names, settings, end, console, out, head)
    except (ValueError, FloatingPointError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    results = [each.summary(name) for name, each in collected.items() if each.tokens]
    for each in results:
        console.print(in_words(each))
    if plot is not None and results:
        device = f"{model}, {head['environment']['device']}, {' / '.join(head['meshes'])}"
        draw(results, f"One prompt, temperature 0: {device}", plot)
    sys.exit(0 if all(each.same_bits for name, each in collected.items() if name == "invariant") else 1)


def experiment(
    name: str,
    meshes: Sequence[Mesh],
    names: Sequence[NumericsName],
    settings: Settings,
    end: float,
    console: Console,
    out: Path | None,
    head: dict[str, Any],
) -> dict[str, Completions]:
    """Completions by numerics; each mesh gets its share of them, and each numerics its share of the time."""
    began = time.monotonic()
    model = make_model(name, meshes[0])
    jax.block_until_ready(nnx.state(model))
    console.print(f"{name} on {jax.devices()[0].device_kind}, made in {time.monotonic() - began:.1f} s")
    collected = {numerics: Completions() for numerics in names}
    cells = len(meshes) * len(names)
    with progress(console) as bar:
        for part, mesh in enumerate(meshes):
            share = len(range(part, settings.completions, len(meshes)))
            here = tbik_jax.shard_model(model, mesh)
            for numerics in names:
                start_compiling(here, mesh, numerics, settings)
            for numerics in names:
                until = time.monotonic() + (end - time.monotonic()) / cells
                cells -= 1
                task = bar.add_task(f"{numerics}, {mesh_label(mesh)}", total=share)
                for rows in plan(settings, share, part):
                    if time.monotonic() > until:
                        console.print(f"{numerics}, {mesh_label(mesh)}: out of time")
                        break
                    complete(here, mesh, numerics, rows, settings, collected[numerics])
                    write(out, head, collected)
                    bar.update(task, advance=int(rows.sum()))
                console.print(
                    f"{numerics}, {mesh_label(mesh)}: {len(collected[numerics].tokens)} completions "
                    f"after {time.monotonic() - began:.1f} s"
                )
    return collected


def complete(
    model: Qwen3,
    mesh: Mesh,
    numerics: NumericsName,
    rows: np.ndarray,
    settings: Settings,
    collected: Completions,
) -> None:
    """Continues one batch and keeps what came of the prompt's rows."""
    vocabulary = model.config.vocab_size
    rng = np.random.default_rng((settings.seed, 2, len(collected.tokens)))
    prompt = the_prompt(settings, vocabulary)
    began = time.perf_counter()
    result = tbik_jax.generate(
        model,
        [prompt if mine else company(settings, vocabulary, rng) for mine in rows],
        mesh=mesh,
        max_new_tokens=settings.new_tokens,
        numerics=numerics,
        prefill_chunk=prefill_width(settings),
        scan_layers=settings.scan_layers,
    )
    collected.seconds += time.perf_counter() - began
    for i in np.flatnonzero(rows):
        collected.tokens.append(result.tokens[i])
        collected.logprobs.append(result.logprobs[i])
        collected.sources.append((mesh_label(mesh), len(rows)))


def in_words(each: dict[str, Any]) -> str:
    """A result as a line."""
    text = f"[bold]{each['numerics']}[/bold]: {each['distinct']} distinct among {each['completions']} completions"
    if each["distinct_bits"] == 1:
        return f"{text}, every log-probability the same bits"
    token, logprob = each["first_token_that_differs"], each["first_logprob_that_differs"]
    return (
        f"{text}, {each['distinct_bits']} with the bits of their log-probabilities; "
        f"the first log-probability that differs is that of token {logprob}, "
        + ("no token differs" if token is None else f"the first token that differs is token {token}")
    )


def progress(console: Console) -> Progress:
    """A bar of completions."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def default_meshes() -> list[Mesh]:
    """One device, tensor parallelism, and data parallelism beside it, as far as there are devices."""
    wanted = ({"tp": 1}, {"tp": 2}, {"tp": 4}, {"data": 3, "tp": 2})
    return [
        tbik_jax.make_mesh(**sizes) for sizes in wanted if math.prod(sizes.values()) <= len(jax.devices())
    ]


def parse_mesh(text: str) -> Mesh:
    """The mesh that "data=2,tp=4" names."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and pair[1].strip().isdigit() for pair in pairs):
        raise ValueError(f"--mesh {text} is no list such as data=2,tp=4")
    sizes = {name.strip(): int(size) for name, size in pairs}
    unknown = set(sizes) - {"data", "fsdp", "tp"}
    if unknown:
        raise ValueError(f"--mesh {text}: axis {min(unknown)} is unknown; use data, fsdp and tp")
    return tbik_jax.make_mesh(**sizes)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of "1,8,32", at least 1 each."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text} is no list of whole numbers of at least 1, such as 1,8,32")
    return tuple(int(part) for part in parts)


def kinds(text: str) -> tuple[Any, ...]:
    """The numerics of "invariant,plain"."""
    names = tuple(part.strip().replace("-", "_") for part in text.split(","))
    for name in names:
        if name not in NUMERICS:
            raise ValueError(f"--numerics {name} is unknown; use some of {', '.join(NUMERICS)}")
    return names


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # virtual ones; GPUs are used where there are any
    typer.run(main)
