"""Layers: a column-parallel product takes its weight as it is stored, [N, K]."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tbik_jax import make_mesh
from tbik_jax.layers import InvariantNumerics, Numerics, PlainNumerics
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, normal, wide


def column_parallel(numerics: Numerics, tp: int):
    return jax.jit(
        jax.shard_map(
            numerics.column_parallel,
            mesh=make_mesh(tp=tp),
            in_specs=(P(), P("tp")),
            out_specs=P(None, None, "tp"),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_column_parallel_product_is_one_leaf_over_the_rows_of_w(name: str, tp: int) -> None:
    rng = np.random.default_rng(0)
    x, w = wide(rng, (2, 3, 64), DTYPES[name]), normal(rng, (48, 64), DTYPES[name])
    expected = orders.round_to(orders.matmul(x.reshape(6, 64), w.T, 1), x.dtype)
    assert_same_bits(column_parallel(InvariantNumerics(), tp)(x, w), expected.reshape(2, 3, 48))


def test_the_plain_product_contracts_w_where_it_lies() -> None:
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((2, 3, 64), (48, 64)))
    text = column_parallel(PlainNumerics(), 2).lower(x, w).as_text()
    assert "dot_general" in text and "transpose" not in text
