"""Tokens and log-probabilities of a Qwen3 of real shape over meshes and batch sizes: are they the same bits?

    python -m benchmarks.generate_matrix --size 0.6B --out benchmarks/results/generate_matrix.json

Writes a checkpoint with random weights, loads it on each mesh that the devices allow, generates in batches of each
size, greedy and sampled, with invariant and with plain numerics, and counts distinct outputs a prompt. Exit status 1
if the invariant outputs differ. `--size small` runs the demonstration's model, for a try on the CPU.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tbik_jax
from benchmarks.environment import environment
from tbik_jax import synthetic
from tbik_jax.divergence import Output, judge
from tbik_jax.mesh import mesh_label

MESHES = ({"tp": 1}, {"tp": 2}, {"data": 2}, {"fsdp": 2})
MODES = {"greedy": 0.0, "sampled": 0.7}


def main() -> int:
    args = _arguments()
    config = synthetic.small_config() if args.size == "small" else synthetic.qwen3_config(args.size)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, args.prompt_tokens + 1, args.prompts)
    prompts = [rng.integers(0, config["vocab_size"], n) for n in lengths]
    chosen = [m for m in MESHES if not args.meshes or "=".join(map(str, *m.items())) in args.meshes]
    meshes = [tbik_jax.make_mesh(**m) for m in chosen if max(m.values()) <= len(jax.devices())]
    outputs: dict[tuple[str, str], list[list[Output]]] = {}
    calls: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic.write_checkpoint(Path(folder) / "model", config)
        for mesh in meshes[::-1]:  # the first mesh last: the timing below finds the model on it
            model = tbik_jax.load(path, mesh=mesh, dtype=jnp.dtype(args.dtype))
            for numerics, batch, mode in itertools.product(("invariant", "plain"), args.batches, MODES):
                rows = outputs.setdefault((numerics, mode), [[] for _ in prompts])
                call = _generate(model, prompts, mesh, batch, numerics, mode, args, rows)
                calls.append(call)
                print(json.dumps(call), flush=True)
        speed = _speed(model, prompts, meshes[0], args) if args.repeats else []
    results = _results(outputs)
    arguments = {k: v for k, v in vars(args).items() if k != "out"}
    report = {
        "environment": environment(),
        "arguments": arguments,
        "results": results,
        "calls": calls,
        "speed": speed,
    }
    for row in results:
        print(json.dumps(row))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 0 if all(row["same_bits"] for row in results if row["numerics"] == "invariant") else 1


def _generate(
    model: Any,
    prompts: list[Any],
    mesh: Any,
    batch: int,
    numerics: Any,
    mode: str,
    args: Any,
    rows: list[list[Output]],
) -> dict[str, Any]:
    """Generates for the prompts in batches; batches of one only for the first few, which shows as much."""
    count = min(len(prompts), args.single_prompts) if batch == 1 else len(prompts)
    seconds = []
    for start in range(0, count, batch):
        indices = [(start + i) % len(prompts) for i in range(batch)]
        began = time.perf_counter()
        out = tbik_jax.generate(
            model,
            [prompts[i] for i in indices],
            mesh=mesh,
            max_new_tokens=args.new_tokens,
            sampling=[tbik_jax.SamplingParams(temperature=MODES[mode], seed=i) for i in indices],
            numerics=numerics,
            scan_layers=not args.unroll,
        )
        seconds.append(time.perf_counter() - began)
        for i, pair in zip(
            indices[: count - start], zip(out.tokens, out.logprobs, strict=True), strict=False
        ):
            rows[i].append(pair)
    return {
        "mesh": mesh_label(mesh),
        "numerics": numerics,
        "batch": batch,
        "mode": mode,
        "first_call_s": round(seconds[0], 3),
        "median_call_s": round(float(np.median(seconds)), 3),
    }


def _speed(model: Any, prompts: list[Any], mesh: Any, args: Any) -> list[dict[str, Any]]:
    """Warm wall time of a whole call on the first mesh, invariant and plain by turns, median of the repeats."""
    rows = []
    for batch in args.batches:
        seconds: dict[str, list[float]] = {"invariant": [], "plain": []}
        for numerics in list(seconds) * (args.repeats + 1):
            began = time.perf_counter()
            tbik_jax.generate(
                model,
                prompts[:batch],
                mesh=mesh,
                max_new_tokens=args.new_tokens,
                numerics=numerics,
                scan_layers=not args.unroll,
            )
            seconds[numerics].append(time.perf_counter() - began)
        medians = {
            name: round(float(np.median(each[1:])), 4) for name, each in seconds.items()
        }  # first: warm-up
        rows.append({"mesh": mesh_label(mesh), "batch": batch, "median_call_s": medians})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _results(outputs: dict[tuple[str, str], list[list[Output]]]) -> list[dict[str, Any]]:
    results = []
    for (numerics, mode), rows in outputs.items():
        verdict = judge(rows)
        results.append(
            {
                "numerics": numerics,
                "mode": mode,
                "same_bits": verdict.same_bits,
                "distinct_outputs": verdict.distinct,
                "mean_distinct_outputs": float(np.mean(verdict.distinct)),
                "largest_probability_difference": verdict.divergence,
                "fingerprint": tbik_jax.fingerprint([row[0] for row in rows]),
            }
        )
    return results


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="0.6B", help="published size, or 'small'")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--single-prompts", type=int, default=32, help="prompts generated in batches of one")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--unroll", action="store_true", help="compile every layer: slow to compile, fast to run"
    )
    parser.add_argument("--meshes", nargs="+", help="only these, e.g. tp=1 tp=2")
    parser.add_argument(
        "--repeats", type=int, default=0, help="also time whole calls on the first mesh, this often"
    )
    parser.add_argument("--out", help="result file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
