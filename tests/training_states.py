"""Training states of arbitrary bits on any mesh, for the tests of checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tbik_jax import checkpoint_arrays, make_mesh, restore_checkpoint, save_checkpoint
from tbik_jax.models import Qwen3
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG as TWO_LAYERS

CONFIG = dataclasses.replace(TWO_LAYERS, num_hidden_layers=1)
#: Moments in float32 and bfloat16, counts in int32, and a key.
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(mu_dtype=jnp.float32),
    optax.add_noise(0.1, 0.5, jax.random.key(5)),
    optax.scale_by_learning_rate(0.01),
)
State = tuple[Qwen3, nnx.Optimizer, nnx.Rngs]


def abstract_model(dtype: Any = jnp.bfloat16, **fields: Any) -> Qwen3:
    config = dataclasses.replace(CONFIG, **fields)
    return nnx.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))


def abstract_optimizer(model: Qwen3, tx: optax.GradientTransformation = TX) -> nnx.Optimizer:
    return nnx.eval_shape(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param), model)


def any_bits(rng: np.random.Generator, like: Any) -> jax.Array:
    """Random bits of an array's shape and dtype: NaNs of any payload, infinities, subnormals and -0.0 among them."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(int(rng.integers(2**31))), like.shape)
    count = int(np.prod(like.shape)) * like.dtype.itemsize
    return jnp.asarray(np.frombuffer(rng.bytes(count), np.dtype(like.dtype)).reshape(like.shape))


def new_state(mesh: Mesh, seed: int = 0) -> State:
    """A state of arbitrary bits on a mesh, as a train step would leave it: moments lie like the parameters."""
    rng = np.random.default_rng(seed)
    model = abstract_model()
    optimizer = abstract_optimizer(model)
    shardings = checkpoint_arrays.node_shardings({"model": model, "optimizer": optimizer}, mesh)
    for part, node in {"model": model, "optimizer": optimizer}.items():
        shapes = checkpoint_arrays.node_arrays(part, node, abstract=True)
        values = {name: jax.device_put(any_bits(rng, s), shardings[part][name]) for name, s in shapes.items()}
        checkpoint_arrays.update_node(node, values)
    rngs = nnx.Rngs(params=jax.random.key(seed), noise=seed + 1)
    rngs.noise()
    return model, optimizer, rngs


def empty_state() -> State:
    model = abstract_model()
    return model, abstract_optimizer(model), nnx.Rngs(params=0, noise=0)


def values(*nodes: Any) -> dict[str, np.ndarray]:
    """Every array of the nodes by name."""
    flat = {}
    for i, node in enumerate(nodes):
        for name, value in checkpoint_arrays.node_arrays(str(i), node).items():
            key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
            flat[f"{i}.{name}"] = np.asarray(jax.random.key_data(value) if key else value)
    return flat


def assert_same_state(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    a, e = values(*actual), values(*expected)
    assert a.keys() == e.keys()
    for name in e:
        assert_same_bits(a[name], e[name])


def save(folder: Path, step: int, state: State, **more: Any) -> Path:
    model, optimizer, rngs = state
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, rng=rngs, **more)


def restore(folder: Path, state: State, **more: Any) -> Any:
    model, optimizer, rngs = state
    return restore_checkpoint(folder, model=model, optimizer=optimizer, rng=rngs, **more)


def write_two_steps(folder: Path) -> State:
    """Steps 1 and 2 in a folder; returns the state of step 2."""
    state = new_state(make_mesh(fsdp=2, tp=2))
    save(folder, 1, new_state(make_mesh(), seed=1), extra={"cursor": 1})
    save(folder, 2, state, extra={"cursor": 2, "names": ["a"]})
    return state
