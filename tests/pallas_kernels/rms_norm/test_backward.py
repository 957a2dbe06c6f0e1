"""The gradient of rms_norm: accurate, in the stated order, a row's bits its own and a token leaf's too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.layers import PlainNumerics
from tbik_jax.pallas_kernels import tree_join
from tbik_jax.pallas_kernels.rms_norm.backward import rms_norm_backward
from tests import backward
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    bits,
    cancelling,
    differing,
    mixed,
    normal,
    wide,
)

EPS = 1e-6
gradient = jax.jit(functools.partial(rms_norm_backward, eps=EPS), static_argnames="leaves")


def operands(dtype: Any, rows: int = 64, d: int = 48) -> tuple[np.ndarray, ...]:
    """x, scale, dy, residual; dy spreads over the tokens."""
    rng = np.random.default_rng(0)
    scale = (1 + normal(rng, (d,)) / 5).astype(dtype)
    dy = backward.wide_tokens(rng, (rows, d), dtype)
    return mixed(rng, (rows, d), dtype), scale, dy, normal(rng, (rows, d), dtype)


def plain_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The textbook formula in the operands' own dtype."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def plain(x: np.ndarray, scale: np.ndarray, dy: np.ndarray) -> Any:
    return jax.vjp(functools.partial(PlainNumerics().rms_norm, eps=EPS), x, scale)[1](jnp.asarray(dy))


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_it_is_as_accurate_as_the_ordinary_one(name: str, kind: Any) -> None:
    rng = np.random.default_rng(1)
    x, dy = (kind(rng, (64, 96), DTYPES[name]) for _ in range(2))
    scale = operands(DTYPES[name], d=96)[1]
    dx, dscale = gradient(x, scale, dy, leaves=8)
    dx64, dscale64 = backward.in_float64(plain_norm, (x, scale), dy)
    plain_dx, plain_dscale = plain(x, scale, dy)
    row = np.abs(dx64).max(-1, keepdims=True)
    assert_as_accurate(dx, plain_dx, dx64, scale=row)
    assert_as_accurate(tree_join(list(dscale)), plain_dscale, dscale64, scale=np.abs(dscale64).max())


@pytest.mark.parametrize("name", DTYPES)
def test_the_residual_is_added_before_the_only_rounding(name: str) -> None:
    x, scale, dy, residual = operands(DTYPES[name])
    fused = gradient(x, scale, dy, residual=residual, leaves=8)
    assert_same_bits(fused, backward.rms_norm(x, scale, dy, residual, EPS, 8))
    alone = gradient(x, scale, dy, leaves=8)[0]
    twice = (np.asarray(alone, np.float32) + residual.astype(np.float32)).astype(residual.dtype)
    if name != "float32":  # twin: rounded before the add as well
        assert differing(twice, fused[0])


@pytest.mark.parametrize("d", [1, 2, 16, 96, 250])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, d: int) -> None:
    x, scale, dy, _ = operands(DTYPES[name], rows=24, d=d)
    for leaves in (1, 4):  # 24 and 6 tokens a leaf: padded
        assert_same_bits(
            gradient(x, scale, dy, leaves=leaves), backward.rms_norm(x, scale, dy, None, EPS, leaves)
        )


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1))
def test_it_has_the_stated_order_at_any_shape(size: int, d: int, leaves: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = wide(rng, (leaves * size, d)), backward.wide_tokens(rng, (leaves * size, d))
    scale = normal(rng, (d,))
    assert_same_bits(
        gradient(x, scale, dy, leaves=leaves), backward.rms_norm(x, scale, dy, None, EPS, leaves)
    )


def test_a_float32_cotangent_of_half_rows() -> None:
    x, scale, dy, residual = operands(DTYPES["bfloat16"])
    dy = dy.astype(np.float32) * np.float32(1.0009765625)
    expected = backward.rms_norm(x, scale, dy, residual, EPS, 8)
    assert_same_bits(gradient(x, scale, dy, residual=residual, leaves=8), expected)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    x, scale, dy, residual = operands(DTYPES[name], rows=70)
    rows = np.stack([x, dy, residual], axis=1)

    def op(rows: np.ndarray) -> Any:
        return gradient(rows[:, 0], scale, rows[:, 1], residual=rows[:, 2], leaves=1)[0]

    assert_rows_stand_alone(op, rows, FEW_ROW_COUNTS)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_leaf_do_not_depend_on_the_call(name: str) -> None:
    x, scale, dy, _ = operands(DTYPES[name])
    backward.assert_leaves_stand_alone(
        lambda x, dy, leaves: gradient(x, scale, dy, leaves=leaves)[1], (x, dy)
    )


def test_twin_plain_jax_has_another_order() -> None:
    x, scale, dy, _ = operands(np.float32)
    dx, dscale = gradient(x, scale, dy, leaves=8)
    plain_dx, plain_dscale = jax.jit(plain)(x, scale, dy)
    assert differing(plain_dx, dx)
    assert differing(plain_dscale, tree_join(list(dscale)))


def test_twin_a_joined_sum_of_other_leaves_differs() -> None:
    """The cut into leaves shows: one leaf of all tokens is another sum than eight joined."""
    x, scale, dy, _ = operands(np.float32, rows=48)
    one, eight = (gradient(x, scale, dy, leaves=leaves)[1] for leaves in (1, 8))
    assert differing(one[0], tree_join(list(eight)))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    x, scale, dy, residual = operands(DTYPES[name], rows=24)
    expected = backward.rms_norm(x, scale, dy, residual, EPS, 2)
    eager = rms_norm_backward(
        *map(jnp.asarray, (x, scale, dy)), eps=EPS, leaves=2, residual=jnp.asarray(residual)
    )
    assert_same_bits(eager, expected)

    @jax.jit
    def surrounded(x: jax.Array, dy: jax.Array, residual: jax.Array) -> Any:
        out = rms_norm_backward(x * 2, scale, dy * 0.5, eps=EPS, leaves=2, residual=residual)
        return out, jnp.sum(out[0].astype(np.float32) * x) + jnp.sum(out[1] * 3)

    def layer(args: tuple[jax.Array, ...]) -> Any:
        x, dy, residual = args
        return rms_norm_backward(x, scale, dy, eps=EPS, leaves=2, residual=residual)

    half, two = np.asarray(0.5, x.dtype), np.asarray(2, x.dtype)
    assert_same_bits(surrounded(x * half, dy * two, residual)[0], expected)
    layers = jax.jit(lambda *args: jax.lax.map(layer, args))(*(np.stack([a, a]) for a in (x, dy, residual)))
    assert_same_bits(jax.tree.map(lambda out: out[1], layers), expected)


def test_tokens_may_have_several_dimensions_and_no_cotangent() -> None:
    x, scale, dy, _ = operands(np.float32)
    assert_same_bits(
        gradient(x.reshape(4, 16, -1), scale, dy.reshape(4, 16, -1), leaves=8)[1],
        gradient(x, scale, dy, leaves=8)[1],
    )
    dx, dscale = gradient(x, scale, np.zeros_like(dy), leaves=8)
    assert not np.any(dx) and not np.any(dscale) and np.any(bits(gradient(x, scale, dy, leaves=8)[0]))


@pytest.mark.parametrize(
    ("shapes", "keywords", "message"),
    [
        (((4, 16), (8,), (4, 16)), {}, r"scale \[D\] and dy \[..., D\], not shapes"),
        (((4, 16), (16,), (3, 16)), {}, r"\(3, 16\)"),
        (((4, 16), (16,), (4, 16)), {"eps": 0.0}, "eps=0.0 must be positive"),
        (((4, 16), (16,), (4, 16)), {"leaves": 8}, "4 tokens cannot be cut into 8 equal.*the next is 8"),
        (((6, 16), (16,), (6, 16)), {"leaves": 3}, "leaves=3 is not supported"),
        (((4, 16), (16,), (4, 16)), {"residual": jnp.zeros((4, 8))}, "residual .* must be alike"),
        (((4, 16), (16,), (4, 16)), {"residual": jnp.zeros((4, 16), "bfloat16")}, "must be alike"),
        (((0, 16), (16,), (0, 16)), {}, "0 tokens"),
    ],
)
def test_it_refuses(shapes: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm_backward(*map(jnp.zeros, shapes), **({"eps": EPS, "leaves": 1} | keywords))


def test_it_refuses_other_dtypes() -> None:
    zeros = jnp.zeros((4, 16))
    with pytest.raises(ValueError, match="x is int32"):
        rms_norm_backward(zeros.astype(int), jnp.zeros(16), zeros, eps=EPS, leaves=1)
    with pytest.raises(ValueError, match="dy is bfloat16; it must be float32"):
        rms_norm_backward(zeros, jnp.zeros(16), zeros.astype("bfloat16"), eps=EPS, leaves=1)


def test_it_has_no_second_derivative() -> None:
    x, scale, dy, _ = operands(np.float32, rows=8)
    with pytest.raises(ValueError, match="rms_norm_backward has no gradient in tree order"):
        jax.grad(lambda x: rms_norm_backward(x, scale, dy, eps=EPS, leaves=1)[0].sum())(jnp.asarray(x))
