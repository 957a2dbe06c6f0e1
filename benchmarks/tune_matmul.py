"""Finds the fastest configuration of the Hopper matmul for each of Qwen3's matmuls and writes the table that chooses.

    python -m benchmarks.tune_matmul --out benchmarks/results/tune_matmul_h200.json

For each weight shape and number of rows: times every candidate three times; takes those near the fastest; throws out
each whose fp32 product differs in a bit from the reference configuration's, on normal inputs or on a wide range of
exponents; and times the others in turn, with `candidate_configs`' first, the rule's choice, among them. Where another
is more than 2 % faster it becomes an entry of pallas_kernels/tree_matmul/tuned/<device>.json. The result file keeps
every candidate's time, those thrown out, and those that failed. A candidate that crashes or hangs costs its worker, and
the rest of its point is tried again without it.

Points come in random order, so a run that ends at `--limit` has tuned a sample. `--merge FILES` takes over their points
and measures the others; with `--limit 0` it only writes the table.
"""

import argparse
import collections
import dataclasses
import functools
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

from benchmarks import gpu_pool
from benchmarks.matmul_bits import count_differences, make_inputs, reference_config
from benchmarks.matmul_shapes import LAYERS, MODELS, TPS, Layer, layers
from benchmarks.matmul_speed import (
    BF16,
    DRY_LAYERS,
    DRY_MS,
    compile_for,
    compile_inputs,
    dump,
    kernel_digest,
    operand_shapes,
)
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels.tree_matmul import tuned
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import (
    MosaicConfig,
    candidate_configs,
    tree_matmul_mosaic_gpu,
)

MS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Up to here one row of tiles covers every row of x.
_ONE_TILE = 128
GAIN = 1.02  # an entry must be worth its line
_NEAR = 1.12  # screened within this factor of the fastest: worth timing properly
_FINALISTS = 6
_BIT_KINDS = ("normal", "wide")
_HOLD_LIMIT = 20.0  # seconds; a candidate whose barriers hang shall not cost more

Config = dict[str, Any]
Point = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A weight shape, a number of rows, and candidates that ended a worker before."""

    layer: Layer
    m: int
    skip: tuple[str, ...] = ()
    most: int | None = None
    dry: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return (*shape_key(self.layer), self.m)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    gpu_pool.prepare_environment(args.workers)
    log = Log(args.out, args.merge)
    chosen = DRY_LAYERS if args.dry else layers(tuple(args.layers), tuple(args.models), tuple(args.tp))
    shapes = {shape_key(layer): layer for layer in chosen}  # layers may share a shape
    tasks = [
        Task(layer=layer, m=m, most=args.most, dry=args.dry)
        for layer in shapes.values()
        for m in (DRY_MS if args.dry else args.ms)
    ]
    random.Random(0).shuffle(tasks)
    jobs = collections.deque(gpu_pool.Job(tune, (task,)) for task in tasks if task.key not in log.points)
    print(f"{len(jobs)} points to tune, {len(log.points)} taken over", flush=True)
    for outcome in gpu_pool.run(jobs, workers=args.workers, limit=args.limit, hold_limit=_HOLD_LIMIT):
        again = log.add(outcome)
        if again is not None:
            jobs.append(gpu_pool.Job(tune, (again,)))
    log.finish(args.table or tuned.table_path(log.data["environment"]["device"]), len(tasks))
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what was measured")
    parser.add_argument("--table", type=Path, help="the table; that of the device by default")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tp", nargs="+", type=int, default=TPS, choices=TPS)
    parser.add_argument("--ms", nargs="+", type=int, default=MS, help="rows of x")
    parser.add_argument("--most", type=int, help="candidates to try at most, in their order")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which the rest is left")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="earlier result files")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, by the host's clock")
    args = parser.parse_args(argv)
    if args.dry and not args.table:
        parser.error("--dry needs --table FILE")
    return args


def shape_key(layer: Layer) -> tuned.Key:
    return layer.k, layer.n, layer.leaves, layer.transpose_rhs


# In a worker.


def tune(task: Task) -> Point:
    """Tries the candidates of one point."""
    layer, m, clock = task.layer, task.m, device_time.WallClock() if task.dry else device_time.Cupti()
    failed: dict[str, str] = {}
    configs = [c for c in candidates(layer, m)[: task.most] if config_name(c) not in task.skip]
    functions = _compile(configs, task, BF16, failed)
    sets_maker = compile_inputs(layer, m)
    count = device_time.count_sets(2 * m * layer.k + 2 * layer.k * layer.n)
    with gpu_pool.gpu():
        sets = [sets_maker(jnp.int32(seed)) for seed in range(2 if task.dry else count)]
        screened = device_time.screen(functions, sets, clock, gpu_pool.note)
        del sets
    finalists = _finalists(configs, screened)
    thrown_out = _throw_out(finalists, task, failed)
    good = {c: functions[c] for c in map(config_name, finalists) if c not in thrown_out and c not in failed}
    timed: dict[str, device_time.Timing] = {}
    if good:
        with gpu_pool.gpu():
            gpu_pool.note("the last round")
            sets = [sets_maker(jnp.int32(seed)) for seed in range(2 if task.dry else count)]
            timed = device_time.compare(good, sets, clock)
    return _point(task, configs, screened, timed, thrown_out, failed)


def candidates(layer: Layer, m: int) -> tuple[MosaicConfig, ...]:
    return candidate_configs(m, layer.n, layer.k, layer.leaves, transpose_rhs=layer.transpose_rhs)


def config_name(config: MosaicConfig) -> str:
    """A configuration as text that tells it from others; what is tuned here is never gated."""
    fields = dataclasses.asdict(config)
    del fields["gated"]
    return json.dumps(fields)


def _compile(
    configs: list[MosaicConfig], task: Task, out_dtype: Any, failed: dict[str, str]
) -> dict[str, Callable[..., Any]]:
    layer, functions = task.layer, {}
    for config in configs:
        product = functools.partial(
            tree_matmul_mosaic_gpu,
            leaves=layer.leaves,
            out_dtype=out_dtype,
            transpose_rhs=layer.transpose_rhs,
            config=config,
            interpret=task.dry,
        )
        name = config_name(config)
        gpu_pool.note(name)
        try:
            functions[name] = compile_for(product, operand_shapes(layer, task.m))
        except Exception as error:  # recorded; the others are worth trying
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return functions


def _finalists(configs: list[MosaicConfig], screened: dict[str, float]) -> list[MosaicConfig]:
    """Those near the fastest, fastest first, and the rule's choice."""
    ran = sorted((c for c in configs if config_name(c) in screened), key=lambda c: screened[config_name(c)])
    if not ran:
        return []
    limit = _NEAR * screened[config_name(ran[0])]
    best = [c for c in ran if screened[config_name(c)] <= limit][:_FINALISTS]
    return best + [c for c in configs[:1] if c in ran and c not in best]


def _throw_out(finalists: list[MosaicConfig], task: Task, failed: dict[str, str]) -> dict[str, str]:
    """The finalists whose bits are not the reference configuration's: name -> how many differ."""
    layer, m = task.layer, task.m
    reference = reference_config(layer.k, layer.leaves)
    functions = _compile(list(dict.fromkeys([reference, *finalists])), task, jnp.float32, failed)
    if config_name(reference) not in functions:
        raise RuntimeError(f"the reference configuration failed: {failed[config_name(reference)]}")
    out = jax.ShapeDtypeStruct((m, layer.n), jnp.float32)
    differ = compile_for(count_differences, (out, out))

    def operands(kind: str, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, w = make_inputs(kind, m, layer.k, layer.n, BF16, seed)
        return x, w.T if layer.transpose_rhs else w

    seed = jax.ShapeDtypeStruct((), jnp.int32)
    makers = {kind: compile_for(functools.partial(operands, kind), (seed,)) for kind in _BIT_KINDS}
    found: dict[str, str] = {}
    with gpu_pool.gpu():
        for kind, make in makers.items():
            inputs = make(jnp.int32(m + layer.k))
            expected = functions[config_name(reference)](*inputs)
            for name in map(config_name, finalists):
                if name not in functions:
                    continue
                gpu_pool.note(name)
                count = int(differ(functions[name](*inputs), expected)[0])
                if count:
                    found[name] = f"{count} of {m * layer.n} differ on {kind} inputs"
    return found


def _point(
    task: Task,
    configs: list[MosaicConfig],
    screened: dict[str, float],
    timed: dict[str, device_time.Timing],
    thrown_out: dict[str, str],
    failed: dict[str, str],
) -> Point:
    names = [config_name(c) for c in configs]
    default = config_name(candidates(task.layer, task.m)[0])
    best = min(timed, key=lambda c: timed[c].us, default=None)
    point: Point = dict(zip(("k", "n", "leaves", "transpose_rhs", "m"), task.key, strict=True))
    if default in timed and best is not None:
        point |= {"default_us": timed[default].us, "best_us": timed[best].us}
        point["gain"] = round(timed[default].us / timed[best].us, 4)
    return point | {
        "best": best and json.loads(best),
        "default": json.loads(default),
        # config's values, microseconds at first, and in the last round
        "rows": [
            [list(json.loads(c).values()), screened.get(c), timed[c].us if c in timed else None]
            for c in names
        ],
        "thrown_out": thrown_out,
        "failed": failed | {c: "ended its worker" for c in task.skip},
    }


# In the process that owns the pool.


class Log:
    """What was measured, by (k, n, leaves, transpose_rhs, m)."""

    def __init__(self, path: Path, earlier: list[Path]):
        self.path, self.start, self.told, self.held = path, time.monotonic(), 0.0, 0.0
        self.points: dict[tuple[Any, ...], Point] = {}
        self.data: dict[str, Any] = {
            "environment": environment() | {"kernel": kernel_digest()},
            "fields": [field.name for field in dataclasses.fields(MosaicConfig) if field.name != "gated"],
            "failures": [],
        }
        for file in earlier:
            self._take_over(file)

    def _take_over(self, file: Path) -> None:
        data = json.loads(file.read_text())
        theirs, mine = data["environment"]["device"], self.data["environment"]["device"]
        if theirs != mine:
            raise ValueError(f"{file} has device {theirs}, not {mine}; measure again without it")
        try:
            points = [with_all_fields(point, data["fields"]) for point in data["points"]]
        except TypeError as error:
            fields = f"fields {data['fields']}, not {self.data['fields']}"
            raise ValueError(f"{file} has {fields}: {error}; measure again without it") from None
        self.points |= {point_key(point): point for point in points}

    def add(self, outcome: gpu_pool.Outcome) -> Task | None:
        """Keeps an outcome; a task to try again where one candidate was to blame for a failure."""
        (task,) = outcome.job.arguments
        self.held += outcome.held
        again = None
        if outcome.error is None:
            self.points[task.key] = outcome.value
        else:
            print(f"FAILED {task.key} at {outcome.note}: {outcome.error[:300]}", flush=True)
            self.data["failures"].append({"task": task.key, "at": outcome.note, "error": outcome.error})
            if (outcome.note or "").startswith("{") and len(task.skip) < 8:
                again = dataclasses.replace(task, skip=(*task.skip, str(outcome.note)))
        if time.monotonic() > self.told + 10:
            self.told = time.monotonic()
            self.save()
            print(f"{self.progress()}", flush=True)
        return again

    def progress(self) -> str:
        seconds = time.monotonic() - self.start
        return (
            f"{seconds:4.0f} s: {len(self.points)} points, {len(self.data['failures'])} failures, "
            f"{sum(bool(p['thrown_out']) for p in self.points.values())} with candidates thrown out, "
            f"GPU busy {self.held:.0f} s"
        )

    def save(self) -> None:
        self.data |= {"seconds": round(time.monotonic() - self.start, 1), "gpu_seconds": round(self.held, 1)}
        points = [self.points[key] for key in sorted(self.points)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(dump(self.data | {"points": points}))

    def finish(self, table: Path, wanted: int) -> None:
        self.save()
        entries = table_of(list(self.points.values()))
        tuned.write_table(entries, table)
        tuned.read_table(table)
        gains = sorted(p["gain"] for p in self.points.values() if "gain" in p)
        print(self.progress())
        for point in self.points.values():
            for name, why in point["thrown_out"].items():
                print(f"THROWN OUT {point_key(point)} {name}: {why}")
        if gains:
            faster = [g for g in gains if g > GAIN]
            print(
                f"{len(gains)} of {wanted} points tuned; {len(faster)} more than {GAIN} times as fast as by the "
                f"rule, median of all {gains[len(gains) // 2]}, most {gains[-1]}; {len(entries)} lines in {table}",
                flush=True,
            )


def with_all_fields(point: Point, fields: list[str]) -> Point:
    """A point of a file whose configurations have these fields: others came later, and have their default's meaning.

    Raises:
        TypeError: if a field is unknown now, or one that is not there has no default.
    """
    old = functools.partial(zip, fields, strict=True)

    def named(text: str) -> str:  # a configuration, or something else that ended a worker
        return (
            config_name(MosaicConfig(**json.loads(text))) if text.startswith("{") and text != "{}" else text
        )

    def whole(config: Config | None) -> Config | None:
        return config and json.loads(config_name(MosaicConfig(**config)))

    rows = [
        [list(json.loads(config_name(MosaicConfig(**dict(old(values))))).values()), *times]
        for values, *times in point["rows"]
    ]
    found = {name: {named(c): why for c, why in point[name].items()} for name in ("thrown_out", "failed")}
    return point | {"best": whole(point["best"]), "default": whole(point["default"]), "rows": rows} | found


def point_key(point: Point) -> tuple[Any, ...]:
    return tuple(point[name] for name in ("k", "n", "leaves", "transpose_rhs", "m"))


def table_of(points: list[Point]) -> tuned.Table:
    """The entries that the measured points ask for.

    An entry serves the rows above the next smaller count that was measured, and above `_ONE_TILE` above the next
    smaller count of `MS`: there the number of tiles matters. So counts of these that were not measured, and those at
    which the rule is as good, get a null, except after the last entry, which serves all that is larger.
    """
    by_shape: dict[tuned.Key, dict[int, Config | None]] = {}
    for point in points:
        better = point.get("gain", float("inf")) > GAIN  # no gain: the rule's choice failed
        k, n, leaves, transpose_rhs, m = point_key(point)
        unmeasured = dict.fromkeys(m for m in MS if m > _ONE_TILE)
        configs = by_shape.setdefault((k, n, leaves, transpose_rhs), unmeasured)
        configs[m] = point["best"] if better else None
    table: tuned.Table = {}
    for key, configs in by_shape.items():
        entries: list[tuple[int, Config | None]] = []
        measured = [point_key(p)[4] for p in points if point_key(p)[:4] == key]
        for m, config in sorted(configs.items()):
            if m > max(measured):
                break
            if entries and entries[-1][1] == config:
                entries.pop()  # the next one serves its rows too
            entries.append((m, config))
        if any(config is not None for _, config in entries):
            table[key] = tuple(entries)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
