"""The whole matrix of a Qwen3 of real shape: are tokens and log-probabilities the same bits on every mesh and batch?

    python -m benchmarks.matrix --devices 2 --models 8B --out benchmarks/results/matrix_8b_2xh200.json

Each mesh is a process of its own, with random weights from the same seed; all compile at once, and compute in turn,
side by side where the devices suffice. The first 8, 16 and 32 of the same prompts are continued, greedy and sampled,
with invariant numerics, and on some meshes with plain ones; `results` counts the distinct outputs of each prompt and
the largest difference of a token's probability. Exits with 1 if invariant outputs differ or a mesh failed.
`--models small` tries it with a tiny model, on the CPU too.
"""

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import tbik_jax
from benchmarks import mesh_jobs
from benchmarks.generate_speed import sharded_model
from benchmarks.matmul_speed import dump
from tbik_jax import SamplingParams
from tbik_jax.bench.environment import environment
from tbik_jax.buckets import bucket, capacity_bucket
from tbik_jax.divergence import Output, judge
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import sampling_arrays
from tbik_jax.steps import Engine

MODES = {"greedy": 0.0, "sampled": 0.7}
NUMERICS = ("invariant", "plain")
MESH_AXES = ("data", "fsdp", "tp")
Sizes = tuple[int, int, int]
#: Too large for a device that shares nothing of its weights.
TP_ONLY = ("32B",)
#: (data, fsdp, tp).
MESHES = (
    (1, 1, 1),
    (1, 1, 2),
    (2, 1, 1),
    (1, 2, 1),
    (3, 1, 1),
    (1, 1, 4),
    (5, 1, 1),
    (3, 1, 2),
    (7, 1, 1),
    (1, 1, 8),
    (4, 1, 2),
    (2, 2, 2),
)
#: Those that plain numerics run on too: enough to show how far they part.
PLAIN_MESHES = ((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 1, 8))


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.mesh:
        return _work(args)
    cells = [(name, sizes) for name in args.models for sizes in _sizes(args, name)]
    data: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "limit")},
        "calls": [],
        "failures": [],
        "results": [],
    }
    outputs: dict[tuple[str, str, str], list[list[Output]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            mesh_jobs.Job(
                name=f"{name} {_label(sizes)}",
                devices=math.prod(sizes),
                command=_command(argv, name, sizes, Path(folder) / f"{number}.npz"),
                result=Path(folder) / f"{number}.npz",
            )
            for number, (name, sizes) in enumerate(cells)
        ]
        for job, lines, error in mesh_jobs.run(jobs, args.devices, args.limit):
            model = job.name.split()[0]
            data["calls"] += lines
            if error:
                data["failures"].append({"job": job.name, "error": error})
                print(json.dumps(data["failures"][-1]), flush=True)
            else:
                _add(outputs, model, job.result, max(args.batches))
            data["results"] = [_result(*key, rows) for key, rows in outputs.items()]
            for line in lines:
                print(json.dumps(line), flush=True)
            if args.out:
                args.out.write_text(dump(data))
    for row in data["results"]:
        print(json.dumps(row), flush=True)
    invariant = [row for row in data["results"] if row["numerics"] == "invariant"]
    return 0 if invariant and all(row["same_bits"] for row in invariant) and not data["failures"] else 1


def _sizes(args: argparse.Namespace, model: str) -> list[Sizes]:
    """The meshes of a model, those that need the most devices first."""
    wanted = [
        sizes
        for sizes in MESHES
        if math.prod(sizes) <= args.devices
        and (model not in TP_ONLY or sizes[:2] == (1, 1))
        and mesh_jobs.named(sizes, args.meshes)
    ]
    return sorted(wanted, key=math.prod, reverse=True)


def _label(sizes: Sizes) -> str:
    named = [f"{axis}={n}" for axis, n in zip(MESH_AXES, sizes, strict=True) if n > 1]
    return " ".join(named) or "1 device"


def _command(argv: list[str], model: str, sizes: Sizes, result: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.matrix", *argv),
        *("--models", model, "--mesh", *map(str, sizes), "--result", str(result)),
    ]


def _add(
    outputs: dict[tuple[str, str, str], list[list[Output]]], model: str, result: Path, prompts: int
) -> None:
    """Takes over what a worker saved: for numerics, mode and batch, tokens and log-probabilities [batch, new]."""
    with np.load(result) as saved:
        for key in saved.files:
            numerics, mode, batch, what = key.split("/")
            if what != "tokens":
                continue
            rows = outputs.setdefault((model, numerics, mode), [[] for _ in range(prompts)])
            tokens, logprobs = saved[key], saved[f"{numerics}/{mode}/{batch}/logprobs"]
            for i in range(int(batch)):
                rows[i].append((tokens[i], logprobs[i]))


def _work(args: argparse.Namespace) -> int:
    """Continues the prompts on one mesh, says so line by line, and saves what came."""
    (name,) = args.models
    mesh = tbik_jax.make_mesh(**dict(zip(MESH_AXES, args.mesh, strict=True)))
    model = sharded_model(name, mesh, args.layers)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, args.prompt_tokens + 1, max(args.batches))
    prompts = [rng.integers(0, model.config.vocab_size, n).astype(np.int32) for n in lengths]
    saved: dict[str, np.ndarray] = {}
    for call, (tokens, logprobs) in _on_mesh(model, mesh, prompts, args):
        key = f"{call['numerics']}/{call['mode']}/{call['batch']}"
        saved |= {f"{key}/tokens": tokens, f"{key}/logprobs": logprobs}
        print(json.dumps({"model": name} | call), flush=True)
    np.savez(args.result, **saved)  # type: ignore[arg-type]
    return 0


def _on_mesh(
    model: Qwen3, mesh: Mesh, prompts: list[np.ndarray], args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Output]]:
    """Continues the prompts in batches of each size: what was done, and what came."""
    began = time.perf_counter()
    chosen = [name for name in args.numerics if name != "plain" or tuple(args.mesh) in PLAIN_MESHES]
    engines = {name: Engine.create(model, mesh, name, args.scan_layers) for name in chosen}
    start = functools.partial(_start, mesh=mesh, prompts=prompts, args=args)
    keys = [(name, batch, mode) for name in chosen for batch in args.batches for mode in MODES]
    runs = {key: start(engines[key[0]], key[1], MODES[key[2]]) for key in keys}
    for run, _ in runs.values():
        run.wait_until_compiled()
    prepared = time.perf_counter() - began
    with mesh_jobs.wait_for_devices():
        waited = time.perf_counter() - began - prepared
        for name, batch, mode in keys:
            run, width = runs.pop((name, batch, mode))
            run.allocate()
            began = time.perf_counter()
            if width:
                run.prefill(0, width)
            out = run.decode(args.new_tokens, None, batch)
            call = {
                "mesh": mesh_label(mesh),
                "numerics": name,
                "batch": batch,
                "mode": mode,
                "seconds": round(time.perf_counter() - began, 3),
                "prepared_s": round(prepared, 1),
                "waited_s": round(waited, 1),
            }
            rows = slice(batch), slice(args.new_tokens)
            yield call, (np.array(out.tokens[rows]), np.array(out.logprobs[rows]))
            del run


def _start(
    engine: Engine,
    batch: int,
    temperature: float,
    *,
    mesh: Mesh,
    prompts: list[np.ndarray],
    args: argparse.Namespace,
) -> tuple[Run, int]:
    """A run whose programs begin to compile, and the width of its prefill: that of the longest prompt of all."""
    longest = max(len(prompt) for prompt in prompts)
    padded = Padded.of(prompts[:batch], mesh)
    padded = Padded(padded.window(0, longest), padded.lengths)
    config = engine.steps.config
    sampling = [SamplingParams(temperature=temperature, seed=i) for i in range(padded.size)]
    width = bucket(longest - 1) if longest > 1 else 0
    run = Run(engine, padded, capacity_bucket(max(longest + args.new_tokens, width)), config)
    run.prepare_decode(
        bucket(args.new_tokens),
        sampling_arrays(sampling, config.vocab_size),
        False,
        np.asarray([-1], np.int32),
    )
    if width:
        run.prepare_prefill(width)
    return run, width


def _result(model: str, numerics: str, mode: str, rows: list[list[Output]]) -> dict[str, Any]:
    rows = [row for row in rows if row]
    verdict = judge(rows)
    return {
        "model": model,
        "numerics": numerics,
        "mode": mode,
        "configurations": max(len(row) for row in rows),
        "same_bits": verdict.same_bits,
        "mean_distinct_outputs": float(np.mean(verdict.distinct)),
        "most_distinct_outputs": int(max(verdict.distinct)),
        "largest_probability_difference": verdict.divergence,
        "fingerprint": tbik_jax.fingerprint([row[0] for row in rows]),
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", type=int, default=len(jax.devices()), help="use meshes of at most so many"
    )
    parser.add_argument("--models", nargs="+", default=["8B"], help="published sizes, or 'small'")
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=NUMERICS)
    parser.add_argument("--scan-layers", action="store_true", help="compile one layer, not each")
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds after which what still runs is ended"
    )
    parser.add_argument("--meshes", nargs="+", help="data,fsdp,tp of the meshes to use; all by default")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--mesh", nargs=3, type=int, help="of a worker: data, fsdp and tp")
    parser.add_argument("--result", type=Path, help="of a worker: where it saves outputs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
