"""Attention on a Hopper GPU: prefill, chunks, decode and every variant of the kernel give a query the same bits."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import attention
from tbik_jax.pallas_kernels.attention.config import AttentionConfig
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan
from tests.helpers import assert_same_bits, cancelling, differing, normal, wide

LENGTH = 1200  # three splits
#: On both sides of tiles, blocks and splits.
SEAMS = (0, 1, 63, 64, 127, 128, 511, 512, 1023, 1024, 1199)


def operands(make, dtype, kv_heads, group, h):
    rng = np.random.default_rng(5)
    q = normal(rng, (1, LENGTH, kv_heads * group, h), dtype)
    k = normal(rng, (1, LENGTH, kv_heads, h), dtype)
    return tuple(map(jnp.asarray, (q, k, make(rng, (1, LENGTH, kv_heads, h), dtype))))


def at(positions, count=1):
    return jnp.asarray(positions, jnp.int32)[:, None] + jnp.arange(count, dtype=jnp.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "h"),
    [(jnp.bfloat16, 2, 4, 128), (jnp.float16, 1, 3, 128), (jnp.bfloat16, 1, 7, 64), (jnp.bfloat16, 3, 1, 64)],
)
def test_prefill_chunks_and_decode_have_the_same_bits(hopper, make, dtype, kv_heads, group, h):
    if dtype == jnp.float16 and make is wide:
        pytest.skip("2**24 of spread is more than float16 has")
    q, k, v = operands(make, dtype, kv_heads, group, h)
    whole = attention(q, k, v, at([0], LENGTH), backend="mosaic_gpu")
    rows = len(SEAMS)
    caches = [jnp.tile(a, (rows, 1, 1, 1)) for a in (k, v)]
    queries = jnp.concatenate([q[:, p : p + 1] for p in SEAMS])
    decoded = attention(queries, *caches, at(SEAMS), backend="mosaic_gpu")
    assert_same_bits(decoded[:, 0], jnp.stack([whole[0, p] for p in SEAMS]))
    for start, count in ((0, 3), (130, 100), (1000, 200)):
        chunk = attention(q[:, start : start + count], k, v, at([start], count), backend="mosaic_gpu")
        assert_same_bits(chunk, whole[:, start : start + count])


@pytest.mark.gpu
def test_every_variant_has_the_same_bits(hopper):
    q, k, v = operands(wide, jnp.bfloat16, 2, 4, 128)
    where = at([LENGTH - 2], 2)
    outs = [
        attention_mosaic_gpu(q[:, -2:], k, v, where, plan=AttentionPlan(), scale=0.1, config=config)
        for config in (
            AttentionConfig(variant="tiles"),
            *(AttentionConfig(variant="split", parts=parts) for parts in (1, 2, 4, 8)),
            AttentionConfig(variant="split", parts=2, value_stages=3),
            AttentionConfig(variant="split", parts=3, second_launch=True),
        )
    ]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])
    # twin: another plan is another order
    plan = AttentionPlan(blocks_per_split=2)
    assert differing(attention_mosaic_gpu(q[:, -2:], k, v, where, plan=plan, scale=0.1), outs[0])


columns = partial(AttentionConfig, variant="columns")
#: Every way in which "columns" shares out its work; with 64 columns of values there are no halves.
COLUMNS = (
    columns(stages=3, value_stages=3),
    columns(stages=6, value_stages=6),
    columns(parts=2, stages=6, value_stages=6),
    columns(parts=4, stages=6, value_stages=6),
    columns(parts=8, stages=6, value_stages=6),  # CTAs without a split
    columns(parts=2, second_launch=True, stages=3, value_stages=3),
    columns(parts=8, second_launch=True, stages=6, value_stages=6),
)
HALVES = tuple(columns(parts=parts, value_parts=2, stages=8, value_stages=8) for parts in (1, 2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "h", "count"),
    [
        (jnp.bfloat16, 2, 4, 128, 1),
        (jnp.bfloat16, 2, 1, 128, 1),
        (jnp.bfloat16, 2, 2, 128, 1),
        (jnp.bfloat16, 2, 8, 128, 1),
        (jnp.bfloat16, 1, 3, 128, 2),
        (jnp.bfloat16, 2, 4, 64, 1),
        (jnp.bfloat16, 1, 7, 64, 1),
        (jnp.float16, 2, 4, 128, 1),
        (jnp.float16, 2, 2, 64, 4),
    ],
)
def test_columns_have_the_bits_of_prefill(hopper, make, dtype, kv_heads, group, h, count):
    if dtype == jnp.float16 and make is wide:
        pytest.skip("2**24 of spread is more than float16 has")
    q, k, v = operands(make, dtype, kv_heads, group, h)
    whole = attention(q, k, v, at([0], LENGTH), backend="mosaic_gpu")
    starts = [p for p in SEAMS if p + count <= LENGTH]
    caches = [jnp.tile(a, (len(starts), 1, 1, 1)) for a in (k, v)]
    queries = jnp.concatenate([q[:, p : p + count] for p in starts])
    expected = jnp.concatenate([whole[:, p : p + count] for p in starts])
    scale = h**-0.5
    for config in COLUMNS + (HALVES if h == 128 else ()):
        run = partial(attention_mosaic_gpu, queries, *caches, at(starts, count), scale=scale, config=config)
        assert_same_bits(run(plan=AttentionPlan()), expected)
    # twin: another plan is another order
    assert differing(run(plan=AttentionPlan(blocks_per_split=2)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "group", "count"), [(128, 4, 1), (128, 4, 2), (64, 3, 1)])
def test_any_number_of_splits_is_joined_in_order(hopper, h, group, count):
    """By a second launch, which takes 16 at a time, and in a cluster, one round after the other."""
    rng, plan, room = np.random.default_rng([h, group]), AttentionPlan(blocks_per_split=1), 150 * 128
    q = jnp.asarray(normal(rng, (1, count, group, h)), jnp.bfloat16)
    k = jnp.asarray(normal(rng, (1, room, 1, h)) / 4, jnp.bfloat16)
    # Blocks cancel but for a little.
    large = 2.0**12 * rng.permutation(np.tile([-1, 1], room // 256)).repeat(128)[:, None, None]
    v = jnp.asarray(large + normal(rng, (1, room, 1, h)), jnp.bfloat16)
    launched_again = columns(parts=8, second_launch=True, stages=6, value_stages=6)
    for splits in (1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 129, 150):
        run = partial(attention_mosaic_gpu, q, k, v, at([128 * splits - count], count), scale=0.01)
        expected = run(plan=plan, config=columns(parts=4, stages=6, value_stages=6))
        for config in (launched_again, AttentionConfig(variant="split", parts=3, second_launch=True)):
            assert_same_bits(run(plan=plan, config=config), expected)
    # twin: another plan is another order
    assert differing(run(plan=AttentionPlan(), config=launched_again), expected)


@pytest.mark.gpu
def test_a_longer_cache_and_other_rows_change_nothing(hopper):
    q, k, v = operands(cancelling, jnp.bfloat16, 2, 4, 128)
    whole = attention(q, k, v, at([0], LENGTH), backend="mosaic_gpu")
    longer = [jnp.pad(a, ((0, 1), (0, 848), (0, 0), (0, 0)), constant_values=1000.0) for a in (k, v)]
    both = attention(jnp.tile(q, (2, 1, 1, 1)), *longer, at([0, 0], LENGTH), backend="mosaic_gpu")
    assert_same_bits(both[:1], whole)
