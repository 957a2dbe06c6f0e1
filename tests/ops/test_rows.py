"""Sums, means, variances, softmax and norms over any axes: values, stated orders, batches, gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbik_jax
from tbik_jax.pallas_kernels import log_softmax as kernel_log_softmax
from tbik_jax.pallas_kernels import rms_norm as kernel_rms_norm
from tests import orders
from tests.backward import in_float64
from tests.helpers import (
    DTYPES,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    cancelling,
    differing,
    mixed,
    normal,
    rows_that_differ,
)

F32 = np.float32
Op = Callable[..., Any]
AXES: tuple[Any, ...] = (None, 0, (0, 2), -1)
#: ours and jax's, with an axis
OPS: dict[str, tuple[Op, Op]] = {
    "sum": (tbik_jax.sum, jnp.sum),
    "mean": (tbik_jax.mean, jnp.mean),
    "var": (tbik_jax.var, jnp.var),
    "logsumexp": (tbik_jax.logsumexp, jax.scipy.special.logsumexp),
    "softmax": (tbik_jax.softmax, jax.nn.softmax),
    "log_softmax": (tbik_jax.log_softmax, jax.nn.log_softmax),
}


def plain_rms_norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def plain_layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    return (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(
        jnp.var(x, -1, keepdims=True) + 1e-6
    ) * scale + bias


NORMS: dict[str, tuple[Op, Op, int]] = {
    "rms_norm": (tbik_jax.rms_norm, plain_rms_norm, 1),
    "layer_norm": (tbik_jax.layer_norm, plain_layer_norm, 2),
}


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_as_accurate_as_jax(name: str, axis: Any) -> None:
    op, plain = OPS[name]
    x = normal(np.random.default_rng(0), (4, 5, 6))
    shape = jax.eval_shape(lambda x: plain(x, axis=axis), x).shape
    ct = normal(np.random.default_rng(1), shape)

    def both(op: Op) -> Any:
        out, pull = jax.jit(lambda x: jax.vjp(lambda x: op(x, axis=axis), x))(x)
        return out, jax.jit(lambda ct: pull(ct))(ct)[0]

    (mine, gradient), (theirs, plain_gradient) = both(op), both(plain)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6)
    [exact] = in_float64(lambda x: plain(x, axis=axis), (x,), ct)
    scale = np.abs(exact).max()
    if name == "sum":
        assert_same_bits(gradient, plain_gradient)
    else:
        assert_as_accurate(gradient, plain_gradient, exact, scale=scale, factor=8)


@pytest.mark.parametrize("name", OPS)
def test_keepdims_where_vmap_and_second_derivatives(name: str) -> None:
    op, plain = OPS[name]
    rng = np.random.default_rng(2)
    x, where = normal(rng, (4, 6)), rng.random((4, 6)) > 0.3
    where[:, 0] = True
    np.testing.assert_allclose(
        op(x, axis=1, where=where), plain(x, axis=1, where=where), rtol=2e-6, atol=2e-6
    )
    if name not in ("softmax", "log_softmax"):
        assert_same_bits(op(x, axis=1, keepdims=True)[:, 0], op(x, axis=1))
    assert_same_bits(jax.vmap(lambda row: op(row, axis=0))(x), op(x, axis=1))

    def curvature(op: Op) -> Any:
        return jax.jit(jax.jacrev(jax.grad(lambda x: jnp.sin(op(x, axis=1)).sum())))(x)

    np.testing.assert_allclose(curvature(op), curvature(plain), rtol=1e-4, atol=1e-4)


def test_orders_are_the_stated_ones() -> None:
    rng = np.random.default_rng(3)
    x = cancelling(rng, (5, 46))
    total = orders.tree_sum(x)
    assert_same_bits(tbik_jax.sum(x, -1), total)
    assert_same_bits(tbik_jax.sum(x.reshape(5, 2, 23), (1, 2)), total)
    assert_same_bits(tbik_jax.sum(np.ascontiguousarray(x.T), 0), total)
    mean = total / F32(46)
    assert_same_bits(tbik_jax.mean(x, -1), mean)
    centred = x - mean[:, None]
    assert_same_bits(tbik_jax.var(x, -1), orders.tree_sum(centred * centred) / F32(46))
    assert differing(np.add.accumulate(x, axis=-1)[:, -1], total) > 0
    logits = normal(rng, (5, 256))
    assert_same_bits(tbik_jax.log_softmax(logits), kernel_log_softmax(logits, backend="reference"))
    assert (
        differing(kernel_log_softmax(logits, leaves=1, backend="reference"), tbik_jax.log_softmax(logits)) > 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_bits_of_the_kernel_package(dtype: str) -> None:
    rng = np.random.default_rng(4)
    x, scale = mixed(rng, (9, 96), DTYPES[dtype]), normal(rng, (96,), DTYPES[dtype])
    assert_same_bits(tbik_jax.rms_norm(x, scale), kernel_rms_norm(x, scale, eps=1e-6, backend="reference"))


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_as_accurate_as_plain_with_their_gradients(name: str) -> None:
    op, plain, parameters = NORMS[name]
    rng = np.random.default_rng(5)
    operands = tuple(normal(rng, shape) for shape in ((9, 40), *[(40,)] * parameters))
    mine, pull = jax.vjp(op, *operands)
    theirs, plain_pull = jax.vjp(plain, *operands)
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    ct = normal(rng, (9, 40))
    for a, b, exact in zip(pull(ct), plain_pull(ct), in_float64(plain, operands, ct), strict=True):
        assert_as_accurate(a, b, exact, scale=np.abs(exact).max(), factor=8)


ROW_OPS: dict[str, Op] = {
    **{name: functools.partial(op, axis=-1) for name, (op, _) in OPS.items()},
    "rms_norm": lambda x: tbik_jax.rms_norm(x, np.arange(1, 101, dtype=F32).astype(x.dtype)),
    "layer_norm": lambda x: tbik_jax.layer_norm(x, *[np.arange(1, 101, dtype=F32).astype(x.dtype)] * 2),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ROW_OPS),
        ("mean", "bfloat16"),
        ("softmax", "bfloat16"),
        ("layer_norm", "float16"),
    ],
)
def test_a_row_stands_alone_forward_and_backward(name: str, dtype: str) -> None:
    op = jax.jit(ROW_OPS[name])
    x = mixed(np.random.default_rng(6), (33, 100), DTYPES[dtype])
    counts = (1, 17)

    def both(x: Any) -> Any:
        out, pull = jax.vjp(op, x)
        weights = (jnp.arange(100 if out.ndim > 1 else 1) % 7).astype(out.dtype)
        gradient = pull(jnp.broadcast_to(weights if out.ndim > 1 else weights[0] + 1, out.shape))[0]
        return jnp.concatenate([out if out.ndim > 1 else out[:, None], gradient], axis=1)

    assert_rows_stand_alone(jax.jit(both), x, counts)
    if dtype == "float32":
        assert_same_bits(op(x), ROW_OPS[name](x))  # eagerly


def test_the_same_cut_finds_sums_that_differ() -> None:
    """XLA's CPU sums of rows have one order a length; the sum as a plain product with ones has not, and is found."""
    x, ones = mixed(np.random.default_rng(7), (33, 4096)), np.ones((4096, 24), F32)
    assert rows_that_differ(jax.jit(lambda x: jnp.dot(x, ones)[:, 0]), x, (1, 8, 17)) > 0
    assert rows_that_differ(jax.jit(lambda x: tbik_jax.sum(x, -1)), x, (1, 8, 17)) == 0


def test_infinities_and_empty_rows() -> None:
    x = np.asarray([[-np.inf, -np.inf], [np.inf, 0], [np.nan, 0], [0, -np.inf]], F32)
    np.testing.assert_array_equal(tbik_jax.logsumexp(x, axis=-1), [-np.inf, np.inf, np.nan, 0])
    assert_same_bits(tbik_jax.softmax(x[3:]), np.asarray([[1, 0]], F32))
    assert_same_bits(tbik_jax.sum(np.zeros((2, 0), F32), -1), np.zeros(2, F32))
    assert tbik_jax.sum(np.ones((3, 2), np.int32)) == 6
    assert_same_bits(tbik_jax.sum(np.ones(3, F32), initial=2.0), F32(5))
    assert_same_bits(tbik_jax.mean(np.ones(49, F32)), F32(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: tbik_jax.sum(x, axis=2), "axis 2"),
        (lambda x: tbik_jax.sum(x, axis=(0, -2)), "twice"),
        (lambda x: tbik_jax.sum(x, out=x), "out="),
        (lambda x: tbik_jax.sum(x, dtype=jnp.int32), "int32"),
        (lambda x: tbik_jax.mean(x.astype(np.int32)), "int32"),
        (lambda x: tbik_jax.logsumexp(x, b=x), "b="),
        (lambda x: tbik_jax.softmax(x.astype(np.complex64)), "complex64"),
        (lambda x: tbik_jax.rms_norm(x, np.ones(2, F32)), "scale"),
        (lambda x: tbik_jax.layer_norm(x, eps=0.0), "eps"),
    ],
)
def test_what_is_not_covered_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 4), F32))
