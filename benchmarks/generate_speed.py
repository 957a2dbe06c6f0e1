"""Speed of decoding and prefill of Qwen3 at real shapes, invariant beside plain, in one process.

    python -m benchmarks.generate_speed --models 1.7B 8B --out benchmarks/results/generate_speed.json

Weights are random and the cache holds zeros: speed does not depend on values. Wall time of whole programs, invariant
and plain by turns, median of the repeats:

* decode: time a step, from a run of several steps on the device after `--context` positions;
* prefill: one pass over prompts of `--prompt` tokens, into an empty cache;
* kernels: the kernels of a decode step by name, from CUPTI, and what is left of the step's time without any.

Beside it the bandwidth of a large copy, and how much of it decoding's reading of weights and cache comes to.
`--dry` runs a tiny model on the CPU.
"""

import argparse
import collections
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tbik_jax
from benchmarks import device_time
from benchmarks.environment import environment
from benchmarks.matmul_speed import dump
from tbik_jax import synthetic
from tbik_jax.buckets import capacity_bucket
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import SamplingParams, sampling_arrays
from tbik_jax.steps import Engine

NUMERICS = ("invariant", "plain")
_COPIED = 1 << 32  # bytes
_SHOWN = 14  # kernels of a step


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    end = time.monotonic() + args.limit
    mesh = tbik_jax.make_mesh(**{name: int(size) for name, size in (part.split("=") for part in args.mesh)})
    data: dict[str, Any] = {
        "environment": environment(),
        "mesh": mesh_label(mesh),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "limit")},
        "copy_gb_s": None if args.dry else _copy_bandwidth(),
        "rows": [],
        "failures": [],
    }
    for name in args.models:
        if time.monotonic() > end:
            break
        model = _model("small" if args.dry else name)
        tasks = [("decode", batch) for batch in args.batches] + [("prefill", b) for b in args.prefill_batches]
        for what, batch in tasks:
            if time.monotonic() > end:
                data["failures"].append({"model": name, "what": what, "batch": batch, "error": "out of time"})
                continue
            try:
                measure = _decode if what == "decode" else _prefill
                row = {"model": name, "what": what, "batch": batch} | measure(model, mesh, batch, args)
                if what == "decode" and data["copy_gb_s"]:
                    row["of_copy"] = _of_copy(row, data["copy_gb_s"])
                data["rows"].append(row)
            except Exception as error:  # recorded; the rest is worth measuring
                row = {"model": name, "what": what, "batch": batch, "error": f"{error}"[:1000]}
                data["failures"].append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
            if args.out:
                args.out.write_text(dump(data))
        del model
    return 1 if data["failures"] else 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.7B", "8B"])
    parser.add_argument("--mesh", nargs="+", default=["tp=1"], help="axes, e.g. data=1 tp=2")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128], help="of decoding")
    parser.add_argument("--prefill-batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=1024, help="positions before the first decoded one")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of prefill")
    parser.add_argument("--steps", type=int, default=24, help="decode steps timed together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=NUMERICS)
    parser.add_argument("--limit", type=float, default=500, help="seconds after which nothing new begins")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model, for a try on the CPU")
    return parser.parse_args(argv)


def _model(name: str) -> Qwen3:
    config = synthetic.small_config() if name == "small" else synthetic.qwen3_config(name)
    began = time.perf_counter()
    model = Qwen3(Qwen3Config.from_dict(config), rngs=nnx.Rngs(0))
    jax.block_until_ready(nnx.state(model))
    print(f"{name}: weights made in {time.perf_counter() - began:.1f} s", flush=True)
    return model


def _engines(model: Qwen3, mesh: Any, names: Any) -> dict[str, Engine]:
    return {name: Engine.create(model, mesh, name) for name in names}


def _decode(model: Qwen3, mesh: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step of each numerics."""
    room = 16 * (2 + args.steps * (args.repeats + 1) // 16)
    rows = Padded.of([np.zeros((args.context,), np.int32)] * batch, mesh)
    sampling = sampling_arrays([SamplingParams()] * rows.size, model.config.vocab_size)
    times: dict[str, list[float]] = collections.defaultdict(list)
    runs, compile_s, kernels = {}, {}, {}
    for name, engine in _engines(model, mesh, args.numerics).items():
        began = time.perf_counter()
        run = Run(engine, rows, capacity_bucket(args.context + room), model.config)
        run.prepare_decode(room, sampling, False, np.asarray([-1], np.int32))
        run.allocate(1)
        run.advance(2)
        jax.block_until_ready(run.state.token)
        compile_s[name] = round(time.perf_counter() - began, 1)
        runs[name] = run
    for turn in range(args.repeats):
        for name, run in runs.items():
            first = 2 + turn * args.steps
            times[name].append(_seconds(lambda run=run, n=first + args.steps: _to(run, n)) / args.steps)
    if not args.dry:
        for name, run in runs.items():
            kernels[name] = _kernels(run, 2 + args.repeats * args.steps, statistics.median(times[name]))
    ms = {name: round(1000 * statistics.median(each), 4) for name, each in times.items()}
    read = sum(each.nbytes for each in jax.tree.leaves(nnx.state(model)))
    if not model.config.tie_word_embeddings:
        read -= model.embedding_vd[...].nbytes  # of which a step reads a few rows
    config = model.config
    cached = (
        2 * batch * args.context * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    )
    return {
        "context": args.context,
        "ms": ms,
        "ratio": _ratio(ms),
        "spread_ms": {name: [round(1000 * t, 4) for t in sorted(each)] for name, each in times.items()},
        "bytes_a_step": read + cached,
        "compile_s": compile_s,
        "kernels": kernels,
    }


def _to(run: Run, count: int) -> Any:
    run.advance(count)
    return run.state.token


def _prefill(model: Qwen3, mesh: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one pass over `batch` prompts."""
    rows = Padded.of([np.zeros((args.prompt + 1,), np.int32)] * batch, mesh)
    times: dict[str, list[float]] = collections.defaultdict(list)
    runs, compile_s = {}, {}
    for name, engine in _engines(model, mesh, args.numerics).items():
        began = time.perf_counter()
        run = Run(engine, rows, capacity_bucket(args.prompt), model.config)
        run.prepare_prefill(args.prompt)
        run.allocate(args.prompt)
        run.prefill(0, args.prompt)
        jax.block_until_ready(run.cache)
        compile_s[name] = round(time.perf_counter() - began, 1)
        runs[name] = run
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(_seconds(lambda run=run: (run.prefill(0, args.prompt), run.cache)[1]))
    ms = {name: round(1000 * statistics.median(each), 3) for name, each in times.items()}
    spread = {name: [round(1000 * t, 3) for t in sorted(each)] for name, each in times.items()}
    return {
        "prompt": args.prompt,
        "ms": ms,
        "ratio": _ratio(ms),
        "spread_ms": spread,
        "compile_s": compile_s,
    }


def _ratio(ms: dict[str, float]) -> float | None:
    return round(ms["plain"] / ms["invariant"], 4) if set(NUMERICS) <= set(ms) else None


def _of_copy(row: dict[str, Any], copy_gb_s: float) -> dict[str, float]:
    """Bytes read a second over the copy's bandwidth, which counts reads and writes."""
    return {name: round(row["bytes_a_step"] / ms / 1e6 / copy_gb_s, 4) for name, ms in row["ms"].items()}


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def _kernels(run: Run, count: int, step_s: float) -> dict[str, Any]:
    """Microseconds of a step by kernel, the largest first, from a few more steps."""
    steps, clock = 4, device_time.Cupti()
    clock.start()
    try:
        jax.block_until_ready(_to(run, count + steps))
    finally:
        recorded = clock.stop()
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, ms in recorded:
        total[name[:80]][0] += 1000 * ms / steps
        total[name[:80]][1] += 1 / steps
    largest = sorted(total.items(), key=lambda item: -item[1][0])
    busy = sum(us for _, (us, _) in largest)
    return {
        "launches": round(len(recorded) / steps, 1),
        "busy_us": round(busy, 1),
        "idle_us": round(1e6 * step_s - busy, 1),
        "us_and_launches": {name: [round(us, 1), round(n, 2)] for name, (us, n) in largest[:_SHOWN]},
        "others_us": round(sum(us for _, (us, _) in largest[_SHOWN:]), 1),
    }


def _copy_bandwidth() -> float:
    """GB/s, read and written together, of a copy of some GiB."""
    x = jnp.zeros((_COPIED // 4,), jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = [_seconds(lambda: copy(x)) for _ in range(5)]
    rate = round(2 * _COPIED / statistics.median(times) / 1e9, 1)
    print(f"copy: {rate} GB/s", flush=True)
    return rate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
