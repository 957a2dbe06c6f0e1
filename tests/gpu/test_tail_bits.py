"""Bits of the head of the model on a Hopper GPU: `pytest -m gpu`. `benchmarks/check_tail.py` checks more and times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import leaf_statistics, sample_argmax
from tbik_jax.pallas_kernels.log_softmax.reference import join_totals
from tbik_jax.pallas_kernels.sampling.mosaic_gpu import sample_argmax_mosaic_gpu
from tests.helpers import assert_same_bits, differing, mixed

VOCAB = 151936
ROWS = 12
statistics = jax.jit(leaf_statistics, static_argnames=("leaves", "backend"))
draw = jax.jit(sample_argmax, static_argnames="backend")


def logits(vocab: int = VOCAB, width: float = 30) -> jax.Array:
    x = mixed(np.random.default_rng(vocab), (ROWS, vocab))
    return jnp.asarray(x / np.abs(x).max(-1, keepdims=True) * np.float32(width))


def hot(x: jax.Array) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    temperature = jnp.asarray(rng.choice([0, 0.6, 1, 1.7], len(x)), jnp.float32)
    key = jnp.asarray(rng.integers(0, 2**32, (len(x), 2)), jnp.uint32)
    return x, x.max(-1), temperature, key, jnp.arange(len(x), dtype=jnp.int32) * 1000


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [VOCAB, 128256, 32000, 8 * 176])
def test_statistics_have_the_bits_of_the_reference(hopper, vocab):
    for width in (0.1, 3, 30, 300):
        x = logits(vocab, width)
        kernel = statistics(x, leaves=8, backend="mosaic_gpu")
        assert_same_bits(kernel, statistics(x, leaves=8, backend="reference"))


@pytest.mark.gpu
def test_twin_another_number_of_leaves_has_other_bits(hopper):
    x = logits(width=0.1)  # every term counts
    eight, four = (
        join_totals(s.maximum, s.total, x.max(-1))
        for s in (statistics(x, leaves=n, backend="mosaic_gpu") for n in (8, 4))
    )
    assert differing(eight, four)


@pytest.mark.gpu
def test_rows_and_ranks_have_the_bits_of_the_whole(hopper):
    x = logits()
    whole = statistics(x, leaves=8, backend="mosaic_gpu")
    for rows in (slice(1), slice(5, 7), slice(3, 12)):
        assert_same_bits(
            statistics(x[rows], leaves=8, backend="mosaic_gpu"), tuple(part[rows] for part in whole)
        )
    for ranks in (2, 4, 8):
        width, leaves = VOCAB // ranks, 8 // ranks
        for rank in range(ranks):
            mine = statistics(x[:, rank * width :][:, :width], leaves=leaves, backend="mosaic_gpu")
            assert_same_bits(mine, tuple(part[:, rank * leaves :][:, :leaves] for part in whole))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [VOCAB, 75968, 18992, 300])
def test_draws_are_those_of_the_reference(hopper, vocab):
    """Tokens and logits by their bits; XLA's quotient may differ in the value's last place."""
    arrays = hot(logits(vocab, 4))
    kernel = draw(*arrays, offset=5, backend="mosaic_gpu")
    reference = draw(*arrays, offset=5, backend="reference")
    assert_same_bits((kernel.token, kernel.logit), (reference.token, reference.logit))
    np.testing.assert_allclose(kernel.value, reference.value, rtol=1e-6, atol=1e-6)
    for parts in (1, 3, 64):
        cut = sample_argmax_mosaic_gpu(*arrays, jnp.int32(5), parts=parts)
        assert_same_bits(cut, kernel)
    alone = draw(*(a[7:8] for a in arrays), offset=5, backend="mosaic_gpu")
    assert_same_bits(alone, tuple(part[7:8] for part in kernel))
