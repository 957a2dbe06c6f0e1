"""The gradient of a token's log-probability: accurate, in stated steps, an element's bits its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.log_softmax.backward import token_logprob_backward
from tests import backward, orders
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    bits,
    differing,
    normal,
    wide,
)

VOCAB = 8 * 21
gradient = jax.jit(token_logprob_backward, static_argnames="out_dtype")


def operands(rows: int = 70, kind: Any = normal) -> tuple[np.ndarray, ...]:
    """logits, targets, row_max, log_total, ct."""
    rng = np.random.default_rng(0)
    logits = kind(rng, (rows, VOCAB)) * np.float32(3)
    targets = rng.integers(0, VOCAB, rows).astype(np.int32)
    targets[:3] = 0, VOCAB - 1, logits[2].argmax()
    row_max = logits.max(-1)
    log_total = orders.log(orders.exp_sum(logits, row_max, 8))
    return logits, targets, row_max, log_total, backward.wide_tokens(rng, (rows,))


def plain_logprob(logits: jax.Array, targets: np.ndarray) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def plain(logits: np.ndarray, targets: np.ndarray, ct: np.ndarray) -> Any:
    return jax.vjp(lambda logits: plain_logprob(logits, targets), logits)[1](jnp.asarray(ct))[0]


@pytest.mark.parametrize("kind", [normal, wide])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_it_is_as_accurate_as_the_ordinary_one(name: str, kind: Any) -> None:
    logits, targets, row_max, log_total, ct = operands(kind=kind)
    ours = gradient(logits, targets, row_max, log_total, ct, offset=0, out_dtype=name)
    theirs = np.asarray(plain(logits, targets, ct)).astype(DTYPES[name])
    (exact,) = backward.in_float64(lambda logits: plain_logprob(logits, targets), (logits,), ct)
    assert_as_accurate(ours, theirs, exact, scale=np.abs(ct.astype(np.float64))[:, None])


@pytest.mark.parametrize("kind", [normal, wide])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_steps(name: str, kind: Any) -> None:
    args = operands(kind=kind)
    ours = gradient(*args, offset=0, out_dtype=name)
    assert_same_bits(ours, backward.token_logprob(*args, DTYPES[name]))


def test_a_row_adds_up_to_nothing() -> None:
    *args, ct = operands()
    out = np.asarray(gradient(*args, np.ones_like(ct), offset=0, out_dtype="float32"), np.float64)
    assert np.abs(out.sum(-1)).max() < 1e-5


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    logits, targets, row_max, log_total, ct = operands()
    rest = np.stack([row_max, log_total, ct, targets.astype(np.float32)], axis=1)

    def op(rows: np.ndarray) -> Any:
        row_max, log_total, ct, targets = rows[:, VOCAB:].T
        return gradient(
            rows[:, :VOCAB], targets.astype(np.int32), row_max, log_total, ct, offset=0, out_dtype=name
        )

    assert_rows_stand_alone(op, np.concatenate([logits, rest], axis=1), FEW_ROW_COUNTS)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_the_cut_of_the_vocabulary(name: str, ranks: int) -> None:
    logits, *rest = operands()
    size = VOCAB // ranks
    parts = [
        gradient(part, *rest, offset=jnp.int32(i * size), out_dtype=name)
        for i, part in enumerate(np.split(logits, ranks, axis=1))
    ]
    whole = gradient(logits, *rest, offset=0, out_dtype=name)
    assert_same_bits(np.concatenate(parts, axis=1), whole)
    unmoved = gradient(logits[:, size:], *rest, offset=0, out_dtype=name)  # twin: a forgotten offset
    assert differing(unmoved, whole[:, size:])


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    args = operands(rows=9)
    expected = backward.token_logprob(*args, DTYPES[name])
    assert_same_bits(token_logprob_backward(*map(jnp.asarray, args), offset=0, out_dtype=name), expected)

    @jax.jit
    def surrounded(logits: jax.Array, targets: jax.Array, row_max: jax.Array, *rest: jax.Array) -> Any:
        out = token_logprob_backward(logits * 2, targets, row_max * 2, *rest, offset=0, out_dtype=name)
        return out, jnp.sum(out.astype(np.float32) * logits, axis=0)

    logits, targets, row_max, *rest = args
    half = np.float32(0.5)
    assert_same_bits(surrounded(logits * half, targets, row_max * half, *rest)[0], expected)
    one_by_one = jax.jit(
        lambda *args: jax.lax.map(lambda row: token_logprob_backward(*row, offset=0, out_dtype=name), args)
    )
    assert_same_bits(one_by_one(*args), expected)


def test_rows_without_a_cotangent_are_zeros_and_targets_elsewhere_are_not_hot() -> None:
    logits, targets, row_max, log_total, ct = operands()
    out = gradient(logits, targets, row_max, log_total, ct * 0, offset=0, out_dtype="bfloat16")
    assert not np.any(np.asarray(out, np.float32))
    ones = np.ones_like(ct)
    outside = gradient(logits, targets * 0 - 1, row_max, log_total, ones, offset=0, out_dtype="float32")
    assert (np.asarray(outside) <= 0).all() and np.any(bits(outside))


def test_twin_plain_jax_takes_other_steps() -> None:
    args = operands()
    ours = gradient(*args, offset=0, out_dtype="float32")
    assert differing(jax.jit(plain)(args[0], args[1], args[4]), ours)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, jnp.zeros((4, 8), "bfloat16"), "takes float32 logits .* not bfloat16"),
        (1, jnp.zeros(4), "takes integer targets"),
        (1, jnp.zeros((4, 1), int), r"not int32 \(4, 1\)"),
        (2, jnp.zeros((4, 1)), "takes float32 row_max"),
        (3, jnp.zeros(4, "bfloat16"), "takes float32 log_total"),
        (4, jnp.zeros(3), "takes float32 ct"),
    ],
)
def test_it_refuses(index: int, value: jax.Array, message: str) -> None:
    args = [jnp.zeros((4, 8)), jnp.zeros(4, int), *[jnp.zeros(4)] * 3]
    args[index] = value
    with pytest.raises(ValueError, match=message):
        token_logprob_backward(*args, offset=0, out_dtype="float32")


def test_it_refuses_other_results_and_a_second_derivative() -> None:
    args = (jnp.zeros((4, 8)), jnp.zeros(4, int), *[jnp.zeros(4)] * 3)
    with pytest.raises(ValueError, match="out_dtype=int8 is not supported"):
        token_logprob_backward(*args, offset=0, out_dtype="int8")

    def total(ct: jax.Array) -> jax.Array:
        return token_logprob_backward(*args[:4], ct, offset=0, out_dtype="float32").sum()

    with pytest.raises(ValueError, match="token_logprob_backward has no gradient in tree order"):
        jax.grad(total)(args[4])
