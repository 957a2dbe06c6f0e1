"""Kernels under `invariant`: refused, unless a rule names them or this package wrote them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import tbik_jax
from tbik_jax import Rule
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import tree_matmul_mosaic_gpu
from tests.helpers import DTYPES, assert_same_bits, normal

F32 = np.float32


def double(x_ref: Any, o_ref: Any) -> None:
    o_ref[...] = x_ref[...] + x_ref[...]


def doubled(x: jax.Array) -> jax.Array:
    return jnp.sum(pl.pallas_call(double, out_shape=x, interpret=True, name="double_kernel")(x))


def test_a_kernel_is_refused_until_a_rule_names_it() -> None:
    x = normal(np.random.default_rng(0), (8,))
    with pytest.raises(ValueError, match=r"pallas_call at .*Rule\(pattern='double_kernel', trust=True\)"):
        tbik_jax.invariant(doubled)(x)
    everything = [Rule(pattern="*", exclude=True)]
    with pytest.raises(ValueError, match="double_kernel"):  # to leave out is not to trust
        tbik_jax.invariant(doubled, everything)(x)
    [refused] = tbik_jax.report(doubled, x).of("uncovered")
    assert refused.primitive == "pallas_call"
    trusted = [Rule(pattern="double_*", trust=True)]
    assert_same_bits(tbik_jax.invariant(doubled, trusted)(x), tbik_jax.sum(x + x))
    [entry] = tbik_jax.report(doubled, x, rules=trusted).of("trusted")
    assert entry.reason == "double_kernel"
    with pytest.warns(UserWarning, match="another"), pytest.raises(ValueError, match="double_kernel"):
        tbik_jax.invariant(jnp.sum, [Rule(pattern="another", trust=True)])(x)
        tbik_jax.invariant(doubled, [Rule(pattern="another", trust=True)])(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "*", "trust": True}, "name the kernel"),
        ({"pattern": "x", "trust": True, "exclude": True}, "two things"),
        ({"pattern": "x", "leaves": 3}, "leaves=3"),
    ],
)
def test_a_rule_that_makes_no_sense_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**options)


def test_the_kernels_of_this_package_stand_as_they_are() -> None:
    rng = np.random.default_rng(1)
    x, w = normal(rng, (9, 64), DTYPES["bfloat16"]), normal(rng, (64, 32), DTYPES["bfloat16"])

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return tree_matmul_mosaic_gpu(x, w, leaves=1, out_dtype=jnp.float32, interpret=True) + 1

    found = tbik_jax.report(product, x, w)
    assert not found.of("uncovered") and len(found.of("trusted")) == 1
    mine = jax.jit(tbik_jax.invariant(product))
    assert "tree_matmul" in str(jax.make_jaxpr(mine)(x, w))
    out = jax.vmap(mine, (0, None))(x[:, None], w)[:, 0]  # by its rule for vmap, a batch of rows is more rows
    np.testing.assert_allclose(out, x.astype(F32) @ w.astype(F32) + 1, rtol=1e-5, atol=1e-5)
