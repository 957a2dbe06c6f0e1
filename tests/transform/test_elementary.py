"""Elementary functions: accurate, the values of NumPy at the ends, and the same bits in every batch and fusion."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax

import tbik_jax
from tbik_jax.pallas_kernels.common.rounding import pin
from tests.helpers import DTYPES, assert_same_bits, differing

F32 = np.float32
#: Of each function: the one in float64, the largest |x| and the smallest x, and the error allowed in ulp.
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float, float]] = {
    "tanh": (np.tanh, 30, -30, 1.5),
    "log1p": (np.log1p, 3e38, -0.9999, 3),
    "log2": (np.log2, 3e38, 1e-37, 3),
    "expm1": (np.expm1, 88, -88, 3),
    "asinh": (np.arcsinh, 3e38, -3e38, 3),
    "acosh": (np.arccosh, 3e38, 1, 4),
    "atanh": (np.arctanh, 0.99999, -0.99999, 3),
    "erf": (scipy.special.erf, 10, -10, 3),
    "erfc": (scipy.special.erfc, 9, -9, 11),
}
ENDS = np.asarray([0, -0.0, 1, -1, 1e-40, -1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan], F32)


def of_many_sizes(name: str, count: int) -> np.ndarray:
    _, most, least, _ = FUNCTIONS[name]
    rng = np.random.default_rng(len(name))
    sizes = np.exp(rng.uniform(np.log(1e-30), np.log(most), count))
    if least == 1:
        return (1 + np.minimum(sizes, 1e38)).astype(F32)
    return np.clip(sizes * rng.choice([-1, 1], count), least, most).astype(F32)


def applied(name: str) -> Callable[[Any], Any]:
    return jax.jit(tbik_jax.invariant(getattr(lax, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_accurate(name: str) -> None:
    exact, _, _, allowed = FUNCTIONS[name]
    x = np.concatenate([of_many_sizes(name, 1 << 18), of_many_sizes(name, 1 << 16) % F32(8)])
    x = x[(x >= FUNCTIONS[name][2]) & (x <= FUNCTIONS[name][1])]
    expected = exact(x.astype(np.float64))
    normal = np.abs(expected) > 2.0**-126
    errors = np.abs(np.asarray(applied(name)(x), np.float64) - expected) / np.spacing(
        np.abs(expected).astype(F32)
    )
    assert errors[normal].max() <= allowed
    assert np.sum(normal) > 1e5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_its_ends_are_those_of_numpy(name: str) -> None:
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name][0](ENDS.astype(np.float64)).astype(F32)
    out = np.asarray(applied(name)(ENDS))
    flushed = (np.abs(ENDS) == F32(1e-40)) & (name == "log2")  # subnormal numbers count as zeros
    np.testing.assert_allclose(out[~flushed], expected[~flushed], rtol=1e-6, atol=2e-40)
    zeros = expected == 0
    assert_same_bits(out[zeros & (ENDS == 0)], expected[zeros & (ENDS == 0)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_rounded_once(dtype: str) -> None:
    x = np.linspace(-3, 3, 999).astype(DTYPES[dtype])
    wide = np.asarray(applied("tanh")(x.astype(F32)))
    assert_same_bits(applied("tanh")(x), wide.astype(DTYPES[dtype]))


AFTER: dict[str, Callable[[Any], Any]] = {
    "alone": lambda y: y,
    "sigmoid": jax.nn.sigmoid,
    "line": lambda y: y * F32(1.1) + 1,
    "square": lambda y: y * y,
}


def parts_that_differ(function: Callable[[Any], Any], x: np.ndarray) -> int:
    """Elements that have other bits in a batch of few than in the batch of all."""
    run = jax.jit(function, compiler_options={"xla_allow_excess_precision": False})
    whole, differ = np.asarray(run(x)), 0
    for shape in ((1,), (3,), (13,), (67,), (13, 7), (59, 3)):
        size = int(np.prod(shape))
        for i in range(0, min(len(x), 40 * size) - size + 1, size):
            out = np.asarray(run(x[i : i + size].reshape(shape)))
            differ += differing(out.reshape(-1), whole[i : i + size])
    return differ


def inputs(name: str) -> np.ndarray:
    x = np.random.default_rng(3).uniform(-2, 2, 1 << 13).astype(F32)
    if name == "log2":
        return np.abs(x) + F32(0.01)
    return 1 + np.abs(x) if name == "acosh" else x / 4 if name in ("atanh", "log1p") else x


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bits_depend_neither_on_the_batch_nor_on_the_fusion(name: str, after: str) -> None:
    def function(x: jax.Array) -> jax.Array:
        return AFTER[after](getattr(lax, name)(x))

    x = inputs(name)
    mine = tbik_jax.invariant(function)
    assert parts_that_differ(mine, x) == 0
    step_by_step = tbik_jax.invariant(AFTER[after])(applied(name)(x))
    assert_same_bits(jax.jit(mine)(x), step_by_step)


def test_twin_the_ordinary_functions_depend_on_the_batch() -> None:
    """XLA's own, and XLA's own rounded by itself before what follows."""
    assert parts_that_differ(jnp.tanh, inputs("tanh")) > 0
    for name in ("tanh", "log2"):
        left = [tbik_jax.Rule(pattern=name, exclude=True)]
        function = getattr(lax, name)
        rounded = tbik_jax.invariant(lambda x, f=function: jax.nn.sigmoid(pin(f(x))), left)
        assert parts_that_differ(rounded, inputs(name)) > 0


def test_gradients_are_made_of_them() -> None:
    """gelu's derivative holds tanh or erf: what XLA makes of them is another function."""
    x = inputs("tanh")
    for approximate in (True, False):
        gradient = jax.grad(lambda x, a=approximate: jax.nn.gelu(x, approximate=a).sum())
        entries = tbik_jax.report(gradient, x)
        replaced = {e.primitive for e in entries.of("replaced")}
        assert ("tanh" if approximate else "erfc") in replaced and not entries.of("uncovered")
        np.testing.assert_allclose(
            jax.jit(tbik_jax.invariant(gradient))(x), jax.jit(gradient)(x), rtol=1e-4, atol=1e-6
        )
        assert parts_that_differ(tbik_jax.invariant(gradient), x) == 0
