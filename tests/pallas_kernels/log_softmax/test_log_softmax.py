"""log_softmax: accurate, in the stated order, a row's bits its own, and leaves for the ranks of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.log_softmax.api import exp_sum, log_softmax
from tests import orders
from tests.helpers import (
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    differing,
    mixed,
    normal,
)

F32 = np.float32
logp = jax.jit(log_softmax, static_argnames="leaves")
sums = jax.jit(exp_sum, static_argnames="leaves")
plain = jax.jit(jax.nn.log_softmax)


def logits(rows: int = 70, vocab: int = 296) -> np.ndarray:
    """Rows of every kind, from flat distributions, whose sums need every term, to peaked ones."""
    rng = np.random.default_rng(0)
    x = mixed(rng, (rows, vocab))
    width = 10 ** rng.uniform(-2, 2, (rows, 1)).astype(F32)
    return x / np.abs(x).max(-1, keepdims=True) * width


@pytest.mark.parametrize("factor", [0.1, 5, 50])
def test_it_is_as_accurate_as_the_ordinary_one(factor: float) -> None:
    x = normal(np.random.default_rng(0), (70, 1000)) * F32(factor)
    x64 = x.astype(np.float64)
    shifted = x64 - x64.max(-1, keepdims=True)
    exact = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert_as_accurate(logp(x), plain(x), exact, scale=np.abs(exact).max(-1, keepdims=True))


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab", [8, 296, 1024])
def test_it_has_the_stated_order(vocab: int, leaves: int) -> None:
    x = logits(vocab=vocab)
    assert_same_bits(sums(x, x.max(-1), leaves=leaves), orders.exp_sum(x, x.max(-1), leaves))
    assert_same_bits(logp(x, leaves=leaves), orders.log_softmax(x, leaves))


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    assert_rows_stand_alone(logp, logits(), FEW_ROW_COUNTS)


def test_bits_do_not_depend_on_jit_or_leading_dimensions() -> None:
    x = logits(rows=12)
    expected = orders.log_softmax(x, 8)
    assert_same_bits(log_softmax(jnp.asarray(x)), expected)
    assert_same_bits(logp(x.reshape(2, 3, 2, 296)), expected.reshape(2, 3, 2, 296))
    assert_same_bits(logp(x[0]), expected[0])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_computes_a_complete_subtree(ranks: int) -> None:
    x = logits()
    row_max = x.max(-1)
    parts = [np.asarray(sums(part, row_max, leaves=8 // ranks)) for part in np.split(x, ranks, axis=-1)]
    assert_same_bits(orders.tree_join(parts), sums(x, row_max, leaves=8))


def test_one_possible_token_has_probability_one() -> None:
    x = np.full((2, 16), -1e30, F32)
    x[:, 3] = 7
    out = np.asarray(logp(x))
    assert (out[:, 3] == 0).all() and np.isfinite(out).all()


def test_twin_another_order_has_other_bits() -> None:
    x = logits(vocab=1024)
    row_max = x.max(-1)
    expected = orders.exp_sum(x, row_max, 8)
    assert differing(jax.jit(lambda x, m: jnp.sum(jnp.exp(x - m[:, None]), axis=-1))(x, row_max), expected)
    assert all(differing(sums(x, row_max, leaves=leaves), expected) for leaves in (2, 4))
    assert differing(plain(x), orders.log_softmax(x, 8))


def test_a_vocabulary_of_a_power_of_two_in_one_leaf_pairs_other_elements() -> None:
    x = logits(vocab=1024)
    assert differing(sums(x, x.max(-1), leaves=1), sums(x, x.max(-1), leaves=8))


@pytest.mark.parametrize(
    ("x", "leaves", "message"),
    [
        (np.zeros((2, 12), F32), 8, "vocabulary of 12 cannot be cut into 8 equal leaves"),
        (np.zeros((2, 12), F32), 3, "into 3 equal leaves; use 1, 2, 4 or 8"),
        (np.zeros((2, 16), np.float16), 8, "takes float32 x .* not float16"),
    ],
)
def test_it_refuses(x: np.ndarray, leaves: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_softmax(x, leaves=leaves)


def test_exp_sum_refuses_a_maximum_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"row_max \[...\], not"):
        exp_sum(np.zeros((2, 16), F32), np.zeros((2, 1), F32), leaves=8)
