"""rope: tables that are data, a rotation in stated steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.layers import PlainNumerics
from tbik_jax.pallas_kernels.rope.api import rope, rope_tables
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
THETA = 1e6
rotate = jax.jit(rope)
plain = jax.jit(PlainNumerics().rope)


def operands(dtype: Any, rows: int = 70, heads: int = 3, h: int = 32) -> tuple[np.ndarray, ...]:
    x = mixed(np.random.default_rng(0), (rows, heads, h), dtype)
    return x, *rope_tables(rows, h, THETA)


# --- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [2, 16, 128])
def test_tables_hold_the_rounded_cosine_of_the_rounded_angle(h: int) -> None:
    cos, sin = rope_tables(300, h, THETA)
    angle = np.empty((300, h // 2))
    for i in range(h // 2):
        inverse = F32(1.0 / THETA ** float(F32(2 * i) / F32(h)))
        angle[:, i] = np.arange(300, dtype=F32) * inverse
    assert cos.dtype == sin.dtype == F32 and cos.shape == sin.shape == (300, h // 2)
    assert_same_bits((cos, sin), (np.cos(angle).astype(F32), np.sin(angle).astype(F32)))


def test_tables_are_those_of_the_real_angle_up_to_the_rounding_of_the_angle() -> None:
    cos, sin = rope_tables(4096, 128, THETA)
    angle = np.arange(4096)[:, None] * THETA ** -(np.arange(0, 128, 2) / 128)
    tolerance = 3 * np.maximum(angle, 1) * np.finfo(F32).eps
    assert (np.abs(cos - np.cos(angle)) <= tolerance).all() and (
        np.abs(sin - np.sin(angle)) <= tolerance
    ).all()


def test_a_position_has_the_same_bits_in_a_table_of_any_length() -> None:
    whole = rope_tables(1000, 64, THETA)
    for length in (1, 7, 64, 999):
        assert_same_bits(rope_tables(length, 64, THETA), tuple(table[:length] for table in whole))


def test_position_zero_does_not_rotate() -> None:
    cos, sin = rope_tables(1, 16, THETA)
    assert (cos == 1).all() and (sin == 0).all()


@pytest.mark.parametrize(
    ("length", "h", "theta"), [(0, 16, THETA), (4, 15, THETA), (4, 0, THETA), (4, 16, 0.0)]
)
def test_tables_refuse(length: int, h: int, theta: float) -> None:
    with pytest.raises(ValueError, match=f"not {length}, {h}, {theta}"):
        rope_tables(length, h, theta)


# --- rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_the_ordinary_one(name: str) -> None:
    x, cos, sin = operands(DTYPES[name])
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    c, s = (t.astype(np.float64)[:, None] for t in (cos, sin))
    exact = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    size = np.concatenate([np.hypot(first, second)] * 2, axis=-1) + np.finfo(np.float16).tiny
    assert_as_accurate(rotate(x, cos, sin), plain(x, cos, sin), exact, scale=size)


@pytest.mark.parametrize("h", [2, 30, 128])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_steps(name: str, h: int) -> None:
    x, cos, sin = operands(DTYPES[name], h=h)
    assert_same_bits(rotate(x, cos, sin), orders.rope(x, cos, sin))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    x, *_ = operands(DTYPES[name])
    cos, sin = (table[37] for table in rope_tables(38, 32, THETA))  # all rows at one position

    def at_one_position(rows: np.ndarray) -> jax.Array:
        return rotate(rows, *(np.broadcast_to(table, (len(rows), 16)) for table in (cos, sin)))

    assert_rows_stand_alone(at_one_position, x, FEW_ROW_COUNTS)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_heads_or_leading_dimensions(name: str) -> None:
    x, cos, sin = operands(DTYPES[name], rows=12)
    expected = orders.rope(x, cos, sin)
    assert_same_bits(rope(*map(jnp.asarray, (x, cos, sin))), expected)
    assert_same_bits(rotate(x[:, 1:2], cos, sin), expected[:, 1:2])
    batch = rotate(x.reshape(3, 4, 3, 32), cos.reshape(3, 4, 16), sin.reshape(3, 4, 16))
    assert_same_bits(batch, expected.reshape(3, 4, 3, 32))


def test_twin_the_ordinary_one_fuses_products_and_adds() -> None:
    x, cos, sin = operands(F32)
    if not differing(plain(x, cos, sin), orders.rope(x, cos, sin)):
        pytest.skip("XLA does not contract products and adds on this machine")


@pytest.mark.parametrize(
    ("x", "cos", "sin"),
    [
        ((4, 2, 16), (4, 16), (4, 16)),
        ((4, 2, 16), (4, 8), (3, 8)),
        ((4, 2, 16), (8,), (8,)),
        ((4, 2, 15), (4, 7), (4, 7)),
        ((16,), (8,), (8,)),
    ],
)
def test_it_refuses(x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="takes cos and sin"):
        rope(*(jnp.asarray(normal(rng, shape)) for shape in (x, cos, sin)))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_it_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"rope: x is {dtype}; it must be one of bfloat16"):
        rope(jnp.zeros((4, 2, 16), dtype), jnp.zeros((4, 8)), jnp.zeros((4, 8)))
    with pytest.raises(ValueError, match=f"takes float32 cos and sin, not float32 and {dtype}"):
        rope(jnp.zeros((4, 2, 16)), jnp.zeros((4, 8)), jnp.zeros((4, 8), dtype))
