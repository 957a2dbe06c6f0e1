"""attention: accurate, in the stated order, and the same bits for a query in prefill, chunks and decode.

A small plan (16 keys a block, 2 blocks a split) makes the joining of splits visible at lengths that a CPU walks
quickly: 288 keys are 9 splits, and positions 15, 16, 31, 32, 63, 64, ... lie on both sides of its seams.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.layers import PlainNumerics
from tbik_jax.pallas_kernels.attention.api import AttentionPlan, attention
from tests import orders
from tests.helpers import DTYPES, assert_as_accurate, assert_same_bits, cancelling, differing, normal, wide

F32, BF16 = np.float32, DTYPES["bfloat16"]
PLAN = AttentionPlan(block=16, blocks_per_split=2)
HEAD_DIM = 16
LENGTH = 288  # 9 splits
SHORT = 80  # 3 splits, the last one half full
#: Queries a call; few, since each is compiled.
CHUNKS = (1, 5, 37)
#: Positions on both sides of blocks and splits.
SEAMS = np.asarray(
    [0, 1, 14, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 191, 192, 255, 256, 257, 287]
)

attend = jax.jit(partial(attention, plan=PLAN))


def operands(
    dtype: Any, *, rows: int = 2, length: int = SHORT, heads: int = 4, kv_heads: int = 2, kind=normal
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v for every position; keys are small enough for the softmax to look at many of them."""
    rng = np.random.default_rng(0)
    q = normal(rng, (rows, length, heads, HEAD_DIM), dtype)
    k = kind(rng, (rows, length, kv_heads, HEAD_DIM))
    k = (k / (np.abs(k).max(axis=-1, keepdims=True) + 1) * 3).astype(dtype)
    return q, k, kind(rng, (rows, length, kv_heads, HEAD_DIM), dtype)


def upto(length: int, rows: int = 2) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def prefill(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(attend(q, k, v, upto(q.shape[1], len(q))))


def at(q: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Queries [B, T, N, H] at positions [B, T]."""
    return np.take_along_axis(q, positions[..., None, None], axis=1)


@pytest.fixture(scope="module")
def long_prompt() -> tuple[np.ndarray, ...]:
    """q, k, v of nine splits, and the prefill of all of them in one call."""
    arrays = operands(BF16, length=LENGTH)
    return *arrays, prefill(*arrays)


# --- numerics ----------------------------------------------------------------------------------------------


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Softmax attention in float64."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.astype(np.float64), *(np.repeat(a.astype(np.float64), group, axis=2) for a in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_the_ordinary_one(name: str, kind) -> None:
    q, k, v = operands(DTYPES[name], kind=kind)
    plain = PlainNumerics().attention(*map(jnp.asarray, (q, k, v, upto(SHORT))))
    exact = exact_attention(q, k, v)
    assert_as_accurate(prefill(q, k, v), plain, exact, scale=np.abs(v.astype(np.float64)).max())


def test_the_default_plan_is_as_accurate() -> None:
    q, k, v = operands(F32)
    plain = PlainNumerics().attention(*map(jnp.asarray, (q, k, v, upto(SHORT))))
    out = jax.jit(attention)(q, k, v, upto(SHORT))
    assert_as_accurate(out, plain, exact_attention(q, k, v))


# --- the order of the adds ---------------------------------------------------------------------------------


def stated(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, **change: Any) -> np.ndarray:
    plan = {"block": 16, "blocks_per_split": 2, "scale": q.shape[-1] ** -0.5, **change}
    return orders.attention(q, k, v, positions, **plan)


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, kind) -> None:
    q, k, v = operands(DTYPES[name], kind=kind)
    seams = np.tile(SEAMS[SEAMS < SHORT], (2, 1))
    assert_same_bits(at(prefill(q, k, v), seams), stated(at(q, seams), k, v, seams))


def test_nine_splits_are_joined_in_the_stated_order(long_prompt) -> None:
    q, k, v, whole = long_prompt
    seams = np.stack([SEAMS, SEAMS[::-1]])
    assert_same_bits(at(whole, seams), stated(at(q, seams), k, v, seams))


def test_nine_splits_are_joined_in_the_stated_order_in_float32() -> None:
    q, k, v = operands(F32, length=LENGTH)
    seams = np.stack([SEAMS, SEAMS[::-1]])
    out = attend(at(q, seams), k, v, seams.astype(np.int32))
    assert_same_bits(out, stated(at(q, seams), k, v, seams))


@pytest.mark.parametrize("plan", [{"block": 32, "blocks_per_split": 1}, {"block": 16, "blocks_per_split": 5}])
def test_other_plans_have_their_stated_order(plan: dict[str, int]) -> None:
    q, k, v = operands(F32, rows=1)
    seams = SEAMS[None, SEAMS < SHORT]
    run = jax.jit(partial(attention, plan=AttentionPlan(**plan), scale=0.3))
    out = run(at(q, seams), k, v, seams.astype(np.int32))
    assert_same_bits(out, stated(at(q, seams), k, v, seams, scale=0.3, **plan))


def test_bits_do_not_depend_on_jit() -> None:
    q, k, v = operands(F32, rows=1, length=33)
    out = attention(*map(jnp.asarray, (q, k, v, upto(33, 1))), plan=PLAN)
    assert_same_bits(out, stated(q, k, v, upto(33, 1)))


# --- prefill, chunks and decode ----------------------------------------------------------------------------


def chunked(q: np.ndarray, k: np.ndarray, v: np.ndarray, chunks: list[int], rest: float) -> np.ndarray:
    """Attention of `chunks` queries at a time; the cache past a chunk is filled with `rest`."""
    outs, start = [], 0
    for chunk in chunks:
        end = start + chunk
        cache = [np.where(np.arange(k.shape[1])[:, None, None] < end, a, a.dtype.type(rest)) for a in (k, v)]
        positions = upto(LENGTH, len(q))[:, start:end]
        outs.append(np.asarray(attend(q[:, start:end], *cache, positions)))
        start = end
    return np.concatenate(outs, axis=1)


def chunk_lists(total: int) -> st.SearchStrategy[list[int]]:
    """Lists of compiled chunk sizes that end at or before `total`."""

    def cut(chunks: list[int]) -> list[int]:
        return [c for c, end in zip(chunks, np.cumsum(chunks), strict=True) if end <= total]

    return st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=40).map(cut)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(chunks=chunk_lists(LENGTH), rest=st.sampled_from([0.0, -7.0, 1e30]))
def test_chunked_prefill_has_the_bits_of_prefill(long_prompt, chunks: list[int], rest: float) -> None:
    q, k, v, whole = long_prompt
    assert_same_bits(chunked(q, k, v, chunks, rest), whole[:, : sum(chunks)])


def test_decode_has_the_bits_of_prefill(long_prompt) -> None:
    q, k, v, whole = long_prompt
    assert_same_bits(chunked(q, k, v, [1] * LENGTH, 3.0), whole)


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_decode_has_the_bits_of_prefill_in_other_dtypes(name: str) -> None:
    q, k, v = operands(DTYPES[name])
    whole = prefill(q, k, v)
    assert_same_bits(chunked(q, k, v, [1] * SHORT, -7.0), whole)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_ragged_rows_have_the_bits_of_their_own_prefill(long_prompt, data: st.DataObject) -> None:
    """Rows at unrelated positions, one query each, as in a decode batch of prompts of any lengths."""
    q, k, v, whole = long_prompt
    seam = st.sampled_from(SEAMS.tolist()) | st.integers(0, LENGTH - 1)
    positions = np.asarray([[data.draw(seam)], [data.draw(seam)]], np.int32)
    live = np.arange(LENGTH)[None, :, None, None] <= positions[..., None, None]
    cache = [np.where(live, a, a.dtype.type(5)) for a in (k, v)]
    assert_same_bits(attend(at(q, positions), *cache, positions), at(whole, positions))


def test_queries_of_one_call_may_stand_anywhere(long_prompt) -> None:
    q, k, v, whole = long_prompt
    positions = np.random.default_rng(0).integers(0, LENGTH, (2, 37)).astype(np.int32)
    assert_same_bits(attend(at(q, positions), k, v, positions), at(whole, positions))


# --- the batch and the cache -------------------------------------------------------------------------------


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    q, k, v = operands(BF16, rows=5)
    whole = prefill(q, k, v)
    for rows in (slice(1), slice(2, 3), slice(3), [4, 2, 0]):
        assert_same_bits(prefill(q[rows], k[rows], v[rows]), whole[rows])


def test_other_rows_may_hold_anything() -> None:
    q, k, v = operands(BF16)
    whole = prefill(q, k, v)
    for filler in (0, 300, -1e30):
        changed = [np.stack([a[0], np.full_like(a[1], filler)]) for a in (q, k, v)]
        assert_same_bits(prefill(*changed)[0], whole[0])


@pytest.mark.parametrize("capacity", [81, 112])
@pytest.mark.parametrize("filler", [0.0, 1e30])
def test_a_longer_cache_changes_nothing(capacity: int, filler: float) -> None:
    q, k, v = operands(BF16)
    longer = [
        np.pad(a, ((0, 0), (0, capacity - SHORT), (0, 0), (0, 0)), constant_values=filler) for a in (k, v)
    ]
    assert_same_bits(attend(q, *longer, upto(SHORT)), prefill(q, k, v))


@pytest.mark.parametrize("length", [16, 33])
def test_a_shorter_prompt_is_the_beginning_of_a_longer_one(length: int) -> None:
    q, k, v = operands(BF16)
    assert_same_bits(prefill(q[:, :length], k[:, :length], v[:, :length]), prefill(q, k, v)[:, :length])


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_queries_are_as_many_single_ones(group: int) -> None:
    q, k, v = operands(BF16, rows=1, length=48, heads=2 * group)
    out = prefill(q, k, v)
    assert_same_bits(out, stated(q, k, v, upto(48, 1)))
    assert_same_bits(attend(q[:, 40:41], k, v, np.full((1, 1), 40, np.int32)), out[:, 40:41])


def test_heads_do_not_mix() -> None:
    """What tensor parallelism relies on: a rank's heads have the same bits without the others."""
    q, k, v = operands(BF16)
    assert_same_bits(prefill(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:]), prefill(q, k, v)[:, :, 2:])


# --- twins: these checks can fail --------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [{"block": 32}, {"blocks_per_split": 1}, {"blocks_per_split": 3}])
def test_twin_another_plan_has_other_bits(plan: dict[str, int]) -> None:
    q, k, v = operands(F32)
    last = np.full((2, 1), SHORT - 1)
    assert differing(stated(at(q, last), k, v, last, **plan), stated(at(q, last), k, v, last))


def test_twin_ordinary_attention_changes_a_query_between_prefill_and_decode() -> None:
    q, k, v = operands(F32, length=LENGTH)
    plain = jax.jit(PlainNumerics().attention)
    whole = np.asarray(plain(q, k, v, upto(LENGTH)))
    decoded = [plain(q[:, p : p + 1], k, v, np.full((2, 1), p, np.int32)) for p in SEAMS]
    if not any(differing(one, whole[:, p : p + 1]) for p, one in zip(SEAMS, decoded, strict=True)):
        pytest.skip("dot_product_attention of this XLA gives a query the same bits in prefill and decode")


# --- plan and errors ---------------------------------------------------------------------------------------


def test_the_plan_is_data() -> None:
    assert AttentionPlan() == AttentionPlan(block=128, blocks_per_split=4) and hash(PLAN)
    assert PLAN.split == 32 and AttentionPlan().split == 512


@pytest.mark.parametrize(("block", "blocks"), [(0, 1), (8, 1), (24, 1), (-16, 1), (16, 0)])
def test_a_plan_of_no_whole_steps_is_refused(block: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=f"block={block} must be .* blocks_per_split={blocks} >= 1"):
        AttentionPlan(block=block, blocks_per_split=blocks)


Q, K, POSITIONS = (2, 3, 4, 16), (2, 32, 2, 16), (2, 3)


@pytest.mark.parametrize(
    ("q", "k", "v", "positions", "message"),
    [
        (Q[1:], K, K, POSITIONS, "attention takes q"),
        (Q, K[1:], K[1:], POSITIONS, "attention takes q"),
        (Q, K, (2, 16, 2, 16), POSITIONS, "attention takes q"),
        (Q, K, K, (2, 4), "attention takes q"),
        (Q, (3, *K[1:]), (3, *K[1:]), POSITIONS, "differ in batch or head_dim"),
        (Q, (2, 32, 2, 32), (2, 32, 2, 32), POSITIONS, "differ in batch or head_dim"),
        (Q, (2, 32, 3, 16), (2, 32, 3, 16), POSITIONS, "no multiple of K"),
        ((2, 3, 4, 24), (2, 32, 2, 24), (2, 32, 2, 24), POSITIONS, "head_dim=24 must be a multiple of 16"),
    ],
)
def test_it_refuses_shapes_that_do_not_fit(q, k, v, positions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shape) for shape in (q, k, v)), jnp.zeros(positions, jnp.int32))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_it_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"attention: q is {dtype}; it must be one of bfloat16"):
        attention(*(jnp.zeros(shape, dtype) for shape in (Q, K, K)), jnp.zeros(POSITIONS, jnp.int32))


def test_it_refuses_positions_that_are_no_integers() -> None:
    with pytest.raises(ValueError, match="integer positions, not float32"):
        attention(*(jnp.zeros(shape) for shape in (Q, K, K)), jnp.zeros(POSITIONS))


def test_it_refuses_mixed_dtypes() -> None:
    with pytest.raises(ValueError, match="one dtype, not bfloat16, float32 and float32"):
        attention(jnp.zeros(Q, BF16), jnp.zeros(K), jnp.zeros(K), jnp.zeros(POSITIONS, jnp.int32))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_later_value_that_is_not_finite_does_not_enter(bad: float) -> None:
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 2, 16)), jnp.float16) for _ in range(3))
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    clean = attention(q, k, v, positions)
    broken = attention(q, k.at[:, 9].set(bad), v.at[:, 9].set(bad), positions)
    assert_same_bits(broken[:, :9], clean[:, :9])
    assert not np.isfinite(np.asarray(broken[:, 9:], np.float32)).all()
