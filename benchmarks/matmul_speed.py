"""Speed of the tree matmul beside `jnp.dot` on every matmul of Qwen3 1.7B, 8B and 32B, from 1 to 8192 rows.

    python -m benchmarks.matmul_speed --out benchmarks/results/matmul_speed.json
    python -m benchmarks.matmul_speed --plot benchmarks/results/matmul_speed.json docs/matmul_speed.png

At each point, in one process and interleaved (see `device_time`), bfloat16 in and out:

* dot: `jax.jit(jnp.dot)`, as XLA compiles it by default (it times its own candidates, cuBLAS among them);
* tree: the Hopper kernel with the leaves that the layer has at this TP;
* chain: the same kernel with one leaf, so that the price of the tree shows; not where the layer has one leaf anyway;
* triton: the portable kernel, with `--triton`.

`dot` is compiled while this process has the GPU to itself, because XLA times candidates then; `--autotune-cache` keeps
what it chose, and a later run that finds it there is several times shorter. Points come in random order, so that a run
that ends at `--limit` has a sample of all of them; `--resume` measures those that a file lacks. Exits with 1 if a
point failed.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import gpu_pool
from benchmarks.matmul_report import plot, print_table, ratio, summarize
from benchmarks.matmul_shapes import LAYERS, MODELS, MS, TPS, Layer, layers
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu, mosaic_problem, mosaic_sums
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import choose_config, tree_matmul_mosaic_gpu

BF16 = jnp.bfloat16
DRY_LAYERS = [  # what the interpreter can do in a moment
    Layer(layer="o_proj", model="1.7B", tp=1, k=512, n=64, leaves=8),
    Layer(layer="o_proj", model="1.7B", tp=2, k=256, n=64, leaves=4),
    Layer(layer="qkv", model="1.7B", tp=1, k=64, n=128, leaves=1),
    Layer(layer="lm_head", model="8B", tp=8, k=64, n=48, leaves=1, transpose_rhs=True),
]
DRY_MS = (1, 70)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a job needs to know beside its point."""

    triton: bool = False
    cublas: bool = False  # leave XLA's own matmul kernels out of `dot`
    autotune_cache: Path | None = None
    dry: bool = False


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.plot:
        source, target = map(Path, args.plot)
        data = json.loads(source.read_text())
        plot(data["points"], target, _title(data["environment"]))
        return 0
    if args.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    gpu_pool.prepare_environment(args.workers, args.autotune_cache)
    options = Options(
        triton=args.triton, cublas=args.cublas, autotune_cache=args.autotune_cache, dry=args.dry
    )
    chosen = DRY_LAYERS if args.dry else layers(tuple(args.layers), tuple(args.models), tuple(args.tp))
    points = [(layer, m) for layer in chosen for m in (DRY_MS if args.dry else args.ms)]
    random.Random(0).shuffle(points)
    report = Report(args.out, args.resume, options)
    wanted = [(layer, m) for layer, m in points if not report.keep(layer, m)]
    print(f"{len(wanted)} points to measure, {len(points) - len(wanted)} kept", flush=True)
    jobs = collections.deque(gpu_pool.Job(measure, (layer, m, options)) for layer, m in wanted)
    # XLA may time many candidates of a large `dot`.
    for outcome in gpu_pool.run(jobs, workers=args.workers, limit=args.limit, hold_limit=90):
        report.add(outcome)
    report.finish(len(points))
    return 1 if report.data["failures"] else 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tp", nargs="+", type=int, default=TPS, choices=TPS)
    parser.add_argument("--ms", nargs="+", type=int, default=MS, help="rows of x")
    parser.add_argument("--triton", action="store_true", help="time the portable kernel too")
    parser.add_argument("--cublas", action="store_true", help="cuBLAS for `dot`, without XLA's own kernels")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which the rest is left")
    parser.add_argument("--autotune-cache", type=Path, help="folder for what XLA chose for `dot`")
    parser.add_argument("--resume", type=Path, help="result file whose points need not be measured again")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, by the host's clock")
    parser.add_argument("--plot", nargs=2, metavar=("RESULTS", "PNG"), help="plot a result file, and end")
    args = parser.parse_args(argv)
    if not args.plot and not args.out:
        parser.error("--out FILE is needed")
    return args


# In a worker.


def measure(layer: Layer, m: int, options: Options) -> dict[str, Any]:
    """Compiles and times the variants of one point."""
    start = time.perf_counter()
    shapes = operand_shapes(layer, m)
    functions, errors = {}, {}
    for name, function in _variants(layer, m, options).items():
        gpu_pool.note(f"compiling {name}")
        try:
            functions[name] = compile_for(function, shapes)
        except Exception as error:  # the other variants are worth having
            errors[name] = f"{type(error).__name__}: {error}"[:600]
    make_inputs = compile_inputs(layer, m)
    known = _mark(layer, m, options)
    dot_seconds = 0.0

    def add_dot() -> None:
        nonlocal dot_seconds
        gpu_pool.note("compiling dot")
        before = time.perf_counter()
        functions["dot"] = _compile_dot(layer, options, shapes)
        dot_seconds = round(time.perf_counter() - before, 2)

    if known and known.exists():
        add_dot()
    with gpu_pool.gpu():
        if "dot" not in functions:
            add_dot()
            if known:
                known.parent.mkdir(parents=True, exist_ok=True)
                known.touch()
        gpu_pool.note(f"timing {', '.join(functions)}")
        count = device_time.count_sets(2 * m * layer.k + 2 * layer.k * layer.n)
        sets = [make_inputs(jnp.int32(seed)) for seed in range(2 if options.dry else count)]
        clock = device_time.WallClock() if options.dry else device_time.Cupti()
        timings = device_time.compare(functions, sets, clock)
        del sets
    point = _point(layer, m, timings, count)
    seconds = round(time.perf_counter() - start, 2)
    return point | {"errors": errors, "seconds": seconds, "dot_compile_seconds": dot_seconds}


def operand_shapes(layer: Layer, m: int, dtype: Any = BF16) -> tuple[jax.ShapeDtypeStruct, ...]:
    w = (layer.n, layer.k) if layer.transpose_rhs else (layer.k, layer.n)
    return jax.ShapeDtypeStruct((m, layer.k), dtype), jax.ShapeDtypeStruct(w, dtype)


def compile_for(function: Callable[..., Any], shapes: tuple[Any, ...], **options: Any) -> Callable[..., Any]:
    """`function` compiled for `shapes`, without a call of it."""
    return jax.jit(function).lower(*shapes).compile(compiler_options=options or None)


def compile_inputs(layer: Layer, m: int) -> Callable[..., Any]:
    """seed -> fresh normal x and w."""

    def make(seed: jax.Array) -> tuple[jax.Array, ...]:
        shapes = operand_shapes(layer, m)
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(
            jax.random.normal(key, s.shape, jnp.float32).astype(s.dtype)
            for key, s in zip(keys, shapes, strict=True)
        )

    return compile_for(make, (jax.ShapeDtypeStruct((), jnp.int32),))


def _variants(layer: Layer, m: int, options: Options) -> dict[str, Callable[..., Any]]:
    common = {"out_dtype": BF16, "transpose_rhs": layer.transpose_rhs}
    product = functools.partial(tree_matmul_mosaic_gpu, **common, interpret=options.dry)
    found = {"tree": functools.partial(product, leaves=layer.leaves)}
    if layer.leaves > 1:
        found["chain"] = functools.partial(product, leaves=1)
    if options.triton:
        from tbik_jax.pallas_kernels.tree_matmul.triton import tree_matmul_triton

        found["triton"] = functools.partial(tree_matmul_triton, **common, leaves=layer.leaves)
    return found


def _compile_dot(layer: Layer, options: Options, shapes: tuple[Any, ...]) -> Callable[..., Any]:
    contracted = (((1,), (1,)), ((), ()))
    dot = functools.partial(lax.dot_general, dimension_numbers=contracted) if layer.transpose_rhs else jnp.dot
    return compile_for(dot, shapes, **({"xla_gpu_enable_triton_gemm": False} if options.cublas else {}))


def _mark(layer: Layer, m: int, options: Options) -> Path | None:
    """A file that exists once XLA's choice for this `dot` is in the cache."""
    if options.autotune_cache is None:
        return None
    layout = "nk" if layer.transpose_rhs else "kn"
    kind = "cublas" if options.cublas else "xla"
    return options.autotune_cache / "seen" / f"{kind}-{m}-{layer.k}-{layer.n}-{layout}"


def _point(layer: Layer, m: int, timings: dict[str, device_time.Timing], sets: int) -> dict[str, Any]:
    point: dict[str, Any] = {
        "layer": layer.layer,
        "model": layer.model,
        "tp": layer.tp,
        "row_parallel": layer.row_parallel,
        "m": m,
        "k": layer.k,
        "n": layer.n,
        "leaves": layer.leaves,
        "layout": "[N, K]" if layer.transpose_rhs else "[K, N]",
    } | _configs(layer, m)
    for field in ("us", "p10", "p90", "calls", "kernels"):
        point[field] = {name: getattr(timing, field) for name, timing in timings.items()}
    moved = 2 * (m * layer.k + layer.k * layer.n + m * layer.n)
    us = point["us"]
    point["gb_per_s"] = {name: round(moved / t / 1e3, 1) for name, t in us.items()}
    point["tflops"] = {name: round(2 * m * layer.k * layer.n / t / 1e6, 2) for name, t in us.items()}
    point["ratio"] = {
        name: round(r, 4) for name in us if name != "dot" and (r := ratio(point, name)) is not None
    }
    return point | {"sets": sets}


def _configs(layer: Layer, m: int) -> dict[str, Any]:
    """The configurations that run."""

    def chosen(leaves: int) -> dict[str, Any]:
        config = choose_config(m, layer.n, layer.k, leaves, transpose_rhs=layer.transpose_rhs)
        return dataclasses.asdict(config)

    found = {"config": chosen(layer.leaves)}
    return found | ({"chain_config": chosen(1)} if layer.leaves > 1 else {})


# In the process that owns the pool.


class Report:
    """Collects points, prints progress, and keeps the file up to date."""

    def __init__(self, path: Path, resume: Path | None, options: Options):
        self.path, self.start, self.told, self.held = path, time.monotonic(), 0.0, 0.0
        settings = dataclasses.asdict(options)
        del settings["autotune_cache"]
        self.data: dict[str, Any] = {
            "environment": environment() | {"kernel": kernel_digest()},
            "options": settings,
            "points": [],
            "failures": [],
        }
        self.earlier: dict[Any, Any] = {}
        if resume and resume.exists():
            earlier = json.loads(resume.read_text())
            same = all(earlier["environment"][k] == self.data["environment"][k] for k in ("device", "kernel"))
            if same and earlier["options"] == settings:
                self.earlier = {(p["layer"], p["model"], p["tp"], p["m"]): p for p in earlier["points"]}
            else:
                print(f"{resume} is of another device, kernel or setting: measuring all again", flush=True)

    def keep(self, layer: Layer, m: int) -> bool:
        """Takes over the point of the resumed file, if it was of the configurations that would run now."""
        point = self.earlier.get((layer.layer, layer.model, layer.tp, m))
        configs = json.loads(json.dumps(_configs(layer, m)))
        if point is None or point["errors"] or any(point[name] != value for name, value in configs.items()):
            return False
        self.data["points"].append(point)
        return True

    def add(self, outcome: gpu_pool.Outcome) -> None:
        layer, m, _ = outcome.job.arguments
        self.held += outcome.held
        why = outcome.error
        if why is None:
            self.data["points"].append(outcome.value)
            why = "; ".join(f"{k}: {v}" for k, v in outcome.value["errors"].items()) or None
        if why is not None:
            failure = {"layer": dataclasses.asdict(layer), "m": m, "error": why, "while": outcome.note}
            self.data["failures"].append(failure)
            print(f"FAILED {layer} m={m} while {outcome.note}: {why[:400]}", flush=True)
        if time.monotonic() > self.told + 10:
            self.told = time.monotonic()
            self.save()
            count, failed = len(self.data["points"]), len(self.data["failures"])
            print(
                f"{self.seconds:4.0f} s: {count} points, {failed} failures, GPU busy {self.held:.0f} s",
                flush=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def finish(self, wanted: int) -> None:
        points = self.data["points"]
        points.sort(key=lambda p: (LAYERS.index(p["layer"]), MODELS.index(p["model"]), p["tp"], p["m"]))
        self.data["summary"] = summarize(points)
        self.data["missing"] = wanted - len(points)
        self.save()
        print_table(points, self.data["summary"])
        print(
            f"{len(points)} of {wanted} points, {len(self.data['failures'])} failures, "
            f"{self.seconds:.0f} s, GPU busy {self.held:.0f} s; "
            f"{sum(p['dot_compile_seconds'] for p in points):.0f} s went into compiling dot",
            flush=True,
        )

    def save(self) -> None:
        self.data["seconds"], self.data["gpu_seconds"] = round(self.seconds, 1), round(self.held, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(dump(self.data))


def dump(data: dict[str, Any]) -> str:
    """JSON with a line for each entry of each list."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def kernel_digest() -> str:
    """Of the kernel's source: times of different kernels do not belong in one table."""
    files = (mosaic_gpu.__file__, mosaic_problem.__file__, mosaic_sums.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def _title(env: dict[str, Any]) -> str:
    return f"Tree matmul against jnp.dot, {env['device']}, jax {env['versions']['jax']}, bfloat16"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
