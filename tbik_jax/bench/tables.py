"""The tables of `tbik-jax bench`: products, attention and decoding, invariant beside plain in one process.

A compact version of the scripts under `benchmarks/`: it times what the layers of one model call, at few sizes, so that
it answers within minutes whether a machine runs as the published figures say.
"""

import dataclasses
import functools
import operator
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from .. import synthetic
from ..buckets import bucket, capacity_bucket
from ..layers import Numerics
from ..loading import parameter_shardings
from ..mesh import make_mesh
from ..models import Qwen3, Qwen3Config
from ..run import Padded, Run
from ..sampling import SamplingParams, sampling_arrays
from ..steps import INVARIANT_OPTIONS, Engine, make_numerics
from .device_time import Cupti, WallClock, compare, count_sets

NUMERICS = ("invariant", "plain")
TABLES = ("matmul", "attention", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table; microseconds of device time on a GPU, of the host's clock elsewhere.

    Attributes:
        table: one of `TABLES`.
        what: is timed.
        invariant_us: median.
        plain_us: median.
    """

    table: str
    what: str
    invariant_us: float
    plain_us: float

    @property
    def ratio(self) -> float:
        """Plain's time over invariant's: above 1 the invariant one is faster."""
        return self.plain_us / self.invariant_us


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the tables measure.

    Attributes:
        config: of the model whose layers are timed.
        rows: of the products.
        caches: (batch, positions) of decode attention.
        prompts: (batch, tokens) of prefill attention.
        batches: of decoding.
        context: positions before the first decoded token.
        steps: that are timed together.
    """

    config: Qwen3Config
    rows: tuple[int, ...]
    caches: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    context: int
    steps: int

    @classmethod
    def for_gpu(cls, size: str, layers: int) -> "Sizes":
        """Those of a published Qwen3, with so many layers in the decode table.

        Raises:
            ValueError: there is no such size.
        """
        return cls(
            config=Qwen3Config.from_dict(synthetic.qwen3_config(size) | {"num_hidden_layers": layers}),
            rows=(1, 32, 128, 2048),
            caches=((1, 4096), (32, 1024), (32, 4096)),
            prompts=((1, 2048), (4, 2048)),
            batches=(1, 32, 128),
            context=1024,
            steps=24,
        )

    @classmethod
    def for_cpu(cls) -> "Sizes":
        """Small ones, for references."""
        return cls(
            config=Qwen3Config.from_dict(synthetic.small_config(num_hidden_layers=1)),
            rows=(1, 32),
            caches=((4, 128),),
            prompts=((1, 128),),
            batches=(1,),
            context=16,
            steps=4,
        )


def measure(tables: Sequence[str], sizes: Sizes, mesh: Mesh | None = None) -> Iterator[Row]:
    """Rows of some tables, one by one.

    Args:
        tables: some of `TABLES`.
        sizes: to measure.
        mesh: of the decode table; products and attention run on one device. One device by default.

    Raises:
        ValueError: an unknown table.
    """
    for table in tables:
        if table not in TABLES:
            raise ValueError(f"there is no table {table!r}; use some of {', '.join(TABLES)}")
    rows: dict[str, Callable[[Sizes], Iterator[Row]]] = {
        "matmul": _matmul,
        "attention": _attention,
        "decode": functools.partial(_decode, mesh=mesh or make_mesh()),
    }
    for table in TABLES:
        if table in tables:
            yield from rows[table](sizes)


def count(tables: Sequence[str], sizes: Sizes) -> int:
    """How many rows `measure` gives."""
    numbers = {
        "matmul": 4 * len(sizes.rows),
        "attention": len(sizes.caches) + len(sizes.prompts),
        "decode": len(sizes.batches),
    }
    return sum(numbers[table] for table in set(tables) & set(TABLES))


# --- products and attention ------------------------------------------------------------------------------


def _matmul(sizes: Sizes) -> Iterator[Row]:
    config = sizes.config
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_attention_heads * h
    qkv = heads + 2 * config.num_key_value_heads * h
    layers = (
        ("qkv", "column_parallel", d, qkv, (qkv, d)),
        ("o_proj", "row_parallel", heads, d, (heads, d)),
        ("gate_up", "gated_column_parallel", d, 2 * f, (2 * f, d)),
        ("down_proj", "row_parallel", f, d, (f, d)),
    )
    for (name, method, k, n, w), m in ((layer, m) for layer in layers for m in sizes.rows):
        found = _time(operator.attrgetter(method), ((m, k), w))
        yield Row(table="matmul", what=f"{name}, M={m}, K={k}, N={n}", **found)


def _attention(sizes: Sizes) -> Iterator[Row]:
    config = sizes.config
    heads, kv_heads, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cases = [("decode", b, 1, s) for b, s in sizes.caches] + [("prefill", b, s, s) for b, s in sizes.prompts]
    for name, b, t, s in cases:
        positions = jnp.tile(jnp.arange(s - t, s, dtype=jnp.int32), (b, 1))

        def attend(numerics: Numerics, positions: jax.Array = positions) -> Callable[..., Any]:
            return lambda q, k, v: numerics.attention(q, k, v, positions)

        found = _time(attend, ((b, t, heads, h), (b, s, kv_heads, h), (b, s, kv_heads, h)))
        yield Row(table="attention", what=f"{name}, batch {b}, {s} positions", **found)


def _time(
    layer: Callable[[Numerics], Callable[..., Any]], shapes: tuple[tuple[int, ...], ...]
) -> dict[str, float]:
    """A layer of both numerics on one device, as a model calls it, with random operands in bfloat16."""
    mesh = make_mesh()

    def compiled(name: str) -> Callable[..., Any]:
        body = jax.shard_map(
            layer(make_numerics(name, mesh)), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )  # check_vma: as in steps.py, the butterfly ends replicated, which cannot be inferred
        return jax.jit(body, compiler_options=INVARIANT_OPTIONS if name == "invariant" else None)

    @jax.jit
    def operands(seed: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(
            jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
        )

    on_gpu = jax.devices()[0].platform == "gpu"
    sets = count_sets(sum(2 * int(np.prod(shape)) for shape in shapes)) if on_gpu else 2
    inputs = [operands(jnp.int32(seed)) for seed in range(sets)]
    clock = Cupti() if on_gpu else WallClock()
    timings = compare({name: compiled(name) for name in NUMERICS}, inputs, clock)
    return {f"{name}_us": timings[name].us for name in NUMERICS}


# --- decoding ------------------------------------------------------------------------------------------


def _decode(sizes: Sizes, *, mesh: Mesh) -> Iterator[Row]:
    model = _random_model(sizes.config, mesh)
    for batch in sizes.batches:
        runs = {name: _prepare(Engine.create(model, mesh, name), sizes, batch) for name in NUMERICS}
        us = _step_times(runs, sizes.steps)
        what = f"step, batch {batch}, {sizes.context} positions"
        yield Row(table="decode", what=what, **us)


_TURNS = 3


def _prepare(engine: Engine, sizes: Sizes, batch: int) -> Run:
    room = sizes.steps * (_TURNS + 1)
    rows = Padded.of([np.zeros((sizes.context,), np.int32)] * batch, engine.steps.mesh)
    sampling = sampling_arrays([SamplingParams()] * rows.size, sizes.config.vocab_size)
    run = Run(engine, rows, capacity_bucket(sizes.context + room), sizes.config)
    run.prepare_decode(bucket(room), sampling, False, np.asarray([-1], np.int32))
    run.allocate()
    return run


def _step_times(runs: dict[str, Run], steps: int) -> dict[str, float]:
    """Microseconds of a step by the host's clock, by turns; the first turn compiles and warms."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_TURNS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run.advance((turn + 1) * steps)
            jax.block_until_ready(run.state.token)
            times[name].append(1e6 * (time.perf_counter() - began) / steps)
    return {f"{name}_us": statistics.median(each[1:]) for name, each in times.items()}


def _random_model(config: Qwen3Config, mesh: Mesh) -> Qwen3:
    """Random parameters in place on the mesh, moved one by one."""
    graphdef, state = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)))
    shardings = jax.tree.leaves(parameter_shardings(state, mesh))
    values, treedef = jax.tree.flatten(state)
    del state
    for i, sharding in enumerate(shardings):
        values[i] = jax.device_put(values[i], sharding)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, values))
