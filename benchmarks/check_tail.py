"""Checks and times the kernels behind the logits on the GPU it runs on: the leaves' statistics, and sampling.

    python -m benchmarks.check_tail --out benchmarks/results/check_tail_h200.json

Bits are compared as integers, so that -0.0 and NaN count.

* statistics: the kernel has the reference's bits, a row alone those of the row in a batch, ranks those of the whole;
  leaves joined over 1, 2, 4 and 8 ranks give one log-sum, and it is as accurate as XLA's.
* sampling: the kernel draws the reference's tokens with the reference's noise, however a row is cut up; ranks combine.
* time: device time beside plain XLA ops (argmax; log-softmax of a chosen token; `jax.random.categorical`) on the same
  logits, interleaved, logits cold, in GB/s of one pass over them.

A failure is recorded and the rest still runs. Exits with 1 after any. `--interpret` runs a tiny part on the CPU.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbik_jax.bench.device_time import Cupti, WallClock, compare, count_sets
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels.common.rounding import exp, log
from tbik_jax.pallas_kernels.common.tree import tree_join
from tbik_jax.pallas_kernels.log_softmax.mosaic_gpu import leaf_statistics_mosaic_gpu
from tbik_jax.pallas_kernels.log_softmax.reference import join_totals, leaf_statistics_reference
from tbik_jax.pallas_kernels.sampling.mosaic_gpu import sample_argmax_mosaic_gpu
from tbik_jax.pallas_kernels.sampling.reference import (
    Draw,
    gumbel_noise,
    sample_argmax_reference,
    scaled_logits,
)

VOCAB = 151936
KINDS = ("normal", "wide", "flat", "peaked", "negative", "ties", "special")

reference_statistics = jax.jit(leaf_statistics_reference, static_argnames="leaves")
reference_draw = jax.jit(sample_argmax_reference)


class Report:
    """Runs checks one after the other, prints a line for each, and keeps the file up to date."""

    def __init__(self, path: Path | None, limit: float):
        self.path, self.end, self.start = path, time.perf_counter() + limit, time.perf_counter()
        self.data: dict[str, Any] = {
            "environment": environment(),
            "checks": 0,
            "failures": [],
            "left": [],
            "times": [],
        }

    def check(self, name: str, test: Callable[[], str | None]) -> None:
        """test() returns None, or a sentence that says what is wrong."""
        if time.perf_counter() > self.end:
            self.data["left"].append(name)
            return
        self.data["checks"] += 1
        try:
            why = test()
        except Exception as error:  # recorded, so that one failure cannot hide the others
            why = f"{type(error).__name__}: {str(error)[:1500]}"
        print(f"[{time.perf_counter() - self.start:6.1f} s] {name}: {why or 'ok'}", flush=True)
        if why:
            self.data["failures"].append(f"{name}: {why}")
        self.save()

    def save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.start, 1)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def finish(self) -> int:
        self.save()
        failed, left = len(self.data["failures"]), len(self.data["left"])
        print(
            f"{self.data['checks']} checks, {failed} failed, {left} left, {self.data['seconds']} s",
            flush=True,
        )
        for failure in self.data["failures"]:
            print("FAILED", failure, flush=True)
        return 1 if failed or left else 0


def difference(actual: Any, expected: Any) -> str | None:
    """How many elements of two trees of arrays have other bits, and the first of them."""
    names = getattr(actual, "_fields", None) or [str(i) for i in range(len(actual))]
    found = []
    for name, left, right in zip(names, actual, expected, strict=True):
        a, b = np.asarray(left), np.asarray(right)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}: {a.dtype}{a.shape} is not {b.dtype}{b.shape}"
        unsigned = f"uint{8 * a.dtype.itemsize}"
        other = a.view(unsigned) != b.view(unsigned)
        if other.any():
            at = tuple(int(i) for i in np.argwhere(other)[0])
            found.append(
                f"{name}: {int(other.sum())} of {a.size} differ, first at {at}: {a[at]!r} and {b[at]!r}"
            )
    return "; ".join(found) or None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_logits(kind: str, rows: int, vocab: int, seed: int = 0) -> jax.Array:
    """Logits [rows, vocab] of a kind; the first rows are the same for every number of rows up to 128."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (max(rows, 128 if vocab > 10000 else rows), vocab), jnp.float32)[:rows]
    if kind == "wide":
        return x * jnp.exp2(jax.random.uniform(keys[1], (vocab,), jnp.float32, -12, 6))
    if kind == "flat":
        return x * 1e-3
    if kind == "peaked":
        return x.at[:, vocab // 3].set(60)
    if kind == "negative":
        return x * 5 - 200
    if kind == "ties":
        return jnp.round(x * 2)
    if kind == "special":
        spoil = jax.random.randint(keys[2], (rows,), 0, 5)
        value = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, -0.0, 3e38])[spoil]
        column = jax.random.randint(keys[3], (rows,), 0, vocab)
        return x.at[jnp.arange(rows), column].set(value)
    return x * 3


def check_statistics(report: Report, rows: int, vocab: int, interpret: bool) -> None:
    run = jax.jit(
        functools.partial(leaf_statistics_mosaic_gpu, interpret=interpret), static_argnames="leaves"
    )
    for kind in KINDS:
        x = make_logits(kind, rows, vocab)

        def bits(x: jax.Array = x) -> str | None:
            """NaN alone may have other bits in a leaf whose logits are not finite."""
            ours, theirs = (jax.tree.map(np.asarray, f(x, leaves=8)) for f in (run, reference_statistics))
            usual = [tuple(np.where(np.isnan(p), np.float32(np.nan), p) if p.dtype == np.float32 else p for p in s)
                     for s in (ours, theirs)]  # fmt: skip
            return difference(ours._replace(**dict(zip(ours._fields, usual[0], strict=True))), usual[1])

        report.check(f"statistics {kind} [{rows}, {vocab}]: bits of the reference", bits)
        report.check(f"statistics {kind}: rows and ranks", functools.partial(check_parts, run, x))
        if kind not in ("special",):
            report.check(
                f"statistics {kind}: numerics", functools.partial(check_numerics, report, run, x, kind)
            )


def check_parts(run: Callable[..., Any], x: jax.Array) -> str | None:
    whole = run(x, leaves=8)
    again = difference(run(x, leaves=8), whole)
    if again:
        return f"again: {again}"
    for rows in (slice(0, 1), slice(len(x) - 1, len(x)), slice(1, 1 + len(x) // 2)):
        why = difference(run(x[rows], leaves=8), tuple(part[rows] for part in whole))
        if why:
            return f"rows {rows}: {why}"
    row_max = jnp.max(whole.maximum, axis=-1)
    total = join_totals(whole.maximum, whole.total, row_max)
    for ranks in (2, 4, 8):
        size = x.shape[-1] // ranks
        parts = [run(x[:, r * size :][:, :size], leaves=8 // ranks) for r in range(ranks)]
        why = difference([jnp.concatenate(p, axis=-1) for p in zip(*parts, strict=True)], whole)
        joined = tree_join([join_totals(p.maximum, p.total, row_max) for p in parts])
        why = why or difference([joined], [total])
        if why:
            return f"{ranks} ranks: {why}"
    return None


def check_numerics(report: Report, run: Callable[..., Any], x: jax.Array, kind: str) -> str | None:
    x64 = np.asarray(x[:4], np.float64)
    shifted = x64 - x64.max(-1, keepdims=True)
    exact = np.log(np.exp(shifted).sum(-1))
    stats = run(x[:4], leaves=8)
    row_max = jnp.max(stats.maximum, axis=-1)
    if (np.asarray(row_max) != x64.max(-1)).any():
        return "the maximum is another one"
    if not bool(stats.finite.all()):
        return "not finite"
    best = np.asarray(stats.best) + np.arange(8) * (x.shape[-1] // 8)
    first = [best[i][np.asarray(stats.maximum)[i].argmax()] for i in range(len(best))]
    if list(first) != list(x64.argmax(-1)):
        return f"argmax {first} is not {list(x64.argmax(-1))}"
    ours = np.abs(np.asarray(log(join_totals(stats.maximum, stats.total, row_max)), np.float64) - exact).max()
    plain = jnp.log(jnp.sum(jnp.exp(x[:4] - x[:4].max(-1, keepdims=True)), axis=-1))
    theirs = np.abs(np.asarray(plain, np.float64) - exact).max()
    bound = 4 * theirs + 4 * np.finfo(np.float32).eps * max(1.0, np.abs(exact).max())
    report.data.setdefault("errors", []).append({"kind": kind, "ours": float(ours), "plain": float(theirs)})
    return None if ours <= bound else f"error {ours:.3g} against the plain op's {theirs:.3g}"


def sampling_arrays(x: jax.Array, hot: bool = False) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(1)
    rows = len(x)
    temperature = jnp.asarray(np.ones(rows) if hot else rng.choice([0, 0.3, 0.7, 1, 2], rows), jnp.float32)
    key = jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32)
    return x, x.max(-1), temperature, key, jnp.arange(rows, dtype=jnp.int32) * 77


def check_sampling(report: Report, rows: int, vocab: int, interpret: bool) -> None:
    run = functools.partial(sample_argmax_mosaic_gpu, interpret=interpret)
    for kind in KINDS[:-1]:
        arrays = sampling_arrays(make_logits(kind, rows, vocab))
        report.check(
            f"sampling {kind} [{rows}, {vocab}]: the reference's draws",
            functools.partial(check_draws, run, arrays),
        )
        report.check(f"sampling {kind}: cuts, rows, ranks", functools.partial(check_cuts, run, arrays))
    flat = jnp.zeros((rows, vocab), jnp.float32)
    arrays = sampling_arrays(flat, hot=True)
    noise = jax.jit(gumbel_noise, static_argnums=2)(arrays[3], arrays[4], vocab)

    def noise_of() -> str | None:
        """On flat logits the value is the noise: its maximum, bit for bit."""
        drawn = run(*arrays, jnp.int32(0))
        return difference(
            [drawn.value, drawn.token], [noise.max(-1), jnp.argmax(noise, -1).astype(jnp.int32)]
        )

    report.check("sampling: the noise of the winner", noise_of)

    def quotients() -> str:
        """Not a failure: how often XLA's quotient is not the nearest number."""
        x = make_logits("normal", rows, vocab)
        temperature = jnp.full((rows,), 0.7, jnp.float32)
        ours = np.asarray(jax.jit(scaled_logits)(x, x.max(-1), temperature))
        nearest = (np.asarray(x) - np.asarray(x.max(-1))[:, None]) / np.float32(0.7)
        report.data["quotients_not_nearest"] = float((ours != nearest).mean())
        return ""

    report.check("sampling: XLA's quotients", lambda: quotients() or None)
    value = jnp.linspace(-103, 0, 4096, dtype=jnp.float32)
    report.data["exp_max_ulp"] = float(
        np.max(np.abs(np.asarray(exp(value), np.float64) / np.exp(np.asarray(value, np.float64)) - 1)[2000:])
        * 2**24
    )


def check_draws(run: Callable[..., Draw], arrays: tuple[jax.Array, ...]) -> str | None:
    """Tokens and logits by their bits; the noisy values within the last places in which XLA's quotient may differ."""
    ours, reference = run(*arrays, jnp.int32(0)), reference_draw(*arrays, jnp.int32(0))
    if not np.allclose(ours.value, reference.value, rtol=1e-6, atol=1e-6):
        return f"values differ: {np.asarray(ours.value)} and {np.asarray(reference.value)}"
    return difference([ours.token, ours.logit], [reference.token, reference.logit])


def check_cuts(run: Callable[..., Draw], arrays: tuple[jax.Array, ...]) -> str | None:
    zero, size = jnp.int32(0), arrays[0].shape[1]
    whole = run(*arrays, zero)
    for parts in (1, 5, 40):
        why = difference(run(*arrays, zero, parts=parts), whole)
        if why:
            return f"{parts} parts: {why}"
    why = difference(run(*(a[1:2] for a in arrays), zero), tuple(part[1:2] for part in whole))
    if why:
        return f"row 1 alone: {why}"
    hot = np.asarray(arrays[2]) > 0
    for ranks in (2, 8):
        width = size // ranks
        drawn = [
            run(arrays[0][:, r * width :][:, :width], *arrays[1:], jnp.int32(r * width)) for r in range(ranks)
        ]
        values = np.stack([np.asarray(d.value) for d in drawn])
        best = values.argmax(0)
        tokens = np.asarray([np.asarray(drawn[b].token)[i] for i, b in enumerate(best)])
        if (tokens[hot] != np.asarray(whole.token)[hot]).any():
            return f"{ranks} ranks draw {tokens[hot]} and the whole {np.asarray(whole.token)[hot]}"
    return None


def time_rows(report: Report, rows: int, vocab: int, interpret: bool) -> None:
    """Device time at a batch of `rows`, cold logits."""
    sets = [
        sampling_arrays(make_logits("normal", rows, vocab, seed), hot=True)
        for seed in range(sets_of(rows, vocab))
    ]

    def logprob(stats: Any, best: jax.Array) -> jax.Array:
        row_max = jnp.max(stats.maximum, axis=-1)
        return best - row_max - log(join_totals(stats.maximum, stats.total, row_max))

    def kernel_statistics(x: jax.Array, *_: Any) -> Any:
        return leaf_statistics_mosaic_gpu(x, leaves=8, interpret=interpret)

    def kernel_greedy(x: jax.Array, *_: Any) -> Any:
        stats = leaf_statistics_mosaic_gpu(x, leaves=8, interpret=interpret)
        row_max = jnp.max(stats.maximum, axis=-1)
        return logprob(stats, row_max), stats.best, stats.finite

    def kernel_draw(x: jax.Array, row_max: jax.Array, *rest: Any) -> Any:
        return sample_argmax_mosaic_gpu(x, row_max, *rest, jnp.int32(0), interpret=interpret)

    def kernel_cold(x: jax.Array, row_max: jax.Array, temperature: jax.Array, *rest: Any) -> Any:
        return sample_argmax_mosaic_gpu(x, row_max, temperature * 0, *rest, jnp.int32(0), interpret=interpret)

    def reference_greedy(x: jax.Array, *_: Any) -> Any:
        stats = leaf_statistics_reference(x, leaves=8)
        return logprob(stats, jnp.max(stats.maximum, axis=-1)), stats.best, stats.finite

    def reference_drawn(*arrays: Any) -> Any:
        return sample_argmax_reference(*arrays, jnp.int32(0))

    def plain_argmax(x: jax.Array, *_: Any) -> Any:
        return jnp.argmax(x, axis=-1), jnp.max(x, axis=-1)

    def plain_logprob(x: jax.Array, *_: Any) -> Any:
        best = jnp.argmax(x, axis=-1)
        return best, jnp.max(x, -1) - jax.nn.logsumexp(x, axis=-1)

    def plain_categorical(x: jax.Array, row_max: jax.Array, temperature: jax.Array, *_: Any) -> Any:
        return jax.random.categorical(jax.random.key(0), x / temperature[:, None], axis=-1)

    everything: dict[str, Callable[..., Any]] = {
        f.__name__: f
        for f in (kernel_statistics, kernel_greedy, kernel_draw, kernel_cold, reference_greedy, reference_drawn,
                  plain_argmax, plain_logprob, plain_categorical)
    }  # fmt: skip
    functions = {}
    for (
        name,
        function,
    ) in everything.items():  # one that does not compile must not hide the times of the others
        try:
            functions[name] = jax.jit(function).lower(*sets[0]).compile()
        except Exception as error:
            report.data["failures"].append(
                f"time {name} rows={rows}: {type(error).__name__}: {str(error)[:800]}"
            )
    clock = WallClock() if interpret else Cupti()
    for name, timing in compare(functions, sets, clock).items():
        record = {"rows": rows, "vocab": vocab, "name": name, "us": timing.us, "p10": timing.p10, "p90": timing.p90,
                  "kernels": timing.kernels, "gb_s": round(4e-3 * rows * vocab / timing.us, 1)}  # fmt: skip
        report.data["times"].append(record)
        print("   ", record, flush=True)


def sets_of(rows: int, vocab: int) -> int:
    return min(12, count_sets(4 * rows * vocab))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--limit", type=float, default=140, help="seconds after which the rest is left")
    parser.add_argument("--interpret", action="store_true", help="a tiny part, interpreted on the CPU")
    args = parser.parse_args(argv)
    if args.interpret:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    report = Report(args.out, args.limit)
    print(json.dumps(report.data["environment"]), flush=True)
    vocab, rows, batches = (8 * 144, 2, (1,)) if args.interpret else (VOCAB, 16, (1, 8, 32, 128))
    check_statistics(report, rows, vocab, args.interpret)
    check_sampling(report, rows, vocab, args.interpret)
    for batch in batches:
        report.check(f"time {batch} rows", functools.partial(time_rows, report, batch, vocab, args.interpret))
    if not args.interpret:
        check_statistics(report, 3, 128256, False)
        check_sampling(report, 130, 18992, False)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
