"""rms_norm: accurate, in the stated order, a row's bits its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.layers import PlainNumerics
from tbik_jax.pallas_kernels.rms_norm.api import rms_norm
from tests import orders
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    cancelling,
    differing,
    mixed,
    normal,
    wide,
)

EPS = 1e-6
norm = jax.jit(rms_norm, static_argnames="eps")
plain = jax.jit(PlainNumerics().rms_norm, static_argnames="eps")


def operands(dtype: Any, rows: int = 70, d: int = 128) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return mixed(rng, (rows, d), dtype), (1 + normal(rng, (d,)) / 5).astype(dtype)


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_the_ordinary_one(name: str, kind) -> None:
    x, (_, scale) = kind(np.random.default_rng(0), (70, 1000), DTYPES[name]), operands(DTYPES[name], d=1000)
    x64 = x.astype(np.float64)
    exact = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * scale.astype(np.float64)
    scale_of_error = np.maximum(np.abs(exact), 2.0**-10)
    assert_as_accurate(norm(x, scale, eps=EPS), plain(x, scale, eps=EPS), exact, scale=scale_of_error)


@pytest.mark.parametrize("d", [1, 2, 16, 96, 128, 1000])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, d: int) -> None:
    x, scale = operands(DTYPES[name], d=d)
    assert_same_bits(norm(x, scale, eps=EPS), orders.rms_norm(x, scale, EPS))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    x, scale = operands(DTYPES[name])
    counts = ROW_COUNTS if name == "float32" else FEW_ROW_COUNTS
    assert_rows_stand_alone(lambda rows: norm(rows, scale, eps=EPS), x, counts)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    x, scale = operands(DTYPES[name], rows=12)
    expected = orders.rms_norm(x, scale, EPS)
    assert_same_bits(rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=EPS), expected)
    heads = norm(x.reshape(2, 3, 2, 128), scale, eps=EPS)
    assert_same_bits(heads, expected.reshape(2, 3, 2, 128))

    @jax.jit
    def surrounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = rms_norm(x, scale, eps=EPS)
        return out, jnp.sum(out.astype(np.float32) + x.astype(np.float32))

    assert_same_bits(surrounded(x)[0], expected)


def test_a_row_of_zeros_stays_zero() -> None:
    assert_same_bits(
        norm(np.zeros((2, 16), np.float32), np.ones(16, np.float32), eps=EPS), np.zeros((2, 16), "f4")
    )


@pytest.mark.parametrize("name", DTYPES)
def test_twin_the_ordinary_one_has_another_order(name: str) -> None:
    x, scale = operands(DTYPES[name], rows=2000, d=1000)
    assert differing(plain(x, scale, eps=EPS), orders.rms_norm(x, scale, EPS))


@pytest.mark.parametrize(
    ("x", "scale", "eps", "message"),
    [
        ((4, 16), (8,), EPS, r"scale \[D\], not shapes \(4, 16\) and \(8,\)"),
        ((4, 16), (4, 16), EPS, "not shapes"),
        ((), (), EPS, "not shapes"),
        ((4, 16), (16,), 0.0, "eps=0.0 must be positive"),
        ((4, 16), (16,), float("nan"), "eps=nan must be positive"),
    ],
)
def test_it_refuses(x: tuple[int, ...], scale: tuple[int, ...], eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(jnp.zeros(x), jnp.zeros(scale), eps=eps)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_it_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: x is {dtype}; it must be one of bfloat16"):
        rms_norm(jnp.zeros((4, 16), dtype), jnp.zeros(16), eps=EPS)
    with pytest.raises(ValueError, match=f"rms_norm: scale is {dtype}"):
        rms_norm(jnp.zeros((4, 16)), jnp.zeros(16, dtype), eps=EPS)
