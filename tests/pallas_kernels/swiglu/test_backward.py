"""The gradient of swiglu: accurate, in stated steps, an element's bits its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.swiglu.backward import swiglu_backward
from tests import backward
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

gradient = jax.jit(swiglu_backward)


def operands(dtype: Any, rows: int = 70, f: int = 33) -> tuple[np.ndarray, ...]:
    """gate, up, dy."""
    rng = np.random.default_rng(0)
    gate = mixed(rng, (rows, f), dtype)
    return gate, normal(rng, (rows, f), dtype), backward.wide_tokens(rng, (rows, f), dtype)


def plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def plain(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> Any:
    return jax.vjp(plain_swiglu, gate, up)[1](jnp.asarray(dy))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_it_is_as_accurate_as_the_ordinary_one(name: str) -> None:
    gate, up, dy = operands(DTYPES[name])
    gate = gate.astype(np.float32).clip(-60, 60).astype(gate.dtype)
    exact = backward.in_float64(plain_swiglu, (gate, up), dy)
    for ours, theirs, true in zip(gradient(gate, up, dy), plain(gate, up, dy), exact, strict=True):
        size = np.abs(dy.astype(np.float64)) * np.maximum(np.abs(up.astype(np.float64)), 1)
        assert_as_accurate(ours, theirs, true, scale=size)


def test_it_loses_nothing_where_a_sigmoid_saturates() -> None:
    """Within 16 ulp of every slope, but for the zero of dgate at -1.278."""
    gate = np.concatenate([np.linspace(-80, -2, 4000), np.linspace(-1, 80, 4000)]).astype(np.float32)
    ones = np.ones_like(gate)
    exact = backward.in_float64(lambda g, u: g / (1 + jnp.exp(-g)) * u, (gate, ones), ones)
    for ours, true in zip(gradient(gate, ones, ones), exact, strict=True):
        kept = np.abs(true) > 1e-37
        assert (np.abs(ours - true)[kept] <= 16 * 2.0**-24 * np.abs(true)[kept]).all()


@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_steps(name: str) -> None:
    gate, up, dy = operands(DTYPES[name])
    assert_same_bits(gradient(gate, up, dy), backward.swiglu(gate, up, dy))
    wide_dy = dy.astype(np.float32) * np.float32(1.0009765625)
    assert_same_bits(gradient(gate, up, wide_dy), backward.swiglu(gate, up, wide_dy))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    rows = np.stack(operands(DTYPES[name]), axis=1)
    assert_rows_stand_alone(
        lambda rows: np.stack(gradient(rows[:, 0], rows[:, 1], rows[:, 2])).swapaxes(0, 1),
        rows,
        FEW_ROW_COUNTS,
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bits_do_not_depend_on_the_cut_of_the_intermediate_size(ranks: int) -> None:
    args = operands(np.float32, rows=9, f=8 * 13)
    whole = gradient(*args)
    parts = [gradient(*cut) for cut in zip(*(np.split(x, ranks, axis=1) for x in args), strict=True)]
    assert_same_bits(tuple(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)), whole)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    args = operands(DTYPES[name], rows=9)
    expected = backward.swiglu(*args)
    assert_same_bits(swiglu_backward(*map(jnp.asarray, args)), expected)

    @jax.jit
    def surrounded(gate: jax.Array, up: jax.Array, dy: jax.Array) -> Any:
        out = swiglu_backward(gate * 2, up, dy * 0.5)
        return out, jnp.sum(out[0].astype(np.float32) * gate + out[1].astype(np.float32))

    gate, up, dy = args
    half, two = np.asarray(0.5, gate.dtype), np.asarray(2, gate.dtype)
    assert_same_bits(surrounded(gate * half, up, dy * two)[0], expected)
    rows = jax.jit(lambda *args: jax.lax.map(lambda row: swiglu_backward(*row), args))(*args)
    assert_same_bits(rows, expected)


def test_large_gates_saturate() -> None:
    gate = np.asarray([-1e30, -200, 0, -0.0, 200, 1e30], np.float32)
    dgate, dup = gradient(gate, np.full(6, 2, np.float32), np.full(6, 3, np.float32))
    np.testing.assert_array_equal(dgate, np.asarray([0, 0, 3, 3, 6, 6], np.float32))
    np.testing.assert_array_equal(dup, 3 * np.asarray([0, 0, 0, 0, 200, 1e30], np.float32))


@pytest.mark.parametrize("name", DTYPES)
def test_twin_plain_jax_takes_other_steps(name: str) -> None:
    args = operands(DTYPES[name])
    assert sum(map(differing, jax.jit(plain)(*args), gradient(*args)))


@pytest.mark.parametrize(
    ("gate", "up", "dy", "message"),
    [
        ((4, 8), (4, 9), (4, 8), "must be alike"),
        ((4, 8), (4, 8), (4,), r"takes dy of its shape .* not \(4,\) float32"),
    ],
)
def test_it_refuses(gate: Any, up: Any, dy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu_backward(jnp.zeros(gate), jnp.zeros(up), jnp.zeros(dy))


def test_it_refuses_other_dtypes() -> None:
    zeros = jnp.zeros(4)
    with pytest.raises(ValueError, match="swiglu_backward: gate is int32"):
        swiglu_backward(zeros.astype(int), zeros.astype(int), zeros)
    with pytest.raises(ValueError, match="must be alike"):
        swiglu_backward(zeros, zeros.astype("bfloat16"), zeros)
    with pytest.raises(ValueError, match="not \\(4,\\) bfloat16"):
        swiglu_backward(zeros, zeros, zeros.astype("bfloat16"))


def test_it_has_no_second_derivative() -> None:
    ones = jnp.ones(4)
    with pytest.raises(ValueError, match="swiglu_backward has no gradient in tree order"):
        jax.grad(lambda x: swiglu_backward(x, ones, ones)[0].sum())(ones)
