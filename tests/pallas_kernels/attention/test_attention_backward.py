"""The backward pass of attention: accurate, in the stated order, and bits that a batch row and KV head alone decide."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.attention.api import AttentionPlan, attention
from tbik_jax.pallas_kernels.attention.backward import attention_backward, attention_with_lse
from tests import orders
from tests.helpers import DTYPES, assert_as_accurate, assert_same_bits, cancelling, differing, normal, wide

F32, BF16 = np.float32, DTYPES["bfloat16"]
NAMES = ("dq", "dk", "dv")
LENGTH = 40

forward = jax.jit(attention_with_lse)
backward = jax.jit(partial(attention_backward, backend="reference"))


def operands(
    dtype: Any,
    *,
    rows: int = 2,
    length: int = LENGTH,
    kv_heads: int = 2,
    group: int = 2,
    h: int = 16,
    kind=normal,
) -> tuple[np.ndarray, ...]:
    """q, k, v and dout; k is small enough for the softmax to look at many keys, v and dout for float16."""
    rng = np.random.default_rng([rows, length, kv_heads, group, h])
    q = normal(rng, (rows, length, kv_heads * group, h), dtype)
    others = (kind(rng, (rows, length, heads, h)) for heads in (kv_heads, kv_heads, kv_heads * group))
    k, v, dout = ((a / (np.abs(a).max(axis=-1, keepdims=True) + 1) * 3).astype(dtype) for a in others)
    return q, k, v, dout


def upto(length: int, rows: int) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def kept(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, ...]:
    """All operands of the backward pass; `out` and `lse` by NumPy, for which nothing is compiled."""
    (b, t, heads, h), kv_heads = q.shape, k.shape[2]
    rows = q.reshape(b, t, kv_heads, -1, h).astype(np.float64)
    scores = np.einsum("btkgh,bskh->btkgs", rows, k.astype(np.float64)) * h**-0.5
    scores = np.where(np.tril(np.ones((t, t), bool))[:, None, None], scores, -np.inf)
    lse = np.log(np.exp(scores).sum(-1))
    out = np.einsum("btkgs,bskh->btkgh", np.exp(scores - lse[..., None]), v.astype(np.float64))
    return q, k, v, out.reshape(q.shape).astype(q.dtype), lse.reshape(b, t, heads).astype(F32), dout


def gradients(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """dq, dk, dv of all operands."""
    return tuple(map(np.asarray, backward(*arrays)))


def cut(arrays: tuple[np.ndarray, ...], *index: Any) -> tuple[np.ndarray, ...]:
    """Some rows, and some of their positions, of each."""
    return tuple(a[index] for a in arrays)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention as a formula, in the operands' dtype."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)


def exact_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, at: Callable = softmax_attention
) -> tuple[np.ndarray, ...]:
    """Automatic differentiation in float64."""
    with jax.enable_x64(True):
        q, k, v, dout = (jnp.asarray(a.astype(np.float64)) for a in (q, k, v, dout))
        return tuple(map(np.asarray, jax.vjp(at, q, k, v)[1](dout)))


# --- numerics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_the_ordinary_one(name: str, kind) -> None:
    q, k, v, dout = arrays = operands(DTYPES[name], kind=kind)
    out, lse = forward(q, k, v, upto(LENGTH, 2))
    plain = jax.vjp(partial(jax.nn.dot_product_attention, is_causal=True), *map(jnp.asarray, (q, k, v)))[1](
        jnp.asarray(dout)
    )
    exact = exact_gradients(*arrays)
    for ours, ordinary, true in zip(backward(q, k, v, out, lse, dout), plain, exact, strict=True):
        assert_as_accurate(ours, ordinary, true, scale=np.abs(true).max())


@pytest.mark.parametrize(("length", "h"), [(1, 64), (63, 64), (64, 128), (65, 64), (128, 64), (150, 128)])
def test_a_row_is_accurate_and_stands_alone_at_every_length(length: int, h: int) -> None:
    q, k, v, dout = operands(F32, length=length, kv_heads=1, h=h)
    arrays = kept(q, k, v, dout)
    whole = gradients(*arrays)
    assert_same_bits(gradients(*cut(arrays, slice(1, None))), cut(whole, slice(1, None)))
    for ours, true in zip(whole, exact_gradients(q, k, v, dout), strict=True):
        # fp32 has 2**-24; dq and dk of a single key are 0
        np.testing.assert_allclose(ours, true, rtol=0, atol=1e-6 * max(1, np.abs(true).max()))


def test_the_formula_is_the_derivative() -> None:
    """Central differences in float64; what the other tests compare with is not taken on trust."""
    q, k, v, dout = operands(np.float64, rows=1, length=5, kv_heads=1)
    analytic = exact_gradients(q, k, v, dout)
    rng, step = np.random.default_rng(0), 1e-6
    for i, gradient in enumerate(analytic):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [q, k, v]
            moved[i] = moved[i] + sign * step * direction
            with jax.enable_x64(True):
                ends.append(float(np.sum(np.asarray(softmax_attention(*map(jnp.asarray, moved))) * dout)))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-7)


@pytest.mark.parametrize("name", DTYPES)
def test_lse_is_the_log_of_the_sum_of_exp(name: str) -> None:
    q, k, v, dout = operands(DTYPES[name])
    _, lse = forward(q, k, v, upto(LENGTH, 2))
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, kept(q, k, v, dout)[4], rtol=1e-6, atol=1e-6)


# --- the order of the adds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, kind) -> None:
    arrays = kept(*operands(DTYPES[name], kind=kind))
    assert_same_bits(backward(*arrays), orders.attention_backward(*arrays, scale=0.25))


def test_two_blocks_of_keys_have_the_stated_order() -> None:
    arrays = kept(*operands(F32, rows=1, length=130, kv_heads=1, group=1))
    assert_same_bits(backward(*arrays), orders.attention_backward(*arrays, scale=0.25))


def test_another_scale_has_the_stated_order() -> None:
    arrays = kept(*operands(F32, rows=1, length=17))
    ours = attention_backward(*map(jnp.asarray, arrays), scale=0.3)  # bits do not depend on jit either
    assert_same_bits(ours, orders.attention_backward(*arrays, scale=0.3))


@pytest.mark.parametrize("name", DTYPES)
def test_the_output_beside_lse_is_that_of_attention(name: str) -> None:
    q, k, v, _ = operands(DTYPES[name], length=LENGTH)
    plan, positions = AttentionPlan(block=16, blocks_per_split=1), upto(LENGTH, 2)
    out, _ = jax.jit(partial(attention_with_lse, plan=plan))(q, k, v, positions)
    assert_same_bits(out, jax.jit(partial(attention, plan=plan))(q, k, v, positions))


def test_lse_has_the_stated_order() -> None:
    q, k, v, _ = operands(F32)
    _, lse = forward(q, k, v, upto(LENGTH, 2))
    assert_same_bits(lse, orders.attention_lse(q, k, v, block=128, scale=0.25))


# --- the batch, the heads and the length -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    arrays = kept(*operands(DTYPES[name], kind=wide))
    whole = gradients(*arrays)
    for rows in (slice(1), slice(1, 2), [1, 0], [1, 0, 1]):
        assert_same_bits(gradients(*cut(arrays, rows)), cut(whole, rows))


def test_other_rows_may_hold_anything() -> None:
    arrays = kept(*operands(BF16))
    whole = gradients(*arrays)
    for filler in (0, 300, np.nan):
        changed = [np.stack([a[0], np.full_like(a[1], filler)]) for a in arrays]
        assert_same_bits(cut(gradients(*changed), 0), cut(whole, 0))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ranks_that_share_out_the_kv_heads_have_the_bits_of_one(kv_heads: int) -> None:
    """8, 4 and 2 ranks."""
    arrays = kept(*operands(BF16, kv_heads=8, length=20))
    parts = zip(*(np.split(a, 8 // kv_heads, axis=2) for a in arrays), strict=True)
    ranks = zip(*(gradients(*part) for part in parts), strict=True)
    assert_same_bits([np.concatenate(each, axis=2) for each in ranks], gradients(*arrays))


@pytest.mark.parametrize("group", [1, 4, 8])
def test_every_ratio_of_heads_has_the_stated_order(group: int) -> None:
    arrays = kept(*operands(BF16, length=20, group=group))
    assert_same_bits(backward(*arrays), orders.attention_backward(*arrays, scale=0.25))


def test_what_follows_a_query_does_not_enter_its_gradient() -> None:
    arrays = kept(*operands(BF16))
    whole = gradients(*arrays)
    for length in (1, 17):
        dq, _, _ = gradients(*cut(arrays, slice(None), slice(length)))
        assert_same_bits(dq, whole[0][:, :length])


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_padding_whose_gradient_is_zero_does_not_enter(name: str) -> None:
    arrays = kept(*operands(DTYPES[name]))
    arrays[-1][:, 33:] = 0
    padded, live = gradients(*arrays), (slice(None), slice(33))
    assert_same_bits(cut(padded, *live), gradients(*cut(arrays, *live)))
    assert not any(g[:, 33:].any() for g in padded)


# --- twins: these checks can fail --------------------------------------------------------------------------


def test_twin_another_order_of_heads_has_other_bits() -> None:
    arrays = kept(*operands(F32))
    dq, dk, dv = orders.attention_backward(*arrays, scale=0.25, heads_last=True)
    ours = backward(*arrays)
    assert not differing(dq, ours[0]) and differing(dk, ours[1]) and differing(dv, ours[2])


def test_twin_the_ordinary_gradient_depends_on_the_batch_or_the_length() -> None:
    """`jnp.einsum` and its derivative add in an order that follows the shapes."""
    arrays = operands(F32, rows=4, length=130, h=64)
    plain = jax.jit(lambda q, k, v, dout: jax.vjp(softmax_attention, q, k, v)[1](dout))
    arrays[3][:, 97:] = 0
    padded = plain(*arrays)
    alone = plain(*cut(arrays, slice(1), slice(97)))
    changed = [differing(a, p[:1, :97]) for a, p in zip(alone, padded, strict=True)]
    assert any(changed)


def test_twin_a_key_that_is_seen_enters() -> None:
    arrays = kept(*operands(BF16))
    whole = backward(*arrays)
    changed = list(arrays)
    changed[2] = arrays[2].copy()
    changed[2][:, 20] += 1
    for name, ours, other in zip(NAMES, whole, backward(*changed), strict=True):
        assert name == "dv" or differing(ours, other)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 6, 2, 16), "v": (2, 6, 2, 16)}, "of whole sequences"),
        ({"dout": (2, 5, 2, 16)}, "of whole sequences"),
        ({"out": (2, 5, 4, 32)}, "of whole sequences"),
        ({"v": (2, 5, 1, 16)}, "attention takes q"),
        ({"lse": (2, 4, 5)}, r"takes lse float32 \(2, 5, 4\).* not float32 \(2, 4, 5\)"),
        ({"k": (2, 5, 3, 16), "v": (2, 5, 3, 16)}, "N is no multiple of K"),
    ],
)
def test_it_refuses_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    q, k = (2, 5, 4, 16), (2, 5, 2, 16)
    shapes = {"q": q, "k": k, "v": k, "out": q, "lse": q[:3], "dout": q} | change
    with pytest.raises(ValueError, match=message):
        attention_backward(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": F32}, "q, out and dout must have one dtype, not bfloat16, bfloat16 and float32"),
        ({"lse": BF16}, "takes lse float32 .* not bfloat16"),
        ({"k": F32}, "one dtype, not bfloat16, float32 and bfloat16"),
    ],
)
def test_it_refuses_mixed_dtypes(change: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "out", "lse", "dout")
    arrays = dict(zip(names, kept(*operands(BF16)), strict=True))
    arrays |= {name: arrays[name].astype(dtype) for name, dtype in change.items()}
    with pytest.raises(ValueError, match=message):
        attention_backward(**arrays)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("mosaic_gpu", "backend 'mosaic_gpu' needs a Hopper GPU"),
        ("triton", "has no backend 'triton'"),
        ("other", "backend='other' is unknown"),
    ],
)
def test_a_backend_that_is_not_there_is_refused(backend: str, message: str) -> None:
    arrays = tuple(map(jnp.asarray, kept(*operands(BF16, length=5))))
    with pytest.raises(ValueError, match=message):
        attention_backward(*arrays, backend=backend)
    with pytest.raises(ValueError, match=message):
        attention_with_lse(*arrays[:3], upto(5, 2), backend=backend)


def test_a_second_derivative_is_refused() -> None:
    arrays = tuple(map(jnp.asarray, kept(*operands(F32))))
    with pytest.raises(ValueError, match="attention_backward has no gradient"):
        jax.grad(lambda q: backward(q, *arrays[1:])[1].sum())(arrays[0])
    with pytest.raises(ValueError, match="attention_with_lse has no gradient"):
        jax.grad(lambda q: forward(q, *arrays[1:3], upto(LENGTH, 2))[1].sum())(arrays[0])
