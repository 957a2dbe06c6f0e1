"""Plain JAX beside `tbik_jax.invariant` and the drop-in ops on one GPU: bits of a row alone, and what they cost.

    python -m benchmarks.drop_in_speed --out benchmarks/results/drop_in_h200.json
    python -m benchmarks.drop_in_speed --dry         # small, on the CPU, by the host's clock

* field: what JAX's users reported: a row of eight in a product of K=4096, identical rows with different sums, a
  bfloat16 rounding that jit drops. How many elements differ, plain and invariant.
* model: models of Flax, Equinox and Haiku (`drop_in_models`), forward and gradient. How many elements of a row differ
  alone and in the batch, plain and invariant, and the device time of both, interleaved (`device_time`).
* op: the ops of `tbik_jax` and the primitives of `invariant` beside JAX's own, likewise.

Equinox and Haiku are optional: without them (and what they import) their rows hold an error, and the rest goes on. Many
processes compile and take turns on the GPU (`gpu_pool`); arrays are made on the host. What XLA times candidates for is
compiled by the one that has the GPU. Exits with 1 if an invariant result differs or a row failed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tbik_jax
from benchmarks import gpu_pool
from benchmarks.drop_in_models import MODELS, REALISTIC, SMALL, Model, gradient
from benchmarks.matmul_speed import dump
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment

BF16, F32 = jnp.bfloat16, jnp.float32
DIMS = (((1,), (0,)), ((), ()))
_MOST_SETS = 8

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Two functions of the same arguments, and what to compare.

    Attributes:
        plain: JAX's.
        invariant: ours.
        args: what they are called with, the rows last.
        one: `args` for a row alone, and how to take that row out of the results; None where rows are not compared.
        timed: XLA times candidates when it compiles `plain`.
    """

    plain: Callable[..., Any]
    invariant: Callable[..., Any]
    args: tuple[Any, ...]
    one: tuple[tuple[Any, ...], Callable[[Any], Any]] | None = None
    timed: bool = True


def _differ(a: Any, b: Any) -> int:
    """Elements of two trees with other bits."""
    return sum(
        int((x.view(np.uint8) != y.view(np.uint8)).reshape(*x.shape, -1).any(-1).sum())
        for x, y in zip(*([np.ascontiguousarray(v) for v in jax.tree.leaves(t)] for t in (a, b)), strict=True)
    )


# field ---------------------------------------------------------------------------------------------------------------


def _row_of_eight(dot: Callable[..., jax.Array], n: int) -> tuple[int, int]:
    """One row against eight, as in the JAX issue: K=4096, bfloat16."""
    x, w = (jax.random.normal(jax.random.key(i), s, BF16) for i, s in enumerate(((8, 4096), (4096, n))))
    run = jax.jit(dot)
    whole = run(x, w)
    return sum(_differ(run(x[i : i + 1], w), whole[i : i + 1]) for i in range(8)), whole.size


def _identical_rows(dot: Callable[..., jax.Array], dtype: Any, rows: tuple[int, ...]) -> tuple[int, int]:
    """Rows of one tensor that are equal: results that differ from the first row's."""
    k, run, differ, of = 1000, jax.jit(dot), 0, 0
    for n, seed, count in itertools.product((1, 48), range(4), rows):
        w = jax.random.normal(jax.random.key(seed + 4), (k, n), dtype)
        row = jax.random.normal(jax.random.key(seed), (1, k), dtype)
        out = np.asarray(run(jnp.tile(row, (count, 1)), w))
        differ, of = differ + _differ(out, np.broadcast_to(out[:1], out.shape)), of + out.size
    return differ, of


def _rounding(transform: Callable[..., Any], n: int) -> tuple[int, int]:
    """A bfloat16 product and sum, then a float32 difference, under jit: numbers that skipped a rounding."""
    x, y = (jax.random.normal(jax.random.key(i), (n,), BF16) for i in range(2))
    out = jax.jit(transform(lambda x, y: (x * y + y).astype(F32) - x.astype(F32)))(x, y)
    a, b = np.asarray(x), np.asarray(y)  # ml_dtypes rounds each step
    return _differ(out, (a * b + b).astype(np.float32) - a.astype(np.float32)), n


def field_tests(dry: bool) -> dict[str, Callable[[bool], tuple[int, int]]]:
    """The reports from the field: whether plain, to elements that differ, of how many."""
    plain = functools.partial(jax.lax.dot_general, dimension_numbers=DIMS)
    ours = functools.partial(tbik_jax.dot_general, dimension_numbers=DIMS)
    rows = (3, 8, 65) if dry else (3, 8, 65, 1000, 4100)
    n = 64 if dry else 4096
    return {
        "1 row of 8, K=4096, bfloat16": lambda p: _row_of_eight(plain if p else ours, n),
        "1 row of 8, K=4096, bfloat16 to float32": lambda p: _row_of_eight(
            functools.partial(plain if p else ours, preferred_element_type=F32), n
        ),
        "identical rows, bfloat16": lambda p: _identical_rows(plain if p else ours, BF16, rows),
        "identical rows, float32": lambda p: _identical_rows(plain if p else ours, F32, rows),
        "bfloat16 rounding under jit": lambda p: _rounding((lambda f: f) if p else tbik_jax.invariant, 4096),
    }


# models --------------------------------------------------------------------------------------------------------------


def _forward(model: Model) -> Case:
    """A row alone against the row in the batch."""
    p, x = model.parameters, model.x
    return Case(
        plain=model.forward,
        invariant=tbik_jax.invariant(model.forward),
        args=(p, x),
        one=((p, x[2:3]), lambda out: out[2:3]),
    )


def _gradient(model: Model) -> Case:
    """The gradient of the parameters, which has all rows in it: only its cost."""
    function = gradient(model)
    args = model.parameters, model.x
    return Case(plain=function, invariant=tbik_jax.invariant(function), args=args)


def model_cases(dry: bool) -> dict[str, Callable[[], Case]]:
    size = SMALL if dry else REALISTIC
    cases = {f"{name}, forward": lambda make=make: _forward(make(size)) for name, make in MODELS.items()}
    for name in ("nnx transformer", "linen language model"):
        cases[f"{name}, gradient"] = lambda make=MODELS[name]: _gradient(make(size))
    return cases


# ops -----------------------------------------------------------------------------------------------------------------


def _normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _rows(
    plain: Callable[..., Any], ours: Callable[..., Any], x: jax.Array, *rest: Any, timed: bool = True
) -> Case:
    """A function of rows first."""
    one = (x[2:3], *rest), lambda out: out[2:3]
    return Case(plain=plain, invariant=ours, args=(x, *rest), one=one, timed=timed)


def _transformed(function: Callable[..., Any], x: jax.Array, *rest: Any, timed: bool = True) -> Case:
    return _rows(function, tbik_jax.invariant(function), x, *rest, timed=timed)


def _embedding_gradient(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jax.grad(lambda table: jnp.square(table[tokens].astype(F32)).sum())(table)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def op_cases(dry: bool) -> dict[str, Callable[[], Case]]:
    """Cases by name; they hold arrays, so each is made when it is measured."""
    cases = _product_cases(dry)
    m, k = (16, 256) if dry else (4096, 4096)
    for name, (plain, ours) in _ROW_OPS.items():
        cases[name] = lambda plain=plain, ours=ours: _rows(plain, ours, _normal(m, k), timed=False)
    cases["invariant: cumsum"] = lambda: _transformed(
        lambda x: jnp.cumsum(x, axis=-1), _normal(m, k), timed=False
    )
    vocabulary, width, tokens = (50, 64, 64) if dry else (32000, 2048, 8192)

    def embedding() -> Case:
        ids = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
        ours = tbik_jax.invariant(_embedding_gradient)
        args = _normal(vocabulary, width), ids
        return Case(plain=_embedding_gradient, invariant=ours, args=args, timed=False)

    cases["invariant: gradient of an embedding"] = embedding
    n, image, channels = (4, 8, 16) if dry else (16, 56, 128)
    cases["invariant: convolution 3x3"] = lambda: _transformed(
        _convolution, _normal(n, image, image, channels), _normal(3, 3, channels, channels)
    )
    return cases


_ROW_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{
        name: (functools.partial(plain, axis=-1), functools.partial(getattr(tbik_jax, name), axis=-1))
        for name, plain in {
            "sum": jnp.sum,
            "mean": jnp.mean,
            "var": jnp.var,
            "softmax": jax.nn.softmax,
            "log_softmax": jax.nn.log_softmax,
            "logsumexp": jax.nn.logsumexp,
        }.items()
    },
    "rms_norm": (lambda x: nn.RMSNorm(use_scale=False, dtype=BF16).apply({}, x), tbik_jax.rms_norm),
    "layer_norm": (
        lambda x: nn.LayerNorm(use_scale=False, use_bias=False, dtype=BF16).apply({}, x),
        tbik_jax.layer_norm,
    ),
}


def _product_cases(dry: bool) -> dict[str, Callable[[], Case]]:
    m, k = (16, 256) if dry else (4096, 4096)
    b, t, h, d = (2, 32, 2, 16) if dry else (4, 1024, 16, 128)

    def product(rows: int, dtype: Any) -> Case:
        return _rows(jnp.matmul, tbik_jax.matmul, _normal(rows, k, dtype=dtype), _normal(k, k, dtype=dtype))

    def with_bias() -> Case:
        args = _normal(m, k), _normal(k, k), _normal(k, seed=1)
        return _rows(lambda x, w, b: x @ w + b, tbik_jax.matmul, *args)

    def batched(length: int, columns: int) -> Case:
        dims = (((2,), (1,)), ((0,), (0,)))
        plain, ours = (
            functools.partial(f, dimension_numbers=dims) for f in (jax.lax.dot_general, tbik_jax.dot_general)
        )
        args = _normal(b * h, t, length), _normal(b * h, length, columns, seed=1)
        return Case(plain=plain, invariant=ours, args=args)

    def attention(causal: bool) -> Case:
        plain, ours = (
            functools.partial(f, is_causal=causal)
            for f in (jax.nn.dot_product_attention, tbik_jax.dot_product_attention)
        )
        args = tuple(_normal(b, t, h, d, seed=i) for i in range(3))
        one = tuple(a[1:2] for a in args), lambda out: out[1:2]
        return Case(plain=plain, invariant=ours, args=args, one=one)

    return {
        "dot_product_attention, full": lambda: attention(False),
        "dot_product_attention, causal": lambda: attention(True),
        "dot_general, batched, short sums": lambda: batched(d, t),
        "dot_general, batched, long sums": lambda: batched(t, d),
        "matmul, bfloat16": lambda: product(m, BF16),
        "matmul, bfloat16, 8 rows": lambda: product(8, BF16),
        "matmul, float32": lambda: product(max(8, m // 8), F32),
        "matmul with bias, bfloat16": with_bias,
    }


# measuring -----------------------------------------------------------------------------------------------------------


def measure(group: str, name: str, dry: bool) -> Row:
    """One row, in a worker."""
    start = time.monotonic()
    row = _field_row(name, dry) if group == "field" else _case_row(GROUPS[group](dry)[name])
    return {"group": group, "name": name, **row, "seconds": round(time.monotonic() - start, 2)}


def _field_row(name: str, dry: bool) -> Row:
    test = field_tests(dry)[name]
    with gpu_pool.gpu():
        (differ, of), (mine, _) = test(True), test(False)
    return {"plain_differ": differ, "invariant_differ": mine, "of": of}


def _case_row(make: Callable[[], Case]) -> Row:
    with jax.default_device(_host()):  # others may have the GPU now
        case = make()
    calls = [case.args, *([case.one[0]] if case.one else [])]
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args) for args in calls]

    def compiled(function: Callable[..., Any]) -> list[Any]:
        return [jax.jit(function).lower(*each).compile() for each in shapes]

    gpu_pool.note("compiling invariant")
    mine = compiled(case.invariant)
    plain = None if case.timed else compiled(case.plain)
    with gpu_pool.gpu():
        gpu_pool.note("compiling plain")
        plain = compiled(case.plain) if plain is None else plain
        gpu_pool.note("running")
        calls = jax.device_put(calls, jax.devices()[0])
        return _compared(case, calls, plain, mine)


def _host() -> jax.Device:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the GPU alone
        return jax.devices()[0]


def _compared(case: Case, calls: list[Any], plain: list[Any], mine: list[Any]) -> Row:
    row: Row = {}
    outs = [program[0](*calls[0]) for program in (plain, mine)]
    a, b = ([x.astype(F32) for x in jax.tree.leaves(out)] for out in outs)
    scale = max(float(jnp.abs(x).max()) for x in a) or 1.0
    largest = max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True)) / scale
    row["largest_difference"] = float(f"{largest:.2g}")
    if case.one is not None:
        for name, programs, out in zip(("plain", "invariant"), (plain, mine), outs, strict=True):
            single = programs[1](*calls[1])
            row[f"{name}_differ"] = _differ(single, case.one[1](out))
            row["of"] = sum(x.size for x in jax.tree.leaves(single))
    del outs, a, b
    return row | _times(calls[0], {"plain": plain[0], "invariant": mine[0]})


def _times(args: tuple[Any, ...], functions: device_time.Functions) -> Row:
    """Medians of device time; by the host's clock where kernels cannot be told apart call by call."""
    count = min(_MOST_SETS, device_time.count_sets(sum(x.nbytes for x in jax.tree.leaves(args))))
    sets = [args, *(jax.tree.map(jnp.copy, args) for _ in range(count - 1))]
    clocks: list[Any] = [device_time.WallClock()]
    if jax.default_backend() == "gpu":
        clocks.insert(0, device_time.Cupti())
    message = ""
    for clock in clocks:
        try:
            times = device_time.compare(functions, sets, clock)
        except RuntimeError as error:
            message = str(error)[:200]
            continue
        row: Row = {f"{name}_us": timing.us for name, timing in times.items()}
        row |= {f"{name}_kernels": timing.kernels for name, timing in times.items()}
        row["slowdown"] = round(times["invariant"].us / times["plain"].us, 3)
        return row | {"clock": "device" if isinstance(clock, device_time.Cupti) else "host"}
    raise RuntimeError(message)


GROUPS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "model": model_cases,
    "field": field_tests,
    "op": op_cases,
}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("equinox", "dm-haiku", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results, written after each row")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which the rest is left")
    parser.add_argument("--workers", type=int, default=10, help="processes that compile")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of rows")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU")
    args = parser.parse_args(argv)
    if args.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    gpu_pool.prepare_environment(args.workers)
    wanted = [
        (group, name)
        for group, cases in GROUPS.items()
        for name in cases(args.dry)
        if not args.only or any(part in name for part in args.only)
    ]
    start = time.monotonic()
    data: Row = {
        "environment": environment(),
        "libraries": _versions(),
        "seconds": 0.0,
        "left": [f"{group}: {name}" for group, name in wanted],  # all, should the limit pass before the first
        "rows": [],
    }
    print(json.dumps(data["environment"]), flush=True)
    jobs = deque(gpu_pool.Job(measure, (*each, args.dry)) for each in wanted)
    for outcome in gpu_pool.run(jobs, workers=args.workers, limit=args.limit, hold_limit=90):
        group, name, _ = outcome.job.arguments
        row = outcome.value or {"group": group, "name": name, "error": outcome.error, "while": outcome.note}
        data["rows"].append(row)
        print(json.dumps(row), flush=True)
        done = {(row["group"], row["name"]) for row in data["rows"]}
        data["left"] = [f"{g}: {n}" for g, n in wanted if (g, n) not in done]
        data["seconds"] = round(time.monotonic() - start, 1)
        if args.out:
            args.out.write_text(dump(data))
    print(f"left {data['left']}, {data['seconds']} s", flush=True)
    return int(bool(data["left"]) or any(r.get("invariant_differ") or "error" in r for r in data["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
