"""Checks the Hopper tree matmul on the GPU it runs on: accuracy, bits, and what it costs beside `jnp.dot`.

    python -m benchmarks.check_tree_matmul --out benchmarks/results/check_tree_matmul.json

Bits are compared as integers, so that -0.0 and NaN count. Every comparison is with one base product a case: 4096 rows
at the default tiling, fp32 output.

* rows: the product of every M, of a row alone and of permuted rows equals the base's rows, for normal inputs, for a
  wide range of exponents, and for heavy cancellation; and it is accurate.
* layout: a w stored [N, K] gives what the same w stored [K, N] gives.
* tiles: every split (1 is the serial kernel) and tile gives the same; also with inf, NaN and -0.0 among the inputs.
* ranks: K cut over 1, 2, 4 and 8 ranks, whose products meet in the tree, gives the whole product, before and after
  the one rounding.
* twin: the same comparison of `jnp.dot` over ranks finds differences, so these checks can fail.

A failure is recorded and the rest still runs. Exits with 1 after any mismatch, inaccuracy or exception, or at the time
limit; a slow kernel fails nothing. `--interpret` runs a tiny part on the CPU, where the kernel is interpreted.
"""

import argparse
import dataclasses
import faulthandler
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment
from tbik_jax.pallas_kernels.common.rounding import round_to
from tbik_jax.pallas_kernels.common.tree import tree_join
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import MosaicConfig, choose_config, tree_matmul_mosaic_gpu

BF16, F32 = jnp.bfloat16, jnp.float32
KINDS = ("normal", "wide", "cancel")
QWEN3 = ((2048, 1024), (3072, 1024), (4096, 4096), (12288, 4096), (1024, 4096))  # (K, N)
MS = (1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1024, 4096)
SAMPLE = 512  # columns, and 16 rows, whose accuracy is checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What a run covers. Shapes are (K, N, leaves)."""

    shapes: tuple[tuple[int, int, int], ...]
    ms: tuple[int, ...]  # rows of x for `shapes`, the last the most
    more_shapes: tuple[tuple[int, int, int], ...] = ()  # these take `few_ms`
    few_ms: tuple[int, ...] = (1, 17, 65, 129, 257, 1000, 4096)
    layout_ms: tuple[int, ...] = (1, 17, 129, 4096)
    rank_ms: tuple[int, ...] = (17, 1000)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    tile_ms: tuple[int, ...] = (1, 65, 257)
    tile_ks: tuple[int, ...] = (16, 32, 64)
    speed_ms: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    interpret: bool = False


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
    tile_ms=(65,),
)
TINY = Scope(
    shapes=((512, 48, 8),),
    ms=(1, 17, 66),
    layout_ms=(17, 66),
    rank_ms=(17,),
    ranks=(1, 2),
    tile_ms=(66,),
    tile_ks=(64,),  # the interpreter's order inside a stage is NumPy's
    speed_ms=(),
    interpret=True,
)


class Report:
    """Collects outcomes, prints one line a group, and keeps the file up to date."""

    def __init__(self, path: pathlib.Path | None, quick: bool, verbose: bool):
        self.path, self.verbose = path, verbose
        self.start = time.perf_counter()
        self.data = {"environment": environment(), "quick": quick, "groups": [], "speed": [], "ok": True}
        self.data["environment"]["runtime"] = jax.devices()[0].client.platform_version

    def group(self, name: str) -> "Group":
        return Group(self, name)

    def save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.start, 1)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


class Group:
    """Checks that belong together. An exception fails the check it happens in and no other."""

    def __init__(self, report: Report, name: str):
        self.report, self.name, self.checks, self.failures, self.notes = report, name, 0, [], {}

    def __enter__(self) -> "Group":
        self.start = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, Exception):
            self.fail("group", error)
        seconds = round(time.perf_counter() - self.start, 1)
        data, failed = self.report.data, len(self.failures)
        data["groups"].append(
            {"name": self.name, "checks": self.checks, "failed": failed, "seconds": seconds, **self.notes}
            | {"failures": self.failures[:50]}
        )
        data["ok"] = data["ok"] and not failed
        self.report.save()
        state = f"FAILED {failed}" if failed else "ok"
        notes = " ".join(f"{k}={v}" for k, v in self.notes.items())
        print(f"{self.name:40} {self.checks:5} checks  {state:12} {seconds:6.1f} s  {notes}", flush=True)
        for failure in self.failures[:5]:
            print("   ", failure, flush=True)
        return error is None or isinstance(error, Exception)

    def fail(self, case: str, why: object) -> None:
        if isinstance(why, Exception):
            why = f"{type(why).__name__}: {str(why)[:600]}"
        self.failures.append(f"{case}: {why}")

    def check(self, case: str, test) -> None:
        """Runs test() -> None or a sentence that says what is wrong."""
        self.checks += 1
        if self.report.verbose:
            print("   ", self.name, case, flush=True)
        try:
            why = test()
        except Exception as error:  # recorded, so that one configuration cannot hide the others
            why = error
        if why is not None:
            self.fail(case, why)

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
    key_x, key_w, key_s, key_p = jax.random.split(jax.random.key(k + n), 4)
    x = jax.random.normal(key_x, (4096, k), F32)[:m]
    w = jax.random.normal(key_w, (k, n), F32) / np.sqrt(k)
    if kind == "wide":
        x = x * jnp.exp2(jax.random.uniform(key_s, (k,), F32, -12, 12))
    if kind == "cancel":  # columns in pairs a, -a against rows that differ in their last bits, anywhere in K
        order = jax.random.permutation(key_p, k)
        sign = jnp.where(jnp.arange(k) % 2, -1.0, 1.0)
        nudge = jnp.where(jnp.arange(k) % 2, 1 + 2.0**-7, 1.0)[:, None]
        x = (jnp.repeat(x[:, ::2], 2, axis=1) * sign)[:, order]
        w = (jnp.repeat(w[::2], 2, axis=0).astype(BF16).astype(F32) * nudge)[order]
    if kind == "special":
        rows = jnp.arange(x.shape[0])[:, None] % 8
        column = jnp.arange(k)[None] == (jnp.arange(x.shape[0])[:, None] * 37) % k
        for row, value in ((1, jnp.inf), (2, -jnp.inf), (3, jnp.nan), (4, 3e38)):
            x = jnp.where((rows == row) & column, value, x)
        x = jnp.where(rows == 5, -0.0, x)
    return x.astype(BF16), w.astype(BF16)


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


def check_rows(report: Report, scope: Scope, ms: tuple[int, ...], shape, multiply) -> None:
    """Every M, single rows, permutations, accuracy."""
    k, n, leaves = shape
    for kind in KINDS:
        with report.group(f"rows {kind} k={k} n={n} leaves={leaves}") as group:
            x, w = inputs(kind, ms[-1], k, n)
            check_rows_of(group, ms, x, w, Accuracy(x, w, leaves), multiply)
            if kind == "normal":
                check_rounding(group, x, w, Accuracy(x, w, leaves), multiply)


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


def check_layout(report: Report, scope: Scope, ms: tuple[int, ...], shape, multiply) -> None:
    """[N, K] against [K, N]."""
    k, n, leaves = shape
    with report.group(f"layout k={k} n={n} leaves={leaves}") as group:
        for kind in KINDS:
            x, w = inputs(kind, ms[-1], k, n)
            stored, base = jnp.array(w.T), np.asarray(multiply(x, w))
            for m in (m for m in scope.layout_ms if m <= ms[-1]):
                make = functools.partial(multiply, x[:m], stored, transpose_rhs=True)
                group.same_bits(f"{kind} m={m}", make, base[:m])


def check_tiles(report: Report, scope: Scope, ms: tuple[int, ...], shape, multiply) -> None:
    """Every split, and tiles the default would not take."""
    k, n, leaves = shape
    with report.group(f"tiles k={k} n={n} leaves={leaves}") as group:
        for kind in (*KINDS, "special"):
            x, w = inputs(kind, ms[-1], k, n)
            base = np.asarray(multiply(x, w))
            for m in scope.tile_ms:
                for config in configs(scope, m, k, n, leaves):
                    make = functools.partial(multiply, x[:m], w, config=config)
                    group.same_bits(f"{kind} m={m} {config}", make, base[:m])


def configs(scope: Scope, m: int, k: int, n: int, leaves: int) -> list[MosaicConfig]:
    default = choose_config(m, n, k, leaves)
    serial = dataclasses.replace(default, split=1, stages=2)
    found = [dataclasses.replace(default, split=s, stages=4) for s in (1, 2, 4, 8) if s <= leaves]
    found += [dataclasses.replace(serial, consumers=c) for c in (1, 2)]
    for t in scope.tile_ks:
        if k // leaves % t == 0 and (n % t == 0 or n < t):
            found.append(dataclasses.replace(serial, tile_k=t, tile_n=64, stages=3))
    if n % 64 == 0:
        found += [dataclasses.replace(serial, tile_k=16, tile_n=t) for t in (16, 64, 128)]
    return list(dict.fromkeys(found))


def check_ranks(report: Report, scope: Scope, ms: tuple[int, ...], shape, multiply) -> None:
    """Tensor parallelism over K, emulated."""
    k, n, leaves = shape
    with report.group(f"ranks k={k} n={n} leaves={leaves}") as group:
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


def over_ranks(x: jax.Array, w: jax.Array, ranks: int, product) -> list[jax.Array]:
    size = x.shape[1] // ranks
    return [product(x[:, r * size :][:, :size], w[r * size :][:size]) for r in range(ranks)]


def check_twin(report: Report, scope: Scope) -> None:
    """The plain op over ranks must differ somewhere, or equal bits above would prove nothing."""
    k, n, leaves = scope.shapes[0]
    with report.group(f"twin k={k} n={n}") as group:
        x, w = inputs("normal", scope.rank_ms[-1], k, n)
        plain = functools.partial(jnp.dot, preferred_element_type=F32)
        whole = bits(np.asarray(plain(x, w)))
        for t in (t for t in scope.ranks if 1 < t <= leaves):
            total = np.asarray(functools.reduce(jnp.add, over_ranks(x, w, t, plain)))
            group.notes[f"differ_t{t}"] = int((bits(total) != whole).sum())
        group.check("jnp.dot over ranks", lambda: None if any(group.notes.values()) else "did not differ")


def measure_speed(report: Report, scope: Scope, shape, repeats: int = 3) -> None:
    """Device time of ours and of `jnp.dot`, interleaved, both to bfloat16. Informs and fails nothing."""
    from jax.experimental.mosaic.gpu import profiler  # needs the CUDA plugin

    k, n, leaves = shape
    product = functools.partial(tree_matmul_mosaic_gpu, leaves=leaves, out_dtype=BF16)
    functions = {"ours": jax.jit(product), "plain": jax.jit(jnp.dot)}
    for m in scope.speed_ms:
        x, w = inputs("normal", m, k, n)
        times = {name: [] for name in functions}
        for name in list(functions) * repeats:
            times[name] += profiler.measure(functions[name], iterations=5)(x, w)[1]
        us = {name: 1000 * statistics.median(t) for name, t in times.items()}
        config, ratio = choose_config(m, n, k, leaves), us["plain"] / us["ours"]
        report.data["speed"].append(
            {"m": m, "k": k, "n": n, "leaves": leaves, "config": dataclasses.asdict(config), "ratio": ratio}
            | {f"{name}_us": value for name, value in us.items()}
        )
        sizes = f"m={m:5} k={k:6} n={n:6} leaves={leaves}"
        print(
            f"  {sizes} ours {us['ours']:8.1f} us  jnp.dot {us['plain']:8.1f} us  ratio {ratio:.2f}",
            flush=True,
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="two shapes and fewer rows")
    parser.add_argument("--interpret", action="store_true", help="a tiny part, interpreted on the CPU")
    parser.add_argument("--no-speed", action="store_true", help="leave out the timing")
    parser.add_argument("--verbose", action="store_true", help="name every check before it runs")
    parser.add_argument("--limit", type=int, default=540, help="seconds after which a hanging run gives up")
    args = parser.parse_args(argv)
    scope = TINY if args.interpret else QUICK if args.quick else FULL
    if args.interpret:
        jax.config.update("jax_platforms", "cpu")
    # A kernel whose barriers hang cannot be interrupted; this prints where it hangs and ends the process.
    faulthandler.dump_traceback_later(args.limit, exit=True)

    report = Report(args.out, args.quick, args.verbose)
    print(json.dumps(report.data["environment"]), flush=True)
    check_twin(report, scope)
    tiled = scope.shapes[0], (scope.more_shapes or scope.shapes)[-1]
    for shape in (*scope.shapes, *scope.more_shapes):
        ms = scope.ms if shape in scope.shapes else scope.few_ms
        multiply = functools.partial(product, leaves=shape[2], interpret=scope.interpret)
        for check in (check_rows, check_layout, check_ranks, *([check_tiles] if shape in tiled else [])):
            check(report, scope, ms, shape, multiply)
    if not args.no_speed:
        for shape in ((4096, 4096, 8), (12288, 4096, 8), (1024, 4096, 1)) if scope.speed_ms else ():
            try:
                measure_speed(report, scope, shape)
            except Exception as error:  # informative only
                report.data["speed"].append(
                    {"shape": shape, "error": f"{type(error).__name__}: {error}"[:600]}
                )
                print("  no speed:", report.data["speed"][-1], flush=True)
    report.save()
    print("ok" if report.data["ok"] else "FAILED", f"in {report.data['seconds']} s", flush=True)
    return 0 if report.data["ok"] else 1


def product(x, w, *, leaves, out_dtype=F32, **kwargs) -> jax.Array:
    return tree_matmul_mosaic_gpu(x, w, leaves=leaves, out_dtype=out_dtype, **kwargs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
