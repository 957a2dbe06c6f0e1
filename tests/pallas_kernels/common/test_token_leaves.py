"""Token leaves: the order of a sum over tokens, and the cuts that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.common.token_leaves import check_token_leaves, token_leaf_sums
from tests import backward
from tests.helpers import assert_same_bits, differing

leaf_sums = jax.jit(token_leaf_sums, static_argnums=1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 37])
def test_a_leaf_has_the_order_of_tree_sum(size: int) -> None:
    x = backward.wide_tokens(np.random.default_rng(size), (8 * size, 3, 5))
    for leaves in (1, 2, 4, 8):
        assert_same_bits(leaf_sums(x, leaves), backward.token_leaf_sums(x, leaves))
    assert_same_bits(token_leaf_sums(jnp.asarray(x), 4), backward.token_leaf_sums(x, 4))


def test_bits_of_a_leaf_do_not_depend_on_the_call() -> None:
    x = backward.wide_tokens(np.random.default_rng(0), (8 * 24, 7))
    whole = backward.assert_leaves_stand_alone(lambda x, leaves: leaf_sums(x, leaves), (x,))
    ordinary = jax.jit(lambda x: jnp.sum(x.reshape(8, 24, 7), axis=1))(x)
    assert differing(ordinary, whole)  # twin


def test_the_cut_must_be_even() -> None:
    assert check_token_leaves("op", 96, 2, multiple=16) == 48
    with pytest.raises(ValueError, match=r"op: 97 tokens .* 2 equal .* of 16; .* of 32 \(the next is 128\)"):
        check_token_leaves("op", 97, 2, multiple=16)
    with pytest.raises(ValueError, match="leaves=16 is not supported"):
        check_token_leaves("op", 96, 16)
