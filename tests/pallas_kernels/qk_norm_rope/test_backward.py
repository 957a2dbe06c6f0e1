"""The gradient of qk_norm_rope: accurate, in the stated order, a head's bits its own and a token leaf's too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import rope_tables, tree_join
from tbik_jax.pallas_kernels.qk_norm_rope.backward import qk_norm_rope_backward
from tests import backward
from tests.helpers import (
    DTYPES,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    differing,
    mixed,
    normal,
)

EPS, POSITIONS = 1e-6, 24
gradient = jax.jit(functools.partial(qk_norm_rope_backward, eps=EPS), static_argnames="leaves")


def operands(
    name: str = "bfloat16",
    b: int = 4,
    t: int = 6,
    kv_heads: int = 2,
    queries: int = 3,
    h: int = 16,
    cotangent: str | None = None,
) -> tuple[np.ndarray, ...]:
    """The arguments of the op; the cotangents, float32 by default, spread over tokens and cancel."""
    rng, dtype = np.random.default_rng([b, t, kv_heads, queries, h]), DTYPES[name]
    ct = DTYPES[cotangent or "float32"]
    qkv = mixed(rng, (b * t, kv_heads, queries + 2, h), dtype).reshape(b, t, kv_heads, queries + 2, h)
    scales = [(1 + normal(rng, (h,)) / 5).astype(dtype) for _ in range(2)]
    positions = (rng.integers(0, POSITIONS - t, (b, 1)) + np.arange(t)).astype(np.int32)
    dq, dk, dv = (
        backward.wide_tokens(rng, (b * t, heads, h), ct).reshape(b, t, heads, h)
        for heads in (kv_heads * queries, kv_heads, kv_heads)
    )
    return (qkv, *scales, *rope_tables(POSITIONS, h, 1e4), positions, dq, dk, dv)


def plain_forward(
    qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, cos: Any, sin: Any
) -> tuple[jax.Array, ...]:
    """The textbook formulas in the operands' own dtype; cos and sin are those of the tokens."""
    b, t, kv_heads, group, h = qkv.shape

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        c, s = (table[..., None, :].astype(x.dtype) for table in (cos, sin))
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    q = rotate(norm(qkv[..., :-2, :].reshape(b, t, kv_heads * (group - 2), h), q_scale))
    return q, rotate(norm(qkv[..., -2, :], k_scale)), qkv[..., -1, :]


def plain(args: tuple[np.ndarray, ...], exact: bool = False) -> Any:
    """Plain JAX's gradients of qkv and the scales, in the operands' dtype or in float64."""
    *primals, cos, sin, positions, dq, dk, dv = args
    forward = functools.partial(plain_forward, cos=cos[positions], sin=sin[positions])
    if exact:
        return backward.in_float64(forward, tuple(primals), (dq, dk, dv))
    cotangents = tuple(jnp.asarray(x.astype(primals[0].dtype)) for x in (dq, dk, dv))
    return jax.vjp(forward, *map(jnp.asarray, primals))[1](cotangents)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_it_is_as_accurate_as_the_ordinary_one(name: str) -> None:
    args = operands(name, t=16, cotangent=name)
    ours, theirs, exact = gradient(*args, leaves=8), plain(args), plain(args, exact=True)
    head = np.abs(exact[0]).max(-1, keepdims=True)
    assert_as_accurate(ours[0], theirs[0], exact[0], scale=head)
    for i in (1, 2):
        joined = np.asarray(tree_join(list(ours[i]))).sum(0)  # over the KV heads, for this comparison
        assert_as_accurate(joined, theirs[i], exact[i], scale=np.abs(exact[i]).max())


@pytest.mark.parametrize(
    "sizes",
    [{}, {"queries": 1, "h": 2}, {"kv_heads": 1, "queries": 4, "h": 30}, {"b": 1, "t": 8, "queries": 5}],
)
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, sizes: dict[str, int]) -> None:
    args = operands(name, **sizes)
    for leaves in (1, 8):
        assert_same_bits(gradient(*args, leaves=leaves), backward.qk_norm_rope(*args, EPS, leaves))


def test_cotangents_may_have_the_activations_dtype() -> None:
    args = operands("bfloat16", cotangent="bfloat16")
    out = gradient(*args, leaves=8)
    assert_same_bits(out, backward.qk_norm_rope(*args, EPS, 8))
    assert_same_bits(out[0][..., -1, :], args[-1])  # dv is copied


def rows_of(args: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """qkv, positions, dq, dk and dv: what is cut with the batch."""
    return args[0], *args[5:]


def of_rows(args: tuple[np.ndarray, ...], rows: tuple[Any, ...], leaves: int) -> Any:
    return gradient(rows[0], *args[1:5], *rows[1:], leaves=leaves)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_of_a_token_do_not_depend_on_the_batch(name: str) -> None:
    args = operands(name, b=18, t=1)
    rows = rows_of(args)
    flat = np.concatenate([x.reshape(18, -1).astype(np.float32) for x in rows], axis=1)  # exact
    ends = np.cumsum([x[0].size for x in rows])[:-1]

    def op(flat: np.ndarray) -> Any:
        cut = [
            part.reshape(-1, *x.shape[1:]).astype(x.dtype)
            for part, x in zip(np.split(flat, ends, axis=1), rows, strict=True)
        ]
        return of_rows(args, tuple(cut), 1)[0]

    assert_rows_stand_alone(op, flat, (1, 3, 8, 17))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("index", [1, 2])
def test_bits_of_a_leaf_do_not_depend_on_the_call(name: str, index: int) -> None:
    args = operands(name, b=8, t=6)
    backward.assert_leaves_stand_alone(
        lambda *rows, leaves: of_rows(args, rows, leaves)[index], rows_of(args)
    )


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_the_cut_of_the_kv_heads(name: str) -> None:
    args = operands(name, kv_heads=4)
    whole = gradient(*args, leaves=8)
    qkv, *shared, dq, dk, dv = args
    for rank in range(4):
        heads, queries = slice(rank, rank + 1), slice(3 * rank, 3 * rank + 3)
        part = gradient(
            qkv[:, :, heads], *shared, dq[:, :, queries], dk[:, :, heads], dv[:, :, heads], leaves=8
        )
        assert_same_bits(part, (whole[0][:, :, heads], whole[1][:, heads], whole[2][:, heads]))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    args = operands(name)
    expected = backward.qk_norm_rope(*args, EPS, 2)
    op = functools.partial(qk_norm_rope_backward, eps=EPS, leaves=2)
    assert_same_bits(op(*map(jnp.asarray, args)), expected)

    @jax.jit
    def surrounded(qkv: jax.Array, *rest: jax.Array) -> Any:
        *others, dq, dk, dv = rest
        out = op(qkv * 2, *others, dq * 0.5, dk, dv)
        return out, jnp.sum(out[0].astype(np.float32) * qkv) + jnp.sum(out[1] * 3) + jnp.sum(dq)

    qkv, *others, dq, dk, dv = args
    half = np.asarray(0.5, qkv.dtype)
    assert_same_bits(surrounded(qkv * half, *others, dq * 2, dk, dv)[0], expected)
    layers = jax.jit(lambda *args: jax.lax.map(lambda layer: op(*layer), args))
    assert_same_bits(jax.tree.map(lambda out: out[1], layers(*(np.stack([x, x]) for x in args))), expected)


def test_padding_adds_nothing() -> None:
    """Tokens behind a row's length, with zero cotangents: zeros of dqkv, and the sums of the other tokens."""
    args = operands("float32")
    rows = list(rows_of(args))
    for x in rows[2:]:
        x[:, 4:] = 0
    out = of_rows(args, tuple(rows), 4)
    assert not np.any(out[0][:, 4:]) and np.any(out[0][:, :4])
    rows[0] = rows[0].copy()
    rows[0][:, 4:] = 7  # whatever the padding holds
    assert_same_bits(of_rows(args, tuple(rows), 4)[1:], out[1:])


def test_twin_plain_jax_has_another_order() -> None:
    args = operands("float32", t=16)
    ours, theirs = gradient(*args, leaves=8), jax.jit(plain)(args)
    assert differing(theirs[0], ours[0])
    for i in (1, 2):
        assert differing(theirs[i], tree_join(list(tree_join(list(ours[i])))))


ARGUMENTS = ("qkv", "q_scale", "k_scale", "cos", "sin", "positions", "dq", "dk", "dv")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", jnp.zeros((4, 6, 2, 2, 16)), "takes qkv"),
        ("qkv", jnp.zeros((4, 6, 2, 5, 16), int), "qkv is int32"),
        ("q_scale", jnp.zeros(8), r"takes q_scale \(16,\) float32, not \(8,\)"),
        ("k_scale", jnp.zeros(16, "bfloat16"), "takes k_scale .* not .* bfloat16"),
        ("cos", jnp.zeros((24, 16)), "takes cos"),
        ("sin", jnp.zeros((23, 8)), "takes sin"),
        ("positions", jnp.zeros((4, 5), int), "takes positions"),
        ("dq", jnp.zeros((4, 6, 2, 16)), r"takes dq \(4, 6, 6, 16\) float32, not \(4, 6, 2, 16\)"),
        ("dk", jnp.zeros((4, 6, 2, 16), "float16"), "takes dk .* not .* float16"),
        ("dv", jnp.zeros((4, 6, 1, 16)), "takes dv"),
        ("eps", 0.0, "eps=0.0 must be positive"),
        ("leaves", 16, "leaves=16 is not supported"),
    ],
)
def test_it_refuses(name: str, value: Any, message: str) -> None:
    keywords = dict(zip(ARGUMENTS, map(jnp.asarray, operands("float32")), strict=True))
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_backward(**{**keywords, "eps": EPS, "leaves": 1, name: value})


def test_it_refuses_an_uneven_cut_and_a_second_derivative() -> None:
    args = list(map(jnp.asarray, operands("float32", b=3, t=1)))
    with pytest.raises(ValueError, match="3 tokens cannot be cut into 2"):
        qk_norm_rope_backward(*args, eps=EPS, leaves=2)
    with pytest.raises(ValueError, match="qk_norm_rope_backward has no gradient in tree order"):
        jax.grad(lambda qkv: qk_norm_rope_backward(qkv, *args[1:], eps=EPS, leaves=1)[0].sum())(args[0])
