"""What JAX's users reported, each with a twin: plain JAX shows it on a CPU, the ops and `invariant` do not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tbik_jax
from tests.helpers import DTYPES, differing, normal

F32, BF16 = np.float32, DTYPES["bfloat16"]
Dot = Callable[[jax.Array, jax.Array], jax.Array]
ROWS = (((1,), (0,)), ((), ()))


def plain_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, ROWS, preferred_element_type=jnp.float32)


def ours(x: jax.Array, w: jax.Array) -> jax.Array:
    return tbik_jax.dot_general(x, w, ROWS, preferred_element_type=jnp.float32)


CURES: dict[str, Dot] = {"the op": ours, "invariant": tbik_jax.invariant(plain_dot)}


def row_of_eight(dot: Dot) -> int:
    """Elements of eight rows of a bfloat16 product over K=4096 that differ when a row stands alone."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, (8, 4096), BF16), normal(rng, (4096, 16), BF16)
    run = jax.jit(dot)
    whole = np.asarray(run(x, w))
    return sum(differing(run(x[i : i + 1], w), whole[i : i + 1]) for i in range(8))


def identical_rows(dot: Dot) -> int:
    """Rows of one tensor of equal rows whose sums of products differ from the first row's."""
    found, run = 0, jax.jit(dot)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        row, w = normal(rng, (1, 1000)), normal(rng, (1000, 1))
        out = np.asarray(run(np.tile(row, (65, 1)), w))
        found += differing(out, np.broadcast_to(out[:1], out.shape))
    return found


def elided_roundings(transform: Callable[[Callable[..., Any]], Callable[..., Any]]) -> int:
    """Elements that lack a rounding to bfloat16 which the program asks for, when it is compiled."""

    def residual(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x * y + y).astype(jnp.float32) - x.astype(jnp.float32)

    rng = np.random.default_rng(0)
    x, y = normal(rng, (512,), BF16), normal(rng, (512,), BF16)
    expected = (x * y + y).astype(F32) - x.astype(F32)  # ml_dtypes rounds each step
    return differing(jax.jit(transform(residual))(x, y), expected)


@pytest.mark.parametrize("cure", CURES)
def test_a_row_of_eight_stands_alone(cure: str) -> None:
    assert row_of_eight(CURES[cure]) == 0


@pytest.mark.parametrize("cure", CURES)
def test_identical_rows_have_identical_sums(cure: str) -> None:
    assert identical_rows(CURES[cure]) == 0


def test_jit_leaves_no_rounding_out() -> None:
    assert elided_roundings(tbik_jax.invariant) == 0


def test_twin_plain_jax_shows_all_three() -> None:
    assert row_of_eight(plain_dot) > 0
    assert identical_rows(plain_dot) > 0
    assert elided_roundings(lambda fn: fn) > 0
