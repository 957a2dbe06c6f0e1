"""`dot_general`, `matmul` and `einsum`: the bits of a slice are its own, in every gradient too."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tbik_jax
from tbik_jax.ops import contraction, plan_product
from tbik_jax.pallas_kernels.tree_matmul import api, mosaic_gpu
from tests import orders
from tests.backward import in_float64
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    cancelling,
    differing,
    mixed,
    normal,
    rows_that_differ,
)

F32 = np.float32
ROWS = (((1,), (0,)), ((), ()))
#: lhs, rhs, dimension numbers; the first free dimension of lhs is the batch that must not enter.
PROBLEMS = {
    "matrix": ((9, 96), (96, 5), ROWS),
    "two contracted": ((9, 4, 8), (8, 6, 4), (((1, 2), (2, 0)), ((), ()))),
    "batched": ((3, 9, 40), (3, 5, 40), (((2,), (2,)), ((0,), (0,)))),
    "batch behind": ((9, 40, 3), (40, 3, 5), (((1,), (0,)), ((2,), (1,)))),
    "outer": ((9,), (5,), (((), ()), ((), ()))),
}


@pytest.mark.parametrize(
    ("k", "leaves", "padded"),
    [
        (0, 1, 16),
        (1, 1, 16),
        (16, 1, 16),
        (40, 2, 64),
        (64, 4, 64),
        (127, 4, 128),
        (128, 8, 128),
        (4096, 8, 4096),
    ],
)
def test_the_plan_is_a_function_of_the_length(k: int, leaves: int, padded: int) -> None:
    plan = plan_product(k)
    assert (plan.leaves, plan.padded) == (leaves, padded)
    assert plan_product(k, 1).leaves == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [5, 40, 127, 384])
def test_matmul_has_the_stated_order(k: int, dtype: str) -> None:
    rng = np.random.default_rng(k)
    x, w = mixed(rng, (9, k), DTYPES[dtype]), normal(rng, (k, 6), DTYPES[dtype])
    plan = plan_product(k)
    zeros = plan.padded - k
    padded = np.pad(x, ((0, 0), (0, zeros))), np.pad(w, ((0, zeros), (0, 0)))
    expected = orders.round_to(orders.matmul(*padded, plan.leaves), x.dtype)
    assert_same_bits(tbik_jax.matmul(x, w), expected)
    assert_same_bits(tbik_jax.dot_general(w, x, (((0,), (1,)), ((), ()))), expected.T)
    if plan.leaves > 1:
        assert differing(orders.round_to(orders.matmul(*padded, 1), F32), orders.matmul(*padded, plan.leaves))


def test_padding_and_cancelling_give_positive_zero() -> None:
    x = np.asarray([[-0.0, -0.0, 0.0], [1.0, -1.0, -0.0]], F32)
    out = np.asarray(tbik_jax.matmul(x, np.ones((3, 2), F32)))
    assert_same_bits(out, np.zeros((2, 2), F32))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_dot_general_is_as_accurate_as_plain_with_its_gradients(problem: str) -> None:
    left, right, dims = PROBLEMS[problem]
    rng = np.random.default_rng(0)
    operands = normal(rng, left), normal(rng, right)
    plain = functools.partial(lax.dot_general, dimension_numbers=dims)
    out, pull = jax.vjp(functools.partial(tbik_jax.dot_general, dimension_numbers=dims), *operands)
    plain_out, plain_pull = jax.vjp(plain, *operands)
    ct = normal(rng, out.shape)
    for mine, theirs, gradient in zip(pull(ct), plain_pull(ct), in_float64(plain, operands, ct), strict=True):
        assert_as_accurate(mine, theirs, gradient, scale=np.abs(gradient).max() + 1e-30, factor=8)
    np.testing.assert_allclose(out, plain_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_row_of_the_batch_stands_alone(problem: str) -> None:
    """Forward, and in the gradient of the rows."""
    left, right, dims = PROBLEMS[problem]
    rng = np.random.default_rng(1)
    where = 1 if problem == "batched" else 0
    rows = np.moveaxis(
        (mixed if len(left) > 1 else normal)(rng, (left[where], *left[:where], *left[where + 1 :])), 0, where
    )
    w = normal(rng, right)

    @jax.jit
    def gradient(batch: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x: tbik_jax.dot_general(x, w, dims), jnp.moveaxis(batch, 0, where))
        return jnp.moveaxis(pull(out)[0], where, 0)

    assert_rows_stand_alone(gradient, np.moveaxis(rows, where, 0), counts=(1, 8))


@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_products_with_batch_dimensions_are_one_kernel_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, mapped: int
) -> None:
    """Also of columns that the kernel takes only filled up to a multiple of 16, and of what `jax.vmap` makes."""
    for module in (contraction, api):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: "mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)
    product = functools.partial(tbik_jax.dot_general, dimension_numbers=PROBLEMS["batched"][2])
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 9, 128), (3, 5, 128))]
    if mapped == 1:
        product = jax.vmap(
            functools.partial(tbik_jax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
        )
    if mapped == 2:  # of products that are several already, also where an operand is the same for all
        product = jax.vmap(product, in_axes=(0, None))
        shapes[0] = jax.ShapeDtypeStruct((4, *shapes[0].shape), jnp.bfloat16)
    jax.clear_caches()  # of another backend
    text = jax.jit(lambda x, w: product(x, w)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    jax.clear_caches()
    assert text.count("mosaic_gpu_v2") == 1 and not re.search(r"stablehlo\.(while|dot)", text)


def test_vmap_of_no_products() -> None:
    left, right, dims = PROBLEMS["batched"]
    mapped = jax.vmap(functools.partial(tbik_jax.dot_general, dimension_numbers=dims))
    assert mapped(np.zeros((0, *left), F32), np.zeros((0, *right), F32)).shape == (0, 3, 9, 5)


@pytest.mark.parametrize("axes", [(0, 0), (1, None), (None, 2)])
def test_vmap_of_products_with_batch_dimensions(axes: tuple[int | None, int | None]) -> None:
    left, right, dims = PROBLEMS["batched"]
    rng = np.random.default_rng(8)
    x, w = (
        normal(rng, shape if axis is None else np.insert(shape, axis, 2))
        for shape, axis in zip((left, right), axes, strict=True)
    )
    out = jax.vmap(lambda x, w: tbik_jax.dot_general(x, w, dims), in_axes=axes)(x, w)
    for i in range(2):
        one = (a if axis is None else np.take(a, i, axis) for a, axis in zip((x, w), axes, strict=True))
        assert_same_bits(out[i], tbik_jax.dot_general(*one, dims))


def test_the_same_cut_finds_plain_dots_that_differ() -> None:
    rng = np.random.default_rng(2)
    x, w = mixed(rng, (65, 4096)), normal(rng, (4096, 24))
    assert rows_that_differ(jax.jit(lambda x: jnp.dot(x, w)), x, FEW_ROW_COUNTS) > 0
    assert rows_that_differ(lambda x: tbik_jax.matmul(x, w), x, FEW_ROW_COUNTS) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_contractions_of_the_same_order(dtype: str) -> None:
    rng = np.random.default_rng(3)
    x, w, dy = (normal(rng, shape, DTYPES[dtype]) for shape in ((40, 128), (128, 48), (40, 48)))
    bias = normal(rng, (48,), DTYPES[dtype])
    out, pull = jax.vjp(lambda *a: tbik_jax.matmul(*a), x, w, bias)
    dx, dw, dbias = pull(dy)
    assert_same_bits(dx, tbik_jax.matmul(dy, w.T))
    assert_same_bits(dw, tbik_jax.matmul(np.ascontiguousarray(x.T), dy))
    assert_same_bits(dbias, orders.round_to(orders.tree_sum(dy.astype(F32).T), dy.dtype))
    total = orders.matmul(x, w, 8) + bias.astype(F32)
    assert_same_bits(out, orders.round_to(total, x.dtype))


def test_vmap_and_jit_change_no_bit() -> None:
    rng = np.random.default_rng(4)
    x, w = mixed(rng, (4, 7, 48)), normal(rng, (4, 48, 5))
    whole = tbik_jax.matmul(x, w)
    assert_same_bits(jax.vmap(tbik_jax.matmul)(x, w), whole)
    assert_same_bits(jax.jit(tbik_jax.matmul)(x, w), whole)
    assert_same_bits(jnp.stack([tbik_jax.matmul(a, b) for a, b in zip(x, w, strict=True)]), whole)
    assert_same_bits(jax.vmap(lambda a: tbik_jax.matmul(a, w[0]))(x), tbik_jax.matmul(x, w[0]))
    assert_same_bits(jax.vmap(lambda b: tbik_jax.matmul(x[0], b))(w), tbik_jax.matmul(x[0][None], w))

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return tbik_jax.sum(tbik_jax.matmul(a, b))

    each = jax.vmap(jax.grad(loss, argnums=(0, 1)))(x, w)
    assert_same_bits([g[2] for g in each], list(jax.grad(loss, argnums=(0, 1))(x[2], w[2])))


def test_second_derivatives_are_covered_and_forward_mode_raises() -> None:
    x = normal(np.random.default_rng(5), (3, 4))

    def loss(x: jax.Array) -> jax.Array:
        return tbik_jax.sum(tbik_jax.matmul(x, tbik_jax.matmul(x.T, x)))

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(x @ (x.T @ x))

    mine = jax.jit(jax.jacrev(jax.grad(loss)))(x)
    np.testing.assert_allclose(mine, jax.jacrev(jax.grad(plain))(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (x,), (x,))


def test_preferred_element_type_and_mixed_dtypes() -> None:
    rng = np.random.default_rng(6)
    x, w = normal(rng, (3, 128), DTYPES["bfloat16"]), normal(rng, (128, 4))
    wide = tbik_jax.dot_general(x, w, ROWS)
    assert wide.dtype == jnp.float32
    assert_same_bits(wide, tbik_jax.matmul(x.astype(F32), w))
    half = w.astype(x.dtype)
    kept = tbik_jax.dot_general(x, half, ROWS, lax.Precision.HIGHEST, jnp.float32)
    assert_same_bits(kept, orders.matmul(x, half, 8))
    out, pull = jax.vjp(lambda a: tbik_jax.dot_general(a, w, ROWS), x)
    assert pull(jnp.ones_like(out))[0].dtype == x.dtype


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_out_sharding_moves_bits_alone(kind: str) -> None:
    rng = np.random.default_rng(7)
    x, w = mixed(rng, (8, 256)), normal(rng, (256, 16))
    whole = tbik_jax.matmul(x, w)
    types = (AxisType.Auto if kind == "auto" else AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("tp",), axis_types=types)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, "tp")
        cut = (
            jax.device_put(x, NamedSharding(mesh, spec)),
            jax.device_put(w, NamedSharding(mesh, PartitionSpec("tp"))),
        )
        out = jax.jit(lambda a, b: tbik_jax.dot_general(a, b, ROWS, out_sharding=spec))(*cut)
    assert out.sharding.spec == spec
    assert_same_bits(out, whole)


EINSUMS = {
    "ij,jk->ik": ((5, 40), (40, 6)),
    "bthd,bshd->bhts": ((2, 5, 3, 16), (2, 7, 3, 16)),
    "ij,jk,kl->il": ((5, 8), (8, 9), (9, 4)),
    "ij->i": ((5, 40),),
    "ij->ji": ((5, 4),),
    "ij,kj->": ((5, 40), (3, 40)),
    "...i,ij->...j": ((2, 5, 40), (40, 3)),
    "ab,b->a": ((5, 4), (1,)),
    "ij,k": ((2, 3), (4,)),
}


@pytest.mark.parametrize("subscripts", EINSUMS)
def test_einsum_is_jnp_einsum(subscripts: str) -> None:
    rng = np.random.default_rng(8)
    operands = tuple(normal(rng, shape) for shape in EINSUMS[subscripts])
    mine, pull = jax.vjp(functools.partial(tbik_jax.einsum, subscripts), *operands)
    plain, plain_pull = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    ct = normal(rng, plain.shape)
    for a, b in zip((mine, *pull(ct)), (plain, *plain_pull(ct)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_einsum_meets_from_left_to_right() -> None:
    """`jnp.einsum` takes another path when the batch grows; a row has its bits in every batch here."""
    rng = np.random.default_rng(9)
    x, a, b = cancelling(rng, (64, 48)), normal(rng, (48, 40)), normal(rng, (40, 6))
    op = functools.partial(tbik_jax.einsum, "ij,jk,kl->il")
    assert_rows_stand_alone(lambda x: op(x, a, b), x, counts=(1, 7, 64))
    one = tbik_jax.matmul(tbik_jax.matmul(x, a), b)
    assert_same_bits(op(x, a, b), one)
    assert differing(tbik_jax.matmul(x, tbik_jax.matmul(a, b)), one) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: tbik_jax.matmul(x, x), "takes x"),
        (lambda x: tbik_jax.matmul(x, x.T, np.ones(3, F32)), "bias"),
        (lambda x: tbik_jax.matmul(x, x.T, leaves=3), "leaves=3"),
        (lambda x: tbik_jax.matmul(x.astype(np.int32), x.T), "int32"),
        (lambda x: tbik_jax.dot_general(x, x.T, ROWS, "fast"), "fast"),
        (lambda x: tbik_jax.dot_general(x, x.T, ROWS, lax.DotAlgorithmPreset.F16_F16_F16), "F16"),
        (lambda x: tbik_jax.dot_general(x, x.T, ROWS, None, jnp.int32), "int32"),
        (lambda x: tbik_jax.einsum("ii,ij->j", x[:2, :2], x), "twice"),
        (lambda x: tbik_jax.einsum("ij,jk->ik", x, x), "sizes"),
    ],
)
def test_what_is_not_covered_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 4), F32))
