"""Speed of the tree all-reduce with each transport beside `lax.psum`, and whether they carry the same bits.

    python -m benchmarks.collectives_speed --out benchmarks/results/collectives_speed.json

For fp32 partial sums of 4 KiB to 64 MiB a device, rounded to bfloat16 at the end, on 2, 4 and 8 of the devices that are
there. Wall time of a sum inside one jitted loop whose every turn needs the last one's result, by turns, median of the
repeats. `plain` is `lax.psum` and the cast after it. Exits with 1 if the transports' bits differ.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.matmul_speed import dump
from tbik_jax.bench.environment import environment
from tbik_jax.collectives import TRANSPORTS, choose_transport, tree_psum

_LOOP = 50  # sums of one call


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--kib", nargs="+", type=int, default=[4 << n for n in range(15)])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120, help="seconds after which the rest is left")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    end, points = time.monotonic() + args.limit, []
    for ranks in args.ranks:
        if ranks > len(jax.devices()):
            continue
        mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("tp",))
        for kib in args.kib:
            if time.monotonic() > end:
                break
            points.append(_measure(mesh, kib * 256, args.repeats))
            print(json.dumps(points[-1]), flush=True)
    if args.out:
        args.out.write_text(dump({"environment": environment(), "loop": _LOOP, "points": points}))
    return int(any(point["differ"] for point in points))


def _measure(mesh: Mesh, size: int, repeats: int) -> dict[str, Any]:
    ranks = mesh.shape["tp"]
    sums = {
        t: functools.partial(tree_psum, axis_name="tp", out_dtype=jnp.bfloat16, transport=t)
        for t in TRANSPORTS
    }
    sums["plain"] = lambda x: lax.psum(x, "tp").astype(jnp.bfloat16)
    x = (
        jax.random.normal(jax.random.key(size), (ranks, size))
        * jnp.exp2(jnp.arange(ranks) * 3.0 % 7)[:, None]
    )
    x = jax.device_put(x, jax.NamedSharding(mesh, P("tp")))
    once = {name: np.asarray(_jit(mesh, lambda x, f=f: f(x))(x)).view(np.uint16) for name, f in sums.items()}
    loops = {name: _jit(mesh, functools.partial(_loop, f)) for name, f in sums.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for name in loops:
        jax.block_until_ready(loops[name](x))
    for _ in range(repeats):
        for name, loop in loops.items():
            began = time.perf_counter()
            jax.block_until_ready(loop(x))
            times[name].append(1e6 * (time.perf_counter() - began) / _LOOP)
    us = {name: round(statistics.median(each), 2) for name, each in times.items()}
    chosen = choose_transport(size, ranks)
    return {
        "ranks": ranks,
        "kib": size // 256,
        "us": us,
        "chosen": chosen,
        "best": min(TRANSPORTS, key=lambda t: us[t]),
        "ratio": round(us["plain"] / us[chosen], 3),
        "differ": sum(int((once[t] != once["butterfly"]).sum()) for t in TRANSPORTS),
        "plain_differs": int((once["plain"] != once["butterfly"]).sum()),
    }


def _loop(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    # a small share of the sum goes into the next turn: no turn can begin before the last one has ended
    return lax.fori_loop(0, _LOOP, lambda _, y: y + f(y).astype(jnp.float32) * 1e-6, x)


def _jit(mesh: Mesh, body: Callable[[jax.Array], jax.Array]) -> Any:
    mapped = jax.shard_map(
        lambda x: body(x[0])[None], mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False
    )
    return jax.jit(mapped, compiler_options={"xla_allow_excess_precision": False})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
