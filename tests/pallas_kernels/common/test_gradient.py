"""Ops without a gradient in tree order refuse to be differentiated."""

import jax
import jax.numpy as jnp
import pytest

from tbik_jax.pallas_kernels import (
    add_rms_norm,
    attention,
    embedding,
    exp_sum,
    log_softmax,
    residual_add,
    rms_norm,
    rope,
    swiglu,
    swiglu_joint,
    tree_matmul,
)

X = jnp.ones((2, 128))
HEADS = jnp.ones((1, 2, 2, 16))
HALF = jnp.ones((1, 2, 8))
OPS = {
    "tree_matmul": lambda x: tree_matmul(x, jnp.ones((128, 16))),
    "rms_norm": lambda x: rms_norm(x, jnp.ones(128), eps=1e-6),
    "add_rms_norm": lambda x: add_rms_norm(x, x, jnp.ones(128), eps=1e-6)[1],
    "residual_add": lambda x: residual_add(x, x),
    "rope": lambda x: rope(HEADS * x[0, 0], HALF, HALF),
    "swiglu": lambda x: swiglu(x, x),
    "swiglu_joint": swiglu_joint,
    "exp_sum": lambda x: exp_sum(x, jnp.zeros(2), leaves=8),
    "log_softmax": log_softmax,
    "embedding": lambda x: embedding(jnp.arange(2), x),
    "attention": lambda x: attention(HEADS * x[0, 0], HEADS, HEADS, jnp.arange(2)[None]),
}


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_is_refused(name):
    with pytest.raises(ValueError, match="has no gradient in tree order yet"):
        jax.grad(lambda x: OPS[name](x).ravel()[0])(X)


@pytest.mark.parametrize("name", OPS)
def test_constants_may_pass_under_a_gradient(name):
    value, slope = jax.value_and_grad(lambda s: s * jax.lax.stop_gradient(OPS[name](X).ravel()[0]))(2.0)
    assert jnp.isfinite(value) and jnp.isfinite(slope)
