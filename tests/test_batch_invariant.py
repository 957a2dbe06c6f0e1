"""The ablation: numerics that follow the mesh over tp and no batch."""

import functools

import jax
import numpy as np
import pytest

import tbik_jax
from tbik_jax.training import value_and_grad
from tests.helpers import assert_same_bits, differing
from tests.models_small import small_model
from tests.training_small import batch, next_token_loss

ROWS = [list(row) for row in batch(0)["tokens"]]


@functools.cache
def _score(rows, tp):
    """Of the first `rows` rows."""
    mesh = tbik_jax.make_mesh(tp=tp)
    return np.stack(tbik_jax.score(small_model(), ROWS[:rows], mesh=mesh, numerics="batch_invariant"))


def test_a_row_has_the_same_bits_in_any_batch():
    assert_same_bits(_score(1, tp=2), _score(8, tp=2)[:1])


def test_generate_and_score_agree_on_one_mesh():
    mesh, rows = tbik_jax.make_mesh(tp=2), [row[:9] for row in ROWS]
    out = tbik_jax.generate(small_model(), rows, mesh=mesh, max_new_tokens=7, numerics="batch_invariant")
    whole = [[*row, *tokens.tolist()] for row, tokens in zip(rows, out.tokens, strict=True)]
    scored = tbik_jax.score(small_model(), whole, mesh=mesh, numerics="batch_invariant")
    assert_same_bits([row[8:] for row in scored], out.logprobs)


def test_tp_changes_its_bits_and_not_its_numbers():
    assert differing(_score(8, tp=2), _score(8, tp=1)) > 10
    np.testing.assert_allclose(_score(8, tp=2), _score(8, tp=1), atol=0.1)


@pytest.fixture(scope="module")
def gradients():
    """Losses and gradients with batch-invariant numerics, by mesh."""

    def gradient(**sizes):
        step = value_and_grad(next_token_loss, mesh=tbik_jax.make_mesh(**sizes), numerics="batch_invariant")
        return jax.device_get(jax.tree.leaves(step(small_model(), batch(1))))

    return {"one": gradient(), "tp": gradient(tp=2), "fsdp and tp": gradient(fsdp=2, tp=2)}


def test_gradients_follow_tp_alone(gradients):
    assert_same_bits(gradients["fsdp and tp"], gradients["tp"])
    assert sum(differing(a, b) for a, b in zip(gradients["tp"], gradients["one"], strict=True)) > 1000


def test_gradients_are_the_same_numbers(gradients):
    for found, expected in zip(gradients["tp"], gradients["one"], strict=True):
        np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())
