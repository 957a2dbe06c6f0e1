"""How the row-wise kernels add across threads, and how rows are cut; on the CPU."""

import numpy as np
import pytest

from tbik_jax.pallas_kernels.common import mosaic_rows as rows
from tests import orders
from tests.helpers import assert_same_bits, differing, wide


class NumpyLanes:
    """`Lanes` on arrays of one value a lane."""

    def __init__(self, lanes: int):
        self.lane = np.arange(lanes)

    def add(self, x, y):
        return x + y

    def swap(self, x, distance):
        return x[self.lane ^ distance]

    def choose(self, distance, clear, set_):
        return np.where(self.lane & distance, set_, clear)


def swapped(values, lanes):
    """A lane's own values first: another order."""
    total = sum(values)
    for distance in (1, 2, 4, 8, 16):
        total = total + total[NumpyLanes(lanes).lane ^ distance] if distance < lanes else total
    return total


@pytest.mark.parametrize(("lanes", "v"), [(32, 1), (32, 2), (32, 4), (32, 8), (16, 4), (8, 4), (4, 4)])
def test_lanes_meet_in_halving_order(lanes, v):
    x = wide(np.random.default_rng(lanes * v), (50, lanes, v))
    expected = orders.tree_sum(x.reshape(50, -1))
    different = 0
    for row, total in zip(x, expected, strict=True):
        out = rows.sum_lanes(list(row.T), lanes, NumpyLanes(lanes))
        assert_same_bits(out, np.full(lanes, total))
        different += differing(swapped(list(row.T), lanes), np.full(lanes, total))
    assert v == 1 or different  # twin


@pytest.mark.parametrize(
    ("d", "v"), [(128, 1), (256, 2), (640, 1), (1024, 8), (1536, 4), (2560, 4), (5120, 8)]
)
def test_a_chunk_divides_the_row(d, v):
    assert rows.vector_size(d) == v


@pytest.mark.parametrize(
    ("heads", "half", "expected"),
    [(8, 64, 8), (4, 64, 4), (5, 64, 1), (64, 64, 8), (8, 32, 8), (16, 32, 16), (6, 64, 2)],
)
def test_heads_side_by_side_divide_the_heads(heads, half, expected):
    assert rows.heads_at_once(heads, half) == expected


@pytest.mark.parametrize("half", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_every_lane_has_four_neighbours_of_one_head(heads, half):
    if heads > rows.heads_at_once(heads, half):
        pytest.skip("more than a warpgroup holds")
    layout = rows.head_layout(heads, half).to_mgpu()
    assert layout.registers_shape((heads, half))[-1] == 1
    assert layout.vector_length == rows.HEAD_VECTOR
    assert np.prod(layout.registers_shape((heads, half))) == 1
    assert np.prod(layout.registers_shape((3 * heads, half))) == 3


@pytest.mark.parametrize("n", [128, 200, 1216, 3072, 4096])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_tiles_cover_a_row(n, chunks):
    tiles = rows.Tiles.choose(3, n, chunks)
    covered = np.zeros(n, bool)
    for tile in range(tiles.per_row):
        for i in range(tiles.chunks):
            start = min((tile * tiles.chunks + i) * tiles.size, n - tiles.size)
            covered[start : start + tiles.size] = True
    assert covered.all() and tiles.size % 128 == 0


def test_many_rows_take_larger_tiles():
    assert rows.Tiles.choose(1, 12288, None).chunks == 1
    assert rows.Tiles.choose(8192, 12288, None).chunks == 4
