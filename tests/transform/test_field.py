"""What strangers' functions hold: hidden jaxprs, narrow indices, batched loops, keys, scopes of rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh

from tbik_jax import Rule, invariant, report
from tests.helpers import assert_same_bits, differing

X = jnp.asarray(np.random.default_rng(0).standard_normal((9, 256)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).standard_normal((256, 32)), jnp.float32)


def of_bits(bits):
    """A float product behind an integer signature."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(bits, jnp.float32) @ W, jnp.int32)


BITS = lax.bitcast_convert_type(X, jnp.int32)


def test_a_float_computation_inside_of_an_integer_one_is_seen():
    whole = lax.composite(of_bits, "field.product")
    out = jax.jit(invariant(whole))(BITS)
    assert_same_bits(jax.jit(invariant(whole))(BITS[2:3]), out[2:3])
    assert_same_bits(out, jax.jit(invariant(of_bits))(BITS))
    assert [e.primitive for e in report(whole, BITS).of("replaced")] == ["dot_general"]


def test_what_is_computed_elsewhere_is_refused():
    elsewhere = compute_on(of_bits, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
    with pytest.raises(ValueError, match="compute_on at "):
        invariant(elsewhere)(BITS)
    assert [e.primitive for e in report(elsewhere, BITS).of("uncovered")] == ["compute_on"]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
def test_the_gradient_of_a_lookup_takes_narrow_indices(dtype):
    table = jnp.asarray(np.random.default_rng(2).standard_normal((1000, 8)), jnp.float32)
    ids = jnp.asarray([3, 100, 3, 127, 0, 100], dtype)

    def loss(table):
        return jnp.sum(jnp.take(table, ids, axis=0) ** 2)

    expected = jax.grad(loss)(table)
    assert np.allclose(invariant(jax.grad(loss))(table), expected, rtol=1e-6)
    assert differing(expected, jnp.zeros_like(expected))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_a_scatter_takes_narrow_indices(dtype):
    dnums = lax.ScatterDimensionNumbers((), (0,), (0,))
    place = functools.partial(lax.scatter_add, dimension_numbers=dnums)
    operand, at = jnp.zeros(300), jnp.asarray([[5], [120], [5]], dtype)
    updates = jnp.asarray([1.0, 2.0, 3.0])
    out = invariant(place)(operand, at, updates)
    assert_same_bits(out, place(operand, at, updates))
    assert out[5] == 4 and out[120] == 2


def test_each_row_of_a_loop_under_vmap_ends_by_itself():
    def halve(row):
        def running(state):
            return jnp.sum(state[0] ** 2) > 1

        return lax.while_loop(running, lambda state: (state[0] * 0.5, state[1] + 1), (row, 0))

    rows = X * jnp.exp2(jnp.arange(9.0))[:, None]
    out, counts = invariant(jax.vmap(halve))(rows)
    assert len(set(np.asarray(counts).tolist())) > 4
    for i in (0, 8):
        alone, count = invariant(jax.vmap(halve))(rows[i : i + 1])
        assert_same_bits((alone, count), (out[i : i + 1], counts[i : i + 1]))
    assert_same_bits(counts, jax.vmap(halve)(rows)[1])


def test_keys_are_arguments_and_constants():
    key = jax.random.key(3)

    def noisy(x, key):
        return x + jax.random.normal(key, x.shape)

    expected = invariant(jax.jit(noisy))(X, key)
    assert_same_bits(invariant(noisy)(X, key), expected)
    assert_same_bits(jax.jit(invariant(lambda x: noisy(x, key)))(X), expected)


def test_keys_that_follow_the_batch_are_refused():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    with pytest.raises(ValueError, match=r"random_bits .*other numbers in a batch; use threefry"):
        invariant(jax.vmap(lambda key: jax.random.uniform(key, (3,))))(keys)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_constants_convert_as_arguments_do(dtype):
    constant = np.asarray([np.nan, 3e9, -3e9, 300, -1], np.float32)
    expected = jnp.asarray(constant).astype(dtype)
    converted = jax.jit(invariant(lambda x: lax.convert_element_type(jnp.asarray(constant), dtype) + x))
    assert_same_bits(converted(jnp.zeros(5, dtype)), expected)
    assert_same_bits(jax.jit(invariant(lambda x: x.astype(dtype)))(constant), expected)


def encoder(x, w):
    with jax.named_scope("Encoder"):
        x = jax.jit(lambda x: x @ w)(x)
        return lax.scan(lambda carry, row: (carry, row @ w), 0, x @ jnp.ones((32, 256)))[1]


def test_a_rule_reaches_into_what_its_scope_calls():
    rule = Rule(pattern="*Encoder*", exclude=True)
    out = report(encoder, X, W, rules=[rule])
    products = [e.kind for e in out.entries if e.primitive == "dot_general"]
    assert products == ["excluded"] * 3 and out.unused_rules == ()
    assert report(encoder, X, W, rules=[Rule(pattern="*Decoder*", exclude=True)]).unused_rules


@pytest.mark.parametrize(
    "rule",
    [
        Rule(pattern="transpose", leaves=1),
        Rule(pattern="reduce_sum", leaves=1),
        Rule(pattern="abs", exclude=True),
    ],
    ids=str,
)
def test_a_rule_that_does_nothing_is_unused(rule):
    def fn(x):
        return jnp.sum(x.T) + -jnp.max(x)

    assert report(fn, X, rules=[rule]).unused_rules == (rule,)
    used = Rule(pattern="reduce_sum", exclude=True)
    assert report(fn, X, rules=[used]).unused_rules == ()


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: lax.dot_general(x.astype(jnp.int8), W, (((1,), (0,)), ((), ()))),
        lambda x: lax.dot_general(
            x.astype(jnp.int8),
            W.astype(jnp.int8),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ),
        lambda x: lax.dot_general(
            x, W, (((1,), (0,)), ((), ())), precision=lax.DotAlgorithmPreset.F16_F16_F16
        ),
    ],
    ids=["int8 and float32", "int8 to float32", "float16 products"],
)
def test_a_report_does_not_raise_and_a_call_names_the_line(fn):
    [entry] = report(fn, X).of("uncovered")
    assert entry.primitive == "dot_general" and entry.reason
    with pytest.raises(ValueError, match=r"dot_general at .*test_field.py"):
        invariant(fn)(X)


def test_comparisons_in_total_order_are_exact():
    grid = jnp.linspace(-2.0, 2.0, 33)
    out = invariant(jnp.searchsorted)(grid, X)
    assert_same_bits(out, jnp.searchsorted(grid, X))


def test_sums_whose_bits_follow_the_ranks_say_so():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    spec = jax.P

    def mapped(fn, in_specs, out_specs):
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    scattered = mapped(
        lambda x, w: lax.psum_scatter(x @ w, "a", tiled=True), (spec(None, "a"), spec("a")), spec("a")
    )
    [entry] = [e for e in report(scattered, X[:8], W).entries if e.primitive == "reduce_scatter"]
    assert entry.reason == "other bits for another number of ranks"
    swapped = mapped(
        lambda x, w: lax.psum(x @ w, ("b", "a")), (spec(None, ("a", "b")), spec(("a", "b"))), spec()
    )
    [entry] = [e for e in report(swapped, X, W).entries if e.primitive.startswith("psum")]
    assert "in this order" in entry.reason
    one = mapped(lambda x, w: lax.psum(x @ w, "a"), (spec(None, "a"), spec("a")), spec())
    [entry] = [e for e in report(one, X, W).entries if e.primitive.startswith("psum")]
    assert entry.reason == ""


def test_nothing_is_scattered_into_nothing():
    def fn(x):
        return x[:, :0].at[jnp.asarray([0, 0])].add(1.0)

    assert invariant(fn)(X).shape == (9, 0)
