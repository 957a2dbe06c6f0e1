"""Products with batch dimensions: one launch beside one product after the other and beside JAX's own.

    python -m benchmarks.batched_speed --out benchmarks/results/batched_speed.json

Device time, interleaved, bfloat16, of attention's products (scores and values, prefill and decode), of experts' and of
small ones:

* chosen: the kernel as `choose_config` tiles it, all products in one launch;
* turns: the same products one after the other;
* plain: `lax.dot_general`;
* others: the next candidates' tilings, by number.

The bits of all but plain are compared. Exits with 1 if they differ.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.matmul_bits import count_differences
from benchmarks.matmul_speed import dump
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels.tree_matmul.api import tree_matmul
from tbik_jax.pallas_kernels.tree_matmul.config import candidate_configs
from tbik_jax.steps import INVARIANT_OPTIONS

BF16 = jnp.bfloat16


class Products(NamedTuple):
    """`count` products [m, k] @ [k, n]; w is [n, k] with `transpose_rhs`."""

    count: int
    m: int
    n: int
    k: int
    leaves: int
    transpose_rhs: bool


CASES = {
    "scores of 1024": Products(64, 1024, 1024, 128, 8, True),
    "values of 1024": Products(64, 1024, 128, 1024, 8, False),
    "scores of 512": Products(128, 512, 512, 128, 8, True),
    "values of 512": Products(128, 512, 128, 512, 8, False),
    "scores of 512, heads of 64": Products(96, 512, 512, 64, 4, True),
    "values of 512, heads of 64": Products(96, 512, 64, 512, 8, False),
    "scores of a token": Products(256, 4, 1024, 128, 8, True),
    "values of a token": Products(256, 4, 128, 1024, 8, False),
    "experts, to narrow": Products(8, 512, 2048, 2048, 8, False),
    "experts, to wide": Products(8, 256, 4096, 2048, 8, True),
    "small": Products(512, 64, 64, 64, 4, True),
}
DRY = {"small": Products(3, 8, 16, 32, 2, True), "wide": Products(2, 8, 32, 64, 4, False)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--others", type=int, default=0, help="tilings besides the chosen one")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which the rest is left")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, by the host's clock")
    args = parser.parse_args(argv)
    began, rows = time.monotonic(), []
    cases = DRY if args.dry else CASES
    with ThreadPoolExecutor(2 if args.dry else 14) as pool:
        compiled = {name: _compile(pool, case, args) for name, case in cases.items()}
        for name, case in cases.items():
            row: dict[str, Any] = {"name": name, "left": True}
            if time.monotonic() - began < args.limit:
                functions = {key: future.result() for key, future in compiled[name].items()}
                row = {"name": name, **case._asdict(), **_measure(functions, case, args.dry)}
            rows.append(row)
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(dump({"environment": environment(), "rows": rows}))
    return int(any(row.get("differ", 1) for row in rows if "left" not in row))


def _compile(pool: ThreadPoolExecutor, case: Products, args: argparse.Namespace) -> dict[str, Any]:
    """By name, programs that are being compiled."""
    _, m, n, k, leaves, transpose_rhs = case
    backend = "reference" if args.dry else "mosaic_gpu"
    ours = functools.partial(tree_matmul, leaves=leaves, transpose_rhs=transpose_rhs, backend=backend)
    dims = (((2,), (2 if transpose_rhs else 1,)), ((0,), (0,)))
    functions: dict[str, Callable[..., jax.Array]] = {
        "chosen": ours,
        "turns": lambda x, w: lax.map(lambda pair: ours(*pair), (x, w)),
        "plain": lambda x, w: lax.dot_general(x, w, dims),
    }
    if args.others and not args.dry:
        from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import tree_matmul_mosaic_gpu

        configs = candidate_configs(m, n, k, leaves, transpose_rhs=transpose_rhs, batch=case.count)
        for number, config in enumerate(configs[1 : args.others + 1], 1):
            functions[f"{number}: {_named(config)}"] = functools.partial(
                tree_matmul_mosaic_gpu,
                leaves=leaves,
                out_dtype=BF16,
                transpose_rhs=transpose_rhs,
                config=config,
            )
    shapes = [jax.ShapeDtypeStruct(shape, BF16) for shape in _shapes(case)]
    return {
        name: pool.submit(
            jax.jit(function, compiler_options={} if name == "plain" else INVARIANT_OPTIONS)
            .lower(*shapes)
            .compile
        )
        for name, function in functions.items()
    }


def _named(config: Any) -> str:
    shown = ("split", "last_split", "multicast", "consumers", "tile_n", "tile_k", "boxes", "stages", "group")
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if name in shown)


def _shapes(case: Products) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count, m, n, k, _, transpose_rhs = case
    return (count, m, k), (count, n, k) if transpose_rhs else (count, k, n)


def _measure(functions: dict[str, Any], case: Products, dry: bool) -> dict[str, Any]:
    count = device_time.count_sets(2 * case.count * (case.m * case.k + case.k * case.n + case.m * case.n))
    sets = []
    for seed in range(2 if dry else min(3, count)):
        keys = jax.random.split(jax.random.key(seed))
        sets.append(
            tuple(jax.random.normal(key, shape, BF16) for key, shape in zip(keys, _shapes(case), strict=True))
        )
    expected = functions["turns"](*sets[0])
    differ = {
        name: int(count_differences(function(*sets[0]), expected)[0])
        for name, function in functions.items()
        if name != "plain"
    }
    clock = device_time.WallClock() if dry else device_time.Cupti()
    us = {name: timing.us for name, timing in device_time.compare(functions, sets, clock).items()}
    return {
        "us": us,
        "slowdown": round(us["chosen"] / us["plain"], 3),
        "in_turns": round(us["turns"] / us["plain"], 3),
        "differ": sum(differ.values()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
