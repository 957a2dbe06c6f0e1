"""The Hopper kernels of attention's backward pass on the CPU: order and synchronisation in interpret mode, refusals.

Bits of a GPU need a GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.attention.backward import attention_with_lse
from tbik_jax.pallas_kernels.attention.backward_mosaic_gpu import attention_backward_mosaic_gpu
from tbik_jax.pallas_kernels.attention.backward_reference import attention_backward_reference
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan
from tests.helpers import assert_same_bits, differing

BF16, F16 = jnp.bfloat16, jnp.float16
NAMES = ("dq", "dk", "dv")


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def operands(b: int, t: int, kv_heads: int, group: int, h: int, dtype: Any) -> tuple[jax.Array, ...]:
    """All operands; `out` and `lse` in float32 by a formula."""
    rng = np.random.default_rng([b, t, kv_heads, group, h])
    shapes = [(b, t, heads, h) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)]
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    rows = q.reshape(b, t, kv_heads, group, h).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->btkgs", rows, k.astype(jnp.float32)) * h**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool))[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("btkgs,bskh->btkgh", jax.nn.softmax(scores), v.astype(jnp.float32))
    lse = jax.nn.logsumexp(scores, axis=-1).reshape(b, t, -1)
    return q, k, v, out.reshape(q.shape).astype(dtype), lse, dout


def interpreted(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
    scale = arrays[0].shape[3] ** -0.5
    return tuple(map(np.asarray, attention_backward_mosaic_gpu(*arrays, scale=scale, interpret=True)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 64, 1, 1, 128), BF16),  # one consumer has nothing
        ((1, 300, 1, 2, 64), BF16),  # three pairs of tiles, the last one ragged, and more blocks than slots
        ((2, 133, 2, 3, 64), F16),
        ((1, 1, 1, 1, 64), BF16),
    ],
)
def test_it_is_the_gradient(shape: tuple[int, ...], dtype: Any) -> None:
    arrays = operands(*shape, dtype)
    reference = jax.jit(partial(attention_backward_reference, scale=shape[-1] ** -0.5))(*arrays)
    unit = float(jnp.finfo(dtype).eps)  # weights, scores' gradients and the result are rounded to the dtype
    for name, ours, true in zip(NAMES, interpreted(*arrays), reference, strict=True):
        true = np.asarray(true, np.float32)
        error = np.abs(ours.astype(np.float32) - true).max()
        assert error <= unit * max(1.0, np.abs(true).max()), f"{name}: {error}"


def test_a_row_and_a_kv_head_stand_alone() -> None:
    arrays = operands(2, 70, 2, 1, 64, BF16)
    whole = interpreted(*arrays)
    assert_same_bits(interpreted(*(a[1:] for a in arrays)), tuple(g[1:] for g in whole))
    assert_same_bits(interpreted(*(a[:, :, 1:] for a in arrays)), tuple(g[:, :, 1:] for g in whole))


def test_what_follows_does_not_enter_and_what_is_seen_does() -> None:
    q, k, v, out, lse, dout = operands(1, 130, 1, 1, 64, BF16)
    whole = interpreted(q, k, v, out, lse, dout)
    after = interpreted(q, k.at[:, 100:].set(3), v.at[:, 100:].set(300), out, lse, dout)
    assert not differing(after[0][:, :100], whole[0][:, :100])
    assert differing(after[0][:, 100:], whole[0][:, 100:])  # the twin
    padded = interpreted(q, k, v, out, lse, dout.at[:, 64:].set(0))
    alone = interpreted(*(a[:, :64] for a in (q, k, v, out, lse, dout)))
    assert_same_bits(tuple(g[:, :64] for g in padded), alone)
    assert not any(g[:, 64:].any() for g in padded)


@pytest.mark.parametrize(("t", "starts"), [(130, [0, 70]), (3, [0, 200])])
def test_the_forward_kernel_keeps_the_log_sum_exp(t: int, starts: list[int]) -> None:
    """Also where few queries would take the other variant; the output is the one without it."""
    rng = np.random.default_rng(t)
    q = jnp.asarray(rng.standard_normal((2, t, 3, 64)), BF16)
    k, v = (jnp.asarray(rng.standard_normal((2, 256, 1, 64)), BF16) for _ in range(2))
    positions = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(t, dtype=jnp.int32)
    run = partial(attention_mosaic_gpu, q, k, v, positions, plan=AttentionPlan(), scale=0.125, interpret=True)
    out, lse = run(with_lse=True)
    assert_same_bits(out, run())
    _, expected = jax.jit(partial(attention_with_lse, backend="reference"))(q, k, v, positions)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "message"),
    [
        ((1, 8, 1, 1, 96), BF16, 1.0, "takes head_dim 64 and 128, not 96; use backend='reference'"),
        ((1, 8, 1, 1, 64), jnp.float32, 1.0, "takes bfloat16 and float16, not float32"),
        ((1, 8, 1, 1, 64), BF16, -1.0, "takes a positive scale, not -1.0"),
        ((1, 8, 1, 1, 64), BF16, float("inf"), "takes a positive scale, not inf"),
    ],
)
def test_it_refuses_what_it_does_not_cover(shape, dtype, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_backward_mosaic_gpu(*operands(*shape, dtype), scale=scale, interpret=True)
