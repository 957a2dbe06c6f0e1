"""The Hopper kernel of SwiGLU on the CPU, and the joint form of the op."""

import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import swiglu, swiglu_joint
from tbik_jax.pallas_kernels.swiglu.mosaic_gpu import swiglu_mosaic_gpu
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal


def operands(f, dtype, rows=3):
    rng = np.random.default_rng(f)
    return jnp.asarray(np.concatenate([mixed(rng, (rows, f), dtype), normal(rng, (rows, f), dtype)], axis=1))


@pytest.mark.parametrize("name", DTYPES)
def test_the_joint_form_is_the_same_op(name):
    gate_up = operands(48, DTYPES[name])
    assert_same_bits(swiglu_joint(gate_up), swiglu(gate_up[:, :48], gate_up[:, 48:]))
    assert differing(swiglu_joint(gate_up), swiglu(gate_up[:, 48:], gate_up[:, :48]))


@pytest.mark.parametrize(("f", "chunks"), [(16, None), (208, 1), (400, 2)])
def test_the_kernel_in_the_reference_s_steps_has_its_bits(f, chunks):
    gate_up = operands(f, DTYPES["bfloat16"])
    out = swiglu_mosaic_gpu(gate_up, chunks=chunks, exact=True, interpret=True)
    assert_same_bits(out, swiglu_joint(gate_up))


def test_the_kernel_is_as_accurate_and_takes_two_arrays():
    f = 208
    gate_up = operands(f, DTYPES["bfloat16"])
    out = swiglu_mosaic_gpu(gate_up, interpret=True)
    assert_same_bits(swiglu_mosaic_gpu(gate_up[:, :f], gate_up[:, f:], interpret=True), out)
    ours, expected = (np.asarray(a, np.float32) for a in (out, swiglu_joint(gate_up)))
    assert (np.abs(ours - expected) <= 2.0**-7 * np.abs(expected) + 1e-30).all()


@pytest.mark.parametrize(
    ("shape", "backend", "message"),
    [
        ((2, 15), None, "gates first"),
        ((), None, "gates first"),
        ((2, 24), "mosaic_gpu", "F a multiple of 16"),
        ((2, 32), "triton", "no backend 'triton'"),
    ],
)
def test_it_refuses(shape, backend, message):
    with pytest.raises(ValueError, match=message):
        swiglu_joint(jnp.zeros(shape, jnp.bfloat16), backend=backend)
