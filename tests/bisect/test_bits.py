"""Distances in ulps, and fingerprints of rows: the same on host and device, other ones for one bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tbik_jax.bisect.bits import bits_of, largest_ulp, partial_fingerprints, row_fingerprints
from tests.helpers import DTYPES, normal

F32 = np.float32


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_step_is_from_a_number_to_the_next(dtype):
    info = ml_dtypes.finfo(dtype)
    one = np.asarray([1], dtype)
    assert largest_ulp(one, one + np.asarray([info.eps], dtype)) == 1
    zero, tiny = np.asarray([0.0], dtype), np.asarray([info.smallest_subnormal], dtype)
    assert largest_ulp(zero, -zero) == 1 and largest_ulp(zero, tiny) == 1 and largest_ulp(-tiny, tiny) == 3
    infinite = np.asarray([np.inf], dtype)
    assert largest_ulp(np.asarray([info.max], dtype), infinite) == 1
    assert largest_ulp(infinite, infinite) == 0


def test_pairs_with_a_nan_have_no_distance():
    a, b = np.asarray([1, np.nan, 2], F32), np.asarray([1, 5, np.nan], F32)
    assert largest_ulp(a, b) == 0 and largest_ulp(a[1:], b[1:]) is None


def test_integers_are_as_far_apart_as_their_difference():
    a, b = (np.asarray([x], np.int32) for x in (-(2**31), 2**31 - 1))
    assert largest_ulp(a, b) == 2**32 - 1
    assert largest_ulp(np.asarray([True]), np.asarray([False])) == 1
    far = (np.asarray([x]) for x in (np.finfo(np.float64).max, -np.finfo(np.float64).max))
    assert largest_ulp(*far) > 2**63  # more than an int64 holds


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.int32, np.bool_], ids=str)
def test_parts_on_devices_add_up_to_the_rows_on_the_host(dtype):
    x = 10 * normal(np.random.default_rng(0), (3, 4, 8, 6))
    x = x > 0 if dtype is np.bool_ else x.astype(dtype)
    whole = row_fingerprints(x.reshape(12, 8, 6))
    parts = [
        jax.jit(partial_fingerprints)(jnp.asarray(x[:, :, i : i + 2]), 6 * i).reshape(12, 2)
        for i in (0, 2, 4, 6)
    ]
    np.testing.assert_array_equal(np.sum(parts, axis=0, dtype=np.uint32), whole)
    assert len({row.tobytes() for row in whole}) == 12


def test_every_bit_and_every_place_counts():
    x = normal(np.random.default_rng(1), (1, 40))
    seen = {row_fingerprints(x).tobytes()}
    for place in range(40):
        for bit in range(32):
            y = x.copy()
            bits_of(y)[0, place] ^= np.uint32(1 << bit)
            seen.add(row_fingerprints(y).tobytes())
    assert len(seen) == 1 + 40 * 32
    swapped = x.copy()
    swapped[0, [0, 1]] = x[0, [1, 0]]
    assert row_fingerprints(swapped).tobytes() not in seen
    assert (
        row_fingerprints(np.zeros((1, 3), F32)).tobytes() != row_fingerprints(np.zeros((1, 4), F32)).tobytes()
    )
