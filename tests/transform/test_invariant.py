"""`invariant` and `report`: models of Flax alone and in a batch, on several ranks, control flow, and what raises."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import tbik_jax
from tbik_jax import Rule
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

F32 = np.float32


def call(model: Any, x: jax.Array) -> jax.Array:
    return model(x)


def test_the_gradient_of_flax_layers_gives_a_row_its_bits_in_every_batch() -> None:
    """The input's gradient through Linear, gelu and LayerNorm; plain, every row differs. `jax.vmap` changes nothing."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 128, rngs=rngs),
        jax.nn.gelu,
        nnx.LayerNorm(128, rngs=rngs),
        nnx.Linear(128, 32, rngs=rngs),
    )
    x = normal(np.random.default_rng(5), (9, 64))
    gradient = jax.grad(lambda model, x: (model(x) ** 2).sum(), argnums=1)
    mine, plain = jax.jit(tbik_jax.invariant(gradient)), jax.jit(gradient)
    whole = mine(model, x)
    assert_same_bits(mine(model, x[4:5]), whole[4:5])
    assert differing(plain(model, x[4:5]), plain(model, x)[4:5]) > 0
    rows = jax.jit(jax.vmap(tbik_jax.invariant(lambda row: model(row[None])[0])))(x)
    assert_same_bits(rows, jax.jit(tbik_jax.invariant(call))(model, x))


def test_products_and_sums_have_the_order_of_the_ops() -> None:
    rng = np.random.default_rng(1)
    x, w = mixed(rng, (6, 256)), normal(rng, (256, 16))
    assert_same_bits(tbik_jax.invariant(lambda x, w: x @ w)(x, w), orders.matmul(x, w, 8))
    one = [Rule(pattern="dot_general", leaves=1)]
    assert_same_bits(tbik_jax.invariant(lambda x, w: x @ w, one)(x, w), orders.matmul(x, w, 1))
    assert_same_bits(tbik_jax.invariant(lambda x: x.sum(-1))(x), orders.tree_sum(x))
    assert differing(orders.matmul(x, w, 1), orders.matmul(x, w, 8)) > 0


def loss(x: jax.Array, w: jax.Array) -> jax.Array:
    """jit, scan, remat, custom_jvp, cond and while."""

    def layer(c: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.checkpoint(lambda c: jax.nn.gelu(c @ w) / 3)(c), c.sum()

    c, sums = lax.scan(layer, x, w)
    c = lax.cond(sums[0] > 1e6, lambda c: c * 2, lambda c: jax.nn.relu(c) + c, c)
    steps = lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, lax.stop_gradient(c.sum()))
    )
    return (
        jax.nn.logsumexp(c)
        + jax.nn.log_softmax(c).mean()
        + jax.nn.silu(c).var()
        + lax.stop_gradient(steps[1])
    )


def test_control_flow_and_gradients_are_walked_through() -> None:
    rng = np.random.default_rng(2)
    x, w = normal(rng, (6, 32)), normal(rng, (3, 32, 32))

    np.testing.assert_allclose(jax.jit(tbik_jax.invariant(loss))(x, w), jax.jit(loss)(x, w), rtol=1e-5)

    def without_while(x: jax.Array, w: jax.Array) -> jax.Array:
        c, sums = lax.scan(lambda c, w: (jax.checkpoint(lambda c: jax.nn.gelu(c @ w) / 3)(c), c.sum()), x, w)
        return jax.nn.logsumexp(c) + jax.nn.log_softmax(c).mean() + jax.nn.silu(c).var() + sums.mean()

    gradient = jax.grad(without_while, argnums=(0, 1))
    mine = jax.jit(tbik_jax.invariant(gradient))(x, w)
    for a, b in zip(mine, jax.jit(gradient)(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    entries = tbik_jax.report(gradient, x, w)
    assert not entries.of("uncovered") and len(entries.of("replaced")) > 20
    with pytest.raises(ValueError, match=r"invariant\(jax.grad\(fn\)\)"):
        jax.eval_shape(jax.grad(tbik_jax.invariant(without_while)), x, w)


@pytest.mark.parametrize(
    "function",
    [lambda x: -x, jnp.exp, jnp.sort, lambda x: jnp.sin(-x).sum()],
    ids=["-x", "exp", "sort", "sum"],
)
def test_a_gradient_of_invariant_is_refused_whatever_is_in_it(function: Callable[..., Any]) -> None:
    """Steps that read bits have no derivative, which must not come out as zeros."""
    x = jnp.arange(4.0)
    mine = tbik_jax.invariant(function)
    with pytest.raises(ValueError, match=r"invariant\(jax.grad\(fn\)\)"):
        jax.grad(lambda x: mine(x).sum())(x)
    with pytest.raises(ValueError, match=r"invariant\(jax.grad\(fn\)\)"):  # of what it closes over
        jax.grad(lambda x: tbik_jax.invariant(lambda y: function(x) + y)(1.0).sum())(x)
    # Of what does not follow the argument there is none to refuse, nor of numbers that are no floats.
    np.testing.assert_array_equal(jax.grad(lambda z: z * mine(x).sum())(2.0), np.asarray(mine(x)).sum())
    first = tbik_jax.invariant(lambda x: jnp.argmax(function(x)))
    np.testing.assert_array_equal(jax.grad(lambda x: x[first(x)] * 2)(x).sum(), 2)


@pytest.mark.parametrize("constant", [np.asarray([1.0, -2.0]), np.asarray([1.0, -2.0], np.float32)])
def test_a_numpy_array_may_be_mapped_inside_jit(constant: np.ndarray) -> None:
    mapped = jax.jit(lambda: jax.vmap(tbik_jax.invariant(lambda x: -x * 2))(constant))
    np.testing.assert_array_equal(mapped(), -constant * 2)


def recurrent(x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, row: (jnp.sin(h + row), h.sum()), jnp.zeros(x.shape[1]), x)[1]


def either(x: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)


REMATERIALISED = {
    "scan": recurrent,
    "cond": either,
    "jit": jax.jit(lambda x: jnp.tanh(x @ x.T)),
    "softmax": jax.nn.softmax,
    "while": lambda x: lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x),
}


@pytest.mark.parametrize("name", REMATERIALISED)
def test_gradients_of_what_is_computed_again(name: str) -> None:
    x = normal(np.random.default_rng(9), (24, 5))

    def gradient(remat: Any) -> Any:
        return jax.grad(lambda x: jnp.square(remat(REMATERIALISED[name])(x)).sum())

    again = jax.jit(tbik_jax.invariant(gradient(jax.checkpoint)))(x)
    assert_same_bits(again, jax.jit(tbik_jax.invariant(gradient(lambda f: f)))(x))
    np.testing.assert_allclose(again, jax.jit(gradient(jax.checkpoint))(x), rtol=1e-4, atol=1e-5)
    dots = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    assert_same_bits(jax.jit(tbik_jax.invariant(gradient(dots)))(x), again)


@pytest.mark.parametrize("vma", [True, False])
def test_a_psum_of_a_product_is_one_tree(vma: bool) -> None:
    rng = np.random.default_rng(3)
    x, w = mixed(rng, (6, 256), DTYPES["bfloat16"]), normal(rng, (256, 24), DTYPES["bfloat16"])
    alone = tbik_jax.invariant(lambda x, w: x @ w)(x, w)
    specs = PartitionSpec(None, "tp"), PartitionSpec("tp", None)
    plain = []
    for ranks in (2, 4):
        mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("tp",))
        mapped = jax.shard_map(
            lambda x, w: lax.psum(x @ w, "tp"),
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=vma,
        )
        assert_same_bits(jax.jit(tbik_jax.invariant(mapped))(x, w), alone)
        plain.append(np.asarray(jax.jit(mapped)(x, w)))
    assert differing(*plain) > 0


def test_the_report_says_what_where_and_why() -> None:
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    unused = Rule(pattern="no such layer")

    def fn(x: jax.Array) -> jax.Array:
        return lax.fft(jnp.maximum(x @ x.T, 0).sum(-1), "RFFT", (4,)).real

    found = tbik_jax.report(fn, x, rules=[unused])
    assert [e.primitive for e in found.of("uncovered")] == ["fft"]
    assert {e.primitive for e in found.of("replaced")} == {"dot_general", "reduce_sum"}
    assert {e.primitive for e in found.of("exact")} >= {"transpose", "max"}
    assert all("test_invariant.py" in e.source for e in found.entries)
    assert found.unused_rules == (unused,) and "unused rule" in str(found) and "fft" in str(found)
    with pytest.raises(ValueError, match=r"fft at .*test_invariant.py"):
        tbik_jax.invariant(fn)(np.ones((4, 32), F32))
    left = Rule(pattern="fft", exclude=True)
    assert [e.primitive for e in tbik_jax.report(fn, x, rules=[left]).of("excluded")] == ["fft"]
    assert_same_bits(tbik_jax.invariant(fn, [left])(np.ones((4, 32), F32)), np.asarray([512, 0, 0], F32))
    with pytest.warns(UserWarning, match="no such layer"):
        tbik_jax.invariant(lambda x: x + x, [unused])(np.ones(3, F32))


def test_a_bfloat16_rounding_is_kept() -> None:
    """jit may elide the rounding between two casts; the transform makes it a `reduce_precision`."""
    x = normal(np.random.default_rng(4), (64,))
    rounded = jax.jit(tbik_jax.invariant(lambda x: (x * 3).astype(jnp.bfloat16).astype(jnp.float32)))
    assert_same_bits(rounded(x), (x * F32(3)).astype(DTYPES["bfloat16"]).astype(F32))
    assert differing(rounded(x), x * F32(3)) > 0


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jnp.linalg.cholesky(jnp.outer(x, x)), "cholesky"),
        (lambda x: lax.ragged_dot(x[None], x[None, :, None], jnp.ones(1, int)), "one dot_general a group"),
        (lambda x: x.at[jnp.asarray([0, 0])].apply(jnp.exp), "applies a function"),
        (lambda x: x.astype(jnp.complex64) * 2, "complex64"),
        (lambda x: jnp.abs(lax.complex(x, x)), "abs at"),
        (lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "pure_callback"),
    ],
)
def test_what_is_not_covered_raises(fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tbik_jax.invariant(fn)(jnp.ones(4))


@pytest.mark.parametrize("op", [tbik_jax.matmul, tbik_jax.layer_norm])
def test_the_ops_are_what_they_become(op: Any) -> None:
    """A function that has the ops already keeps their bits."""
    rng = np.random.default_rng(6)
    args = mixed(rng, (6, 64)), normal(rng, (64, 16) if op is tbik_jax.matmul else (64,))
    assert_same_bits(jax.jit(tbik_jax.invariant(op))(*args), op(*args))
