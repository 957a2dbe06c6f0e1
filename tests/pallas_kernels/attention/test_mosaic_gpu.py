"""The Hopper kernel on the CPU: its order and synchronisation in interpret mode, and what it refuses.

Bits of a GPU need a GPU: `benchmarks/check_attention.py` compares those.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.attention import launched_join, mosaic_gpu
from tbik_jax.pallas_kernels.attention.api import attention, attention_backend
from tbik_jax.pallas_kernels.attention.columns import run_columns
from tbik_jax.pallas_kernels.attention.config import AttentionConfig
from tbik_jax.pallas_kernels.attention.mosaic_gpu import attention_mosaic_gpu
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan
from tbik_jax.pallas_kernels.attention.reference import attention_reference
from tests.helpers import assert_as_accurate, cancelling, differing

BF16, F16 = jnp.bfloat16, jnp.float16
#: A block a split, so that few keys are many splits.
PLAN = AttentionPlan(block=128, blocks_per_split=1)
TILES = AttentionConfig(variant="tiles")
columns = functools.partial(AttentionConfig, variant="columns")


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def operands(b, t, s, kv_heads, group, h, dtype=BF16):
    rng = np.random.default_rng([b, t, s, kv_heads, group, h])
    shapes = (b, t, kv_heads * group, h), (b, s, kv_heads, h), (b, s, kv_heads, h)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def interpreted(q, k, v, starts, config, plan=PLAN):
    scale = q.shape[3] ** -0.5
    positions = at(starts, q.shape[1])
    return attention_mosaic_gpu(q, k, v, positions, plan=plan, scale=scale, config=config, interpret=True)


def at(starts, count):
    return jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(count, dtype=jnp.int32)


def exact(q, k, v, starts):
    """Softmax attention in float64."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, k, v))
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    seen = np.arange(k.shape[1]) <= (np.asarray(starts)[:, None] + np.arange(q.shape[1]))[..., None]
    weights = np.exp(np.where(seen[:, None], scores, -np.inf) - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def assert_close(out, q, k, v, starts):
    positions = at(starts, q.shape[1])
    k_whole, v_whole = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % 128), (0, 0), (0, 0))) for a in (k, v))
    scale = q.shape[3] ** -0.5
    plain = jax.jit(functools.partial(attention_reference, plan=PLAN, scale=scale))(
        q, k_whole, v_whole, positions
    )
    assert_as_accurate(out, plain, exact(q, k, v, starts), factor=2)


@pytest.mark.parametrize(
    ("shape", "starts", "config", "dtype"),
    [
        ((1, 130, 256, 1, 1, 64), [10], TILES, BF16),  # the last pair has one tile
        (
            (2, 70, 320, 1, 3, 64),
            [0, 200],
            dataclasses.replace(TILES, kv_group=2),
            F16,
        ),  # unequal rows, ragged cache
        ((3, 1, 200, 1, 2, 128), [0, 127, 199], AttentionConfig(variant="split"), BF16),
        (
            (1, 3, 392, 1, 3, 64),
            [380],
            AttentionConfig(variant="split", parts=2, stages=3, value_stages=4),
            BF16,
        ),  # an odd number of rows
        (
            (1, 1, 520, 1, 5, 128),
            [130],
            AttentionConfig(variant="split", parts=4, value_stages=3),
            F16,
        ),  # CTAs without a split
        (
            (1, 1, 392, 1, 5, 128),
            [390],
            AttentionConfig(variant="split", parts=2),
            BF16,
        ),  # two rows at a time
        (
            (2, 1, 520, 1, 3, 64),
            [130, 519],
            AttentionConfig(variant="split", parts=3, second_launch=True),
            BF16,
        ),
        (
            (3, 1, 200, 1, 2, 128),
            [0, 127, 199],
            columns(stages=3, value_stages=3),
            BF16,
        ),  # ragged rows and cache
        (
            (1, 3, 392, 1, 2, 64),
            [380],
            columns(stages=4, value_stages=3),
            F16,
        ),  # the next block's scores ahead
        (
            (1, 1, 648, 1, 5, 128),
            [640],
            columns(parts=2, stages=3, value_stages=5),
            BF16,
        ),  # an odd number of rows
        ((1, 1, 520, 1, 8, 64), [130], columns(parts=4, stages=5), BF16),  # CTAs without a split
        ((2, 1, 520, 1, 3, 64), [130, 519], columns(parts=3, second_launch=True, stages=4), BF16),
        ((2, 1, 392, 1, 3, 128), [127, 391], columns(parts=2, value_parts=2, stages=4, value_stages=4), BF16),
    ],
)
def test_it_is_attention(shape, starts, config, dtype):
    q, k, v = operands(*shape, dtype)
    assert_close(interpreted(q, k, v, starts, config), q, k, v, starts)


def test_splits_of_several_blocks():
    q, k, v = operands(1, 1, 648, 1, 2, 64)
    plan = AttentionPlan(block=128, blocks_per_split=2)
    out = interpreted(q, k, v, [640], AttentionConfig(variant="split", parts=2), plan)
    assert_close(out, q, k, v, [640])


@functools.cache
def three_splits(config, plan=PLAN):
    """Values cancel, so that the order of the adds shows in the bits."""
    q, k, v = operands(1, 1, 264, 1, 3, 128)
    v = jnp.asarray(cancelling(np.random.default_rng(0), v.shape, BF16))
    return interpreted(q, k * 0.1, v, [263], config, plan)


@pytest.mark.parametrize(
    "config",
    [
        columns(parts=2),
        columns(parts=4),  # of which one has no split
        columns(parts=3, second_launch=True, stages=4),
        columns(value_parts=2),
        columns(parts=4, value_parts=2),
    ],
)
def test_how_columns_share_out_the_work_changes_no_bit(config):
    assert not differing(three_splits(config), three_splits(columns()))


@pytest.mark.parametrize(
    ("unrolled", "splits", "last"),
    [(1, 5, 128), (3, 6, 128), (3, 5, 128), (4, 3, 8), (8, 66, 128), (8, 130, 8)],
)
def test_splits_are_joined_in_order_however_many_at_a_time(monkeypatch, unrolled, splits, last):
    """Whole turns of the unrolled loop and tiles, and last ones that lack splits."""
    room = 128 * max(splits, 6)
    q, k, v = operands(1, 1, room, 1, 3, 128)
    # Keys weigh nearly the same, and splits cancel but for a little.
    large = 2.0**14 * np.resize([1, 1, -1, -1, 1, -1], room // 128).repeat(128)[:, None, None]
    v = jnp.asarray(large + 64 * np.asarray(v, np.float32), BF16)
    run = functools.partial(interpreted, q, k * 0.001, v, [128 * (splits - 1) + last - 1])
    expected = run(columns())
    monkeypatch.setattr(launched_join, "_UNROLLED", unrolled)
    run_columns.clear_cache()
    out = run(columns(parts=3, second_launch=True, stages=4))
    run_columns.clear_cache()
    assert not differing(out, expected)


@pytest.mark.parametrize(
    ("t", "h", "positions"), [(1, 128, 32768), (4, 128, 65536), (4, 64, 8192), (2, 64, 131072)]
)
def test_joins_of_many_splits_lower_for_a_gpu(monkeypatch, t, h, positions):
    """JAX infers layouts by recursion: a kernel unrolled over too many splits ends in a RecursionError."""
    monkeypatch.setattr(mosaic_gpu, "_check_device", lambda: None)
    q, k = ((8 if t > 1 else 1, n, heads, h) for n, heads in ((t, 32), (positions, 8)))
    shapes = [jax.ShapeDtypeStruct(shape, BF16) for shape in (q, k, k)]
    run = jax.jit(functools.partial(mosaic_gpu.attention_mosaic_gpu, plan=AttentionPlan(), scale=0.1))
    lowered = run.trace(*shapes, jax.ShapeDtypeStruct(q[:2], jnp.int32)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


def test_another_plan_of_columns_has_other_bits():  # the twin of the test before
    other = AttentionPlan(block=128, blocks_per_split=3)
    assert differing(three_splits(columns(), other), three_splits(columns()))


@pytest.mark.parametrize("config", [AttentionConfig(variant="split"), columns()])
def test_keys_after_a_query_do_not_enter_and_those_before_do(config):
    q, k, v = operands(1, 1, 256, 1, 2, 64)
    whole = interpreted(q, k, v, [130], config)
    after = interpreted(q, k.at[:, 131:].set(jnp.nan), v.at[:, 131:].set(300), [130], config)
    assert not differing(after, whole)
    assert differing(interpreted(q, k, v.at[:, 130].set(300), [130], config), whole)  # the twin


@pytest.mark.parametrize(
    ("backend", "head_dim", "group", "expected"),
    [
        ("mosaic_gpu", 128, 4, "mosaic_gpu"),
        ("mosaic_gpu", 64, 64, "mosaic_gpu"),
        ("mosaic_gpu", 96, 4, "reference"),
        ("mosaic_gpu", 64, 65, "reference"),
        ("triton", 128, 4, "reference"),
        ("reference", 128, 4, "reference"),
    ],
)
def test_a_models_backend_follows_its_heads(backend, head_dim, group, expected):
    assert attention_backend(backend, head_dim=head_dim, group=group) == expected


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "use backend='reference' for float32"),
        ({"h": 96}, "head_dim=96 must be 64 or 128"),
        ({"s": 64}, "S=64 at least 128 and a multiple of 8; pad the cache"),
        ({"s": 132}, "S=132 at least 128 and a multiple of 8"),
        ({"group": 65}, "65 query heads a KV head are more than 64"),
        ({"plan": AttentionPlan(block=64)}, "blocks of 128 keys, not 64"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
        ({"t": 33, "config": AttentionConfig(variant="split")}, "up to 64 rows, not T=33 times N/K=2"),
        ({"t": 5, "config": columns()}, "up to 8 rows, not T=5 times N/K=2; use 'split'"),
        (
            {"config": columns(value_parts=2)},
            "value_parts=2 leaves a CTA less than 64 of head_dim=64; use value_parts=1",
        ),
    ],
)
def test_it_refuses_what_it_does_not_cover(change, message):
    case = {
        "t": 1,
        "s": 128,
        "group": 2,
        "h": 64,
        "dtype": BF16,
        "plan": PLAN,
        "scale": 1.0,
        "config": None,
    } | change
    q, k, v = operands(1, case["t"], case["s"], 1, case["group"], case["h"], case["dtype"])
    with pytest.raises(ValueError, match=message):
        attention_mosaic_gpu(
            q,
            k,
            v,
            at([0], case["t"]),
            plan=case["plan"],
            scale=case["scale"],
            config=case["config"],
            interpret=True,
        )


def test_it_needs_a_hopper_gpu():
    q, k, v = operands(1, 1, 128, 1, 2, 64)
    with pytest.raises(ValueError, match="mosaic_gpu needs a Hopper GPU"):
        attention(q, k, v, jnp.zeros((1, 1), jnp.int32), backend="mosaic_gpu")


def test_there_is_no_triton_kernel():
    q, k, v = operands(1, 1, 128, 1, 2, 64)
    with pytest.raises(ValueError, match="no backend 'triton'"):
        attention(q, k, v, jnp.zeros((1, 1), jnp.int32), backend="triton")
