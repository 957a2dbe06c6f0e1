"""Proves on the GPU it runs on that attention's gradients depend on the row and KV head alone, and times them.

    python -m benchmarks.check_attention_backward --out benchmarks/results/check_attention_backward.json

* numerics: gradients against those of float32 attention on the same values, next to the error of the ordinary op.
* bits: a row alone, in a batch and in another place of it; a KV head alone and among eight; a sequence that something
  follows whose cotangents are 0; the same call again. The output beside the log-sum-exp is `attention`'s.
* speed: device time beside cuDNN's backward pass, interleaved, from what its own forward pass kept.

Compilation runs in threads; speed is measured when nothing else runs. A failure is recorded and the rest still runs.
Exits with 1 after any. `--interpret` runs a tiny part on the CPU.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checks import Check, Checks, verdict
from tbik_jax.bench.device_time import Cupti, WallClock, compare
from tbik_jax.pallas_kernels import attention
from tbik_jax.pallas_kernels.attention.backward_mosaic_gpu import attention_backward_mosaic_gpu
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan

BF16, F16 = jnp.bfloat16, jnp.float16
NAMES = ("dq", "dk", "dv")
_INTERPRET = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a call."""

    b: int = 1
    t: int = 1000
    kv_heads: int = 2
    group: int = 4
    h: int = 128
    dtype: Any = BF16

    def __str__(self) -> str:
        name = jnp.dtype(self.dtype).name
        return f"{self.b}x{self.t} heads {self.kv_heads}x{self.group} h {self.h} {name}"


@functools.lru_cache(maxsize=16)
def inputs(shape: Shape, kind: str = "normal", seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v and dout. In NumPy, so that nothing is compiled for it."""
    rng = np.random.default_rng([seed, shape.t, shape.h])
    heads = (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads, shape.kv_heads * shape.group)
    q, k, v, dout = (rng.standard_normal((shape.b, shape.t, n, shape.h), np.float32) for n in heads)
    if kind == "wide":  # sharp softmax, and cotangents of any size
        k = k * 3
        dout = dout * np.exp2(rng.uniform(-8, 4, dout.shape).astype(np.float32))
    return tuple(a.astype(shape.dtype) for a in (q, k, v, dout))


@functools.partial(jax.jit, static_argnames="interpret")
def _gradients(q: Any, k: Any, v: Any, dout: Any, interpret: bool) -> tuple[Any, ...]:
    """out, lse, dq, dk and dv."""
    scale = q.shape[3] ** -0.5
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    plan = AttentionPlan()
    short = max(plan.block - k.shape[1], -k.shape[1] % 8)
    keys, values = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (k, v))
    options = {"plan": plan, "scale": scale, "interpret": interpret}
    out, lse = attention_mosaic_gpu(q, keys, values, positions, with_lse=True, **options)
    grads = attention_backward_mosaic_gpu(q, k, v, out, lse, dout, scale=scale, interpret=interpret)
    return out, lse, *grads


def gradients(*operands: np.ndarray) -> dict[str, np.ndarray]:
    outs = _gradients(*map(jnp.asarray, operands), interpret=_INTERPRET)
    return dict(zip(("out", "lse", *NAMES), map(np.asarray, outs), strict=True))


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray], cut: Any = np.s_[:]) -> dict[str, int]:
    """Elements of each gradient whose bytes differ; `cut` is taken of b."""
    counts = {}
    for name in a:
        mine, other = np.ascontiguousarray(a[name]), np.ascontiguousarray(b[name][cut])
        kind = {2: np.uint16, 4: np.uint32}[mine.dtype.itemsize]
        counts[name] = int((mine.view(kind) != other.view(kind)).sum())
    return counts


# --- bits --------------------------------------------------------------------------------------------------


def check_rows(shape: Shape, kind: str) -> dict[str, Any]:
    """Each row of a batch against itself alone; the batch turned round; the same call again."""
    operands = inputs(shape, kind)
    whole, differs = gradients(*operands), {}
    for row in range(shape.b):
        alone = gradients(*(a[row : row + 1] for a in operands))
        differs |= {
            f"{n} of row {row}": c for n, c in differences(alone, whole, np.s_[row : row + 1]).items()
        }
    turned = gradients(*(a[::-1].copy() for a in operands))
    differs |= {f"{n} turned": c for n, c in differences(turned, whole, np.s_[::-1]).items()}
    for _ in range(5):
        again = differences(gradients(*operands), whole)
        differs |= {f"{n} again": differs.get(f"{n} again", 0) + c for n, c in again.items()}
    finite = all(bool(np.isfinite(a.astype(np.float32)).all()) for a in whole.values())
    return verdict(differs | {"not finite": 0 if finite else 1})


def check_heads(shape: Shape, kind: str) -> dict[str, Any]:
    """Each KV head alone against itself among the others."""
    q, k, v, dout = inputs(shape, kind)
    whole, differs = gradients(q, k, v, dout), {}
    for head in range(shape.kv_heads):
        queries = np.s_[:, :, head * shape.group : (head + 1) * shape.group]
        keys = np.s_[:, :, head : head + 1]
        alone = gradients(q[queries], k[keys], v[keys], dout[queries])
        for name in alone:
            cut = keys if name in ("dk", "dv") else queries
            differs[f"{name} of head {head}"] = differences({name: alone[name]}, {name: whole[name]}, cut)[
                name
            ]
    return verdict(differs)


def check_followed(shape: Shape, more: int, kind: str) -> dict[str, Any]:
    """A sequence against the beginning of a longer one whose later cotangents are 0."""
    operands = inputs(shape, kind)
    alone = gradients(*operands)
    rng = np.random.default_rng(1)
    longer = []
    for i, a in enumerate(operands):
        rest = rng.standard_normal((a.shape[0], more, *a.shape[2:])).astype(a.dtype)
        longer.append(np.concatenate([a, rest if i < 3 else np.zeros_like(rest)], axis=1))
    return verdict(differences(alone, gradients(*longer), np.s_[:, : shape.t]))


def check_forward(shape: Shape, kind: str) -> dict[str, Any]:
    """The output beside the log-sum-exp against that of attention as `generate` calls it."""
    q, k, v, dout = inputs(shape, kind)
    positions = np.broadcast_to(np.arange(shape.t, dtype=np.int32), q.shape[:2])
    ours = {"out": gradients(q, k, v, dout)["out"]}
    if _INTERPRET:
        return verdict({})
    plain = attention(*map(jnp.asarray, (q, k, v, positions)))
    return verdict(differences(ours, {"out": np.asarray(plain)}))


def check_twin(shape: Shape) -> dict[str, Any]:
    """The ordinary op's gradients of a head alone and among others; where they differ, these checks can fail."""
    q, k, v, dout = map(jnp.asarray, inputs(shape))
    ordinary = jax.jit(lambda q, k, v, dout: _plain(q, k, v)[1](dout))
    whole = ordinary(q, k, v, dout)
    alone = ordinary(*(a[:1] for a in (q, k, v, dout)))
    counts = {
        n: int((np.asarray(a) != np.asarray(b[:1])).sum())
        for n, a, b in zip(NAMES, alone, whole, strict=True)
    }
    return {"differing": counts}


# --- numerics ----------------------------------------------------------------------------------------------


def _plain(q: Any, k: Any, v: Any) -> tuple[Any, Callable[..., Any]]:
    return jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True, implementation="xla"), q, k, v)


def check_numerics(shape: Shape, kind: str) -> dict[str, Any]:
    """Largest error over the largest element of each gradient, of ours and of the ordinary op."""
    operands = inputs(shape, kind)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda q, k, v, dout: _plain(q, k, v)[1](dout))(
            *(jnp.asarray(a.astype(np.float32)) for a in operands)
        )
    plain = jax.jit(lambda q, k, v, dout: _plain(q, k, v)[1](dout))(*map(jnp.asarray, operands))
    ours = gradients(*operands)
    lost: dict[str, dict[str, float]] = {}
    bad = []
    for i, name in enumerate(NAMES):
        true = np.asarray(exact[i], np.float64)
        size = np.abs(true).max()
        lost[name] = {
            "ours": float(np.abs(ours[name].astype(np.float64) - true).max() / size),
            "plain": float(np.abs(np.asarray(plain[i]).astype(np.float64) - true).max() / size),
        }
        if not lost[name]["ours"] <= 2 * lost[name]["plain"] + 1e-6:
            bad.append(name)
    return {"error": lost, **({"failed": f"inaccurate: {', '.join(bad)}"} if bad else {})}


# --- speed -------------------------------------------------------------------------------------------------


def measure(shape: Shape, clock: Any = None) -> dict[str, Any]:
    """Device microseconds of the backward pass alone."""
    implementation = "xla" if _INTERPRET else "cudnn"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [shape.kv_heads * n for n in (shape.group, 1, 1, shape.group)]
    q, k, v, dout = (
        jax.random.normal(key, (shape.b, shape.t, n, shape.h), shape.dtype)
        for key, n in zip(keys, sizes, strict=True)
    )
    out, lse, *_ = _gradients(q, k, v, dout, interpret=_INTERPRET)
    backward = functools.partial(attention_backward_mosaic_gpu, scale=shape.h**-0.5, interpret=_INTERPRET)
    ours = jax.jit(lambda q, k, v, out, lse, dout, _: backward(q, k, v, out, lse, dout))
    pull = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1])(q, k, v)
    theirs = jax.jit(lambda q, k, v, out, lse, dout, pull: pull(dout))
    operands = (q, k, v, out, lse, dout, pull)
    functions = {"ours": ours.lower(*operands).compile(), implementation: theirs.lower(*operands).compile()}
    times = compare(dict(functions), [operands], clock or (WallClock() if _INTERPRET else Cupti()))
    row: dict[str, Any] = dataclasses.asdict(shape) | {"dtype": jnp.dtype(shape.dtype).name}
    for name, timing in times.items():
        row |= {f"{name}_us": timing.us, f"{name}_p10": timing.p10, f"{name}_kernels": timing.kernels}
    us = times["ours"].us
    flops = 2.5 * 4 * shape.b * shape.kv_heads * shape.group * shape.h * shape.t**2 / 2
    return row | {"ratio": round(times[implementation].us / us, 3), "tflops": round(flops / us / 1e6, 1)}


# --- what runs ---------------------------------------------------------------------------------------------

part = functools.partial
SPEEDS = (
    Shape(b=8, t=2048, kv_heads=8),
    Shape(b=8, t=2048, kv_heads=8, group=2),
    Shape(b=4, t=4096, kv_heads=8),
    Shape(b=1, t=16384, kv_heads=8),
    Shape(b=32, t=768, kv_heads=8, group=2),
    Shape(b=8, t=2048, kv_heads=8, h=64),
)


def checks() -> Iterator[Check]:
    kinds = (Shape(), Shape(h=64), Shape(dtype=F16), Shape(group=2), Shape(group=1), Shape(group=8))
    for shape in kinds:
        yield f"numerics {shape}", part(check_numerics, shape, "normal")
        batch = dataclasses.replace(shape, b=3)
        yield f"rows {batch}", part(check_rows, batch, "wide")
        yield f"forward {shape}", part(check_forward, shape, "wide")
    yield "numerics wide", part(check_numerics, Shape(), "wide")
    yield "numerics 2048", part(check_numerics, Shape(t=2048, group=2), "normal")
    for shape in (Shape(kv_heads=8, t=520), Shape(kv_heads=8, t=520, h=64, group=2)):
        yield f"heads {shape}", part(check_heads, shape, "wide")
    for t in (1, 8, 63, 64, 65, 127, 128, 129, 511, 1000):
        for more in (1, 64, 200):
            yield f"{t} followed by {more}", part(check_followed, Shape(t=t), more, "wide")
    yield "rows 8x2048", part(check_rows, Shape(b=8, t=2048, kv_heads=8), "normal")
    yield "twin", part(check_twin, Shape(b=3))


def tiny_checks() -> Iterator[Check]:
    """For the interpreter, to see that the script runs; bits are NumPy's there."""
    shape = Shape(t=72, kv_heads=1, group=2, h=64)
    yield "numerics", part(check_numerics, shape, "normal")
    yield "rows", part(check_rows, dataclasses.replace(shape, b=2), "wide")
    yield "heads", part(check_heads, dataclasses.replace(shape, kv_heads=2), "wide")
    yield "followed", part(check_followed, shape, 64, "wide")
    yield "forward", part(check_forward, shape, "wide")
    yield "twin", part(check_twin, dataclasses.replace(shape, b=2))


def main() -> None:
    global _INTERPRET
    args = _arguments()
    _INTERPRET = args.interpret
    log = Checks(args.out, args.limit)
    if args.only != "speed":
        log.run(tiny_checks() if args.interpret else checks(), 1 if args.interpret else args.threads)
    if args.only != "bits":
        tiny = (Shape(t=64, kv_heads=1, group=1, h=64),)
        shapes = tiny if args.interpret else SPEEDS
        log.run(((f"speed {shape}", part(measure, shape)) for shape in shapes), 1)
    sys.exit(log.finish() > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which nothing new starts")
    parser.add_argument("--only", choices=("bits", "speed"), help="leave out the rest")
    parser.add_argument("--threads", type=int, default=12, help="checks at a time")
    parser.add_argument("--interpret", action="store_true", help="a tiny part on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
