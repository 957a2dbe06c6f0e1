"""Proves on the GPU it runs on that attention gives a query the same bits in every call, and times it against cuDNN.

    python -m benchmarks.check_attention --out benchmarks/results/check_attention.json

Bits are compared as integers, so that -0.0 and NaN count. The base is always one prefill of the whole sequence.

* bits: chunks of many sizes, decode, batches, longer caches filled with something else, forced variants and clusters,
  every ratio of heads, head_dim 64 and 128, bfloat16 and float16, lengths up to 32768; and a twin, the ordinary op,
  that differs.
* numerics: sampled queries against float64, next to the ordinary op's error on the same input.
* speed: device time beside `jax.nn.dot_product_attention(implementation="cudnn")`, interleaved.

Checks of bits run side by side in threads, as compilation is most of their time; speed is measured when nothing else
runs, between what is likelier to fail and the rest. A failure is recorded and the rest still runs. Exits with 1 after
any. `--interpret` runs a tiny part on the CPU.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checks import Check, Checks, verdict
from tbik_jax.bench.device_time import Cupti, WallClock, compare, count_sets
from tbik_jax.pallas_kernels.attention.config import AttentionConfig, AttentionShape, choose_config
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan

BF16, F16 = jnp.bfloat16, jnp.float16
KINDS = ("normal", "wide", "cancelling", "zeros")
PLAN = AttentionPlan()
#: (B, T, S), 32 query and 8 KV heads, H 128
CASES = (
    *((b, 1, s) for s in (1024, 4096, 32768) for b in (1, 8, 32, 128)),
    *((b, s, s) for b, s in ((1, 2048), (1, 4096), (4, 2048), (1, 16384))),
    *((b, 1, s) for b, s in ((1, 8192), (1, 16384), (4, 32768))),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """What a model fixes."""

    kv_heads: int = 1
    group: int = 4
    h: int = 128
    dtype: Any = BF16


def main() -> None:
    global _INTERPRET
    args = _arguments()
    _INTERPRET = args.interpret
    log = Checks(args.out, args.limit)

    def run(checks: Iterator[Check], threads: int) -> None:
        if args.names:
            checks = (check for check in checks if check[0] in args.names or check[0].startswith("speed"))
        log.run(checks, threads)

    if args.interpret:
        run(tiny_checks(), 1)
    else:
        bits, speeds = args.only != "speed", args.only != "bits"
        cases = [Speed(b=b, t=t, s=s) for b, t, s in CASES] if speeds else []
        first = itertools.chain(
            first_bits() if bits else (), (("compile " + str(c), c.compile) for c in cases)
        )
        run(first, args.threads)
        run((("speed " + str(case), case.measure) for case in cases), 1)
        run(other_bits() if bits else iter(()), args.threads)
    sys.exit(log.finish() > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=130, help="seconds after which nothing new starts")
    parser.add_argument("--only", choices=("bits", "speed"), help="leave out the rest")
    parser.add_argument("--names", nargs="+", help="check the bits of those alone")
    parser.add_argument("--threads", type=int, default=12, help="checks of bits at a time")
    parser.add_argument("--interpret", action="store_true", help="a tiny part on the CPU")
    return parser.parse_args()


# --- inputs ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def inputs(heads: Heads, length: int, kind: str) -> tuple[np.ndarray, ...]:
    """q, k, v of one row, at every position of `length`. In NumPy, so that nothing is compiled for it."""
    rng = np.random.default_rng([length, KINDS.index(kind)])
    shapes = [(1, length, heads.kv_heads * g, heads.h) for g in (heads.group, 1, 1)]
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    most = 12 if heads.dtype == BF16 else 5
    if kind == "wide":  # large scores and values of any size
        k = k * 3
        v = v * np.exp2(rng.uniform(-most, most, v.shape).astype(np.float32))
    elif kind == "cancelling":  # neighbours cancel but for a little, and many keys weigh the same
        k = k * np.float32(0.1)
        v = np.where(np.arange(length)[:, None, None] % 2 == 0, 1, -1) * 2.0**8 + v * 2.0**-3
    elif kind == "zeros":  # zeros of both signs and underflow
        v = np.where(rng.random(v.shape) < 0.9, v * 0.0, v * 2.0**-20)
    return tuple(a.astype(heads.dtype) for a in (q, k, v))


_INTERPRET = False


def attend(q: Any, k: Any, v: Any, positions: Any, config: AttentionConfig | None = None) -> jax.Array:
    scale = q.shape[3] ** -0.5
    return attention_mosaic_gpu(
        q, k, v, positions, plan=PLAN, scale=scale, config=config, interpret=_INTERPRET
    )


def run_at(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, starts: Sequence[int], config: Any = None
) -> np.ndarray:
    """Attention of queries that start at `starts` [B]."""
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(q.shape[1], dtype=np.int32)
    return np.asarray(attend(*map(jnp.asarray, (q, k, v, positions)), config))


_BASES: dict[Any, concurrent.futures.Future[np.ndarray]] = {}
_LOCK = threading.Lock()


def base(heads: Heads, length: int, kind: str) -> np.ndarray:
    """One prefill, which threads that ask for the same one wait for."""
    key = heads, length, kind
    with _LOCK:
        mine = key not in _BASES
        future = _BASES.setdefault(key, concurrent.futures.Future())
    if mine:
        try:
            future.set_result(run_at(*inputs(*key), [0]))
        except Exception as error:
            future.set_exception(error)
    return future.result()


def differing(a: np.ndarray, b: np.ndarray) -> int:
    return int((a.view(np.uint16) != b.view(np.uint16)).sum())


# --- bits --------------------------------------------------------------------------------------------------


def filled(x: np.ndarray, used: Sequence[int], capacity: int, filler: float) -> np.ndarray:
    """Caches [B, capacity, ...] that hold x up to used [B] and something else behind."""
    cache = np.full((len(used), max(capacity, x.shape[1]), *x.shape[2:]), filler, x.dtype)
    for row, count in zip(cache, used, strict=True):
        row[:count] = x[0, :count]
    return cache


def check_chunks(
    heads: Heads,
    length: int,
    kind: str,
    chunk: int,
    starts: list[int],
    capacity: int = 0,
    batched: bool = True,
) -> dict[str, Any]:
    """Chunks of one size at `starts`, each a row of one batch, and alone if not `batched`."""
    q, k, v = inputs(heads, length, kind)
    whole = base(heads, length, kind)
    starts = [s for s in starts if s + chunk <= length]
    rows = [starts] if batched else [[start] for start in starts]
    differs = {}
    for at in rows:
        queries = np.concatenate([q[:, s : s + chunk] for s in at])
        cache = [filled(a, [s + chunk for s in at], capacity or length, 777.0) for a in (k, v)]
        out = run_at(queries, *cache, at)
        differs |= {f"at {s}": differing(out[i], whole[0, s : s + chunk]) for i, s in enumerate(at)}
    return verdict(differs, chosen=str(_choice(heads, len(rows[0]), chunk, capacity or length)))


def _choice(heads: Heads, b: int, t: int, s: int) -> AttentionConfig:
    shape = AttentionShape(b=b, t=t, s=s, kv_heads=heads.kv_heads, group=heads.group, h=heads.h)
    return choose_config(shape, heads.dtype, PLAN)


def check_forced(heads: Heads, length: int, kind: str, chunk: int, start: int) -> dict[str, Any]:
    """The same call in every variant."""
    q, k, v = inputs(heads, length, kind)
    whole, differs = base(heads, length, kind), {}
    split = functools.partial(AttentionConfig, variant="split")
    configs = [
        AttentionConfig(variant="tiles"),
        *(split(parts=parts) for parts in (1, 2, 4, 8)),
        split(parts=2, stages=3, value_stages=2),
        split(parts=1, value_stages=3),
        split(parts=3, second_launch=True),
        split(parts=16, second_launch=True, value_stages=3),
    ]
    for config in configs:
        out = run_at(q[:, start : start + chunk], k, v, [start], config)
        differs[str(config)] = differing(out[0], whole[0, start : start + chunk])
    return verdict(differs)


def check_columns(heads: Heads, length: int, kind: str, chunk: int, starts: list[int]) -> dict[str, Any]:
    """Chunks at `starts`, each a row of one batch, in every way that "columns" has; at most 8 rows a KV head."""
    q, k, v = inputs(heads, length, kind)
    whole, differs = base(heads, length, kind), {}
    columns = functools.partial(AttentionConfig, variant="columns")
    configs = [
        columns(stages=3, value_stages=3),
        *(columns(parts=parts, stages=6, value_stages=6) for parts in (1, 2, 4, 8)),
        columns(parts=8, second_launch=True, stages=6, value_stages=6),
        columns(parts=32, second_launch=True, stages=3, value_stages=3),
    ]
    if heads.h == 128:
        configs += [columns(parts=parts, value_parts=2, stages=8, value_stages=8) for parts in (1, 2, 4)]
    queries = np.concatenate([q[:, s : s + chunk] for s in starts])
    caches = [filled(a, [s + chunk for s in starts], length, 777.0) for a in (k, v)]
    for config in configs:
        out = run_at(queries, *caches, starts, config)
        differs |= {
            f"{config} at {s}": differing(out[i], whole[0, s : s + chunk]) for i, s in enumerate(starts)
        }
    return verdict(differs)


def check_batch(heads: Heads, length: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Rows of a batch of prefills against each alone, and twice the same call."""
    rows = [inputs(heads, length, kind) for kind in kinds]
    q, k, v = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    starts = [0] * len(kinds)
    out = run_at(q, k, v, starts)
    differs = {kind: differing(out[i], base(heads, length, kind)[0]) for i, kind in enumerate(kinds)}
    differs["again"] = sum(differing(run_at(q, k, v, starts), out) for _ in range(5))
    return verdict(differs, finite=bool(np.isfinite(out.astype(np.float32)).all()))


def check_twin(heads: Heads, length: int) -> dict[str, Any]:
    """The ordinary op must differ between prefill and decode, or these checks prove nothing."""
    q, k, v = map(jnp.asarray, inputs(heads, length, "normal"))
    whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    at = length - 1
    one = jax.nn.dot_product_attention(q[:, at:], k, v)
    count = differing(np.asarray(one[0]), np.asarray(whole[0, at:]))
    return {"differing": count} if count else {"differing": 0, "note": "the ordinary op agrees here"}


# --- numerics ----------------------------------------------------------------------------------------------


def check_numerics(heads: Heads, length: int, kind: str) -> dict[str, Any]:
    """Largest error of sampled queries, over the largest |v|, of ours and of the ordinary op."""
    q, k, v = inputs(heads, length, kind)
    at = np.unique(np.linspace(0, length - 1, 24).astype(int))
    exact = exact_attention(*(a[0].astype(np.float64) for a in (q, k, v)), at)
    ours = base(heads, length, kind)
    seen = jnp.asarray(np.arange(length) <= at[:, None])
    plain = jax.nn.dot_product_attention(*map(jnp.asarray, (q[:, at], k, v)), mask=seen[None, None])
    size = np.abs(v.astype(np.float32)).max()
    lost = {
        name: float(np.abs(np.asarray(out).astype(np.float64) - exact).max() / size)
        for name, out in (("ours", ours[0, at]), ("plain", plain[0]))
    }
    bad = not lost["ours"] <= 4 * lost["plain"] + 1e-6
    return {
        "error": lost,
        "finite": bool(np.isfinite(ours.astype(np.float32)).all()),
        **({"failed": "inaccurate"} if bad else {}),
    }


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Queries q [T, N, H] at positions `at` over k, v [S, K, H], in float64."""
    group, outs = q.shape[1] // k.shape[1], []
    for p in at:
        queries = q[p].reshape(k.shape[1], group, -1)
        scores = np.einsum("kgh,skh->kgs", queries, k[: p + 1]) * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("kgs,skh->kgh", weights / weights.sum(-1, keepdims=True), v[: p + 1])
        outs.append(out.reshape(q.shape[1], -1))
    return np.stack(outs)


# --- speed -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Device time of one call: prefill where t == s, else decode at the end of the cache."""

    b: int
    t: int
    s: int
    kv_heads: int = 8
    group: int = 4
    h: int = 128
    clock: Any = None

    def __str__(self) -> str:
        return f"{'prefill' if self.t > 1 else 'decode'} {self.b}x{self.s}"

    def compile(self) -> dict[str, Any]:
        return {"refused": self.programs()[1]}

    @functools.cache  # noqa: B019 - as long as the process
    def programs(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The compiled functions, and errors of those that are refused, as cuDNN refuses some calls."""
        b, t, s, kv_heads, h = self.b, self.t, self.s, self.kv_heads, self.h
        cudnn = None if isinstance(self.clock, WallClock) else "cudnn"
        plain = functools.partial(jax.nn.dot_product_attention, is_causal=t > 1, implementation=cudnn)
        queries = jax.ShapeDtypeStruct((b, t, kv_heads * self.group, h), BF16)
        keys = jax.ShapeDtypeStruct((b, s, kv_heads, h), BF16)
        positions = jax.ShapeDtypeStruct((b, t), jnp.int32)
        compiled, refused = {}, {}
        for name, function in (("ours", attend), ("cudnn", lambda q, k, v, _: plain(q, k, v))):
            try:
                compiled[name] = jax.jit(function).lower(queries, keys, keys, positions).compile()
            except Exception as error:
                refused[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return compiled, refused

    def sets(self) -> list[tuple[jax.Array, ...]]:
        b, t, s, kv_heads, h = self.b, self.t, self.s, self.kv_heads, self.h
        n, sets = kv_heads * self.group, []
        positions = jnp.broadcast_to(jnp.arange(s - t, s, dtype=jnp.int32), (b, t))
        for i in range(count_sets(2 * (2 * b * t * n * h + 2 * b * s * kv_heads * h))):
            keys = jax.random.split(jax.random.key(i), 3)
            q = jax.random.normal(keys[0], (b, t, n, h), BF16)
            k, v = (
                jnp.tile(jax.random.normal(key, (1, s, kv_heads, h), BF16), (b, 1, 1, 1)) for key in keys[1:]
            )
            sets.append((q, k, v, positions))
        return sets

    def measure(self) -> dict[str, Any]:
        b, t, s, kv_heads, h = self.b, self.t, self.s, self.kv_heads, self.h
        compiled, refused = self.programs()
        times = compare(dict(compiled), self.sets(), self.clock or Cupti())
        heads = Heads(kv_heads=kv_heads, group=self.group, h=h)
        row: dict[str, Any] = {"b": b, "t": t, "s": s, "chosen": str(_choice(heads, b, t, s)), **refused}
        for name, timing in times.items():
            row |= {f"{name}_us": timing.us, f"{name}_p10": timing.p10, f"{name}_kernels": timing.kernels}
        if "ours" not in times:
            return row | {"failed": row["ours_error"]}
        us = times["ours"].us
        if len(times) == 2:
            row["ratio"] = round(times["cudnn"].us / us, 3)
        flops = 4 * b * kv_heads * self.group * h * t * s / (2 if t > 1 else 1)
        return row | {
            "tflops": round(flops / us / 1e6, 1),
            "gb_s": round(4 * b * s * kv_heads * h / us / 1e3, 1),
        }


# --- what runs ---------------------------------------------------------------------------------------------

SEAMS = [0, 1, 63, 64, 127, 128, 129, 511, 512, 513, 640, 1023, 1024, 1100, 1535, 1536, 1999]
part = functools.partial
#: Heads for which "columns" is forced, and queries of a call.
COLUMN_HEADS = (
    (Heads(), 1),
    (Heads(group=1), 1),
    (Heads(group=2), 1),
    (Heads(group=2), 4),
    (Heads(group=8), 1),
    (Heads(h=64), 1),
    (Heads(dtype=F16), 1),
    (Heads(h=64, dtype=F16, group=3), 2),
)


def first_bits() -> Iterator[Check]:
    """What is likelier to fail, longest first."""
    h128 = Heads()
    for length in (32768, 5000):
        at = [0, 64, 511, 512, 4095, 4096, length // 2, length - 200, length - 1]
        yield f"decode {length}", part(check_chunks, h128, length, "wide", 1, at)
        alone = part(check_chunks, h128, length, "wide", 1, [4096, length - 1], batched=False)
        yield f"decode alone {length}", alone
        chunks = [0, 300, length // 2, length - 200]
        yield f"chunks {length}", part(check_chunks, h128, length, "normal", 200, chunks)
        yield f"numerics {length}", part(check_numerics, h128, length, "normal")
    yield "variants 32768", part(check_forced, h128, 32768, "normal", 1, 32760)
    yield "variants h 64", part(check_forced, Heads(h=64, group=3), 2000, "wide", 3, 1990)
    yield "variants wide", part(check_forced, h128, 2000, "wide", 3, 1990)
    late = [0, 511, 512, 4096, 16000, 32000, 32767]
    yield "columns 32768", part(check_columns, h128, 32768, "normal", 1, late)
    for heads, chunk in COLUMN_HEADS:
        yield f"columns {heads}", part(check_columns, heads, 2000, "wide", chunk, SEAMS[:-1])
    for heads in (Heads(h=64), Heads(dtype=F16), Heads(h=64, dtype=F16, group=3), Heads(kv_heads=8, group=2)):
        yield f"decode {heads}", part(check_chunks, heads, 2000, "wide", 1, SEAMS)
        yield f"chunks {heads}", part(check_chunks, heads, 2000, "wide", 100, [0, 65, 500, 1900])
        yield f"numerics {heads}", part(check_numerics, heads, 2000, "wide")
    small = Heads(kv_heads=8, group=2, h=64)
    yield "small model", part(check_chunks, small, 704, "wide", 20, [0, 100, 500])
    for group in (1, 3, 5, 6, 7, 8):
        heads = Heads(group=group)
        yield f"decode group {group}", part(check_chunks, heads, 704, "wide", 1, [0, 130, 511, 512, 703])
    yield "twin", part(check_twin, Heads(kv_heads=8), 2000)


def other_bits() -> Iterator[Check]:
    h128 = Heads()
    for kind in KINDS:
        yield f"numerics {kind}", part(check_numerics, h128, 2000, kind)
        yield f"decode {kind}", part(check_chunks, h128, 2000, kind, 1, SEAMS)
        if kind != "wide":  # among the first
            yield f"variants {kind}", part(check_forced, h128, 2000, kind, 3, 1990)
            yield f"columns {kind}", part(check_columns, h128, 2000, kind, 1, SEAMS)
    yield "decode alone", part(check_chunks, h128, 2000, "normal", 1, [0, 511, 512, 1999], batched=False)
    for chunk in (7, 16, 64, 100, 333, 1000):
        at = [0, 1, 65, 500, 777, 1000]
        yield f"chunks of {chunk}", part(check_chunks, h128, 2000, "cancelling", chunk, at)
    yield "capacity", part(check_chunks, h128, 2000, "wide", 1, SEAMS, capacity=4096)
    yield "capacity 2112", part(check_chunks, h128, 2000, "wide", 100, [0, 700, 1900], capacity=2112)
    yield "batch", part(check_batch, h128, 2000, KINDS)


def tiny_checks() -> Iterator[Check]:
    """For the interpreter, to see that the script runs; bits are NumPy's there."""
    heads = Heads(h=64, group=2)
    yield "numerics", part(check_numerics, heads, 200, "wide")
    yield "decode", part(check_chunks, heads, 200, "normal", 1, [0, 130], capacity=256)
    yield "columns", part(check_chunks, Heads(), 256, "normal", 1, [0, 130])
    yield "batch", part(check_batch, heads, 136, ("normal", "zeros"))
    yield "twin", part(check_twin, heads, 200)
    case = Speed(b=1, t=1, s=128, kv_heads=1, group=2, h=64, clock=WallClock())
    yield "compile decode", case.compile
    yield "speed decode", case.measure


if __name__ == "__main__":
    main()
