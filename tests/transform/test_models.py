"""Models of Flax, Equinox and Haiku, which nobody here wrote: a row alone and in the batch, plain and invariant."""

from typing import Any

import jax
import numpy as np
import pytest

import tbik_jax
from benchmarks.drop_in_models import MODELS, SMALL, Model, gradient
from benchmarks.hlo import ordered_by_xla
from tests.helpers import assert_same_bits, differing


@pytest.fixture(scope="module", params=MODELS)
def model(request: Any) -> Model:
    return MODELS[request.param](SMALL)


def row(function: Any, model: Model) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """The third row alone, in the batch, the whole batch, and the sums of its program whose order XLA chose."""
    inputs = model.x, model.x[2:3]
    batch, single = (jax.jit(function).lower(model.parameters, x).compile() for x in inputs)
    whole, alone = (
        np.asarray(run(model.parameters, x)) for run, x in zip((batch, single), inputs, strict=True)
    )
    return alone, whole[2:3], whole, ordered_by_xla(batch.as_text())


def test_a_row_has_its_bits_in_every_batch_and_plain_it_has_not(model: Model) -> None:
    alone, within, mine, sums = row(tbik_jax.invariant(model.forward), model)
    assert_same_bits(alone, within)
    assert not sums
    plain_alone, plain_within, plain, plain_sums = row(model.forward, model)
    assert differing(plain_alone, plain_within) > 0
    assert plain_sums
    np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())


def test_every_primitive_of_their_gradients_is_covered(model: Model) -> None:
    found = tbik_jax.report(gradient(model), model.parameters, model.x)
    assert not found.of("uncovered") and not found.of("excluded")
    assert len(found.of("replaced")) > 50
