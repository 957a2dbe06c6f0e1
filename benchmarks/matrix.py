"""The whole matrix of a Qwen3 of real shape: are tokens and log-probabilities the same bits on every mesh and batch?

    python -m benchmarks.matrix --devices 2 --model 8B --out benchmarks/results/matrix_8b_2xh200.json

Random weights are made once and moved from mesh to mesh. The first 8, 16 and 32 of the same prompts are continued,
greedy and sampled, with invariant and with plain numerics; `results` counts the distinct outputs of each prompt and the
largest difference of a token's probability. Programs of a mesh compile beside each other, before any runs. Exits with
1 if invariant outputs differ. `--dry` tries it with a tiny model.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import tbik_jax
from benchmarks.environment import environment
from benchmarks.matmul_speed import dump
from tbik_jax import SamplingParams, synthetic
from tbik_jax.buckets import bucket, capacity_bucket
from tbik_jax.divergence import Output, judge
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import sampling_arrays
from tbik_jax.steps import Engine

MODES = {"greedy": 0.0, "sampled": 0.7}
NUMERICS = ("invariant", "plain")
#: (data, fsdp, tp), those that need the most devices last.
MESHES = (
    (1, 1, 1),
    (1, 1, 2),
    (2, 1, 1),
    (1, 2, 1),
    (3, 1, 1),
    (1, 1, 4),
    (1, 4, 1),
    (2, 1, 2),
    (1, 2, 2),
    (5, 1, 1),
    (3, 1, 2),
    (7, 1, 1),
    (1, 1, 8),
    (2, 2, 2),
    (4, 1, 2),
)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    end = time.monotonic() + args.limit
    raw = synthetic.small_config() if args.dry else synthetic.qwen3_config(args.model)
    model = Qwen3(
        Qwen3Config.from_dict(raw | ({"num_hidden_layers": args.layers} if args.layers else {})),
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, args.prompt_tokens + 1, max(args.batches))
    prompts = [rng.integers(0, model.config.vocab_size, n).astype(np.int32) for n in lengths]
    outputs: dict[tuple[str, str], list[list[Output]]] = {}
    data: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "limit")},
        "calls": [],
        "left": [],
    }
    for mesh in meshes(args.devices):
        if time.monotonic() > end:
            data["left"].append(mesh_label(mesh))
            continue
        for call in _on_mesh(model, mesh, prompts, args, outputs):
            data["calls"].append(call)
            print(json.dumps(call), flush=True)
            data["results"] = [_result(*key, rows) for key, rows in outputs.items()]
            if args.out:
                args.out.write_text(dump(data))
    for row in data["results"]:
        print(json.dumps(row), flush=True)
    same = all(row["same_bits"] for row in data["results"] if row["numerics"] == "invariant")
    return 0 if same and not data["left"] else 1


def meshes(devices: int) -> Iterator[Mesh]:
    """The meshes of at most so many devices."""
    for sizes in MESHES:
        if math.prod(sizes) <= devices:
            yield tbik_jax.make_mesh(**dict(zip(("data", "fsdp", "tp"), sizes, strict=True)))


def _on_mesh(
    model: Qwen3,
    mesh: Mesh,
    prompts: list[np.ndarray],
    args: argparse.Namespace,
    outputs: dict[tuple[str, str], list[list[Output]]],
) -> Iterator[dict[str, Any]]:
    """Continues the prompts in batches of each size, and adds what came to `outputs`."""
    began = time.perf_counter()
    engines = {name: Engine.create(model, mesh, name) for name in args.numerics}
    start = functools.partial(_start, mesh=mesh, prompts=prompts, args=args)
    keys = [(name, batch, mode) for name in args.numerics for batch in args.batches for mode in MODES]
    runs = {key: start(engines[key[0]], key[1], MODES[key[2]]) for key in keys}
    for name, batch, mode in keys:
        run, width = runs.pop((name, batch, mode))
        run.allocate()
        prepared = time.perf_counter() - began
        began = time.perf_counter()
        if width:
            run.prefill(0, width)
        out = run.decode(args.new_tokens, None, batch)
        seconds = time.perf_counter() - began
        rows = outputs.setdefault((name, mode), [[] for _ in prompts])
        for i in range(batch):
            rows[i].append(
                (np.array(out.tokens[i, : args.new_tokens]), np.array(out.logprobs[i, : args.new_tokens]))
            )
        yield {
            "mesh": mesh_label(mesh),
            "numerics": name,
            "batch": batch,
            "mode": mode,
            "seconds": round(seconds, 3),
            "waited_s": round(prepared, 1),
        }
        del run
        began = time.perf_counter()


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


def _result(numerics: str, mode: str, rows: list[list[Output]]) -> dict[str, Any]:
    rows = [row for row in rows if row]
    verdict = judge(rows)
    return {
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
    parser.add_argument("--model", default="8B", help="published size")
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=NUMERICS)
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no new mesh begins")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model, for a try on the CPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
