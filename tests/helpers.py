"""Bits: comparing arrays as integers, so that -0.0 and NaN count, and inputs that make a wrong order visible."""

from typing import Any

import jax
import numpy as np

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
