"""Proves on the GPU it runs on that the Hopper tree matmul's bits are those of its contract, and that it is accurate.

    python -m benchmarks.check_tree_matmul --out benchmarks/results/check_tree_matmul.json

Bits are compared as integers, so that -0.0 and NaN count.

* configs: for random shapes and Qwen3's, in bfloat16 and float16, every configuration that can be chosen gives the bits
  of the reference configuration, on inputs of every kind (see `check_configs`); with `--triton` the other kernel too.
* rows: the product of every M, of a row alone and of permuted rows equals the rows of one base product, of 4096 rows in
  fp32, for normal inputs, for a wide range of exponents, and for heavy cancellation; and it is accurate.
* layout: a w stored [N, K] gives what the same w stored [K, N] gives.
* ranks: K cut over 1, 2, 4 and 8 ranks, whose products meet in the tree, gives the whole product, before and after
  the one rounding.
* twin: the same comparison of `jnp.dot` over ranks finds differences, so these checks can fail.

Worker processes share the GPU (see `gpu_pool`). A failure is recorded and the rest still runs. Exits with 1 after any
mismatch, inaccuracy or exception, or if `--limit` left something undone. `--interpret` runs a tiny part on the CPU,
where the kernel is interpreted.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_pool
from benchmarks.check_configs import Case, check_configs, layer_cases, random_cases, tiny_cases
from benchmarks.matmul_bits import make_inputs
from benchmarks.matmul_speed import dump, kernel_digest
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels.common.rounding import round_to
from tbik_jax.pallas_kernels.common.tree import tree_join
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import tree_matmul_mosaic_gpu

BF16, F32 = jnp.bfloat16, jnp.float32
KINDS = ("normal", "wide", "cancel")
QWEN3 = ((2048, 1024), (3072, 1024), (4096, 4096), (12288, 4096), (1024, 4096))  # (K, N)
MS = (1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1024, 4096)
SAMPLE = 512  # columns, and 16 rows, whose accuracy is checked
_TRIES = 8  # of a case whose configurations end their workers

Shape = tuple[int, int, int]  # K, N, leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What a run covers beside the configurations."""

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]  # rows of x for `shapes`, the last the most
    more_shapes: tuple[Shape, ...] = ()  # these take `few_ms`
    few_ms: tuple[int, ...] = (1, 17, 65, 129, 257, 1000, 4096)
    layout_ms: tuple[int, ...] = (1, 17, 129, 4096)
    rank_ms: tuple[int, ...] = (17, 1000)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    interpret: bool = False

    def ms_of(self, shape: Shape) -> tuple[int, ...]:
        return self.ms if shape in self.shapes else self.few_ms


FULL = Scope(
    shapes=tuple((k, n, 8) for k, n in QWEN3),
    ms=MS,
    # Columns and leaves that no wide tile divides; vocabularies.
    more_shapes=((1024, 18992, 8), (1024, 18992, 1), (1152, 336, 8), (768, 336, 8)),
)
QUICK = Scope(
    shapes=((2048, 1024, 8), (4096, 4096, 8)),
    ms=(1, 17, 65, 257, 1000, 4096),
    more_shapes=((768, 336, 8), (1024, 18992, 1)),
    few_ms=(1, 65, 1000),
    layout_ms=(17, 1000),
)
TINY = Scope(
    shapes=((512, 48, 8),), ms=(1, 17, 66), layout_ms=(17, 66), rank_ms=(17,), ranks=(1, 2), interpret=True
)


class Group:
    """Checks that belong together. An exception fails the check it happens in and no other."""

    def __init__(self, name: str):
        self.name, self.checks, self.failures, self.notes = name, 0, [], {}
        self.start = time.perf_counter()

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "checks": self.checks,
            "failed": len(self.failures),
            "seconds": round(time.perf_counter() - self.start, 1),
            **self.notes,
            "failures": self.failures[:50],
        }

    def check(self, case: str, test) -> None:
        """Runs test() -> None or a sentence that says what is wrong."""
        self.checks += 1
        gpu_pool.note(f"{self.name} {case}")
        try:
            why = test()
        except Exception as error:  # recorded, so that one failure cannot hide the others
            why = f"{type(error).__name__}: {str(error)[:600]}"
        if why is not None:
            self.failures.append(f"{case}: {why}")

    def same_bits(self, case: str, make, expected: np.ndarray) -> None:
        self.check(case, lambda: difference(np.asarray(make()), expected))


def difference(a: np.ndarray, b: np.ndarray) -> str | None:
    """Where two arrays differ as integers, or None."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{a.shape} is not {b.dtype}{b.shape}"
    unequal = bits(a) != bits(b)
    count = int(unequal.sum())
    if not count:
        return None
    first = tuple(int(i) for i in np.argwhere(unequal)[0])
    return f"{count} of {a.size} differ, first at {first}: {a[first]!r} and {b[first]!r}"


def bits(a: np.ndarray) -> np.ndarray:
    return a.view(f"uint{8 * a.dtype.itemsize}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def inputs(kind: str, m: int, k: int, n: int) -> tuple[jax.Array, jax.Array]:
    """x [m, k] and w [k, n] in bfloat16. The first rows are the same for every m."""
    x, w = make_inputs(kind, 4096, k, n, BF16, jnp.int32(k + n))
    return x[:m], w


class Accuracy:
    """What x @ w is in float64 for a sample of rows and columns, and how far a leaf's chain may fall from it."""

    def __init__(self, x: jax.Array, w: jax.Array, leaves: int):
        self.columns = np.linspace(0, w.shape[1] - 1, min(SAMPLE, w.shape[1])).astype(int)
        x64 = np.asarray(x[:16], np.float64)
        w64 = np.asarray(w[:, self.columns], np.float64)
        self.exact = x64 @ w64
        # The tensor core truncates: each k16 step may lose an ulp (2**-23) of the chain so far and of its own sums.
        steps = x.shape[1] // leaves // 16 + 16 + leaves.bit_length()
        self.bound = steps * 2.0**-23 * (np.abs(x64) @ np.abs(w64))

    def sample(self, out: jax.Array) -> np.ndarray:
        return np.asarray(np.asarray(out[:16])[:, self.columns], np.float64)

    def verdict(self, out: jax.Array) -> str | None:
        error = np.abs(self.sample(out) - self.exact[: out.shape[0]])
        over = float((error / (self.bound[: out.shape[0]] + np.finfo(np.float64).tiny)).max())
        return None if over <= 1 else f"error is {over:.3g} times its bound"

    def relative(self, out: jax.Array) -> float:
        return float(np.linalg.norm(self.sample(out) - self.exact) / np.linalg.norm(self.exact))


def check_rows(scope: Scope, shape: Shape, multiply) -> list[Group]:
    """Every M, single rows, permutations, accuracy."""
    (k, n, leaves), ms, groups = shape, scope.ms_of(shape), []
    for kind in KINDS:
        groups.append(Group(f"rows {kind} k={k} n={n} leaves={leaves}"))
        x, w = inputs(kind, ms[-1], k, n)
        check_rows_of(groups[-1], ms, x, w, Accuracy(x, w, leaves), multiply)
        if kind == "normal":
            check_rounding(groups[-1], x, w, Accuracy(x, w, leaves), multiply)
    return groups


def check_rows_of(group: Group, ms: tuple[int, ...], x, w, accuracy: "Accuracy", multiply) -> None:
    base = np.asarray(multiply(x, w))
    group.check("accuracy", lambda: accuracy.verdict(base))
    group.same_bits("again", lambda: multiply(x, w), base)
    for m in ms[:-1]:
        out = functools.cache(functools.partial(multiply, x[:m], w))
        group.same_bits(f"m={m}", out, base[:m])
        group.check(f"m={m} accuracy", lambda out=out: accuracy.verdict(out()))
    for row in (r for r in (0, 5, 63, 64, 200, 1000, ms[-1] - 1) if r < ms[-1]):
        group.same_bits(
            f"row {row} alone", lambda row=row: multiply(x[row : row + 1], w), base[row : row + 1]
        )
    for m in ms[-2:]:
        order = np.random.default_rng(m).permutation(m)
        group.same_bits(f"m={m} permuted", lambda order=order: multiply(x[order], w), base[order])


def check_rounding(group: Group, x, w, accuracy: "Accuracy", multiply) -> None:
    """The bfloat16 product is the fp32 one rounded, and no worse than the plain op's."""
    base = multiply(x, w)
    rounded = np.asarray(round_to(base, BF16))
    for m in (1, 16, x.shape[0]):
        group.same_bits(f"m={m} bfloat16", lambda m=m: multiply(x[:m], w, out_dtype=BF16), rounded[:m])
    plain = jnp.dot(x, w, preferred_element_type=F32)
    errors = {
        "bf16": accuracy.relative(rounded),
        "plain_bf16": accuracy.relative(round_to(plain, BF16)),
        "f32": accuracy.relative(base),
        "plain_f32": accuracy.relative(plain),
    }
    group.notes |= {f"error_{name}": float(f"{error:.4g}") for name, error in errors.items()}
    good = errors["bf16"] <= 1.05 * errors["plain_bf16"]
    group.check("bfloat16 accuracy", lambda: None if good else f"more than the plain op's: {errors}")


def check_layout(scope: Scope, shape: Shape, multiply) -> list[Group]:
    """[N, K] against [K, N]."""
    (k, n, leaves), ms = shape, scope.ms_of(shape)
    group = Group(f"layout k={k} n={n} leaves={leaves}")
    for kind in KINDS:
        x, w = inputs(kind, ms[-1], k, n)
        stored, base = jnp.array(w.T), np.asarray(multiply(x, w))
        for m in (m for m in scope.layout_ms if m <= ms[-1]):
            make = functools.partial(multiply, x[:m], stored, transpose_rhs=True)
            group.same_bits(f"{kind} m={m}", make, base[:m])
    return [group]


def check_ranks(scope: Scope, shape: Shape, multiply) -> list[Group]:
    """Tensor parallelism over K, emulated."""
    (k, n, leaves), ms = shape, scope.ms_of(shape)
    group = Group(f"ranks k={k} n={n} leaves={leaves}")
    for kind in KINDS:
        for m in (m for m in scope.rank_ms if m <= ms[-1]):
            x, w = inputs(kind, m, k, n)
            whole = multiply(x, w)
            expected, rounded = np.asarray(whole), np.asarray(round_to(whole, BF16))
            for t in (t for t in scope.ranks if t <= leaves):
                parts = functools.partial(
                    over_ranks, x, w, t, functools.partial(multiply, leaves=leaves // t)
                )
                total = functools.cache(lambda parts=parts: tree_join(parts()))
                group.same_bits(f"{kind} m={m} t={t}", total, expected)
                group.same_bits(f"{kind} m={m} t={t} bf16", lambda f=total: round_to(f(), BF16), rounded)
    return [group]


def over_ranks(x: jax.Array, w: jax.Array, ranks: int, product) -> list[jax.Array]:
    size = x.shape[1] // ranks
    return [product(x[:, r * size :][:, :size], w[r * size :][:size]) for r in range(ranks)]


def check_twin(scope: Scope, shape: Shape, _) -> list[Group]:
    """The plain op over ranks must differ somewhere, or equal bits above would prove nothing."""
    k, n, leaves = shape
    group = Group(f"twin k={k} n={n}")
    x, w = inputs("normal", scope.rank_ms[-1], k, n)
    plain = functools.partial(jnp.dot, preferred_element_type=F32)
    whole = bits(np.asarray(plain(x, w)))
    for t in (t for t in scope.ranks if 1 < t <= leaves):
        total = np.asarray(functools.reduce(jnp.add, over_ranks(x, w, t, plain)))
        group.notes[f"differ_t{t}"] = int((bits(total) != whole).sum())
    group.check("jnp.dot over ranks", lambda: None if any(group.notes.values()) else "did not differ")
    return [group]


def run_check(check, scope: Scope, shape: Shape) -> list[dict[str, Any]]:
    """A job: one check of one shape."""
    multiply = functools.partial(product, leaves=shape[2], interpret=scope.interpret)
    return [group.record() for group in check(scope, shape, multiply)]


def product(x, w, *, leaves, out_dtype=F32, **kwargs) -> jax.Array:
    return tree_matmul_mosaic_gpu(x, w, leaves=leaves, out_dtype=out_dtype, **kwargs)


# In the process that owns the pool.


class Report:
    """Collects groups, prints a line for each, and keeps the file up to date."""

    def __init__(self, path: Path | None, arguments: dict[str, Any]):
        self.path, self.start = path, time.perf_counter()
        self.data: dict[str, Any] = {
            "environment": environment() | {"kernel": kernel_digest()},
            "arguments": arguments,
            "groups": [],
            "ok": True,
        }
        self.data["environment"]["runtime"] = jax.devices()[0].client.platform_version

    def add(self, record: dict[str, Any]) -> None:
        self.data["groups"].append(record)
        self.data["ok"] = self.data["ok"] and not record["failed"]
        state = f"FAILED {record['failed']}" if record["failed"] else "ok"
        known = ("name", "checks", "failed", "seconds", "failures")
        notes = " ".join(f"{k}={v}" for k, v in record.items() if k not in known)
        print(
            f"{record['name']:52} {record['checks']:5} checks  {state:12} {record['seconds']:6.1f} s  {notes}",
            flush=True,
        )
        for failure in record["failures"][:5]:
            print("   ", failure, flush=True)
        self.save()

    def crash(self, name: str, outcome: gpu_pool.Outcome) -> None:
        failure = f"while at {outcome.note}: {outcome.error}"
        seconds = round(outcome.seconds, 1)
        self.add({"name": name, "checks": 1, "failed": 1, "seconds": seconds, "failures": [failure]})

    def finish(self, left: int) -> bool:
        groups = self.data["groups"]
        groups.sort(key=lambda group: group["name"])
        self.data |= {"checks": sum(group["checks"] for group in groups), "left": left}
        self.data["ok"] = self.data["ok"] and not left
        self.save()
        state = "ok" if self.data["ok"] else "FAILED"
        print(
            f"{state}: {self.data['checks']} checks in {self.data['seconds']} s, {left} jobs left", flush=True
        )
        return self.data["ok"]

    def save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.start, 1)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(dump(self.data))


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.interpret:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    gpu_pool.prepare_environment(args.workers)
    jobs = make_jobs(args)
    report, left = (
        Report(args.out, _settings(args)),
        len(jobs),
    )
    print(json.dumps(report.data["environment"]), flush=True)
    for outcome in gpu_pool.run(jobs, workers=args.workers, limit=args.limit, work_limit=args.hang):
        first = outcome.job.arguments[0]
        left -= 1
        if outcome.error is None:
            for record in outcome.value:
                report.add(record)
        elif isinstance(first, Case):
            report.crash(first.name, outcome)
            if (
                outcome.note and len(first.skip) < _TRIES
            ):  # the rest of the case, without what ended the worker
                again = dataclasses.replace(first, skip=(*first.skip, outcome.note))
                jobs.append(gpu_pool.Job(check_configs, (again,)))
                left += 1
        else:
            report.crash(f"{first.__name__} {outcome.job.arguments[2]}", outcome)
    return 0 if report.finish(left) else 1


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows")
    parser.add_argument("--interpret", action="store_true", help="a tiny part, interpreted on the CPU")
    parser.add_argument("--random", type=int, default=48, help="random shapes for the configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes and inputs")
    parser.add_argument("--most", type=int, help="configurations of a shape at most, a random sample")
    parser.add_argument("--triton", action="store_true", help="compare the portable kernel's bits too")
    parser.add_argument(
        "--only", choices=("configs", "rest"), help="the configurations alone, or all but them"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which the rest is left")
    parser.add_argument(
        "--hang", type=float, default=90, help="seconds of silence after which a job counts as hung"
    )
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what is checked."""
    return {name: getattr(args, name) for name in ("random", "seed", "quick", "most", "triton", "only")}


def make_jobs(args: argparse.Namespace) -> collections.deque[gpu_pool.Job]:
    scope = TINY if args.interpret else QUICK if args.quick else FULL
    jobs = [gpu_pool.Job(run_check, (check_twin, scope, scope.shapes[0]))]
    for shape in (*scope.shapes, *scope.more_shapes):
        for check in (check_rows, check_layout, check_ranks):
            jobs.append(gpu_pool.Job(run_check, (check, scope, shape)))
    if args.interpret:
        cases = tiny_cases()
    else:
        cases = layer_cases(args.seed, every=4 if args.quick else 1)
        cases += random_cases(args.random // (4 if args.quick else 1), args.seed)
    configs = [
        gpu_pool.Job(
            check_configs, (dataclasses.replace(case, most=args.most or case.most, triton=args.triton),)
        )
        for case in cases
    ]
    chosen = {"configs": configs, "rest": jobs, None: jobs + configs}[args.only]
    return collections.deque(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
