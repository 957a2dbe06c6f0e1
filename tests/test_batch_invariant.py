"""The ablation: numerics that follow the mesh over tp and no batch."""

import jax
import numpy as np
import pytest

import tbik_jax
from tbik_jax.training import value_and_grad
from tests.helpers import assert_same_bits, differing
from tests.models_small import prompts, small_model
from tests.training_small import batch, next_token_loss


def _generate(rows, numerics="batch_invariant", **sizes):
    mesh = tbik_jax.make_mesh(**sizes)
    return tbik_jax.generate(small_model(), rows, mesh=mesh, max_new_tokens=8, numerics=numerics)


def _score(rows, numerics="batch_invariant", **sizes):
    scored = tbik_jax.score(small_model(), rows, mesh=tbik_jax.make_mesh(**sizes), numerics=numerics)
    return np.concatenate(scored)


def test_a_row_has_the_same_bits_in_any_batch():
    every = _generate(prompts(), tp=2)
    alone = _generate(prompts()[2:3], tp=2)
    assert_same_bits((alone.tokens[0], alone.logprobs[0]), (every.tokens[2], every.logprobs[2]))
    cut = _generate(prompts(), data=2, tp=2)
    assert_same_bits((cut.tokens, cut.logprobs), (every.tokens, every.logprobs))


def test_tp_changes_its_bits_and_not_those_of_invariant_numerics():
    rows = [list(row) for row in batch(0)["tokens"]]
    one = _score(rows)
    np.testing.assert_allclose(_score(rows, tp=4), one, atol=0.1)
    assert differing(_score(rows, tp=4), one) > 10
    assert differing(_score(rows, tp=2), one) > 10
    assert_same_bits(_score(rows, "invariant", tp=4), _score(rows, "invariant"))


@pytest.fixture(scope="module")
def gradients():
    """Losses and gradients with batch-invariant numerics, by mesh."""

    def gradient(**sizes):
        mesh = tbik_jax.make_mesh(**sizes)
        return jax.device_get(
            value_and_grad(next_token_loss, mesh=mesh, numerics="batch_invariant")(small_model(), batch(1))
        )

    return {
        "one": gradient(),
        "fsdp": gradient(fsdp=2),
        "tp": gradient(tp=2),
        "fsdp and tp": gradient(fsdp=2, tp=2),
    }


def test_gradients_follow_tp_alone(gradients):
    assert_same_bits(gradients["fsdp"], gradients["one"])
    assert_same_bits(gradients["fsdp and tp"], gradients["tp"])
    each = zip(jax.tree.leaves(gradients["tp"]), jax.tree.leaves(gradients["one"]), strict=True)
    assert sum(differing(a, b) for a, b in each) > 1000


def test_gradients_are_the_same_numbers(gradients):
    leaves = (jax.tree.leaves(gradients[name]) for name in ("tp", "one"))
    for found, expected in zip(*leaves, strict=True):
        np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())
