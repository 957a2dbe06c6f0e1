"""Whether fusing SwiGLU into the matmul of gates and values pays, on Qwen3's gate_up.

    python -m benchmarks.gated_speed --out benchmarks/results/gated_speed.json

Device time, interleaved, weights cold (see `device_time`), bfloat16:

* gated: one kernel;
* two: the same matmul and the SwiGLU kernel after it;
* dot: `jnp.dot` and SwiGLU, as XLA compiles them.

The bits of `gated` and `two` are compared, on normal inputs and on a wide range of exponents. Exits with 1 if they
differ.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.matmul_bits import count_differences, make_inputs
from benchmarks.matmul_shapes import Layer, layers
from benchmarks.matmul_speed import DRY_LAYERS, compile_for, compile_inputs, dump, operand_shapes
from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.pallas_kernels import gated_matmul, swiglu_joint, tree_matmul

BF16 = jnp.bfloat16


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.7B", "8B"])
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--limit", type=float, default=120, help="seconds after which the rest is left")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="a tiny shape on the CPU, by the host's clock")
    args = parser.parse_args(argv)
    end, points = time.monotonic() + args.limit, []
    if args.dry:
        chosen = [layer for layer in DRY_LAYERS if layer.transpose_rhs][:1]
    else:
        chosen = layers(("gate_up",), tuple(args.models), tuple(args.tp))
    for layer in chosen:
        for m in args.ms:
            if time.monotonic() > end:
                break
            point = {"model": layer.model, "tp": layer.tp, "m": m, "k": layer.k, "n": layer.n}
            try:
                point |= _measure(layer, m, args.dry)
            except Exception as error:  # recorded; the rest is worth measuring
                point["error"] = f"{type(error).__name__}: {error}"[:500]
            points.append(point)
            print(json.dumps(point), flush=True)
    if args.out:
        args.out.write_text(dump({"environment": environment(), "points": points}))
    return int(any(point.get("differ", 1) for point in points))


def _measure(layer: Layer, m: int, dry: bool) -> dict[str, Any]:
    backend = "reference" if dry else "mosaic_gpu"

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        product = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=BF16)
        gate, up = jnp.split(product, 2, axis=1)
        return jax.nn.silu(gate) * up

    def two(x: jax.Array, w: jax.Array) -> jax.Array:
        return swiglu_joint(tree_matmul(x, w, 1, transpose_rhs=True, backend=backend), backend=backend)

    shapes = operand_shapes(layer, m)
    gated = functools.partial(gated_matmul, backend=backend)
    functions = {name: compile_for(f, shapes) for name, f in (("gated", gated), ("two", two), ("dot", dot))}
    differ = 0
    for kind in ("normal", "wide"):
        x, w = make_inputs(kind, m, layer.k, layer.n, BF16, jnp.int32(m))
        outs = [functions[name](x, w.T) for name in ("gated", "two")]
        differ += int(count_differences(*outs)[0])
    make = compile_inputs(layer, m)
    count = device_time.count_sets(2 * m * layer.k + 2 * layer.k * layer.n)
    sets = [make(jnp.int32(seed)) for seed in range(2 if dry else count)]
    clock = device_time.WallClock() if dry else device_time.Cupti()
    times = device_time.compare(functions, sets, clock)
    us = {name: timing.us for name, timing in times.items()}
    return {
        "us": us,
        "gain": round(us["two"] / us["gated"], 4),
        "ratio": round(us["dot"] / us["gated"], 4),
        "differ": differ,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
