"""Bits and speed of the products of few rows against the ops that they fuse, at the shapes of Qwen3.

    python -m benchmarks.few_rows_speed --out benchmarks/results/few_rows_h200.json

A row is one product of one model: `norm_matmul` of qkv and of gate and up behind subtrees as the model chooses them,
and `matmul_subtrees` of o_proj and down_proj. `differ` counts elements whose bits are not those of the single ops. `us`
has device times from CUPTI of the fused kernel and of each that it replaces, interleaved, with weights that are not in
L2; the time between kernels, which is saved too, is in none. `--dry` tries a small model on the CPU.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.matmul_speed import dump
from tbik_jax import synthetic
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.bisect.bits import bits_of
from tbik_jax.models.qwen3 import Qwen3Config
from tbik_jax.pallas_kernels import (
    add_rms_norm,
    gated_matmul,
    join_subtrees,
    matmul_subtrees,
    norm_matmul,
    tree_matmul,
)
from tbik_jax.pallas_kernels.few_rows.api import norm_matmul_refusal
from tbik_jax.pallas_kernels.few_rows.config import choose_subtree_config

EPS = 1e-6
_SEED = 0


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    arguments = {name: getattr(args, name) for name in ("models", "rows", "limit")}
    data: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": [], "left": []}
    began, failed = time.perf_counter(), 0
    for model in ["small"] if args.dry else args.models:
        config = _config(model)
        for m in args.rows:
            for name, measure in _PRODUCTS.items():
                if time.perf_counter() - began > args.limit:
                    print(f"{model} {name} of {m}: no time left")
                    data["left"].append({"model": model, "product": name, "m": m})
                    failed += 1
                    continue
                row = {"model": model, "product": name, "m": m, **measure(config, m, args.dry)}
                failed += bool(row["differ"])
                data["rows"].append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    args.out.write_text(dump(data))
    if args.out:
        args.out.write_text(dump(data))
    print("FAILED" if failed else "ok")
    return int(failed > 0)


def _column(config: Qwen3Config, m: int, dry: bool, *, gated: bool) -> dict[str, Any]:
    d, f, heads = _sizes(config)
    n = 2 * f if gated else (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    chosen = choose_subtree_config(d, heads, 8, m=m)
    parts = 1 if chosen is None else chosen.parts
    draw = _Draw()
    x, y, scale = draw(m, d), draw(parts, m, d, dtype=jnp.float32), draw(d)
    first = draw(n, d, scale=d**-0.5)
    if norm_matmul_refusal(x, scale, first, gated):
        return {"n": n, "k": d, "parts": parts, "differ": None}  # not fused, nothing compared
    joined = join_subtrees(y, x.dtype)
    product = gated_matmul if gated else functools.partial(tree_matmul, leaves=1, transpose_rhs=True)
    fused = jax.jit(functools.partial(norm_matmul, eps=EPS, gated=gated))
    norm = jax.jit(functools.partial(add_rms_norm, eps=EPS))
    single = jax.jit(product)
    total, normalised = norm(x, joined, scale)
    differ = _differing(fused(x, y, scale, first), (total, single(normalised, first)))
    return {"n": n, "k": d, "parts": parts, "differ": differ} | _times(
        {
            "fused": lambda w: fused(x, y, scale, w),
            "norm": lambda w: norm(x, joined, scale),
            "product": lambda w: single(normalised, w),
        },
        lambda: draw(n, d, scale=d**-0.5),
        dry,
    )


def _row(config: Qwen3Config, m: int, dry: bool, *, down: bool) -> dict[str, Any]:
    d, f, heads = _sizes(config)
    k = f if down else heads
    chosen = choose_subtree_config(d, k, 8, m=m)
    if chosen is None:
        return {"n": d, "k": k, "differ": None, "parts": None}  # not fused, nothing compared
    draw = _Draw()
    x, first = draw(m, k), draw(k, d, scale=k**-0.5)
    fused = jax.jit(functools.partial(matmul_subtrees, parts=chosen.parts))
    whole = jax.jit(tree_matmul)
    differ = _differing(join_subtrees(fused(x, first), x.dtype), whole(x, first))
    return {"n": d, "k": k, "parts": chosen.parts, "differ": differ} | _times(
        {"fused": lambda w: fused(x, w), "product": lambda w: whole(x, w)},
        lambda: draw(k, d, scale=k**-0.5),
        dry,
    )


_PRODUCTS: dict[str, Callable[[Qwen3Config, int, bool], dict[str, Any]]] = {
    "qkv": functools.partial(_column, gated=False),
    "o_proj": functools.partial(_row, down=False),
    "gate_up": functools.partial(_column, gated=True),
    "down_proj": functools.partial(_row, down=True),
}


def _times(functions: dict[str, Any], weights: Callable[[], jax.Array], dry: bool) -> dict[str, Any]:
    w = weights()
    sets = [(w,)] + [(weights(),) for _ in range(0 if dry else device_time.count_sets(w.nbytes) - 1)]
    clock = device_time.WallClock() if dry else device_time.Cupti()
    found = device_time.compare(functions, sets, clock)
    us = {name: round(timing.us, 2) for name, timing in found.items()}
    ops = sum(each for name, each in us.items() if name != "fused")
    return {
        "us": us,
        "ratio": round(ops / us["fused"], 4),
        "gb_per_s": round(w.nbytes / us["fused"] / 1e3, 1),
    }


def _sizes(config: Qwen3Config) -> tuple[int, int, int]:
    return config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim


def _config(model: str) -> Qwen3Config:
    raw = synthetic.small_config() if model == "small" else synthetic.qwen3_config(model)
    return Qwen3Config.from_dict(raw)


class _Draw:
    """Normal arrays, each another one."""

    def __init__(self) -> None:
        self._key = jax.random.key(_SEED)

    def __call__(self, *shape: int, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return (jax.random.normal(key, shape) * scale).astype(dtype)


def _differing(found: Any, expected: Any) -> int:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return sum(int((bits_of(np.asarray(a)) != bits_of(np.asarray(b))).sum()) for a, b in pairs)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bits and speed of the products of few rows.")
    parser.add_argument("--models", nargs="+", default=["0.6B", "1.7B", "4B", "8B", "14B", "32B"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--limit", type=float, default=300, help="seconds after which nothing new begins")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="one small shape, on the CPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
