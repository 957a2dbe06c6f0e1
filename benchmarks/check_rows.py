"""The row-wise Hopper kernels on one GPU: their bits, their numerics, and their speed beside XLA's own.

    python -m benchmarks.check_rows --out benchmarks/results/check_rows_h200.json
    python -m benchmarks.check_rows --dry         # tiny, on the CPU: the references stand in for the kernels

Bits: rows alone against rows in a batch, the kernels against the references on the GPU and on the CPU, fused against
one after the other, the cache in place. Everything that fails is recorded, and the rest goes on.
"""

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbik_jax.bench import device_time
from tbik_jax.bench.environment import environment
from tbik_jax.layers import PlainNumerics
from tbik_jax.pallas_kernels import (
    add_rms_norm,
    qk_norm_rope,
    residual_add,
    rms_norm,
    rope_tables,
    swiglu,
    swiglu_joint,
)

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
EPS = 1e-6
PLAIN = PlainNumerics()
KINDS = ("normal", "wide", "cancelling")


class Report:
    """Collects results, prints a line for each, and keeps the file up to date."""

    def __init__(self, path: Path | None, limit: float):
        self.path, self.limit, self.start = path, limit, time.perf_counter()
        self.data: dict[str, Any] = {
            "environment": environment(),
            "failures": [],
            "notes": {},
            "speed": [],
            "left": [],
            "checks": 0,
        }

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.start > self.limit

    def run(self, name: str, function: Callable[[], None]) -> None:
        """Runs a group of checks, unless there is no time left."""
        if self.late:
            self.data["left"].append(name)
            return
        start, failed = time.perf_counter(), len(self.data["failures"])
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {str(error)[:2000]}")
        failed = len(self.data["failures"]) - failed
        seconds = time.perf_counter() - start
        print(f"{name:60} {f'{failed} FAILED' if failed else 'ok':10} {seconds:6.1f} s", flush=True)
        self.save()

    def fail(self, name: str, what: str) -> None:
        self.data["failures"].append({"name": name, "what": what})
        print("    FAILED", name, what, flush=True)

    def same(self, name: str, ours: Any, expected: Any, *, loosely: bool = False) -> None:
        """Bits; `loosely` lets NaNs differ from one another, and numbers below fp32's normal ones."""
        self.data["checks"] += 1
        if what := difference(np.asarray(ours), np.asarray(expected), loosely):
            self.fail(name, what)

    def note(self, name: str, value: Any) -> None:
        self.data["notes"][name] = value
        print(f"    {name}: {value}", flush=True)

    def save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.start, 1)
        self.data["ok"] = not self.data["failures"] and not self.data["left"]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def difference(a: np.ndarray, b: np.ndarray, loosely: bool) -> str | None:
    """Where two arrays differ, or None."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.shape} {a.dtype} against {b.shape} {b.dtype}"
    wrong = bits(a) != bits(b)
    if loosely:
        wide, other = a.astype(np.float32), b.astype(np.float32)
        tiny = np.finfo(np.float32).tiny
        wrong &= ~(np.isnan(wide) & np.isnan(other)) & ~((np.abs(wide) < tiny) & (np.abs(other) < tiny))
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{int(wrong.sum())} of {wrong.size} differ, first at {first}: {a[first]} against {b[first]}"


def draw(kind: str, shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    """Normal numbers; of very different sizes; or in pairs that cancel. Zeros of both signs among them."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if kind == "wide":
        spread = 5 if jnp.dtype(dtype) == F16 else 12
        x = x * np.exp2(rng.integers(-spread, spread + 1, shape))
    if kind == "cancelling":
        x[..., 1::2] = -x[..., : x.shape[-1] // 2 * 2 : 2][..., : x[..., 1::2].shape[-1]]
        x[rng.random(shape) < 0.02] = -0.0
    return jnp.asarray(x, dtype)


def on_cpu(function: Callable[..., Any], *operands: Any) -> Any:
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(operands, cpu)))


@functools.cache
def jitted(op: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(op, backend=backend))


def norm(x: jax.Array, scale: jax.Array, backend: str) -> jax.Array:
    return rms_norm(x, scale, eps=EPS, backend=backend)


def add_norm(x: jax.Array, y: jax.Array, scale: jax.Array, backend: str) -> Any:
    return add_rms_norm(x, y, scale, eps=EPS, backend=backend)


def check_rows_of(
    report: Report,
    name: str,
    op: Callable[..., Any],
    operands: tuple[jax.Array, ...],
    shared: tuple[jax.Array, ...],
    kernel: str,
) -> Any:
    """Rows alone, in parts and permuted; returns the whole."""
    ours = jitted(op, kernel)
    whole = jax.tree.map(np.asarray, ours(*operands, *shared))
    rows = operands[0].shape[0]
    chosen = [np.array([0]), np.array([rows - 1]), np.array([1, 2, 3])]
    for order in [*chosen, np.random.default_rng(0).permutation(rows)]:
        parts = ours(*(x[order] for x in operands), *shared)
        for part, all_rows in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            report.same(f"{name}, rows {order[:3]} of {len(order)}", part, all_rows[order])
    return whole


def check_reference(
    report: Report, name: str, op: Callable[..., Any], whole: Any, *operands: jax.Array
) -> None:
    """The reference on the CPU has the bits; on this device XLA divides and takes roots as it likes."""
    cpu = on_cpu(functools.partial(op, backend="reference"), *operands)
    gpu = jitted(op, "reference")(*operands)
    for a, b, c in zip(*map(jax.tree.leaves, (whole, cpu, gpu)), strict=True):
        report.same(f"{name}, reference on the CPU", a, b, loosely=True)
        wrong = int((bits(a) != bits(np.asarray(c))).sum())
        report.note(f"{name}: elements that differ from the reference on this device", f"{wrong} of {a.size}")


def check_norms(report: Report, scope: "Scope", d: int, dtype: Any, kind: str) -> None:
    x, y = (draw(kind, (scope.rows, d), dtype, seed) for seed in (0, 1))
    scale = (1 + draw("normal", (d,), F32, 2) / 5).astype(dtype)
    name = f"{jnp.dtype(dtype).name} D={d} {kind}"
    normed = check_rows_of(report, f"rms_norm {name}", norm, (x,), (scale,), scope.kernel)
    fused = check_rows_of(report, f"add_rms_norm {name}", add_norm, (x, y), (scale,), scope.kernel)
    total = check_rows_of(report, f"residual_add {name}", residual_add, (x, y), (), scope.kernel)
    check_reference(report, f"rms_norm {name}", norm, normed, x, scale)
    check_reference(report, f"residual_add {name}", residual_add, total, x, y)
    apart = total, jitted(norm, scope.kernel)(jnp.asarray(total), scale)
    for a, b in zip(fused, apart, strict=True):
        report.same(f"add_rms_norm in one and in two {name}", a, b)
    wide, scale64 = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * scale64
    plain = jax.jit(PLAIN.rms_norm, static_argnames="eps")(x, scale, eps=EPS)
    errors = [float(np.abs(np.asarray(out, np.float64) - exact).max()) for out in (normed, plain)]
    if not errors[0] <= 1.5 * errors[1] + 1e-30:
        report.fail(f"rms_norm {name}", f"error {errors[0]} where the plain one has {errors[1]}")


def check_swiglu(report: Report, scope: "Scope", f: int, dtype: Any, kind: str) -> None:
    gate_up = draw(kind, (scope.rows, 2 * f), dtype, 3)
    gate, up = gate_up[:, :f], gate_up[:, f:]
    name = f"swiglu {jnp.dtype(dtype).name} F={f} {kind}"
    joint = check_rows_of(report, name, swiglu_joint, (gate_up,), (), scope.kernel)
    report.same(f"{name} of two arrays", swiglu(gate, up, backend=scope.kernel), joint)
    if scope.kernel == "mosaic_gpu":
        from tbik_jax.pallas_kernels.swiglu.mosaic_gpu import swiglu_mosaic_gpu

        for chunks in (1, 2, 4):
            report.same(f"{name} {chunks} chunks", swiglu_mosaic_gpu(gate_up, chunks=chunks), joint)
        reference = on_cpu(functools.partial(swiglu_joint, backend="reference"), gate_up)
        steps = swiglu_mosaic_gpu(gate_up, exact=True)
        report.same(f"{name} in the reference's steps, on the CPU", steps, reference, loosely=True)
        wrong = int((bits(np.asarray(joint)) != bits(reference)).sum())
        report.note(f"{name} elements that differ from the reference on the CPU", f"{wrong} of {joint.size}")
    g, u = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    with np.errstate(over="ignore"):
        exact = g / (1 + np.exp(-g)) * u
    scale = np.abs(exact) + float(np.finfo(np.float16).tiny)
    errors = [
        float((np.abs(np.asarray(out, np.float64) - exact) / scale).max())
        for out in (joint, jax.jit(plain_swiglu)(gate_up))
    ]
    if not errors[0] <= 1.5 * errors[1]:
        report.fail(name, f"relative error {errors[0]} where the plain one has {errors[1]}")


def qk_operands(
    kind: str, b: int, t: int, kv_heads: int, queries: int, h: int, dtype: Any, capacity: int
) -> tuple[jax.Array, ...]:
    qkv = draw(kind, (b, t, kv_heads, queries + 2, h), dtype, 4)
    scales = [(1 + draw("normal", (h,), F32, seed) / 5).astype(dtype) for seed in (5, 6)]
    tables = [jnp.asarray(table) for table in rope_tables(capacity, h, 1e6)]
    rng = np.random.default_rng([b, t])
    starts = rng.integers(0, capacity - t + 1, b)
    positions = jnp.asarray(starts[:, None] + np.arange(t), jnp.int32)
    lengths = jnp.asarray(starts + rng.integers(0, t + 2, b), jnp.int32)
    caches = [draw("normal", (b, capacity, kv_heads, h), dtype, seed) for seed in (7, 8)]
    return (qkv, *scales, *tables, positions, lengths, *caches)


def check_qk(
    report: Report, scope: "Scope", kv_heads: int, queries: int, h: int, dtype: Any, kind: str
) -> None:
    b, t, capacity = scope.batch, 5, 64
    operands = qk_operands(kind, b, t, kv_heads, queries, h, dtype, capacity)
    op = functools.partial(qk_norm_rope, eps=EPS)
    name = f"qk_norm_rope {jnp.dtype(dtype).name} {kv_heads}x{queries}x{h} {kind}"
    ours = jax.jit(functools.partial(op, backend=scope.kernel))
    whole = jax.tree.map(np.asarray, ours(*operands))
    cpu = on_cpu(functools.partial(op, backend="reference"), *operands)
    for part, a, expected in zip(("q", "k cache", "v cache"), whole, cpu, strict=True):
        report.same(f"{name} {part}, reference on the CPU", a, expected, loosely=True)
    qkv, qs, ks, cos, sin, positions, lengths, kc, vc = operands
    for i in (0, b - 1):  # token by token, one row
        k1, v1 = kc[i : i + 1], vc[i : i + 1]
        for j in range(t):
            at = (slice(i, i + 1), slice(j, j + 1))
            q1, k1, v1 = ours(qkv[at], qs, ks, cos, sin, positions[at], lengths[i : i + 1], k1, v1)
            report.same(f"{name} token {j} of row {i}", q1[0, 0], whole[0][i, j])
        report.same(f"{name} k cache of row {i}", k1[0], whole[1][i])
        report.same(f"{name} v cache of row {i}", v1[0], whole[2][i])
    if scope.kernel == "mosaic_gpu":
        outside = ours(qkv, qs, ks, cos, sin, positions + capacity, lengths, kc, vc)
        report.same(f"{name} positions outside write nothing", outside[1], kc)


def check_in_place(report: Report, scope: "Scope") -> None:
    """Under donation and in a loop inside shard_map, the caches stay where they are."""
    operands = qk_operands("normal", 2, 1, 8, 4, 128, BF16, 64)
    op = functools.partial(qk_norm_rope, eps=EPS, backend=scope.kernel)
    caches = [jnp.array(cache, copy=True) for cache in operands[-2:]]
    before = [cache.unsafe_buffer_pointer() for cache in caches]
    after = jax.jit(op, donate_argnums=(7, 8))(*operands[:7], *caches)[1:]
    moved = [a != c.unsafe_buffer_pointer() for a, c in zip(before, after, strict=True)]
    report.note("donated caches that moved", sum(moved))
    mesh = jax.make_mesh((1,), ("tp",))
    spec = jax.sharding.PartitionSpec()

    def loop(*a: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            caches, total = carry
            q, *caches = op(a[0], *a[1:5], jnp.full_like(a[5], i), *a[6:7], *caches)
            return caches, total + jnp.max(q)

        return lax.fori_loop(0, 10, step, (list(a[7:]), jnp.zeros((), BF16)))

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped, donate_argnums=(7, 8)).lower(*operands).compile().as_text()
    copies = [line.strip()[:160] for line in text.splitlines() if " copy(" in line and "[2,64,8,128]" in line]
    report.note("copies of a cache in the compiled loop", copies)
    report.note("calls that alias", text.count("output_to_operand_aliasing"))
    if scope.kernel == "mosaic_gpu" and (copies or any(moved)):
        report.fail("in place", f"{sum(moved)} moved, {copies}")


def norm_functions(kernel: str) -> dict[str, Callable[..., Any]]:
    """Of (x, y, scale)."""
    return {
        "rms_norm": lambda x, y, scale: rms_norm(x, scale, eps=EPS, backend=kernel),
        "rms_norm plain": lambda x, y, scale: PLAIN.rms_norm(x, scale, eps=EPS),
        "add_rms_norm": lambda x, y, scale: add_rms_norm(x, y, scale, eps=EPS, backend=kernel),
        "add_rms_norm plain": lambda x, y, scale: PLAIN.add_rms_norm(x, y, scale, eps=EPS),
        "residual_add": lambda x, y, scale: residual_add(x, y, backend=kernel),
        "residual_add plain": lambda x, y, scale: x + y,
        "negate": lambda x, y, scale: -x,
    }


_ROWS_MOVED = {"rms_norm": 2, "add_rms_norm": 4, "residual_add": 3, "negate": 2, "swiglu": 3}


def plain_swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_functions(kernel: str) -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {"swiglu plain": plain_swiglu}
    if kernel != "mosaic_gpu":
        return functions | {"swiglu": swiglu_joint}
    from tbik_jax.pallas_kernels.swiglu.mosaic_gpu import swiglu_mosaic_gpu

    for chunks in (1, 2, 4):
        functions[f"swiglu chunks={chunks}"] = functools.partial(swiglu_mosaic_gpu, chunks=chunks)
    for chunks in (1, 4):
        functions[f"swiglu exact chunks={chunks}"] = functools.partial(
            swiglu_mosaic_gpu, chunks=chunks, exact=True
        )
    return functions


def speed_cases(
    scope: "Scope",
) -> Iterator[tuple[str, int, int, dict[str, Callable[..., Any]], tuple[Any, ...]]]:
    for rows in scope.speed_rows:
        for d in scope.widths:
            shapes = tuple(jax.ShapeDtypeStruct(s, BF16) for s in ((rows, d), (rows, d), (d,)))
            yield "norms", rows, d, norm_functions(scope.kernel), shapes
        for f in scope.hidden:
            shape = jax.ShapeDtypeStruct((rows, 2 * f), BF16)
            yield "swiglu", rows, f, swiglu_functions(scope.kernel), (shape,)


def measure(report: Report, scope: "Scope") -> None:
    """Device time of our kernels and of XLA's, interleaved."""
    cases = list(speed_cases(scope))
    clock = device_time.WallClock() if scope.dry else device_time.Cupti()
    with ThreadPoolExecutor(8) as pool:
        compiled = [
            {name: pool.submit(jax.jit(f).lower(*shapes).compile) for name, f in functions.items()}
            for _, _, _, functions, shapes in cases
        ]
        for (group, rows, width, _, shapes), futures in zip(cases, compiled, strict=True):

            def one(group=group, rows=rows, width=width, shapes=shapes, futures=futures) -> None:
                functions = {name: future.result() for name, future in futures.items()}
                count = min(16, device_time.count_sets(sum(s.size * 2 for s in shapes)))
                sets = [
                    tuple(jax.random.normal(jax.random.key(i), s.shape, BF16) for s in shapes)
                    for i in range(count)
                ]
                for name, timing in device_time.compare(functions, sets, clock).items():
                    moved = _ROWS_MOVED[name.split()[0]] * rows * width * 2
                    row = {
                        "op": name,
                        "rows": rows,
                        "width": width,
                        "us": timing.us,
                        "p10": timing.p10,
                        "p90": timing.p90,
                        "kernels": timing.kernels,
                        "gbs": round(moved / timing.us / 1e3),
                    }
                    report.data["speed"].append(row)
                    print(
                        f"    {name:24} {timing.us:9.2f} us {row['gbs']:6} GB/s  {timing.kernels} kernels",
                        flush=True,
                    )

            report.run(f"speed {group} rows={rows} width={width}", one)


def measure_qk(report: Report, scope: "Scope", b: int, t: int) -> None:
    """The caches are donated from call to call, so neither side copies them."""
    capacity = max(64, t)
    operands = qk_operands("normal", b, t, scope.kv_heads, 4, 128, BF16, capacity)
    clock = device_time.WallClock() if scope.dry else device_time.Cupti()
    functions = {
        "qk_norm_rope": functools.partial(qk_norm_rope, eps=EPS, backend=scope.kernel),
        "qk_norm_rope plain": functools.partial(PLAIN.qk_norm_rope_cache, eps=EPS),
    }
    calls = 20
    for name, function in functions.items():
        step = jax.jit(function, donate_argnums=(7, 8))
        caches = [jnp.array(cache, copy=True) for cache in operands[-2:]]
        for _ in range(3):
            _, *caches = step(*operands[:7], *caches)
        jax.block_until_ready(caches)
        clock.start()
        for _ in range(calls):
            _, *caches = clock.call(name, step, (*operands[:7], *caches))
        jax.block_until_ready(caches)
        recorded = clock.stop()
        us = 1000 * sum(ms for _, ms in recorded) / calls
        moved = 2 * operands[0].size * 2
        row = {
            "op": name,
            "rows": b * t,
            "width": operands[0].size // (b * t),
            "us": round(us, 3),
            "kernels": round(len(recorded) / calls, 2),
            "gbs": round(moved / us / 1e3),
        }
        report.data["speed"].append(row)
        names = sorted({kernel[:60] for kernel, _ in recorded})
        print(
            f"    {name:24} {us:9.2f} us {row['gbs']:6} GB/s  {row['kernels']} kernels {names[:8]}",
            flush=True,
        )


class Scope:
    """What is checked: all of it on a GPU, a tiny part on the CPU."""

    def __init__(self, dry: bool):
        self.dry, self.kernel = dry, "reference" if dry else "mosaic_gpu"
        self.rows, self.batch = (5, 2) if dry else (300, 3)
        self.norms = (
            [(128, BF16)]
            if dry
            else [
                *((d, BF16) for d in (4096, 1024, 2560, 5120, 80, 128, 640, 2048, 8192)),
                (1024, F16),
                (5120, F16),
            ]
        )
        self.swiglu = (
            [(96, BF16)] if dry else [(1536, BF16), (3072, F16), (1216, BF16), (48, BF16), (12288, BF16)]
        )
        self.heads = (
            [(2, 2, 32)]
            if dry
            else [
                (8, 4, 128),
                (1, 4, 128),
                (8, 2, 128),
                (8, 5, 128),
                (1, 8, 128),
                (2, 5, 128),
                (8, 2, 64),
                (1, 2, 32),
            ]
        )
        self.speed_rows = (1, 8) if dry else (1, 8, 32, 128, 2048, 8192)
        self.widths, self.hidden = ((128,), (96,)) if dry else ((2048, 4096), (6144, 12288))
        self.kv_heads = 2 if dry else 8
        self.tokens = ((2, 1), (1, 4)) if dry else ((1, 1), (8, 1), (32, 1), (128, 1), (4, 512), (16, 512))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--limit", type=float, default=140, help="seconds after which the rest is left")
    parser.add_argument("--dry", action="store_true", help="a tiny part, on the CPU, without the kernels")
    args = parser.parse_args(argv)
    if args.dry:
        jax.config.update("jax_platforms", "cpu")
    scope, report = Scope(args.dry), Report(args.out, args.limit)
    print(json.dumps(report.data["environment"]), flush=True)
    kinds = KINDS[:1] if args.dry else KINDS
    checks = [
        *((f"norms D={d} {jnp.dtype(dt).name}", check_norms, (d, dt)) for d, dt in scope.norms[:1]),
        *((f"qk {k}x{g}x{h}", check_qk, (k, g, h, BF16)) for k, g, h in scope.heads[:2]),
        *((f"swiglu F={f} {jnp.dtype(dt).name}", check_swiglu, (f, dt)) for f, dt in scope.swiglu[:1]),
    ]
    more = [
        *((f"norms D={d} {jnp.dtype(dt).name}", check_norms, (d, dt)) for d, dt in scope.norms[1:]),
        *((f"qk {k}x{g}x{h}", check_qk, (k, g, h, BF16)) for k, g, h in scope.heads[2:]),
        ("qk 8x4x128 float16", check_qk, (scope.kv_heads, 4, 128, F16)),
        *((f"swiglu F={f} {jnp.dtype(dt).name}", check_swiglu, (f, dt)) for f, dt in scope.swiglu[1:]),
    ]
    for i, (name, check, arguments) in enumerate(checks):
        for kind in kinds if i == 0 else kinds[:2]:
            report.run(f"{name} {kind}", functools.partial(check, report, scope, *arguments, kind))
    report.run("in place", functools.partial(check_in_place, report, scope))
    for b, t in scope.tokens:
        report.run(f"speed qk {b}x{t}", functools.partial(measure_qk, report, scope, b, t))
    measure(report, scope)
    for i, (name, check, arguments) in enumerate(more):
        kind = kinds[i % len(kinds)]
        report.run(f"{name} {kind}", functools.partial(check, report, scope, *arguments, kind))
    report.save()
    print(
        f"{'ok' if report.data['ok'] else 'FAILED'}: {report.data['checks']} checks, "
        f"{len(report.data['failures'])} failures, left {report.data['left']}, {report.data['seconds']} s",
        flush=True,
    )
    return 0 if report.data["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
