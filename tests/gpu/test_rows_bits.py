"""Bits of the row-wise kernels on a Hopper GPU: `pytest -m gpu tests/gpu/test_rows_bits.py`.

`benchmarks/check_rows.py` checks the same at more sizes and keeps the results.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import (
    add_rms_norm,
    qk_norm_rope,
    residual_add,
    rms_norm,
    rope_tables,
    swiglu,
    swiglu_joint,
)
from tbik_jax.pallas_kernels.qk_norm_rope.mosaic_gpu import qk_norm_rope_mosaic_gpu
from tests.helpers import assert_same_bits, cancelling, differing, normal, on_cpu, wide

EPS = 1e-6
BF16 = jnp.bfloat16


pytestmark = pytest.mark.usefixtures("hopper")


def rows_and_scale(make, d, rows=130):
    rng = np.random.default_rng(d)
    x, y = (jnp.asarray(make(rng, (rows, d), BF16)) for _ in range(2))
    return x, y, jnp.asarray((1 + normal(rng, (d,)) / 5).astype(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize("d", [80, 128, 1024, 2560, 4096, 5120, 8192])
def test_norms_have_the_reference_s_bits_in_any_batch(make, d):
    x, y, scale = rows_and_scale(make, d)
    whole = add_rms_norm(x, y, scale, eps=EPS, backend="mosaic_gpu")
    total = residual_add(x, y, backend="mosaic_gpu")
    assert_same_bits(whole, (total, rms_norm(total, scale, eps=EPS, backend="mosaic_gpu")))
    for rows in (slice(0, 1), slice(129, 130), slice(5, 8)):
        part = add_rms_norm(x[rows], y[rows], scale, eps=EPS, backend="mosaic_gpu")
        assert_same_bits(part, tuple(out[rows] for out in whole))
    reference = functools.partial(add_rms_norm, eps=EPS, backend="reference")
    assert_same_bits(whole, on_cpu(reference, x, y, scale))
    # twin: a sum that is not rounded before the norm
    wide_total = x.astype(jnp.float32) + y.astype(jnp.float32)
    unrounded = on_cpu(functools.partial(rms_norm, eps=EPS), wide_total, scale.astype(jnp.float32))
    assert differing(unrounded.astype(BF16), whole[1])


@pytest.mark.gpu
@pytest.mark.parametrize("f", [48, 1216, 3072, 12288])
def test_swiglu_has_one_set_of_bits(f):
    rng = np.random.default_rng(f)
    gate_up = jnp.asarray(normal(rng, (1100, 2 * f), BF16))
    whole = swiglu_joint(gate_up, backend="mosaic_gpu")
    assert_same_bits(swiglu(gate_up[:, :f], gate_up[:, f:], backend="mosaic_gpu"), whole)
    for rows in (slice(0, 1), slice(1000, 1003)):
        assert_same_bits(swiglu_joint(gate_up[rows], backend="mosaic_gpu"), whole[rows])
    expected = on_cpu(functools.partial(swiglu_joint, backend="reference"), gate_up)
    ours, expected = (np.asarray(a, np.float32) for a in (whole, expected))
    assert (np.abs(ours - expected) <= 2.0**-7 * np.abs(expected) + 1e-30).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kv_heads", "queries", "h"), [(8, 4, 128), (1, 4, 128), (8, 5, 128), (1, 8, 128), (8, 2, 64), (1, 2, 32)]
)
def test_queries_keys_and_caches(kv_heads, queries, h):
    b, t, capacity = 2, 6, 32
    rng = np.random.default_rng([kv_heads, queries, h])
    qkv = jnp.asarray(normal(rng, (b, t, kv_heads, queries + 2, h), BF16))
    scales = [jnp.asarray((1 + normal(rng, (h,)) / 5).astype(BF16)) for _ in range(2)]
    tables = [jnp.asarray(table) for table in rope_tables(capacity, h, 1e6)]
    positions = jnp.asarray([[3], [20]], jnp.int32) + jnp.arange(t, dtype=jnp.int32)
    lengths = jnp.asarray([6, 32], jnp.int32)
    caches = [jnp.asarray(normal(rng, (b, capacity, kv_heads, h), BF16)) for _ in range(2)]
    op = functools.partial(qk_norm_rope, eps=EPS)
    whole = op(qkv, *scales, *tables, positions, lengths, *caches, backend="mosaic_gpu")
    reference = functools.partial(op, backend="reference")
    assert_same_bits(whole, on_cpu(reference, qkv, *scales, *tables, positions, lengths, *caches))
    for apart in (False, True):  # a CTA a token, or one a KV head
        args = (qkv, *scales, *tables, positions, lengths, *caches)
        assert_same_bits(qk_norm_rope_mosaic_gpu(*args, eps=EPS, apart=apart), whole)
    stepped = caches
    for i in range(t):
        at = (slice(None), slice(i, i + 1))
        q, *stepped = op(qkv[at], *scales, *tables, positions[at], lengths, *stepped, backend="mosaic_gpu")
        assert_same_bits(q, whole[0][at])
    assert_same_bits(tuple(stepped), whole[1:])
    assert differing(caches[0], whole[1])


@pytest.mark.gpu
def test_a_donated_cache_stays_where_it_is():
    b, t, kv_heads, h, capacity = 2, 1, 8, 128, 32
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(normal(rng, (b, t, kv_heads, 6, h), BF16))
    scale = jnp.ones(h, BF16)
    tables = [jnp.asarray(table) for table in rope_tables(capacity, h, 1e6)]
    positions, lengths = jnp.zeros((b, t), jnp.int32), jnp.ones(b, jnp.int32)
    caches = [jnp.zeros((b, capacity, kv_heads, h), BF16) + i for i in range(2)]
    before = [cache.unsafe_buffer_pointer() for cache in caches]
    op = jax.jit(functools.partial(qk_norm_rope, eps=EPS, backend="mosaic_gpu"), donate_argnums=(7, 8))
    after = op(qkv, scale, scale, *tables, positions, lengths, *caches)[1:]
    assert [cache.unsafe_buffer_pointer() for cache in after] == before


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("constant", [False, True])
def test_caches_that_are_slices_of_a_stack(layers, constant):
    """In a loop over layers XLA may fuse slices into a kernel, and so part what it reads from what it returns."""
    b, t, kv_heads, h, capacity = 2, 5, 8, 64, 32
    rng = np.random.default_rng(layers)
    qkv = jnp.asarray(normal(rng, (layers, b, t, kv_heads, 4, h), BF16))
    scale = jnp.ones(h, BF16)
    tables = [jnp.asarray(table) for table in rope_tables(capacity, h, 1e6)]
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    lengths = jnp.full(b, t, jnp.int32)
    stacks = [jnp.zeros((layers, b, capacity, kv_heads, h), BF16) for _ in range(2)]
    op = functools.partial(qk_norm_rope, eps=EPS, backend="mosaic_gpu")

    def run(qkv, *caches):
        def layer(each):
            return op(each[0], scale, scale, *tables, positions, lengths, *each[1:])

        return jax.lax.map(layer, (qkv, *(caches or stacks)))

    outs = jax.jit(run)(qkv, *([] if constant else stacks))
    for i in range(layers):
        alone = op(qkv[i], scale, scale, *tables, positions, lengths, *(stack[i] for stack in stacks))
        assert_same_bits(tuple(out[i] for out in outs), alone)
