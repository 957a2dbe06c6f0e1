"""Which sizes get compiled: few, never too small, with little padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbik_jax.buckets import bucket, capacity_bucket, capacity_that_fits


@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_its_value_with_at_most_a_third_of_padding(value):
    size = bucket(value)
    assert size >= value
    assert size == 16 or (size - value) * 3 < size
    assert bucket(size) == size


@given(st.integers(1, 1 << 16))
def test_a_capacity_is_whole_blocks_of_attention(positions):
    capacity = capacity_bucket(positions)
    assert capacity >= positions and capacity % 128 == 0
    assert capacity_that_fits(capacity) == capacity > capacity_that_fits(capacity - 1)


@pytest.mark.parametrize("function", [bucket, capacity_bucket])
def test_there_are_few(function):
    assert len({function(value) for value in range(1, 40_961)}) <= 24
