"""Sampling whose noise comes from (request seed, position, vocabulary id) alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .pallas_kernels.common.rounding import exp, mul
from .pallas_kernels.common.tree import tree_sum
from .pallas_kernels.sampling.reference import gumbel_noise, scaled_logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a prompt are chosen.

    Attributes:
        temperature: 0 takes the most probable token; 1e-20 .. 1e20 divides the logits before sampling.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: then keep the smallest set of most probable tokens whose probability reaches p; None or 1 keeps all.
        seed: 0 .. 2**64 - 1. The noise of a token depends on (seed, position, vocabulary id) alone, so equal prompts
            with equal seeds give equal samples: give each its own seed for several samples of one prompt.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_number(self.temperature) and (self.temperature == 0 or 1e-20 <= self.temperature <= 1e20)):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or from 1e-20 to 1e20")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise ValueError(
                f"top_k={self.top_k} must be a whole number of at least 1, or None for all tokens"
            )
        if self.top_p is not None and not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], or None for all tokens")
        if not (_whole(self.seed) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed={self.seed} must be a whole number in 0 .. 2**64 - 1")

    @property
    def filters(self) -> bool:
        """Whether any token can be ruled out."""
        narrower = self.top_p is not None and self.top_p < 1
        return self.temperature > 0 and (self.top_k is not None or narrower)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """The parameters of a batch as arrays, one row a prompt.

    Attributes:
        temperature: float32 [B].
        top_k: int32 [B]; the vocabulary's size where all tokens are kept.
        top_p: float32 [B]; 2 where all tokens are kept.
        key: uint32 [B, 2], the seed's high and low word: a Threefry key.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array

    def narrow(self, vocab_size: int) -> jax.Array:
        """Which rows rule tokens out; bool [B]."""
        return (self.temperature > 0) & ((self.top_k < vocab_size) | (self.top_p <= 1))


def sampling_arrays(params: list[SamplingParams], vocab_size: int) -> SamplingArrays:
    """Host (numpy) arrays for a batch; `jax.device_put` places them."""
    seeds = [int(p.seed) for p in params]
    arrays: dict[str, Any] = dict(
        temperature=np.asarray([p.temperature for p in params], np.float32),
        top_k=np.asarray(
            [vocab_size if p.top_k is None else min(p.top_k, vocab_size) for p in params], np.int32
        ),
        top_p=np.asarray([2.0 if p.top_p is None or p.top_p >= 1 else p.top_p for p in params], np.float32),
        key=np.asarray([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32),
    )
    return SamplingArrays(**arrays)


def sample(logits: jax.Array, positions: jax.Array, params: SamplingArrays, *, filtered: bool) -> jax.Array:
    """One token a row: the argmax of (logits - max) / temperature + Gumbel noise over the tokens that the filters keep.

    Args:
        logits: float32 [B, V], finite.
        positions: int32 [B], the absolute position that the new token will have.
        params: of the batch.
        filtered: whether any row uses top_k or top_p; without, no sort is compiled, and `sample_argmax` gives the same
            tokens with less work.

    Returns:
        int32 [B]. Ties go to the lowest vocabulary id.
    """
    hot = params.temperature > 0
    scaled = scaled_logits(logits, jnp.max(logits, axis=-1), params.temperature)
    noisy = scaled + gumbel_noise(params.key, positions, logits.shape[1])
    if filtered:
        noisy = jnp.where(_kept(scaled, params), noisy, -jnp.inf)
    chosen = jnp.where(hot[:, None], noisy, logits)
    return jnp.argmax(chosen, axis=-1).astype(jnp.int32)


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _kept(scaled: jax.Array, params: SamplingArrays) -> jax.Array:
    """Which tokens top_k and then top_p keep; bool [B, V]. Equal logits rank by vocabulary id."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)  # the inverse permutation
    descending = jnp.take_along_axis(scaled, order, axis=-1)
    weights = exp(descending - descending[:, :1])
    weights = jnp.where(jnp.arange(scaled.shape[1]) < params.top_k[:, None], weights, 0)
    before = jnp.pad(_prefix_sum(weights), ((0, 0), (1, 0)))[:, :-1]
    enough = before >= mul(params.top_p, tree_sum(weights))[:, None]
    # the most probable token always stays, whatever rounding did to a tiny top_p
    count = jnp.minimum(jnp.maximum(jnp.argmax(enough, axis=-1), 1), params.top_k)
    count = jnp.where(jnp.any(enough, axis=-1), count, params.top_k)
    return rank < count[:, None]


def _prefix_sum(x: jax.Array) -> jax.Array:
    """Inclusive prefix sums along the last axis by doubling strides, one order per row length."""
    stride = 1
    while stride < x.shape[-1]:
        x = x + jnp.pad(x, ((0, 0), (stride, 0)))[:, : x.shape[-1]]
        stride *= 2
    return x
