"""Gumbel-max sampling in plain JAX: what the noise is, and what is rounded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..common.rounding import div, log


class Draw(NamedTuple):
    """The best token of a part of the vocabulary, a row each.

    Attributes:
        value: float32 [B], its noisy logit, by which parts compare.
        token: int32 [B], its vocabulary id.
        logit: float32 [B], its logit.
    """

    value: jax.Array
    token: jax.Array
    logit: jax.Array


def sample_argmax_reference(
    logits: jax.Array,
    row_max: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    offset: jax.Array,
) -> Draw:
    """The largest `(logits - row_max) / temperature + noise`, ties to the lowest id; arguments as in the API."""
    noisy = scaled_logits(logits, row_max, temperature) + gumbel_noise(
        key, positions, logits.shape[1], offset=offset
    )
    best = jnp.argmax(noisy, axis=-1)[:, None]
    value, logit = (jnp.take_along_axis(x, best, axis=-1)[:, 0] for x in (noisy, logits))
    hot = temperature > 0
    token = jnp.where(hot, best[:, 0].astype(jnp.int32), 0) + offset
    return Draw(jnp.where(hot, value, -np.inf), token, jnp.where(hot, logit, logits[:, 0]))


def scaled_logits(logits: jax.Array, row_max: jax.Array, temperature: jax.Array) -> jax.Array:
    """(logits - row_max) / temperature of [B, V]; undivided where the temperature is 0.

    Relative to the largest, so that a small temperature cannot carry several tokens to infinity.
    """
    return div(logits - row_max[:, None], jnp.where(temperature > 0, temperature, 1)[:, None])


def gumbel_noise(
    key: jax.Array, positions: jax.Array, vocab_size: int, *, offset: jax.Array | int = 0
) -> jax.Array:
    """Gumbel noise float32 [B, V]: element (b, v) is a function of (key[b], positions[b], offset + v) alone.

    Threefry-2x32 of the seed, folded with the position, folded with the vocabulary id; 23 of its bits make a uniform
    number u in (0, 1), and the noise is -log(-log(u)).
    """
    ids = jnp.arange(vocab_size, dtype=jnp.uint32) + jnp.asarray(offset).astype(jnp.uint32)

    def row(words: jax.Array, position: jax.Array) -> jax.Array:
        at_position = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(at_position, ids))[:, 0]

    bits = jax.vmap(row)(key, positions.astype(jnp.uint32))
    uniform = ((bits >> 9).astype(jnp.float32) + np.float32(0.5)) * np.float32(2.0**-23)  # exact: 24 bits
    return -log(-log(uniform))
