"""Speed of decoding and prefill of Qwen3 at real shapes, invariant beside plain, in one process.

    python -m benchmarks.generate_speed --models 1.7B 8B --out benchmarks/results/generate_speed.json

Weights, prompts and what a cache holds before decoding are random: of a prompt of one token repeated every row is the
same, which text's are not, and which probably takes less power. Wall time of whole programs, invariant and plain by
turns, median of the repeats:

* decode: time a step, from a run of `--steps` of them on the device, which begins after `--context` positions; what a
  call costs besides, some 2 ms in which the GPU waits, is shared out over them;
* prefill: a pass over prompts of `--prompt` tokens, into an empty cache, from several behind one another;
* kernels: the kernels of a step or a pass by name, from CUPTI, and what is left of its time without any. Decode's are
  of eight steps in the middle of the run, whose positions are its mean; what is left includes the call's share.

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
from jax.sharding import Mesh

import tbik_jax
from benchmarks.matmul_speed import dump
from tbik_jax import synthetic
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.buckets import bucket, capacity_bucket
from tbik_jax.loading import parameter_shardings
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import SamplingParams, sampling_arrays
from tbik_jax.steps import Engine

NUMERICS = ("invariant", "plain")
OVERLAPPED = "overlapped"  # the invariant prefill whose halves take turns
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
        model = sharded_model("small" if args.dry else name, mesh)
        tasks: list[Decode | Prefill] = [Decode(model, mesh, batch, args) for batch in args.batches]
        tasks += [Prefill(model, mesh, batch, args) for batch in args.prefill_batches]
        for task in tasks:  # all programs compile beside each other
            task.prepare()
        if args.pause:
            print("press Enter to measure", flush=True)
            sys.stdin.readline()
        for task in tasks:
            row: dict[str, Any] = {"model": name, "what": task.what, "batch": task.batch}
            try:
                if time.monotonic() > end:
                    raise TimeoutError("out of time")
                row |= task.measure()
                if task.what == "decode" and data["copy_gb_s"]:
                    row["of_copy"] = _of_copy(row, data["copy_gb_s"])
                data["rows"].append(row)
            except Exception as error:  # recorded; the rest is worth measuring
                row["error"] = f"{type(error).__name__}: {error}"[:1000]
                data["failures"].append(row)
            task.free()
            print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
            if args.out:
                args.out.write_text(dump(data))
        del model, tasks, task
    return 1 if data["failures"] else 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.7B", "8B"])
    parser.add_argument("--mesh", nargs="+", default=["tp=1"], help="axes, e.g. data=1 tp=2")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128], help="of decoding")
    parser.add_argument("--prefill-batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=1024, help="positions before the first decoded one")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of prefill")
    parser.add_argument("--steps", type=int, default=96, help="decode steps timed together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numerics", nargs="+", default=NUMERICS, choices=NUMERICS)
    parser.add_argument(
        "--overlap", action="store_true", help="measure prefill whose halves take turns over tp too"
    )
    parser.add_argument("--limit", type=float, default=500, help="seconds after which nothing new begins")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--pause", action="store_true", help="compile, and wait for Enter before measuring")
    parser.add_argument("--dry", action="store_true", help="a tiny model, for a try on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.steps >= 64 and arguments.steps % Decode._counted:
        parser.error(
            f"--steps {arguments.steps} is no multiple of {Decode._counted}: some would be run for nothing"
        )
    return arguments


def sharded_model(name: str, mesh: Mesh, layers: int | None = None) -> Qwen3:
    """A model of a published size, or "small", with random parameters from one seed, in place on the mesh.

    They are made on one device and moved one by one, so that this device never holds much more than the model.

    Args:
        name: of the size.
        mesh: with all of the axes.
        layers: another number than the size has.
    """
    raw = synthetic.small_config() if name == "small" else synthetic.qwen3_config(name)
    raw |= {"num_hidden_layers": layers} if layers else {}
    began = time.perf_counter()
    graphdef, state = nnx.split(Qwen3(Qwen3Config.from_dict(raw), rngs=nnx.Rngs(0)))
    shardings = jax.tree.leaves(parameter_shardings(state, mesh))
    values, treedef = jax.tree.flatten(state)
    del state
    for i, sharding in enumerate(shardings):
        values[i] = jax.device_put(values[i], sharding)
    jax.block_until_ready(values)
    print(f"{name}: weights made in {time.perf_counter() - began:.1f} s", flush=True)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, values))


class _Task:
    """One batch size, with a run of each numerics.

    Attributes:
        what: "decode" or "prefill".
        batch: prompts.
    """

    what = ""

    def __init__(self, model: Qwen3, mesh: Any, batch: int, args: argparse.Namespace):
        self.model, self.batch, self._args, self._mesh = model, batch, args, mesh
        self._runs: dict[str, Run] = {}
        self._began = time.perf_counter()

    def prepare(self) -> None:
        """Begins to compile."""
        for name in self._names():
            overlap = name == OVERLAPPED
            engine = Engine.create(
                self.model, self._mesh, "invariant" if overlap else name, overlap_prefill=overlap
            )
            self._runs[name] = self._prepare(engine)

    def _names(self) -> list[str]:
        """What is measured by turns."""
        return list(self._args.numerics)

    def _rows(self, length: int) -> Padded:
        """Prompts of random tokens."""
        size = (self.batch, length)
        tokens = np.random.default_rng(0).integers(self.model.config.vocab_size, size=size, dtype=np.int32)
        return Padded.of(list(tokens), self._mesh)

    def free(self) -> None:
        """Gives the caches back."""
        self._runs = {}

    def measure(self) -> dict[str, Any]:
        """Milliseconds of each numerics, by turns."""
        times: dict[str, list[float]] = collections.defaultdict(list)
        for run in self._runs.values():
            self._allocate(run)
            self._go(run, 0)
        for turn in range(1, self._args.repeats + 1):
            for name, run in self._runs.items():
                times[name].append(1000 * self._go(run, turn))
        ms = {name: round(statistics.median(each), 4) for name, each in times.items()}
        kernels = {}
        if not self._args.dry:
            for name, run in self._runs.items():
                self._before_last(run)
                kernels[name] = kernels_of(lambda run=run: self._last(run), self._counted, ms[name])
        return {
            "ms": ms,
            "ratio": _ratio(ms),
            "spread_ms": {name: [round(t, 4) for t in sorted(each)] for name, each in times.items()},
            "kernels": kernels,
            **({"ratio_overlapped": _ratio(ms, OVERLAPPED)} if OVERLAPPED in ms else {}),
        } | self._notes()

    def _prepare(self, engine: Engine) -> Run:
        raise NotImplementedError

    def _allocate(self, run: Run) -> None:
        raise NotImplementedError

    def _go(self, run: Run, turn: int) -> float:
        """Seconds of one decode step or one pass, from a turn of several."""
        raise NotImplementedError

    def _before_last(self, run: Run) -> None:
        """What comes before `_last`."""

    #: Steps or passes of `_last`.
    _counted = 1

    def _last(self, run: Run) -> Any:
        raise NotImplementedError

    def _notes(self) -> dict[str, Any]:
        return {}


class Decode(_Task):
    """Steps of the decode loop, which every time begin after `--context` positions."""

    what = "decode"
    _counted = 8  # as many as the host looks behind at most

    def _prepare(self, engine: Engine) -> Run:
        rows, room = self._rows(self._args.context), max(self._args.steps, self._counted)
        sampling = sampling_arrays([SamplingParams()] * rows.size, self.model.config.vocab_size)
        run = Run(engine, rows, capacity_bucket(self._args.context + room), self.model.config)
        run.prepare_decode(bucket(room), sampling, False, np.asarray([-1], np.int32))
        return run

    def _allocate(self, run: Run) -> None:
        run.allocate()
        self._first = jax.tree.map(np.array, jax.device_get(run.state))  # not views of what is donated
        leaves, treedef = jax.tree.flatten(run.cache)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        run.cache = jax.tree.unflatten(treedef, list(map(_random_like, leaves, keys)))

    def _go(self, run: Run, turn: int) -> float:
        self._begin(run)
        return _seconds(lambda: _to(run, self._args.steps)) / self._args.steps

    def _before_last(self, run: Run) -> None:
        self._begin(run)
        jax.block_until_ready(_to(run, self._middle))

    def _last(self, run: Run) -> Any:
        return _to(run, self._middle + self._counted)

    @property
    def _middle(self) -> int:
        """Steps before those that are counted, with as many behind them."""
        return max(0, (self._args.steps - self._counted) // 2)

    def _begin(self, run: Run) -> None:
        """Puts the state of before the first step back; the caches' later positions are written again."""
        shardings = jax.tree.map(lambda x: x.sharding, run.state)
        run.state = jax.block_until_ready(jax.device_put(self._first, shardings))

    def _notes(self) -> dict[str, Any]:
        config, model = self.model.config, self.model
        read = sum(each.nbytes for each in jax.tree.leaves(nnx.state(model)))
        if not config.tie_word_embeddings:
            read -= model.embedding_vd[...].nbytes  # of which a step reads a few rows
        positions = self._args.context + (self._args.steps + 1) / 2  # the mean: each step reads one more
        cached = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * positions
        cached *= self.batch * config.num_hidden_layers
        return {"context": self._args.context, "bytes_a_step": read + int(cached)}


class Prefill(_Task):
    """Passes over prompts of `--prompt` tokens."""

    what = "prefill"

    def _names(self) -> list[str]:
        return super()._names() + [OVERLAPPED] * self._args.overlap

    _passes = 3  # of a turn, one behind the other, so that the host's work is hidden as in a chunked prefill

    def _prepare(self, engine: Engine) -> Run:
        rows = self._rows(self._args.prompt + 1)
        run = Run(engine, rows, capacity_bucket(self._args.prompt), self.model.config)
        run.prepare_prefill(self._args.prompt)
        return run

    def _allocate(self, run: Run) -> None:
        run.allocate()

    def _go(self, run: Run, turn: int) -> float:
        return _seconds(lambda: [self._last(run) for _ in range(self._passes)][-1]) / self._passes

    def _last(self, run: Run) -> Any:
        run.prefill(0, self._args.prompt)
        return run.cache

    def _notes(self) -> dict[str, Any]:
        return {"prompt": self._args.prompt}


def _to(run: Run, count: int) -> Any:
    run.advance(count)
    return run.state.token


def _random_like(x: jax.Array, key: jax.Array) -> jax.Array:
    """Normal values in the place of x, whose memory they take."""
    fill = jax.jit(
        lambda x, key: jax.random.normal(key, x.shape, x.dtype),
        donate_argnums=0,
        keep_unused=True,  # else x is dropped, and its memory is not taken
        out_shardings=x.sharding,
    )
    return fill(x, key)


def _ratio(ms: dict[str, float], name: str = "invariant") -> float | None:
    return round(ms["plain"] / ms[name], 4) if {"plain", name} <= set(ms) else None


def _of_copy(row: dict[str, Any], copy_gb_s: float) -> dict[str, float]:
    """Bytes read a second over the copy's bandwidth, which counts reads and writes."""
    return {name: round(row["bytes_a_step"] / ms / 1e6 / copy_gb_s, 4) for name, ms in row["ms"].items()}


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def kernels_of(
    function: Callable[[], Any], steps: int, step_ms: float, shown: int = _SHOWN
) -> dict[str, Any]:
    """Microseconds of a step by kernel, the largest first, from a call of `function`, which takes several."""
    clock = device_time.Cupti()
    clock.start()
    try:
        jax.block_until_ready(function())
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
        "idle_us": round(1000 * step_ms - busy, 1),
        "us_and_launches": {name: [round(us, 1), round(n, 2)] for name, (us, n) in largest[:shown]},
        "others_us": round(sum(us for _, (us, _) in largest[shown:]), 1),
    }


def _copy_bandwidth() -> float:
    """GB/s, read and written together, of a copy of some GiB, by its kernel's time: it also allocates memory."""
    x = jnp.zeros((_COPIED // 4,), jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    us = device_time.compare({"copy": copy}, [(x,)], device_time.Cupti())["copy"].us
    rate = round(2 * _COPIED / us / 1e3, 1)
    print(f"copy: {rate} GB/s", flush=True)
    return rate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
