"""exp and log: accurate, and the same bits wherever a value stands; products and quotients that stay rounded alone."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.common.rounding import div, exp, log, mul, neg, pin, reciprocal_sqrt, round_to
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

F32 = np.float32
INF, NAN = np.inf, np.nan
TINY, MAX = np.finfo(F32).tiny, np.finfo(F32).max

jit_exp, jit_log = jax.jit(exp), jax.jit(log)


def ulps(actual: Any, exact: np.ndarray) -> np.ndarray:
    """Distance from float64 `exact` in units of the last place of its float32 rounding."""
    return np.abs(np.asarray(actual, np.float64) - exact) / np.spacing(np.abs(exact).astype(F32))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- exp -------------------------------------------------------------------------------------------------


def test_exp_is_within_one_ulp() -> None:
    near_zero = normal(rng(), (1 << 18,)) * 2.0 ** rng(1).uniform(-30, 3, 1 << 18)
    x = np.concatenate([rng(2).uniform(-87.33, 88.72, 1 << 20), near_zero]).astype(F32)
    assert ulps(jit_exp(x), np.exp(x.astype(np.float64))).max() <= 1


def test_exp_is_within_one_ulp_where_the_reduction_switches() -> None:
    """Around the odd multiples of ln(2) / 2 the remainder is largest."""
    middle = ((np.arange(-125, 127) + 0.5) * np.log(2)).astype(F32)
    steps = np.arange(-50, 51, dtype=np.int32)
    x = (middle.view(np.int32)[:, None] + steps).view(F32)
    assert ulps(jit_exp(x), np.exp(x.astype(np.float64))).max() <= 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        *[(0, 1), (-0.0, 1), (1e-40, 1), (-1e-40, 1), (1e-9, 1), (NAN, NAN)],
        *[(INF, INF), (1e30, INF), (89, INF), (88.72284, INF)],
        *[(-INF, 0), (-1e30, 0), (-200, 0), (-104, 0)],
    ],
)
def test_exp_of_special_values(x: float, expected: float) -> None:
    np.testing.assert_array_equal(jit_exp(F32(x)), F32(expected))
    assert not np.signbit(jit_exp(F32(x)))


def test_exp_at_the_ends_of_the_normal_range() -> None:
    x = np.asarray([88.7, 88.72283, np.nextafter(F32(88.72283), F32(0)), -87.0, -87.33654], F32)
    y = np.asarray(jit_exp(x))
    assert np.isfinite(y).all() and (y >= TINY).all()
    assert ulps(y, np.exp(x.astype(np.float64))).max() <= 1


def test_exp_below_the_normal_range_is_right_or_flushed() -> None:
    x = np.asarray([-87.4, -88, -90, -95, -100, -102, -103, -103.9], F32)
    y, exact = np.asarray(jit_exp(x), np.float64), np.exp(x.astype(np.float64))
    assert ((y == 0) | (np.abs(y - exact) <= 2.0**-149)).all()


def test_exp_has_the_stated_steps() -> None:
    x = rng().uniform(-110, 95, 1 << 18).astype(F32)
    assert_same_bits(jit_exp(x), orders.exp(x))


# --- log -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "stride"), [(-1, 1), (0, 1), (1, 3), (-126, 7), (-60, 7), (127, 7)])
def test_log_is_within_one_ulp_for_all_mantissas(exponent: int, stride: int) -> None:
    x = (np.arange(0, 1 << 23, stride, dtype=np.int32) | (exponent + 127) << 23).view(F32)
    x = x[x != 1]
    assert ulps(jit_log(x), np.log(x.astype(np.float64))).max() <= 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1, 0),
        (0, -INF),
        (-0.0, -INF),
        (1e-40, -INF),
        (INF, INF),
        (-1, NAN),
        (-INF, NAN),
        (-TINY, NAN),
        (NAN, NAN),
    ],
)
def test_log_of_special_values(x: float, expected: float) -> None:
    y = np.asarray(jit_log(F32(x)))
    np.testing.assert_array_equal(y, F32(expected))
    assert x != 1 or not np.signbit(y)


def test_log_at_the_ends_of_the_normal_range() -> None:
    x = np.asarray([TINY, np.nextafter(TINY, F32(1)), MAX], F32)
    assert ulps(jit_log(x), np.log(x.astype(np.float64))).max() <= 1


def test_log_has_the_stated_steps() -> None:
    """Some of its products have a factor that comes from an integer, which the compiler knows to be no NaN."""
    x = np.exp(rng().uniform(-87, 88, 1 << 19)).astype(F32)
    assert_same_bits(jit_log(x), orders.log(x))


# --- the same bits wherever a value stands -----------------------------------------------------------------


def values(function: str, count: int = 4099, seed: int = 0) -> np.ndarray:
    x = normal(rng(seed), (count,)) * F32(10)
    return np.abs(x) + F32(1e-6) if function == "log" else x


def lengths_that_differ(
    op: Callable[[np.ndarray], Any], x: np.ndarray, lengths: Iterable[int] = range(1, 34)
) -> list[int]:
    """Lengths for which a prefix, or a piece from the middle, has other bits than in the whole array."""
    whole = np.asarray(op(x))
    return [
        n
        for n in lengths
        if differing(op(x[:n]), whole[:n]) or differing(op(x[1001 : 1001 + n]), whole[1001 : 1001 + n])
    ]


@pytest.mark.parametrize(("name", "op"), [("exp", jit_exp), ("log", jit_log)])
def test_bits_do_not_depend_on_the_length_or_the_place(name: str, op: Callable[..., Any]) -> None:
    assert lengths_that_differ(op, values(name)) == []


@pytest.mark.parametrize(("name", "op"), [("exp", jax.jit(jnp.exp)), ("log", jax.jit(jnp.log))])
def test_twin_the_ordinary_function_depends_on_the_length(name: str, op: Callable[..., Any]) -> None:
    if not any(lengths_that_differ(op, values(name, seed=seed), (3, 5, 7, 15)) for seed in range(10)):
        pytest.skip(f"jnp.{name} of this XLA has the same bits in arrays of length 3, 5, 7 and 15")


@pytest.mark.parametrize(
    "formula",
    [
        lambda exp, log, x, y: exp(x - y) - y,
        lambda exp, log, x, y: x + log(1 + exp(-x)),
        lambda exp, log, x, y: log(y) + log(y + 1),
        lambda exp, log, x, y: exp(log(y) + x) + log(y),
    ],
)
def test_bits_do_not_depend_on_the_fusion(formula: Callable[..., Any]) -> None:
    x, y = values("exp"), values("log", seed=1)
    assert_same_bits(
        jax.jit(lambda x, y: formula(exp, log, x, y))(x, y), formula(orders.exp, orders.log, x, y)
    )


@pytest.mark.parametrize(("name", "op"), [("exp", exp), ("log", log)])
def test_bits_do_not_depend_on_jit_vmap_or_scan(name: str, op: Callable[[jax.Array], jax.Array]) -> None:
    x = values(name, 20 * 33).reshape(20, 33)
    expected = getattr(orders, name)(x)
    assert_same_bits(op(jnp.asarray(x)), expected)
    assert_same_bits(jax.jit(jax.vmap(op))(x), expected)
    assert_same_bits(jax.jit(lambda x: jax.lax.map(op, x))(x), expected)


# --- products --------------------------------------------------------------------------------------------


def operands(count: int = 4096) -> list[np.ndarray]:
    return list(normal(rng(), (4, count)))


@pytest.mark.parametrize(
    "formula",
    [
        lambda mul, a, b, c, d: mul(a, b) + c,
        lambda mul, a, b, c, d: c - mul(a, b),
        lambda mul, a, b, c, d: mul(a, b) - mul(c, d),
        lambda mul, a, b, c, d: mul(mul(a, b) + c, d) + a,
        lambda mul, a, b, c, d: mul(a, a[:1]) + c,
        lambda mul, a, b, c, d: mul(a, F32(0.1)) + F32(0.3),
        lambda mul, a, b, c, d: mul((a * 50).astype("int32").astype(F32), F32(-2.12194440e-4)) + c,
        lambda mul, a, b, c, d: mul(abs(a), b) + c,
    ],
)
def test_products_are_rounded_by_themselves(formula: Callable[..., Any]) -> None:
    args = operands()
    expected = formula(np.multiply, *args)
    assert_same_bits(jax.jit(lambda *args: formula(mul, *args))(*args), expected)
    assert_same_bits(formula(mul, *map(jnp.asarray, args)), expected)


def test_pin_keeps_a_product_out_of_an_add_in_a_loop() -> None:
    a, b, c, _ = operands()

    def body(i: jax.Array, acc: jax.Array) -> jax.Array:
        return acc + pin(a * (b + i.astype(jnp.float32)))

    expected = c
    for i in range(5):
        expected = expected + a * (b + F32(i))
    assert_same_bits(jax.jit(lambda c: jax.lax.fori_loop(0, 5, body, c))(c), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 15, 17, 100])
def test_pin_works_for_any_length(n: int) -> None:
    a, b, c, _ = operands(n)
    assert_same_bits(jax.jit(lambda a, b, c: pin(a * b) + c)(a, b, c), a * b + c)


def test_twin_without_pin_products_are_fused() -> None:
    a, b, c, _ = operands()
    if not differing(jax.jit(lambda a, b, c: a * b + c)(a, b, c), a * b + c):
        pytest.skip("XLA does not contract products and adds on this machine")


def test_pin_changes_no_value_and_no_gradient() -> None:
    x = np.asarray([0, -0.0, 1.5, -3e38, TINY, INF, -INF, NAN], F32)
    assert_same_bits(jax.jit(pin)(x), x)
    assert jax.grad(lambda x: 3 * pin(x))(2.0) == 3


# --- quotients -------------------------------------------------------------------------------------------


def quotients(op: Callable[..., Any], shape: tuple[int, ...]) -> int:
    """Wrong bits of a division by a value that is broadcast over 64 columns."""
    a, b = normal(rng(), (*shape, 64)), np.abs(normal(rng(1), (*shape, 1))) + F32(0.1)
    return differing(jax.jit(op)(a, b), a / b)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (50,), (3, 5)])
def test_quotients_are_rounded_once(shape: tuple[int, ...]) -> None:
    assert quotients(div, shape) == 0


def test_a_quotient_by_a_scalar_is_rounded_once() -> None:
    a = operands()[0]
    assert_same_bits(jax.jit(div)(a, F32(3)), a / F32(3))
    assert_same_bits(jax.jit(lambda a: div(a, F32(3)))(a), a / F32(3))
    assert_same_bits(div(jnp.asarray(a), F32(3)), a / F32(3))


def test_twin_an_ordinary_quotient_becomes_a_product() -> None:
    if not quotients(lambda a, b: a / b, (50,)):
        pytest.skip("XLA does not turn a division by a broadcast into a product on this machine")


def test_quotients_in_a_row_stay_two() -> None:
    a, b, c = (rng(7).uniform(0.5, 2, (3, 64))).astype(F32)
    expected = (a / b) / c
    assert_same_bits(jax.jit(lambda a, b, c: div(div(a, b), c))(a, b, c), expected)
    assert_same_bits(jax.jit(lambda a, b, c: div(a, div(b, c)))(a, b, c), a / (b / c))
    root = jax.jit(lambda a, b: div(reciprocal_sqrt(a), b))
    assert_same_bits(root(a, b), (F32(1) / np.sqrt(a)) / b)


def test_twin_of_ordinary_quotients_in_a_row_xla_makes_one() -> None:
    a, b, c = (rng(7).uniform(0.5, 2, (3, 64))).astype(F32)
    assert differing(jax.jit(lambda a, b, c: a / b / c)(a, b, c), (a / b) / c) > 0


@pytest.mark.parametrize("axes", [(0, None), (1, 0), (None, 0)], ids=str)
def test_vmap_changes_no_quotient(axes: tuple[Any, Any]) -> None:
    """A divisor that `jax.vmap` leaves unbatched is broadcast too."""
    a, b = normal(rng(), (64, 48)), np.abs(normal(rng(1), (48,))) + F32(0.1)
    operands = {(0, None): (a, b), (1, 0): (a, b), (None, 0): (a[0], np.tile(b, (64, 1)))}[axes]
    expected = {(0, None): a / b, (1, 0): (a / b).T, (None, 0): np.tile(a[0] / b, (64, 1))}[axes]
    assert_same_bits(jax.jit(jax.vmap(div, axes))(*operands), expected)


def test_twin_a_barrier_behind_the_broadcast_is_too_late() -> None:
    a, b = normal(rng(), (64, 48)), np.abs(normal(rng(1), (48,))) + F32(0.1)

    def late(a: jax.Array, b: jax.Array) -> jax.Array:
        return a / jax.lax.optimization_barrier(jnp.broadcast_to(b, a.shape))

    if not differing(jax.jit(jax.vmap(late, (0, None)))(a, b), a / b):
        pytest.skip("XLA does not turn a division by a broadcast into a product on this machine")


def test_reciprocal_sqrt_is_two_rounded_steps() -> None:
    x = np.exp(rng().uniform(-87, 88, 1 << 16)).astype(F32)
    assert_same_bits(jax.jit(reciprocal_sqrt)(x), F32(1) / np.sqrt(x))
    y = operands(16)[0]
    fused = jax.jit(lambda x, y: mul(y, reciprocal_sqrt(x)[:, None]) + 1)(x, y)
    assert_same_bits(fused, y * (F32(1) / np.sqrt(x))[:, None] + 1)


@pytest.mark.parametrize("name", DTYPES)
def test_neg_turns_the_sign_of_all_that_has_one(name: str) -> None:
    x = np.asarray([0, -0.0, 1, -1, INF, -INF, 1e-40, -6e-8, 3.5], DTYPES[name])
    assert_same_bits(jax.jit(neg)(x), np.negative(x))
    assert np.isnan(np.asarray(neg(jnp.asarray([NAN], DTYPES[name])), F32)).all()


# --- rounding to a smaller type ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_round_to_is_to_nearest_even(name: str) -> None:
    dtype = DTYPES[name]
    x = rng().integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(F32)
    x = x[(np.abs(x) >= TINY) & np.isfinite(x)]
    near = mixed(rng(), (64, 64)).astype(dtype).astype(F32)
    ties = near + np.spacing(near.astype(dtype)).astype(F32) / 2
    x = np.concatenate([x, near.ravel(), ties.ravel(), np.asarray([0, -0.0, INF, -INF], F32)])
    assert_same_bits(jax.jit(lambda x: round_to(x, dtype))(x), orders.round_to(x, dtype))
    assert np.isnan(round_to(jnp.float32(NAN), dtype).astype(jnp.float32))


def half_operands(name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """a, b and c in half precision, and a * b + c with the product and the sum each rounded to it."""
    dtype = DTYPES[name]
    args = [x.astype(dtype) for x in operands()[:3]]
    a, b, c = (x.astype(F32) for x in args)
    return args, ((a * b).astype(dtype).astype(F32) + c).astype(dtype)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_round_to_survives_jit_with_excess_precision(name: str) -> None:
    args, expected = half_operands(name)

    @jax.jit
    def both_rounded(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        product = round_to(mul(a.astype(F32), b.astype(F32)), a.dtype)
        return round_to(product.astype(F32) + c.astype(F32), a.dtype)

    assert_same_bits(both_rounded(*args), expected)


def test_round_to_bfloat16_is_more_than_a_cast() -> None:
    """XLA may drop a pair of casts inside a fusion; it never drops this instruction."""
    text = jax.jit(lambda x: round_to(x, jnp.bfloat16)).lower(np.zeros(4, F32)).as_text()
    assert "reduce_precision" in text and "e8m7" in text


def test_twin_an_ordinary_rounding_is_dropped_with_excess_precision() -> None:
    args, expected = half_operands("bfloat16")
    plain = jax.jit(lambda a, b, c: ((a * b).astype(F32) + c.astype(F32)).astype(a.dtype))
    if not differing(plain(*args), expected):
        pytest.skip("XLA keeps the roundings of bfloat16 arithmetic on this machine")
