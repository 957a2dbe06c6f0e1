"""tree_matmul: accurate, in the stated order, a row's bits its own, and complete subtrees for the ranks of a mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.pallas_kernels.tree_matmul.api import tree_matmul
from tests import orders
from tests.helpers import (
    DTYPES,
    FEW_ROW_COUNTS,
    ROW_COUNTS,
    assert_as_accurate,
    assert_rows_stand_alone,
    assert_same_bits,
    cancelling,
    differing,
    mixed,
    normal,
    rows_that_differ,
    wide,
)

F32 = np.float32
matmul = jax.jit(tree_matmul, static_argnames=("leaves", "out_dtype", "transpose_rhs", "backend"))
plain = jax.jit(partial(jnp.dot, preferred_element_type=F32))


def operands(dtype: Any, m: int = 70, k: int = 256, n: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """x [m, k] with rows of every kind, and w [k, n] whose columns are wide in k."""
    rng = np.random.default_rng(0)
    return mixed(rng, (m, k), dtype), np.ascontiguousarray(mixed(rng, (n, k), dtype).T)


# --- numerics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [normal, wide, cancelling])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_as_accurate_as_dot(name: str, kind) -> None:
    rng = np.random.default_rng(0)
    x, w = kind(rng, (70, 256), DTYPES[name]), normal(rng, (256, 48), DTYPES[name])
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    scale = np.abs(wide_x) @ np.abs(wide_w)
    exact = wide_x @ wide_w
    assert_as_accurate(matmul(x, w, out_dtype=F32), plain(x, w), exact, scale=scale)
    assert_as_accurate(matmul(x, w), plain(x, w).astype(x.dtype), exact, scale=scale, factor=1.01)


# --- the order of the adds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_stated_order(name: str, leaves: int) -> None:
    x, w = operands(DTYPES[name])
    expected = orders.matmul(x, w, leaves)
    assert_same_bits(matmul(x, w, leaves=leaves, out_dtype=F32), expected)
    assert_same_bits(matmul(x, w, leaves=leaves), orders.round_to(expected, x.dtype))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    m=st.integers(1, 70),
    leaf=st.integers(1, 3),
    n=st.integers(1, 40),
    leaves=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(sorted(DTYPES)),
    transpose=st.booleans(),
)
def test_it_has_the_stated_order_for_any_shape(
    m: int, leaf: int, n: int, leaves: int, name: str, transpose: bool
) -> None:
    x, w = operands(DTYPES[name], m, 16 * leaf * leaves, n)
    out = matmul(x, w.T if transpose else w, leaves=leaves, out_dtype=F32, transpose_rhs=transpose)
    assert_same_bits(out, orders.matmul(x, w, leaves))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("name", DTYPES)
def test_the_sum_is_rounded_to_the_output_type_once(name: str, out: str) -> None:
    x, w = operands(DTYPES[name], 8)
    expected = orders.round_to(orders.matmul(x, w, 8), DTYPES[out])
    assert_same_bits(matmul(x, w, out_dtype=DTYPES[out]), expected)


@pytest.mark.parametrize("leaf", [16, 32])
@pytest.mark.parametrize("leaves", [1, 8])
def test_a_leaf_starts_from_plus_zero(leaf: int, leaves: int) -> None:
    """A sum of negative zeros is +0.0; a loop of one iteration gives XLA a chance to drop the start."""
    x, w = np.zeros((3, leaf * leaves), F32), np.full((leaf * leaves, 16), -1, F32)
    assert not np.signbit(matmul(x, w, leaves=leaves)).any()


def test_infinity_and_nan_go_through() -> None:
    x, w = np.ones((4, 128), F32), np.ones((128, 16), F32)
    x[1, 3], x[2, 3], x[2, 100], x[3, 5] = np.inf, np.inf, -np.inf, np.nan
    out = np.asarray(matmul(x, w))[:, 0]
    np.testing.assert_array_equal(out, np.asarray([128, np.inf, np.nan, np.nan], F32))


# --- a row's bits are its own ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_batch(name: str) -> None:
    x, w = operands(DTYPES[name], k=128)
    counts = ROW_COUNTS if name == "float32" else FEW_ROW_COUNTS
    assert_rows_stand_alone(lambda rows: matmul(rows, w), x, counts)


def test_bits_of_a_column_do_not_depend_on_the_others() -> None:
    x, w = operands(F32, m=5, k=128, n=70)
    whole = np.asarray(matmul(x, w))
    for n in FEW_ROW_COUNTS:
        assert_same_bits(matmul(x, w[:, -n:]), whole[:, -n:])


def test_leading_dimensions_change_nothing() -> None:
    x, w = operands(DTYPES["bfloat16"], m=24)
    whole = np.asarray(matmul(x, w))
    assert_same_bits(matmul(x.reshape(2, 3, 4, 256), w), whole.reshape(2, 3, 4, 48))
    assert_same_bits(matmul(x[5], w), whole[5])
    assert matmul(np.zeros((3, 0, 256), F32), np.zeros((256, 48), F32)).shape == (3, 0, 48)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_several_products_are_each_the_one_alone(name: str, transpose_rhs: bool) -> None:
    x, w = operands(DTYPES[name], m=18, k=128, n=3 * 48)
    x, w = x.reshape(3, 6, 128), np.moveaxis(w.reshape(128, 3, 48), 1, 0)
    w = np.ascontiguousarray(np.swapaxes(w, 1, 2)) if transpose_rhs else w
    out = np.asarray(matmul(x.reshape(3, 2, 3, 128), w, transpose_rhs=transpose_rhs))
    for i in range(3):
        assert_same_bits(out[i].reshape(6, 48), matmul(x[i], w[i], transpose_rhs=transpose_rhs))
    assert matmul(np.zeros((3, 0, 128), F32), np.zeros((3, 128, 48), F32)).shape == (3, 0, 48)
    assert matmul(np.zeros((0, 5, 128), F32), np.zeros((0, 128, 48), F32)).shape == (0, 5, 48)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_do_not_depend_on_jit_or_on_what_stands_around(name: str) -> None:
    x, w = operands(DTYPES[name], m=7)
    expected = matmul(x, w)

    @jax.jit
    def surrounded(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = tree_matmul(x * 1, jnp.abs(w) * jnp.sign(w))
        return out, jnp.tanh(out.astype(F32)) + 1

    assert_same_bits(tree_matmul(x, w), expected)
    assert_same_bits(surrounded(x, w)[0], expected)
    scanned = jax.jit(lambda x: jax.lax.map(lambda row: tree_matmul(row, w), x))
    assert_same_bits(scanned(x), expected)


# --- the ranks of a mesh -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_computes_a_complete_subtree(name: str, ranks: int) -> None:
    x, w = operands(DTYPES[name], m=9)
    pairs = zip(np.split(x, ranks, axis=1), np.split(w, ranks, axis=0), strict=True)
    parts = [np.asarray(matmul(xr, wr, leaves=8 // ranks, out_dtype=F32)) for xr, wr in pairs]
    assert_same_bits(orders.tree_join(parts), matmul(x, w, out_dtype=F32))


# --- twins: these checks can fail --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_twin_another_number_of_leaves_has_other_bits(name: str) -> None:
    x, w = operands(DTYPES[name])
    outs = [matmul(x, w, leaves=leaves, out_dtype=F32) for leaves in (1, 2, 4, 8)]
    assert all(differing(a, b) for i, a in enumerate(outs) for b in outs[:i])


def test_twin_dot_has_another_order() -> None:
    x, w = operands(F32)
    assert all(differing(plain(x, w), orders.matmul(x, w, leaves)) for leaves in (1, 2, 4, 8))


def test_twin_dot_changes_a_row_with_the_batch() -> None:
    x, w = operands(F32, k=512, n=256)
    if not rows_that_differ(lambda rows: plain(rows, w), x, ROW_COUNTS):
        pytest.skip("jnp.dot of this XLA gives a row the same bits in every batch of 1 to 70 rows")


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "w", "change", "message"),
    [
        ((4, 200), (200, 16), {}, "k=200 .* multiple of 128 .the next is 256."),
        ((4, 256), (256, 16), {"leaves": 3}, "leaves=3"),
        ((4, 256), (128, 16), {}, r"x has K=256 and w \[K, N\] has K=128"),
        ((4, 256), (256, 16), {"transpose_rhs": True}, r"x has K=256 and w \[N, K\] has K=16"),
        ((), (256, 16), {}, r"not shapes \(\) and"),
        (
            (4, 256),
            (2, 256, 16),
            {},
            r"x \[B, ..., K\] to w \[B, K, N\], not shapes \(4, 256\) and \(2, 256, 16\)",
        ),
        ((256,), (2, 256, 16), {}, r"not shapes \(256,\) and \(2, 256, 16\)"),
        ((4, 256), (1, 4, 256, 16), {}, r"not shapes \(4, 256\) and \(1, 4, 256, 16\)"),
        ((4, 256), (4, 4, 16), {"transpose_lhs": True}, r"takes matrices x \[K, M\] and w"),
        ((4, 256), (256, 16), {"out_dtype": "int32"}, "out_dtype=int32 is not supported"),
        ((4, 256), (256, 16), {"out_dtype": "float64"}, "out_dtype=float64 is not supported"),
        ((4, 256), (256, 16), {"backend": "cublas"}, "backend='cublas' is unknown"),
    ],
)
def test_it_refuses(x: tuple[int, ...], w: tuple[int, ...], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_matmul(np.zeros(x, F32), np.zeros(w, F32), **change)


@pytest.mark.parametrize(
    ("x", "w"), [("bfloat16", "float32"), ("int32", "int32"), ("float8_e4m3fn", "float8_e4m3fn")]
)
def test_it_refuses_other_dtypes(x: str, w: str) -> None:
    with pytest.raises(ValueError, match=f"x is {x} and w is {w}; both must be one of bfloat16"):
        tree_matmul(jnp.zeros((4, 256), x), jnp.zeros((256, 16), w))
