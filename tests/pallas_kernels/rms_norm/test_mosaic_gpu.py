"""The Hopper kernels of RMSNorm on the CPU: in the interpreter, which adds across threads by `tree_sum` itself.

The part that crosses threads is tested in `common/test_mosaic_rows.py`, the bits of a GPU in `tests/gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import add_rms_norm, residual_add, rms_norm
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.rms_norm.mosaic_gpu import rms_norm_mosaic_gpu
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

EPS = 1e-6


def operands(d, dtype, rows=3):
    rng = np.random.default_rng(d)
    return (
        mixed(rng, (rows, d), dtype),
        normal(rng, (rows, d), dtype),
        (1 + normal(rng, (d,)) / 5).astype(dtype),
    )


@pytest.mark.parametrize(
    ("d", "name"), [(16, "bfloat16"), (128, "float16"), (640, "bfloat16"), (1536, "bfloat16")]
)
def test_it_has_the_reference_s_bits(d, name):
    x, y, scale = map(jnp.asarray, operands(d, DTYPES[name]))
    assert_same_bits(rms_norm_mosaic_gpu(x, scale, eps=EPS, interpret=True), orders.rms_norm(x, scale, EPS))
    total, out = rms_norm_mosaic_gpu(x, scale, eps=EPS, y=y, interpret=True)
    assert_same_bits(total, residual_add(x, y))
    assert_same_bits(out, orders.rms_norm(np.asarray(total), scale, EPS))
    # twin: the norm of the sum that was not rounded
    unrounded = np.asarray(x, np.float32) + np.asarray(y, np.float32)
    assert differing(orders.rms_norm(unrounded, scale, EPS).astype(x.dtype), out)


def test_a_row_stands_alone():
    x, _, scale = map(jnp.asarray, operands(256, DTYPES["bfloat16"]))
    whole = rms_norm_mosaic_gpu(x, scale, eps=EPS, interpret=True)
    assert_same_bits(rms_norm_mosaic_gpu(x[1:2], scale, eps=EPS, interpret=True), whole[1:2])
    assert differing(whole[0], whole[1])


@pytest.mark.parametrize("name", DTYPES)
def test_the_fused_op_is_both_ops(name):
    x, y, scale = map(jnp.asarray, operands(48, DTYPES[name]))
    total = residual_add(x, y)
    assert_same_bits(add_rms_norm(x, y, scale, eps=EPS), (total, rms_norm(total, scale, eps=EPS)))


@pytest.mark.parametrize("d", [1024, 2560, 80])
def test_it_lowers_for_hopper(monkeypatch, d):
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    rows, scale = jax.ShapeDtypeStruct((7, d), jnp.bfloat16), jax.ShapeDtypeStruct((d,), jnp.bfloat16)
    fused = jax.jit(lambda x, y, s: add_rms_norm(x, y, s, eps=EPS, backend="mosaic_gpu"))
    text = fused.trace(rows, rows, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("d", "scale_dtype", "backend", "message"),
    [
        (24, jnp.bfloat16, "mosaic_gpu", "a multiple of 16 up to 8192 elements.*not D=24"),
        (8208, jnp.bfloat16, "mosaic_gpu", "D=8208"),
        (128, jnp.float32, "mosaic_gpu", "bfloat16 and float32"),
        (128, jnp.bfloat16, "triton", "rms_norm has no backend 'triton'"),
    ],
)
def test_it_refuses(d, scale_dtype, backend, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(jnp.zeros((2, d), jnp.bfloat16), jnp.zeros(d, scale_dtype), eps=EPS, backend=backend)


def test_the_fused_op_refuses_unlike_terms():
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm(jnp.zeros((2, 16)), jnp.zeros((3, 16)), jnp.zeros(16), eps=EPS)
