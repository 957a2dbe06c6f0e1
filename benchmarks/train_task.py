"""A training run of a Qwen3 of real shape on random tokens, for what measures and compares training."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import tbik_jax
from benchmarks.generate_speed import sharded_model
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision


def next_token_loss(
    model: tbik_jax.TrainingModel, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each next token, and its weight."""
    return -model.logprobs(batch["tokens"]), batch["weights"]


class TrainingTask:
    """A run with one numerics on one mesh. Every run of a model begins with the same weights and tokens.

    Attributes:
        model: bfloat16 parameters.
        optimizer: AdamW with clipping, in float32.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        numerics: str,
        *,
        rows: int,
        width: int,
        layers: int | None = None,
        master: bool = False,
        **options: Any,
    ):
        self.model: Qwen3 = sharded_model(name, mesh, layers)
        clipped = optax.chain(clip_by_global_norm(1.0, mesh=mesh), optax.adamw(1e-4))
        self.optimizer = nnx.Optimizer(self.model, mixed_precision(clipped, master=master), wrt=nnx.Param)
        self._step = tbik_jax.train_step(next_token_loss, mesh=mesh, numerics=numerics, **options)
        self._rows, self._width = rows, width

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Random tokens; each row but one ends early."""
        rng = np.random.default_rng(step)
        ends = rng.integers(self._width // 2, self._width + 1, self._rows)
        ends[0] = self._width
        tokens = rng.integers(0, self.model.config.vocab_size, (self._rows, self._width))
        return {
            "tokens": tokens.astype(np.int32),
            "weights": (np.arange(1, self._width) < ends[:, None]).astype(np.float32),
        }

    def step(self, batch: dict[str, Any]) -> jax.Array:
        """Trains on a batch, and returns the loss before it."""
        return self._step(self.model, self.optimizer, batch)

    def fingerprints(self) -> dict[str, str]:
        """Of the parameters and of the optimiser's state."""
        return {
            "parameters": tbik_jax.fingerprint(jax.tree.leaves(nnx.state(self.model))),
            "optimizer": tbik_jax.fingerprint(jax.tree.leaves(nnx.state(self.optimizer))),
        }


def step_flops(config: Qwen3Config, rows: int, width: int) -> float:
    """Floating-point operations of a step without those that rematerialisation repeats, for the model's utilisation.

    Forward and backward of every matmul, 6 a weight and token, and of causal attention's two products of half the
    keys each, 3 times 2 * 2 * T / 2 * N * H a token and layer. The embedding's lookup has none.
    """
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    out = config.num_attention_heads * config.head_dim
    layer = config.hidden_size * (heads + out + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return rows * width * (6.0 * weights + 6.0 * width * out * config.num_hidden_layers)
