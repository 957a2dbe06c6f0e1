"""A Qwen3 small enough that a mesh's programs compile in seconds, cut so that tp = 8 works."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tbik_jax.models import Qwen3, Qwen3Config

CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
)


def small_model(dtype: jnp.dtype = jnp.bfloat16) -> Qwen3:
    """Random parameters, always the same."""
    return Qwen3(CONFIG, dtype=dtype, rngs=nnx.Rngs(7))


def prompts(lengths: tuple[int, ...] = (5, 1, 12, 3, 9, 2)) -> list[list[int]]:
    """Random token ids, always the same."""
    rng = np.random.default_rng(11)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
