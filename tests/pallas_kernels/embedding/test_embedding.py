"""embedding: exact rows of a table, and of the part of it that a rank holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.embedding.api import embedding
from tests.helpers import DTYPES, assert_rows_stand_alone, assert_same_bits, bits, mixed

look_up = jax.jit(embedding)
VOCAB, D = 64, 24


def table(dtype: Any) -> np.ndarray:
    rows = mixed(np.random.default_rng(0), (VOCAB, D), dtype)
    rows[5, :4] = [-0.0, np.inf, -np.inf, np.nan]
    return rows


def ids(shape: tuple[int, ...] = (70,)) -> np.ndarray:
    drawn = np.random.default_rng(1).integers(0, VOCAB, shape).astype(np.int32)
    drawn.flat[:3] = 0, VOCAB - 1, 5
    return drawn


@pytest.mark.parametrize("name", DTYPES)
def test_rows_are_copied_bit_for_bit(name: str) -> None:
    rows = table(DTYPES[name])
    assert_same_bits(look_up(ids(), rows), rows[ids()])
    assert_same_bits(look_up(ids((2, 3, 5)), rows), rows[ids((2, 3, 5))])
    assert_same_bits(embedding(jnp.asarray(ids()), jnp.asarray(rows)), rows[ids()])


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    assert_rows_stand_alone(lambda rows: look_up(rows, table(DTYPES[name])), ids(), (1, 7, 33))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_each_id_lies_in_one_part_and_is_zero_bits_in_the_others(name: str, ranks: int) -> None:
    rows = table(DTYPES[name])
    size = VOCAB // ranks
    parts = [look_up(ids(), rows[r * size : (r + 1) * size], offset=r * size) for r in range(ranks)]
    assert sum((bits(part) != 0).any(-1).astype(int) for part in parts).max() == 1
    assert_same_bits(sum(bits(part) for part in parts), bits(rows[ids()]))


@pytest.mark.parametrize("outside", [-1, -VOCAB, VOCAB, 2**31 - 1])
def test_an_id_outside_the_table_gives_plus_zeros(outside: int) -> None:
    got = look_up(np.asarray([outside], np.int32), table(np.float32))
    assert_same_bits(got, np.zeros((1, D), np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int16"])
def test_ids_may_be_of_any_integer_type(dtype: str) -> None:
    rows = table(np.float32)
    assert_same_bits(look_up(ids().astype(dtype), rows), rows[ids()])


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (4, 8)), ("int32", (4,)), ("int32", (4, 8, 2))])
def test_it_refuses(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="embedding takes integer ids and a table"):
        embedding(jnp.zeros(3, dtype), jnp.zeros(shape))
