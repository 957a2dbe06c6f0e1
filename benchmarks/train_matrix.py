"""Training of a Qwen3 of real shape on many meshes: are losses, weights and optimiser state the same bits?

    python -m benchmarks.train_matrix --devices 2 --models 0.6B 1.7B --out benchmarks/results/train_matrix_2xh200.json

Each mesh is a process of its own with the same weights and tokens, and all share the devices. With invariant numerics
every fingerprint must agree; plain ones stand beside. Exits with 1 if invariant ones differ or a mesh failed.
`--models small` tries it with a tiny model, on the CPU too.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tbik_jax
from benchmarks import mesh_jobs
from benchmarks.matmul_speed import dump
from benchmarks.train_task import TrainingTask
from tbik_jax.bench.environment import environment
from tbik_jax.mesh import mesh_label

NUMERICS = ("invariant", "plain")
MESH_AXES = ("data", "fsdp", "tp")
#: (data, fsdp, tp).
MESHES = (
    (1, 1, 1),
    (1, 1, 2),
    (1, 2, 1),
    (2, 1, 1),
    (1, 1, 4),
    (1, 4, 1),
    (4, 1, 1),
    (2, 1, 2),
    (1, 2, 2),
    (2, 2, 1),
    (1, 1, 8),
    (1, 8, 1),
    (8, 1, 1),
    (2, 2, 2),
)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.mesh:
        return _work(args)
    data: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "limit")},
        "runs": [],
        "failures": [],
        "results": [],
    }
    wanted = [m for m in MESHES if math.prod(m) <= args.devices and mesh_jobs.named(m, args.meshes)]
    meshes = sorted(wanted, key=math.prod, reverse=True)
    cells = [(n, name, sizes) for n in args.numerics for name in args.models for sizes in meshes]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            mesh_jobs.Job(
                name=" ".join((name, numerics, *map(str, sizes))),
                devices=math.prod(sizes),
                command=_command(argv, numerics, name, sizes, Path(folder) / str(number)),
                result=Path(folder) / str(number),
            )
            for number, (numerics, name, sizes) in enumerate(cells)
        ]
        for job, lines, error in mesh_jobs.run(jobs, args.devices, args.limit, args.at_once):
            data["runs"] += lines
            if error:
                data["failures"].append({"job": job.name, "error": error})
                print(json.dumps(data["failures"][-1]), flush=True)
            data["results"] = results(data["runs"])
            for line in lines:
                print(json.dumps(line), flush=True)
            if args.out:
                args.out.write_text(dump(data))
    for row in data["results"]:
        print(json.dumps(row), flush=True)
    invariant = [row for row in data["results"] if row["numerics"] == "invariant"]
    return 0 if invariant and all(row["same_bits"] for row in invariant) and not data["failures"] else 1


def results(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and numerics: on how many meshes it ran, and how many fingerprints of each kind came."""
    rows = []
    for model, numerics in dict.fromkeys((run["model"], run["numerics"]) for run in runs):
        mine = [run for run in runs if (run["model"], run["numerics"]) == (model, numerics)]
        distinct = {what: len({run[what] for run in mine}) for what in ("losses", "parameters", "optimizer")}
        rows.append(
            {
                "model": model,
                "numerics": numerics,
                "meshes": len(mine),
                "distinct": distinct,
                "same_bits": max(distinct.values()) == 1,
                "steps": mine[0]["steps"],
            }
        )
    return rows


def _command(argv: list[str], numerics: str, model: str, sizes: tuple[int, ...], result: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.train_matrix", *argv, "--numerics", numerics, "--models", model),
        *("--mesh", *map(str, sizes), "--result", str(result)),
    ]


def _work(args: argparse.Namespace) -> int:
    """Trains on one mesh."""
    (name,), (numerics,) = args.models, args.numerics
    mesh = tbik_jax.make_mesh(**dict(zip(MESH_AXES, args.mesh, strict=True)))
    began = time.perf_counter()
    task = TrainingTask(
        name,
        mesh,
        numerics,
        rows=args.rows,
        width=args.width,
        layers=args.layers,
        master=args.master,
        microbatches=args.microbatches,
        scan_layers=True if args.scan_layers else None,
    )
    losses, first = [], 0.0
    for step in range(args.steps):
        losses.append(np.asarray(task.step(task.batch(step)), np.float32))
        first = first or time.perf_counter() - began
    row = {
        "model": name,
        "numerics": numerics,
        "mesh": mesh_label(mesh),
        "steps": args.steps,
        "first_and_last_loss": [float(losses[0]), float(losses[-1])],
        "losses": tbik_jax.fingerprint(losses),
        **task.fingerprints(),
        "first_step_s": round(first, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(row), flush=True)
    args.result.write_text("done")
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", type=int, default=len(jax.devices()), help="use meshes of at most so many"
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], help="published sizes, or 'small'")
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--width", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--master", action="store_true", help="fp32 master weights")
    parser.add_argument("--scan-layers", action="store_true", help="compile one layer, not each")
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=NUMERICS)
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds after which what still runs is ended"
    )
    parser.add_argument("--at-once", type=int, help="most meshes at a time, where memory does not hold all")
    parser.add_argument("--meshes", nargs="+", help="data,fsdp,tp of the meshes to use; all by default")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--mesh", nargs=3, type=int, help="of a worker: data, fsdp and tp")
    parser.add_argument("--result", type=Path, help="of a worker: written when it is done")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
