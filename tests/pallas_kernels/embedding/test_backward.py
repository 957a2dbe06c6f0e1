"""The gradient of an embedding table: token by token inside a leaf, and no bit of it from the mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.pallas_kernels import tree_join
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.embedding.backward import (
    embedding_backward,
    first_occurrence,
    slot_sums_matmul,
    slot_sums_reference,
)
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu
from tests import backward
from tests.helpers import DTYPES, assert_as_accurate, assert_same_bits, differing, normal

VOCAB, D, TOKENS = 40, 6, 128
gradient = jax.jit(
    functools.partial(embedding_backward, backend="reference"), static_argnames=("rows", "leaves")
)


def operands(dtype: Any, tokens: int = TOKENS, d: int = D) -> tuple[np.ndarray, np.ndarray]:
    """Ids, some of them often and some never, and dy with cancellation between neighbours."""
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.geometric(0.15, tokens), VOCAB - 2).astype(np.int32)
    ids[:2] = 0
    return ids, backward.wide_tokens(rng, (tokens, d), dtype)


def plain(ids: np.ndarray, dy: np.ndarray) -> jax.Array:
    """The scatter-add that JAX makes of a gather, into a table of dy's dtype."""
    table = jnp.zeros((VOCAB, dy.shape[-1]), dy.dtype)
    return jax.vjp(lambda table: table[ids], table)[1](jnp.asarray(dy))[0]


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_it_is_as_accurate_as_the_ordinary_one(name: str) -> None:
    ids, dy = operands(DTYPES[name])
    exact = np.zeros((VOCAB, D))
    np.add.at(exact, ids, dy.astype(np.float64))
    ours = gradient(ids, dy, rows=VOCAB, offset=0, leaves=8)
    assert_as_accurate(ours, plain(ids, dy), exact)


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, leaves: int) -> None:
    ids, dy = operands(DTYPES[name])
    ours = gradient(ids, dy, rows=VOCAB, offset=0, leaves=leaves)
    assert_same_bits(ours, backward.embedding(ids, dy, VOCAB, leaves))


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4, 8]), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_it_has_the_stated_order_at_any_shape(steps: int, leaves: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = 16 * steps * leaves
    ids, dy = rng.integers(0, rows, tokens).astype(np.int32), backward.wide_tokens(rng, (tokens, 3))
    ours = gradient(ids, dy, rows=rows, offset=0, leaves=leaves)
    assert_same_bits(ours, backward.embedding(ids, dy, rows, leaves))


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_the_call_that_holds_a_leaf(name: str) -> None:
    """Calls meet in the upper levels of the same tree, also where an id occurs in few leaves or cancels to zero."""
    ids, dy = operands(DTYPES[name])
    ids[-1], dy[-1] = VOCAB - 1, -0.0
    ids[20:22], dy[20], dy[21] = 1, 2.5, -2.5
    whole = gradient(ids, dy, rows=VOCAB, offset=0, leaves=8)
    for calls in (2, 4, 8):
        parts = [
            gradient(some, rows, rows=VOCAB, offset=0, leaves=8 // calls)
            for some, rows in zip(np.split(ids, calls), np.split(dy, calls), strict=True)
        ]
        assert_same_bits(tree_join(parts), whole)
    assert_same_bits(whole[VOCAB - 1], np.zeros(D, np.float32))  # +0.0, although its token's is -0.0
    backwards = sum(parts[::-1])  # twin: the leaves in another order
    if name == "float32":
        assert differing(backwards, whole)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bits_do_not_depend_on_the_cut_of_the_table(ranks: int) -> None:
    ids, dy = operands(np.float32)
    size = VOCAB // ranks
    parts = [gradient(ids, dy, rows=size, offset=jnp.int32(r * size), leaves=8) for r in range(ranks)]
    assert_same_bits(np.concatenate(parts), gradient(ids, dy, rows=VOCAB, offset=0, leaves=8))


def test_a_row_does_not_depend_on_the_other_ids() -> None:
    ids, dy = operands(np.float32)
    whole = np.asarray(gradient(ids, dy, rows=VOCAB, offset=0, leaves=8))
    others = np.where(ids == 3, 3, (ids + 5) % 32 + 4)
    moved = np.asarray(gradient(others, dy, rows=VOCAB, offset=0, leaves=8))
    assert_same_bits(moved[3], whole[3])
    assert differing(moved[4:], whole[4:])


@pytest.mark.parametrize("leaves", [1, 2, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_the_matmul_of_a_one_hot_matrix_has_the_same_bits(name: str, leaves: int) -> None:
    ids, dy = operands(DTYPES[name], d=16)
    slots = first_occurrence(jnp.asarray(ids))
    assert_same_bits(slots, np.asarray([list(ids).index(i) for i in ids], np.int32))
    ours = slot_sums_matmul(slots, jnp.asarray(dy), leaves=leaves, backend="reference")
    assert_same_bits(ours, jax.jit(slot_sums_reference, static_argnames="leaves")(slots, dy, leaves=leaves))
    assert_same_bits(
        ours[np.unique(slots)], backward.embedding(ids, dy, VOCAB, leaves)[ids[np.unique(slots)]]
    )


def test_it_lowers_for_hopper_as_one_matmul_without_scattered_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)
    ids, dy = jax.ShapeDtypeStruct((512,), jnp.int32), jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    op = jax.jit(functools.partial(embedding_backward, rows=VOCAB, offset=0, leaves=8, backend="mosaic_gpu"))
    text = op.trace(ids, dy).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1 and "stablehlo.dot" not in text
    assert scattered_adds(text) == 0
    scatter = jax.jit(plain).trace(ids, dy).lower(lowering_platforms=("cuda",)).as_text()
    assert scattered_adds(scatter) == 1  # twin


def scattered_adds(text: str) -> int:
    """Scatters whose body adds, in a lowered program."""
    bodies = text.split('"stablehlo.scatter"')[1:]
    return sum("stablehlo.add" in body.split("stablehlo.return")[0] for body in bodies)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    ids, dy = operands(DTYPES[name])
    expected = backward.embedding(ids, dy, VOCAB, 2)
    op = functools.partial(embedding_backward, rows=VOCAB, offset=0, leaves=2)
    assert_same_bits(op(jnp.asarray(ids), jnp.asarray(dy)), expected)

    @jax.jit
    def surrounded(ids: jax.Array, dy: jax.Array) -> Any:
        out = op(ids - 1, dy * 2)
        return out, jnp.sum(out * 3, axis=0) + jnp.sum(dy.astype(np.float32), axis=0)

    assert_same_bits(surrounded(ids + 1, dy * np.asarray(0.5, dy.dtype))[0], expected)
    steps = jax.jit(lambda *args: jax.lax.map(lambda step: op(*step), args))
    out = steps(np.stack([ids[::-1], ids]), np.stack([dy, dy]))
    assert_same_bits(out[1], expected)
    assert differing(out[0], expected)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int16"])
def test_ids_may_be_of_any_integer_type_and_any_shape(dtype: str) -> None:
    ids, dy = operands(np.float32)
    expected = gradient(ids, dy, rows=VOCAB, offset=0, leaves=4)
    folded = gradient(
        ids.astype(dtype).reshape(4, 2, 16), dy.reshape(4, 2, 16, D), rows=VOCAB, offset=0, leaves=4
    )
    assert_same_bits(folded, expected)


def test_ids_outside_are_left_out() -> None:
    ids, dy = operands(np.float32)
    inside = ids >= 5
    outside = np.where(inside, ids, np.where(ids % 2, -1, 2**31 - 1))
    ours = gradient(outside, dy, rows=VOCAB, offset=0, leaves=8)
    assert_same_bits(ours[:5], np.zeros((5, D), np.float32))
    assert_same_bits(ours[5:], gradient(ids, dy, rows=VOCAB, offset=0, leaves=8)[5:])
    assert np.any(np.asarray(ours))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_twin_a_scatter_add_has_another_order(name: str) -> None:
    ids, dy = operands(DTYPES[name])
    ours = gradient(ids, dy, rows=VOCAB, offset=0, leaves=8)
    assert differing(np.asarray(plain(ids, dy), np.float32), ours)


@pytest.mark.parametrize(
    ("ids", "dy", "keywords", "message"),
    [
        (jnp.zeros(16), jnp.zeros((16, 4)), {}, "takes integer ids"),
        (jnp.zeros(16, int), jnp.zeros((15, 4)), {}, r"\(16,\) and \(15, 4\)"),
        (jnp.zeros(16, int), jnp.zeros((16, 4), int), {}, "dy is int32"),
        (jnp.zeros(16, int), jnp.zeros((16, 4)), {"rows": 0}, "rows=0 must be at least 1"),
        (jnp.zeros(16, int), jnp.zeros((16, 4)), {"leaves": 2}, "multiple of 16.*multiple of 32"),
        (jnp.zeros(24, int), jnp.zeros((24, 4)), {}, r"24 tokens cannot .* \(the next is 32\)"),
        (jnp.zeros(48, int), jnp.zeros((48, 4)), {"leaves": 3}, "leaves=3 is not supported"),
        (jnp.zeros(16, int), jnp.zeros((16, 4)), {"backend": "mosaic_gpu"}, "takes bfloat16 and float16"),
        (jnp.zeros(16, int), jnp.zeros((16, 4)), {"backend": "pallas"}, "is unknown"),
    ],
)
def test_it_refuses(ids: jax.Array, dy: jax.Array, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_backward(ids, dy, **({"rows": 8, "offset": 0, "leaves": 1} | keywords))


def test_it_has_no_second_derivative() -> None:
    ids, dy = jnp.zeros(16, int), jnp.asarray(normal(np.random.default_rng(0), (16, 4)))
    with pytest.raises(ValueError, match="embedding_backward has no gradient in tree order"):
        jax.grad(lambda dy: embedding_backward(ids, dy, rows=8, offset=0, leaves=1).sum())(dy)
