"""A small training run whose every bit can be compared over meshes."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import tbik_jax
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision
from tbik_jax.training import shard_model, train_step
from tests.models_small import CONFIG, small_model

ROWS, WIDTH = 8, 16  # 128 tokens: 8 leaves of 16, the shortest that there are


def batch(seed: int, rows: int = ROWS, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Random tokens, and weights 0 or 1 of which each row has another number."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, rows)
    return {
        "tokens": rng.integers(0, CONFIG.vocab_size, (rows, width)).astype(np.int32),
        "weights": (np.arange(1, width) < lengths[:, None]).astype(np.float32),
    }


def next_token_loss(model: tbik_jax.TrainingModel, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each next token."""
    return -model.logprobs(batch["tokens"]), batch["weights"]


def optimizer(model: Any, mesh: Mesh) -> nnx.Optimizer:
    """AdamW in fp32 with fp32 master weights, behind clipping that takes effect."""
    return nnx.Optimizer(model, _transformation(mesh), wrt=nnx.Param)


# One of each for a mesh, so that its runs share a compiled step.
@functools.cache
def _transformation(mesh: Mesh) -> optax.GradientTransformation:
    tx = optax.chain(clip_by_global_norm(0.5, mesh=mesh), optax.adamw(3e-3))
    return mixed_precision(tx, master=True)


@functools.cache
def _step(mesh: Mesh, numerics: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return train_step(next_token_loss, mesh=mesh, numerics=numerics, **dict(options))


class Training:
    """A run on one mesh."""

    def __init__(self, mesh: Mesh, numerics: str = "invariant", **options: Any):
        self.model = shard_model(small_model(), mesh)
        self.optimizer = optimizer(self.model, mesh)
        self._step = _step(mesh, numerics, tuple(options.items()))

    def steps(self, first: int, last: int) -> list[np.ndarray]:
        """The losses of steps first .. last - 1."""
        return [
            np.asarray(self._step(self.model, self.optimizer, batch(step))) for step in range(first, last)
        ]

    def state(self) -> list[np.ndarray]:
        """Parameters, moments, master weights and step count."""
        return [np.asarray(x) for x in jax.tree.leaves(nnx.state((self.model, self.optimizer)))]


@functools.cache
def twenty_steps(
    numerics: str = "invariant", remat: bool = True, **sizes: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Losses and final state of 20 steps on a mesh."""
    run = Training(tbik_jax.make_mesh(**sizes), numerics, **({} if remat else {"remat": False}))
    return run.steps(0, 20), run.state()
