"""The tree of leaves and the halving sum of a row: which value meets which, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.common.tree import tree_join, tree_sum
from tests import orders
from tests.helpers import (
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    cancelling,
    differing,
    mixed,
    normal,
    wide,
)

jit_sum = jax.jit(tree_sum)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Term:
    """A name that remembers how it was added up."""

    def __init__(self, text: str):
        self.text = text

    def __add__(self, other: "Term") -> "Term":
        return Term(f"({self.text}+{other.text})")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (4, "((0+1)+(2+3))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_join_adds_neighbours_first_and_the_lower_on_the_left(count: int, expected: str) -> None:
    assert tree_join([Term(str(i)) for i in range(count)]).text == expected


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_join_has_the_stated_order(kind, count: int) -> None:
    parts = list(kind(rng(), (count, 257)))
    assert_same_bits(jax.jit(tree_join)(parts), orders.tree_join(parts))


def test_join_of_a_subtree_is_a_node_of_the_tree() -> None:
    parts = list(cancelling(rng(), (8, 257)))
    halves = [tree_join(parts[:4]), tree_join(parts[4:])]
    assert_same_bits(tree_join(halves), orders.tree_join(parts))


@pytest.mark.parametrize("count", [0, 3, 5, 6, 7, 12])
def test_join_refuses_what_is_no_tree(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} partial sums .* use 1, 2, 4 or 8"):
        tree_join([jnp.zeros(2)] * count)


def test_twin_another_order_of_the_join_has_other_bits() -> None:
    parts = list(cancelling(rng(), (8, 257)))
    chain = parts[0]
    for part in parts[1:]:
        chain = chain + part
    assert differing(chain, orders.tree_join(parts))
    assert differing(orders.tree_join(parts[::2] + parts[1::2]), orders.tree_join(parts))


@pytest.mark.parametrize("n", [*range(1, 18), 31, 33, 100, 128, 1000])
def test_sum_has_the_stated_order(n: int) -> None:
    x = mixed(rng(), (30, n))
    assert_same_bits(jit_sum(x), orders.tree_sum(x))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_sum_keeps_the_sign_of_zero_as_the_padding_makes_it(n: int) -> None:
    x = np.full((3, n), -0.0, np.float32)
    assert_same_bits(jit_sum(x), orders.tree_sum(x))


@pytest.mark.parametrize("n", [96, 128])
def test_sum_of_a_row_depends_on_the_row_alone(n: int) -> None:
    assert_rows_stand_alone(jit_sum, mixed(rng(), (70, n)), FEW_ROW_COUNTS)


def test_sum_has_the_same_bits_without_jit_and_in_more_dimensions() -> None:
    x = mixed(rng(), (30, 100))
    assert_same_bits(tree_sum(jnp.asarray(x)), orders.tree_sum(x))
    assert_same_bits(jit_sum(x.reshape(2, 3, 5, 100)), orders.tree_sum(x).reshape(2, 3, 5))


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
def test_sum_is_as_accurate_as_the_ordinary_one(kind) -> None:
    x = kind(rng(), (70, 1000))
    exact, scale = x.astype(np.float64).sum(-1), np.abs(x).sum(-1, dtype=np.float64)
    assert_as_accurate(jit_sum(x), jnp.sum(x, axis=-1), exact, scale=scale)


def test_twin_the_ordinary_sum_has_another_order() -> None:
    x = cancelling(rng(), (70, 1000))
    assert differing(jax.jit(lambda x: jnp.sum(x, axis=-1))(x), orders.tree_sum(x))
