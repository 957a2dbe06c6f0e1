"""How far apart outputs are: counts, probabilities up to where tokens part, and the first token that differs."""

import numpy as np
import pytest

from tbik_jax.divergence import divergence_by_position, judge


def output(tokens, logprobs):
    return np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32)


A = output([1, 2, 3], [-1.0, -2.0, -3.0])
B = output([1, 2, 4], [-1.0, -2.5, -0.1])
SHORT = output([1], [-1.5])


def test_the_first_token_that_differs_is_the_least_over_prompts():
    assert judge([[A, A], [A, B]]).first_token == 2
    assert judge([[A, A]]).first_token is None
    assert judge([[A, B], [A, output([9, 2, 3], [0, 0, 0])]]).first_token == 0
    assert judge([[A, SHORT]]).first_token == 1  # where the shorter one ends


def test_other_probabilities_of_the_same_tokens_are_no_other_token():
    nudged = A[0], np.nextafter(A[1], np.float32(0))
    verdict = judge([[A, nudged]])
    assert verdict.first_token is None and not verdict.same_bits and verdict.divergence > 0


def test_by_position_ends_where_tokens_part():
    found = divergence_by_position([[A, A], [A, B]])
    assert found == pytest.approx([0, np.exp(-2.0) - np.exp(-2.5), 0])  # the third: from the pair that agrees
    found = divergence_by_position([[A, B]])
    assert found[:2] == pytest.approx([0, np.exp(-2.0) - np.exp(-2.5)]) and np.isnan(found[2])
    assert found[1] == judge([[A, B]]).divergence
