"""Speed of a training step of Qwen3 at real shapes, invariant beside plain by turns in one process.

    python -m benchmarks.train_speed --models 1.7B --out benchmarks/results/train_speed.json

Forward, backward, clipping and AdamW in float32 of one batch of random tokens, with random weights. Wall time of a
step, median of the repeats, after one that compiles and one that warms; model FLOP utilisation against `--peak`; and
the kernels of a step by name, from CUPTI. `--dry` runs a tiny model on the CPU.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import tbik_jax
from benchmarks.generate_speed import NUMERICS, kernels_of
from benchmarks.matmul_speed import dump
from benchmarks.train_task import TrainingTask, step_flops
from tbik_jax.bench.environment import environment
from tbik_jax.mesh import mesh_label


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    mesh = tbik_jax.make_mesh(**{name: int(size) for name, size in (part.split("=") for part in args.mesh)})
    data: dict[str, Any] = {
        "environment": environment(),
        "mesh": mesh_label(mesh),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "rows": [],
        "failures": [],
    }
    for name in args.models:
        row: dict[str, Any] = {"model": name, "batch": args.rows, "width": args.width, "layers": args.layers}
        try:
            row |= _measure(name, mesh, args)
            data["rows"].append(row)
        except Exception as error:  # recorded; another model is worth measuring
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
            data["failures"].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
        if args.out:
            args.out.write_text(dump(data))
    return 1 if data["failures"] else 0


def _measure(name: str, mesh: Any, args: argparse.Namespace) -> dict[str, Any]:
    tasks, row = {}, dict[str, Any](compile_s={}, ms={}, spread_ms={}, kernels={})
    for numerics in args.numerics:
        task = TrainingTask(
            "small" if args.dry else name,
            mesh,
            numerics,
            rows=args.rows,
            width=args.width,
            layers=args.layers,
            master=args.master,
            microbatches=args.microbatches,
            remat=not args.no_remat,
            scan_layers=True if args.scan_layers else None,
        )
        batch = jax.device_put(task.batch(0))
        began = time.perf_counter()
        _seconds(task, batch)
        row["compile_s"][numerics] = round(time.perf_counter() - began, 1)
        print(f"{name} {numerics}: compiled in {row['compile_s'][numerics]} s", flush=True)
        tasks[numerics] = task, batch
    times: dict[str, list[float]] = {numerics: [] for numerics in tasks}
    for turn in range(args.repeats + 1):
        for numerics, each in tasks.items():
            seconds = _seconds(*each)
            if turn:
                times[numerics].append(1000 * seconds)
    row["ms"] = {numerics: round(statistics.median(each), 3) for numerics, each in times.items()}
    row["spread_ms"] = {numerics: [round(t, 3) for t in sorted(each)] for numerics, each in times.items()}
    if set(NUMERICS) <= set(row["ms"]):
        row["ratio"] = round(row["ms"]["plain"] / row["ms"]["invariant"], 4)
    if not args.dry:
        flops = step_flops(next(iter(tasks.values()))[0].model.config, args.rows, args.width)
        peak = args.peak * 1e12 * mesh.devices.size
        row["utilisation"] = {n: round(flops / (ms / 1000) / peak, 4) for n, ms in row["ms"].items()}
        for numerics, each in tasks.items():
            row["kernels"][numerics] = kernels_of(lambda each=each: _run(*each), 1, row["ms"][numerics], 40)
    return row


def _run(task: TrainingTask, batch: Any) -> Any:
    loss = task.step(batch)
    return loss, nnx.state(task.model)


def _seconds(task: TrainingTask, batch: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(_run(task, batch))
    return time.perf_counter() - began


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["0.6B", "1.7B"])
    parser.add_argument("--mesh", nargs="+", default=["tp=1"], help="axes, e.g. fsdp=2 tp=1")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to compile sooner")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--width", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--no-remat", action="store_true", help="keep every layer's values")
    parser.add_argument("--master", action="store_true", help="fp32 master weights")
    parser.add_argument("--scan-layers", action="store_true", help="compile one layer, not each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=(*NUMERICS, "batch_invariant"))
    parser.add_argument(
        "--peak", type=float, default=989.0, help="TFLOP/s of a device: the H200's in bfloat16"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model, for a try on the CPU")
    args = parser.parse_args(argv)
    if args.dry:
        args.rows, args.width, args.repeats = 8, 16, 2
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
