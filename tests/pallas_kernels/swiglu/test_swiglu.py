"""swiglu: accurate, in stated steps, an element's bits its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.swiglu.api import swiglu
from tests import orders
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    differing,
    mixed,
    normal,
)

F32 = np.float32
gated = jax.jit(swiglu)
plain = jax.jit(lambda gate, up: jax.nn.silu(gate) * up)


def operands(dtype: Any, rows: int = 70, f: int = 96) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return mixed(rng, (rows, f), dtype), normal(rng, (rows, f), dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_the_ordinary_one(name: str) -> None:
    gate, up = operands(DTYPES[name])
    gate = (gate.astype(F32).clip(-60, 60)).astype(gate.dtype)
    g64, u64 = gate.astype(np.float64), up.astype(np.float64)
    exact = g64 / (1 + np.exp(-g64)) * u64
    scale = np.abs(exact) + float(np.finfo(np.float16).tiny)
    assert_as_accurate(gated(gate, up), plain(gate, up), exact, scale=scale)


@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_steps(name: str) -> None:
    gate, up = operands(DTYPES[name])
    assert_same_bits(gated(gate, up), orders.swiglu(gate, up))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    gate, up = operands(DTYPES[name], f=33)
    both = np.stack([gate, up], axis=1)
    assert_rows_stand_alone(lambda rows: gated(rows[:, 0], rows[:, 1]), both, FEW_ROW_COUNTS)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_or_on_the_length(name: str) -> None:
    gate, up = operands(DTYPES[name], rows=9, f=33)
    expected = orders.swiglu(gate, up)
    assert_same_bits(swiglu(jnp.asarray(gate), jnp.asarray(up)), expected)
    for n in (1, 2, 3, 5, 7, 15, 17):
        assert_same_bits(gated(gate[:, -n:], up[:, -n:]), expected[:, -n:])


def test_large_gates_saturate() -> None:
    gate, up = np.asarray([-1e30, -200, 0, -0.0, 200, 1e30], F32), np.full(6, 2, F32)
    np.testing.assert_array_equal(gated(gate, up), np.asarray([0, 0, 0, 0, 400, 2e30], F32))


@pytest.mark.parametrize("name", DTYPES)
def test_twin_the_ordinary_one_takes_other_steps(name: str) -> None:
    gate, up = operands(DTYPES[name], rows=700)
    if not differing(plain(gate, up), orders.swiglu(gate, up)):
        pytest.skip("jax.nn.silu of this XLA rounds as swiglu does")


@pytest.mark.parametrize(
    ("gate", "up"), [(((4, 8), "float32"), ((4, 9), "float32")), (((4,), "float32"), ((4,), "bfloat16"))]
)
def test_it_refuses(gate: tuple[Any, str], up: tuple[Any, str]) -> None:
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(jnp.zeros(*gate), jnp.zeros(*up))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_it_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"swiglu: gate is {dtype}; it must be one of bfloat16"):
        swiglu(jnp.zeros(4, dtype), jnp.zeros(4, dtype))
