"""XLA's two code generators for GPUs, between which it chooses by timing, give the drop-in ops the same bits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tbik_jax
from tbik_jax.pallas_kernels.common import rounding
from tbik_jax.steps import INVARIANT_OPTIONS
from tests.helpers import assert_same_bits, differing, normal, wide

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
F32 = np.float32
NATIVE = {"xla_gpu_experimental_enable_fusion_autotuner": False}
TRITON = {
    "xla_gpu_experimental_enable_fusion_block_level_rewriter": True,
    "xla_gpu_experimental_all_fusions_with_triton": True,
}
UNARY = (
    *(
        "sin",
        "cos",
        "tan",
        "cbrt",
        "erf_inv",
        "asin",
        "acos",
        "sinh",
        "cosh",
        "exp2",
        "logistic",
        "sqrt",
        "rsqrt",
    ),
    *("exp", "log", "tanh", "erf", "neg", "abs"),
)
BINARY = ("div", "rem", "max", "min", "sub", "mul")


def inputs(kind: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    if kind == "special":
        ends = [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, -3e38, 2, 0.5, 1.5]
        x = np.resize(np.asarray(ends, F32), (256, 512))
        return jnp.asarray(x), jnp.asarray(rng.permuted(x, axis=1))
    make = {"normal": normal, "wide": wide}[kind]
    return jnp.asarray(make(rng, (256, 512))), jnp.asarray(make(rng, (256, 512)))


def programs(function: Callable[..., Any], *args: jax.Array) -> dict[str, Any]:
    """It and a transpose behind it, of which XLA knows two kernels, by either generator."""

    def turned(*args: jax.Array) -> jax.Array:
        out = function(*args)
        return jnp.transpose(out.reshape(out.shape[0], 8, -1), (1, 0, 2))

    lowered = jax.jit(turned).lower(*args)
    return {name: lowered.compile(options) for name, options in (("native", NATIVE), ("triton", TRITON))}


def layers(x: jax.Array) -> jax.Array:
    numbers: dict[str, Any] = {"rngs": nnx.Rngs(0), "dtype": F32, "param_dtype": F32}
    model = nnx.Sequential(nnx.Linear(512, 64, **numbers), jax.nn.gelu, nnx.LayerNorm(64, **numbers))
    return jax.grad(lambda x: jnp.square(model(x)).sum())(x)


def of_lax(name: str) -> Callable[..., jax.Array]:
    return tbik_jax.invariant(getattr(lax, name))


OPS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "product and sum": lambda x, y: rounding.mul(x, y) + y,
    "quotient": rounding.div,
    "quotient of one": lambda x, y: rounding.div(jnp.ones_like(x), x),
    "1 / sqrt": lambda x, y: rounding.reciprocal_sqrt(jnp.abs(x)),
    "exp": lambda x, y: rounding.exp(x),
    "log": lambda x, y: rounding.log(x),
    "negative": lambda x, y: rounding.neg(x),
    "negative, float16": lambda x, y: rounding.neg(x.astype(jnp.float16)),
    "bfloat16": lambda x, y: rounding.round_to(x, jnp.bfloat16),
    "softmax": lambda x, y: tbik_jax.softmax(x, axis=-1),
    "log_softmax": lambda x, y: tbik_jax.log_softmax(x, axis=-1),
    "layer_norm": lambda x, y: tbik_jax.layer_norm(x),
    "rms_norm": lambda x, y: tbik_jax.rms_norm(x),
    "gradient of layers": lambda x, y: tbik_jax.invariant(layers)(x),
    "gradient of a softmax": lambda x, y: jax.vjp(tbik_jax.softmax, x)[1](y)[0],
    "gradient of a norm": lambda x, y: jax.vjp(tbik_jax.layer_norm, x)[1](y)[0],
    **{f"invariant {name}": lambda x, y, name=name: of_lax(name)(x) for name in UNARY},
    **{f"invariant {name}": lambda x, y, name=name: of_lax(name)(x, y) for name in BINARY},
}


@pytest.mark.parametrize("name", OPS)
def test_both_give_the_same_bits(name: str) -> None:
    compiled = programs(OPS[name], *inputs("normal"))
    for kind in ("normal", "wide", "special"):
        args = inputs(kind)
        native = np.asarray(compiled["native"](*args))
        triton = np.asarray(compiled["triton"](*args))
        nan = np.isnan(native.astype(F32))
        np.testing.assert_array_equal(nan, np.isnan(triton.astype(F32)))
        assert_same_bits(np.where(nan, 0, native), np.where(nan, 0, triton))


def test_both_are_at_work() -> None:
    """Engaged; what XLA leaves to one of them alone needs no test."""
    args = inputs("normal")
    of_triton = 0
    for name in ("add", "quotient", "1 / sqrt", "negative", "rms_norm", "invariant sin"):
        compiled = programs(OPS[name], *args)
        assert "__triton" not in compiled["native"].as_text()
        of_triton += "__triton" in compiled["triton"].as_text()
    assert of_triton >= 4


@pytest.mark.parametrize(
    "function",
    [lambda x, y: -x, lambda x, y: F32(1) / rounding.pin(jnp.sqrt(jnp.abs(x)))],
    ids=["-x", "1 / y"],
)
def test_twin_of_ordinary_ops_they_differ(function: Callable[..., Any]) -> None:
    compiled = programs(function, *inputs("normal"))
    args = inputs("special" if function(F32(0), F32(0)) == 0 else "wide")
    assert differing(compiled["native"](*args), compiled["triton"](*args)) > 0


@pytest.mark.parametrize("name", ["quotient of one", "1 / sqrt", "negative", "invariant logistic"])
def test_op_by_op_is_the_whole(name: str) -> None:
    args = inputs("normal")
    assert_same_bits(OPS[name](*args), jax.jit(OPS[name])(*args))


def test_what_this_package_compiles_is_not_timed() -> None:
    assert INVARIANT_OPTIONS.items() >= NATIVE.items()
