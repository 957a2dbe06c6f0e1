"""Tensor parallelism on one device: each rank's shard in turn, ranks meeting in the collectives as on a real mesh.

The step's own body runs under `jax.vmap` with the mesh's axis names, so collectives are those of the package, while
every kernel is a loop over the ranks: the arithmetic of each is what a device of a larger mesh would do.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbik_jax.layers import base, invariant
from tbik_jax.steps import INVARIANT_OPTIONS, Engine

#: What the invariant numerics call.
KERNELS = (
    "add_rms_norm",
    "attention",
    "embedding",
    "gated_matmul",
    "leaf_statistics",
    "qk_norm_rope",
    "residual_add",
    "rms_norm",
    "tree_matmul",
)


def one_after_another(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as a loop over the ranks: arrays by position or by name, everything else as it is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        everything, tree = jax.tree.flatten((args, kwargs))
        arrays = [isinstance(each, jax.Array) for each in everything]

        @jax.custom_batching.sequential_vmap
        def call(some: list[jax.Array]) -> Any:
            given = iter(some)
            values = [next(given) if array else each for array, each in zip(arrays, everything, strict=True)]
            args, kwargs = jax.tree.unflatten(tree, values)
            return op(*args, **kwargs)

        return call([each for each, array in zip(everything, arrays, strict=True) if array])

    return run


def patch_kernels(monkeypatch: Any) -> None:
    """Makes every op that the invariant numerics call a loop over the ranks."""
    for module in (invariant, base):
        for name in KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, one_after_another(getattr(module, name)))


def _cut(x: jax.Array, spec: PartitionSpec, ranks: int) -> tuple[jax.Array, int | None]:
    """The shards of `x` stacked, and the axis they are stacked along; x itself where tp does not cut it."""
    if "tp" not in spec:
        return x, None
    dim = list(spec).index("tp")
    shape = (*x.shape[:dim], ranks, x.shape[dim] // ranks, *x.shape[dim + 1 :])
    return jnp.moveaxis(x.reshape(shape), dim, 0), 0


def hidden_states(
    engine: Engine, cache: Any, cache_specs: Any, tokens: Any, lengths: Any, tables: Any, ranks: int
) -> Any:
    """What `steps.hidden_states` gives on a mesh of tp=ranks: the taps of rank 0, and the logits of all."""
    steps = engine.steps
    parameters = [_cut(x, spec, ranks) for x, spec in zip(engine.parameters, steps._specs, strict=True)]
    is_spec = lambda each: isinstance(each, PartitionSpec)  # noqa: E731
    flat, tree = jax.tree.flatten(cache)
    caches = [
        _cut(x, s, ranks) for x, s in zip(flat, jax.tree.leaves(cache_specs, is_leaf=is_spec), strict=True)
    ]

    def body(parameters: list[jax.Array], flat: list[jax.Array]) -> Any:
        return steps._hidden_states(parameters, jax.tree.unflatten(tree, flat), tokens, lengths, tables)

    axes = [axis for _, axis in parameters], [axis for _, axis in caches]
    over_tp = functools.partial(
        jax.vmap(body, in_axes=axes, axis_name="tp"), [x for x, _ in parameters], [x for x, _ in caches]
    )

    def whole(one: jax.Array) -> Any:
        alone = jax.vmap(lambda _: jax.vmap(lambda _: over_tp(), axis_name="fsdp")(one), axis_name="data")
        return alone(one)

    compiled = jax.jit(whole, compiler_options=INVARIANT_OPTIONS)
    taps, logits = jax.tree.map(lambda x: x[0, 0], compiled(jnp.zeros((1,))))
    return [tap[0] for tap in taps], jnp.concatenate(list(logits), axis=-1)
