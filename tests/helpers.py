"""Bits: comparing arrays as integers, so that -0.0 and NaN count, and inputs that make a wrong order visible."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np

#: The dtypes of weights and activations, by name.
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
#: Numbers of rows on both sides of every tile boundary up to 64, and a few of them where compiling takes long.
ROW_COUNTS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65)
FEW_ROW_COUNTS = (1, 3, 8, 17, 65)

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x: Any) -> np.ndarray:
    """The bits of an array as unsigned integers of the same width."""
    array = np.ascontiguousarray(np.asarray(x))
    return array.view(_INTEGERS[array.dtype.itemsize])


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every bit of two trees of arrays is equal."""
    a, e = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(a) == len(e)
    for left, right in zip(a, e, strict=True):
        assert np.shape(left) == np.shape(right) and np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(bits(left), bits(right))


def differing(actual: Any, expected: Any) -> int:
    """How many elements of two arrays have other bits."""
    return int((bits(actual) != bits(expected)).sum())


def on_cpu(function: Callable[..., Any], *operands: Any) -> Any:
    """The bits of a reference: XLA's own divisions and roots on a GPU are not always the nearest number."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(operands, cpu)))


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Standard normal numbers."""
    return rng.standard_normal(shape).astype(dtype)


def wide(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Normal numbers with a spread of 2**-12 .. 2**12 along the last axis: sums depend on their order."""
    return (rng.standard_normal(shape) * 2.0 ** rng.uniform(-12, 12, shape[-1])).astype(dtype)


def cancelling(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Large numbers followed by their negatives plus a little: what is left over depends on the order most of all."""
    half = rng.standard_normal((*shape[:-1], shape[-1] // 2)) * 2.0**10
    rest = -half + rng.standard_normal(half.shape) * 2.0**-6
    pairs = np.stack([half, rest], axis=-1).reshape(*shape[:-1], -1)
    return pairs.astype(dtype)


def cancelling_parts(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Parts of a sum, float32 [P, ...], of which neighbours leave little: another order shows in any dtype."""
    parts = rng.standard_normal(shape) * 2.0**12
    parts[1::2] = rng.standard_normal(parts[1::2].shape) - parts[::2][: len(parts[1::2])]
    return parts.astype(np.float32)


def mixed(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Normal, wide and cancelling rows (of the first axis) in turn."""
    out = normal(rng, shape, dtype)
    out[1::3] = wide(rng, shape, dtype)[1::3]
    even = (*shape[:-1], shape[-1] + shape[-1] % 2)
    out[2::3] = cancelling(rng, even, dtype)[2::3, ..., : shape[-1]]
    return out


def assert_rows_stand_alone(
    op: Callable[[np.ndarray], Any], rows: np.ndarray, counts: Iterable[int] = ROW_COUNTS
) -> None:
    """`op` gives a row (of the first axis) the same bits in any number of rows, at any place, beside any others."""
    whole = np.asarray(op(rows))
    order = np.random.default_rng(0).permutation(len(rows))
    assert_same_bits(op(rows[order]), whole[order])
    for count in counts:
        assert_same_bits(op(rows[:count]), whole[:count])
        assert_same_bits(op(rows[-count:]), whole[-count:])


def rows_that_differ(op: Callable[[np.ndarray], Any], rows: np.ndarray, counts: Iterable[int]) -> int:
    """In how many of `counts` some row has other bits than in the whole batch."""
    whole = np.asarray(op(rows))
    return sum(differing(op(rows[:count]), whole[:count]) > 0 for count in counts)


def assert_as_accurate(
    actual: Any, plain: Any, exact: np.ndarray, *, scale: Any = 1.0, factor: float = 4.0
) -> None:
    """The largest error against float64, relative to `scale`, is at most `factor` times the plain op's."""

    def lost(y: Any) -> float:
        return float((np.abs(np.asarray(y).astype(np.float64) - exact) / scale).max())

    assert lost(actual) <= factor * lost(plain), f"{lost(actual)} against the plain op's {lost(plain)}"
