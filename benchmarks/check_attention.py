"""Proves on the GPU it runs on that attention gives a query the same bits in every call, and times it against cuDNN.

    python -m benchmarks.check_attention --out benchmarks/results/check_attention.json

Bits are compared as integers, so that -0.0 and NaN count. The base is always one prefill of the whole sequence.

* bits: chunks of many sizes, decode, batches, longer caches filled with something else, forced variants and clusters,
  every ratio of heads, head_dim 64 and 128, bfloat16 and float16, lengths up to 32768; and a twin, the ordinary op,
  that differs.
* numerics: sampled queries against float64, next to the ordinary op's error on the same input.
* speed: device time beside `jax.nn.dot_product_attention(implementation="cudnn")`, interleaved.

A failure is recorded and the rest still runs. Exits with 1 after any. `--interpret` runs a tiny part on the CPU.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_time import Cupti, WallClock, compare, count_sets
from benchmarks.environment import environment
from tbik_jax.pallas_kernels.attention.config import AttentionConfig, AttentionShape, choose_config
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan

BF16, F16 = jnp.bfloat16, jnp.float16
KINDS = ("normal", "wide", "cancelling", "zeros")
PLAN = AttentionPlan()
PREFILL = ((1, 2048), (1, 4096), (4, 2048), (1, 16384))  # (B, S), 32 query and 8 KV heads, H 128
DECODE = tuple((b, s) for s in (1024, 4096, 32768) for b in (1, 8, 32, 128))
Check = tuple[str, Callable[[], dict[str, Any]]]


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
    start, failures = time.monotonic(), 0
    result: dict[str, Any] = {"environment": environment(), "checks": [], "speed": []}
    for name, check in tiny_checks() if args.interpret else all_checks(args.no_speed):
        if time.monotonic() - start > args.limit:
            row: dict[str, Any] = {"name": name, "failed": "out of time"}
        else:
            row = _run(name, check)
        row["at_s"] = round(time.monotonic() - start, 1)
        failures += bool(row.get("failed"))
        result["speed" if name.startswith("speed") else "checks"].append(row)
        print(json.dumps(row), flush=True)
    result |= {"failures": failures, "seconds": round(time.monotonic() - start, 1)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{failures} failures in {result['seconds']} s")
    sys.exit(failures > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=140, help="seconds after which nothing new starts")
    parser.add_argument("--no-speed", action="store_true", help="leave out the timing")
    parser.add_argument("--interpret", action="store_true", help="a tiny part on the CPU")
    return parser.parse_args()


def _run(name: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"name": name, **check()}
    except Exception as error:  # one broken case must not hide the others
        last = traceback.format_exc().strip().splitlines()[-6:]
        return {"name": name, "failed": f"{type(error).__name__}: {str(error)[:400]}", "trace": last}


# --- inputs ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def inputs(heads: Heads, length: int, kind: str, seed: int = 0) -> tuple[jax.Array, ...]:
    """q, k, v of one row, at every position of `length`."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(1, length, heads.kv_heads * g, heads.h) for g in (heads.group, 1, 1)]
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=False))
    most = 12 if heads.dtype == BF16 else 5
    if kind == "wide":  # large scores and values of any size
        k = k * 3
        v = v * jnp.exp2(jax.random.uniform(keys[3], v.shape, minval=-most, maxval=most))
    elif kind == "cancelling":  # neighbours cancel but for a little, and many keys weigh the same
        k = k * 0.1
        v = jnp.where(jnp.arange(length)[:, None, None] % 2 == 0, 1, -1) * 2.0**8 + v * 2.0**-3
    elif kind == "zeros":  # zeros of both signs and underflow
        v = jnp.where(jax.random.bernoulli(keys[3], 0.9, v.shape), v * 0.0, v * 2.0**-20)
    return tuple(a.astype(heads.dtype) for a in (q, k, v))


_INTERPRET = False


def attend(q: Any, k: Any, v: Any, starts: Any, config: AttentionConfig | None = None) -> jax.Array:
    starts, scale = jnp.asarray(starts, jnp.int32), q.shape[3] ** -0.5
    return attention_mosaic_gpu(q, k, v, starts, plan=PLAN, scale=scale, config=config, interpret=_INTERPRET)


@functools.lru_cache(maxsize=8)
def base(heads: Heads, length: int, kind: str) -> jax.Array:
    return attend(*inputs(heads, length, kind), [0])


def differing(a: jax.Array, b: jax.Array) -> int:
    return int(jnp.sum(_bits(a) != _bits(b)))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def verdict(differs: dict[str, int], **more: Any) -> dict[str, Any]:
    """A row of the result; every number in `differs` must be 0."""
    bad = {what: count for what, count in differs.items() if count}
    return {"compared": len(differs), **({"failed": "bits differ", "differing": bad} if bad else {}), **more}


# --- bits --------------------------------------------------------------------------------------------------


def filled(x: jax.Array, used: jax.Array, capacity: int, filler: float) -> jax.Array:
    """A cache [B, capacity, ...] that holds x up to used [B] and something else behind."""
    x = jnp.pad(x, ((0, 0), (0, max(0, capacity - x.shape[1])), (0, 0), (0, 0)))
    return jnp.where(
        jnp.arange(x.shape[1])[None, :, None, None] < used[:, None, None, None], x, filler
    ).astype(x.dtype)


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
    rows = [jnp.asarray(starts)] if batched else [jnp.asarray([s]) for s in starts]
    differs = {}
    for at in rows:
        queries = jnp.concatenate([q[:, s : s + chunk] for s in at.tolist()])
        cache = [
            filled(jnp.broadcast_to(a, (len(at), *a.shape[1:])), at + chunk, capacity or length, 777.0)
            for a in (k, v)
        ]
        out = attend(queries, *cache, at)
        for i, s in enumerate(at.tolist()):
            differs[f"at {s}"] = differing(out[i], whole[0, s : s + chunk])
    return verdict(differs, chosen=str(_choice(heads, len(rows[0]), chunk, capacity or length)))


def _choice(heads: Heads, b: int, t: int, s: int) -> AttentionConfig:
    shape = AttentionShape(b=b, t=t, s=s, kv_heads=heads.kv_heads, group=heads.group, h=heads.h)
    return choose_config(shape, -(-s // PLAN.split))


def check_forced(heads: Heads, length: int, kind: str, chunk: int, start: int) -> dict[str, Any]:
    """The same call in every variant."""
    q, k, v = inputs(heads, length, kind)
    whole, differs = base(heads, length, kind), {}
    configs = [AttentionConfig(variant="split", cluster=c) for c in (1, 2, 4, 8)] + [
        AttentionConfig(variant="tiles")
    ]
    for config in configs:
        out = attend(q[:, start : start + chunk], k, v, [start], config)
        differs[f"{config.variant} {config.cluster}"] = differing(out[0], whole[0, start : start + chunk])
    return verdict(differs)


def check_batch(heads: Heads, length: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Rows of a batch of prefills against each alone, and twice the same call."""
    rows = [inputs(heads, length, kind) for kind in kinds]
    q, k, v = (jnp.concatenate(parts) for parts in zip(*rows, strict=True))
    out = attend(q, k, v, [0] * len(kinds))
    differs = {kind: differing(out[i], base(heads, length, kind)[0]) for i, kind in enumerate(kinds)}
    differs["again"] = sum(differing(attend(q, k, v, [0] * len(kinds)), out) for _ in range(5))
    return verdict(differs, finite=bool(jnp.isfinite(out).all()))


def check_twin(heads: Heads, length: int) -> dict[str, Any]:
    """The ordinary op must differ between prefill and decode, or these checks prove nothing."""
    q, k, v = inputs(heads, length, "normal")
    whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    at = length - 1
    one = jax.nn.dot_product_attention(q[:, at:], k, v)
    count = differing(one[0], whole[0, at:])
    return {"differing": count} if count else {"differing": 0, "note": "the ordinary op agrees here"}


# --- numerics ----------------------------------------------------------------------------------------------


def check_numerics(heads: Heads, length: int, kind: str) -> dict[str, Any]:
    """Largest error of sampled queries, over the largest |v|, of ours and of the ordinary op."""
    q, k, v = inputs(heads, length, kind)
    at = np.unique(np.linspace(0, length - 1, 24).astype(int))
    exact = exact_attention(*(np.asarray(a[0].astype(jnp.float32), np.float64) for a in (q, k, v)), at)
    ours = base(heads, length, kind)
    plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    size = np.abs(np.asarray(v.astype(jnp.float32))).max()
    lost = {
        name: float(np.abs(np.asarray(out[0, at].astype(jnp.float32), np.float64) - exact).max() / size)
        for name, out in (("ours", ours), ("plain", plain))
    }
    bad = not lost["ours"] <= 4 * lost["plain"] + 1e-6
    return {
        "error": lost,
        "finite": bool(jnp.isfinite(ours).all()),
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


def speed(
    b: int, t: int, s: int, kv_heads: int = 8, group: int = 4, h: int = 128, clock: Any = None
) -> dict[str, Any]:
    """Prefill where t == s, else decode at the end of the cache."""
    n, causal = kv_heads * group, t > 1
    cudnn = None if isinstance(clock, WallClock) else "cudnn"
    starts = jnp.full((b,), s - t, jnp.int32)
    functions = {
        "ours": jax.jit(functools.partial(attend, starts=np.asarray(starts))),
        "cudnn": jax.jit(
            functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=cudnn)
        ),
    }
    sets = []
    for i in range(count_sets(2 * (2 * b * t * n * h + 2 * b * s * kv_heads * h))):
        keys = jax.random.split(jax.random.key(i), 3)
        q = jax.random.normal(keys[0], (b, t, n, h), BF16)
        k, v = (jnp.tile(jax.random.normal(key, (1, s, kv_heads, h), BF16), (b, 1, 1, 1)) for key in keys[1:])
        sets.append((q, k, v))
    row: dict[str, Any] = {
        "b": b,
        "t": t,
        "s": s,
        "chosen": str(_choice(Heads(kv_heads=kv_heads, group=group, h=h), b, t, s)),
    }
    for name in list(functions):
        try:
            jax.block_until_ready(functions[name](*sets[0]))
        except Exception as error:  # cuDNN refuses some calls
            row[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:300]}"
            del functions[name]
    times = compare(functions, sets, clock or Cupti())
    row |= {f"{name}_us": timing.us for name, timing in times.items()}
    row |= {f"{name}_kernels": timing.kernels for name, timing in times.items()}
    if len(times) == 2:
        row["ratio"] = round(times["cudnn"].us / times["ours"].us, 3)
    if "ours" in times:
        flops, moved = 4 * b * n * h * t * s / (2 if causal else 1), 4 * b * s * kv_heads * h
        row |= {
            "tflops": round(flops / times["ours"].us / 1e6, 1),
            "gb_s": round(moved / times["ours"].us / 1e3, 1),
        }
    if "ours" not in times:
        row["failed"] = row.get("ours_error", "no time")
    return row


# --- what runs ---------------------------------------------------------------------------------------------


def all_checks(no_speed: bool) -> Iterator[Check]:
    """What tells most first."""
    h128, seams = (
        Heads(),
        [0, 1, 63, 64, 127, 128, 129, 511, 512, 513, 640, 1023, 1024, 1100, 1535, 1536, 1999],
    )
    part = functools.partial
    yield "numerics normal", part(check_numerics, h128, 2000, "normal")
    for kind in KINDS:
        yield f"decode {kind}", part(check_chunks, h128, 2000, kind, 1, seams)
    for kind in KINDS:
        yield f"variants {kind}", part(check_forced, h128, 2000, kind, 3, 1990)
    yield "decode alone", part(check_chunks, h128, 2000, "normal", 1, [0, 511, 512, 1999], batched=False)
    if not no_speed:
        yield from all_speeds()
    for chunk in (7, 16, 64, 100, 333, 1000):
        yield (
            f"chunks of {chunk}",
            part(check_chunks, h128, 2000, "cancelling", chunk, [0, 1, 65, 500, 777, 1000]),
        )
    yield "capacity", part(check_chunks, h128, 2000, "wide", 1, seams, capacity=4096)
    yield "capacity 2112", part(check_chunks, h128, 2000, "wide", 100, [0, 700, 1900], capacity=2112)
    yield "batch", part(check_batch, h128, 2000, KINDS)
    for kind in KINDS[1:]:
        yield f"numerics {kind}", part(check_numerics, h128, 2000, kind)
    for heads in (Heads(h=64), Heads(dtype=F16), Heads(h=64, dtype=F16, group=3), Heads(kv_heads=8, group=2)):
        yield f"decode {heads}", part(check_chunks, heads, 2000, "wide", 1, seams)
        yield f"chunks {heads}", part(check_chunks, heads, 2000, "wide", 100, [0, 65, 500, 1900])
        yield f"numerics {heads}", part(check_numerics, heads, 2000, "wide")
    for group in (1, 3, 5, 6, 7, 8):
        yield (
            f"decode group {group}",
            part(check_chunks, Heads(group=group), 704, "wide", 1, [0, 130, 511, 512, 703]),
        )
    yield "variants h 64", part(check_forced, Heads(h=64, group=3), 704, "wide", 3, 690)
    for length in (5000, 32768):
        at = [0, 64, 511, 512, 4095, 4096, length // 2, length - 200, length - 1]
        yield f"decode {length}", part(check_chunks, h128, length, "wide", 1, at)
        yield (
            f"chunks {length}",
            part(check_chunks, h128, length, "normal", 200, [0, 300, length // 2, length - 200]),
        )
        yield f"numerics {length}", part(check_numerics, h128, length, "normal")
    yield "variants 32768", part(check_forced, h128, 32768, "normal", 1, 32760)
    yield "twin", part(check_twin, Heads(kv_heads=8), 2000)


def all_speeds() -> Iterator[Check]:
    for b, s in PREFILL:
        yield f"speed prefill {b}x{s}", functools.partial(speed, b, s, s)
    for b, s in DECODE:
        yield f"speed decode {b}x{s}", functools.partial(speed, b, 1, s)


def tiny_checks() -> Iterator[Check]:
    """For the interpreter, to see that the script runs; bits are NumPy's there."""
    heads = Heads(h=64, group=2)
    yield "numerics", functools.partial(check_numerics, heads, 200, "wide")
    yield "decode", functools.partial(check_chunks, heads, 200, "normal", 1, [0, 130], capacity=256)
    yield "batch", functools.partial(check_batch, heads, 136, ("normal", "zeros"))
    yield "twin", functools.partial(check_twin, heads, 200)
    clock = WallClock()
    yield "speed decode", functools.partial(speed, 1, 1, 128, kv_heads=1, group=2, h=64, clock=clock)


if __name__ == "__main__":
    main()
