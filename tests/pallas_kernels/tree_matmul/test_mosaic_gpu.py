"""The Hopper kernel on the CPU: its order and synchronisation in interpret mode, and that it lowers for CUDA.

Bits of a GPU need a GPU: `benchmarks/check_tree_matmul.py` compares those. An interpreted call compiles for a second or
more, so one case covers several features.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu, mosaic_sums
from tbik_jax.pallas_kernels.tree_matmul.config import SMEM_BYTES
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import MosaicConfig, tree_matmul_mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul.mosaic_problem import Problem
from tests.helpers import assert_same_bits, differing

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
#: The smallest tile that the kernel can have, and a ring of the fewest stages: every step waits for a free slot.
SMALL = MosaicConfig(consumers=1, tile_n=16, tile_k=16, stages=2)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def operands(m, n, k, dtype=BF16, *, transpose_rhs=False):
    """Normal x [m, k] and w."""
    rng = np.random.default_rng([m, n, k])
    x, w = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    return jnp.asarray(x, dtype), jnp.asarray(w.T if transpose_rhs else w, dtype)


def operands_with_exact_leaves(m, n, k, leaves, dtype=BF16, *, transpose_rhs=False):
    """x and w whose leaves are exact in fp32 in any order, while the adds between leaves round.

    The interpreter multiplies a stage with NumPy, whose order is its own. Here that cannot show, and what is left to
    show is the tree. Entries are integers of 7 bits, which is exact in leaves of up to
    1024; those of x carry a power of two that is one for each leaf, far from its neighbours'.
    """
    rng = np.random.default_rng([m, n, k, leaves])
    least, most = (-28, -4) if dtype == BF16 else (-17, -4)  # float16 has no more
    small_and_large = np.linspace(least, most, leaves).round().reshape(-1, max(1, leaves // 2)).T.ravel()
    scale = np.exp2(small_and_large).repeat(k // leaves)
    x, w = rng.integers(-127, 128, (m, k)) * scale, rng.integers(-127, 128, (k, n))
    return jnp.asarray(x, dtype), jnp.asarray(w.T if transpose_rhs else w, dtype)


def interpreted(x, w, leaves, out_dtype=F32, **kwargs):
    return tree_matmul_mosaic_gpu(x, w, leaves=leaves, out_dtype=out_dtype, interpret=True, **kwargs)


def leaves_of(x, w, leaves):
    """The fp32 products of the leaves, each in ascending k; x [m, k], w [k, n]."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    size = x.shape[1] // leaves
    products = []
    for leaf in range(leaves):
        acc = np.zeros((x.shape[0], w.shape[1]), np.float32)
        for k in range(leaf * size, (leaf + 1) * size):
            acc += x[:, k, None] * w[None, k]
        products.append(acc)
    return products


def in_order(x, w, leaves):
    """The order written out: fp32 leaves in ascending k, then neighbours; x [m, k], w [k, n]."""
    level = leaves_of(x, w, leaves)
    while len(level) > 1:
        level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def assert_in_order(config, m, n, leaf, leaves, transpose_rhs, dtype=BF16, out_dtype=F32):
    """The product of a configuration has the bits of `in_order`, rounded once."""
    x, w = operands_with_exact_leaves(m, n, leaf * leaves, leaves, dtype, transpose_rhs=transpose_rhs)
    out = interpreted(x, w, leaves, out_dtype, transpose_rhs=transpose_rhs, config=config)
    expected = in_order(x, w.T if transpose_rhs else w, leaves)
    assert_same_bits(out, jnp.asarray(expected).astype(out_dtype))


def assert_close(out, x, w, leaves):
    """Within twice what the plain fp32 product loses on these inputs, and one rounding to the output type."""
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    plain = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
    # The plain product is blocked as it likes; on few elements it may be exact, hence an ulp of the largest.
    lost = np.abs(plain - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()
    half_ulp = float(jnp.finfo(out.dtype).eps) / 2 if out.dtype != F32 else 0
    expected = in_order(x, w, leaves).astype(np.float64)
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert out.shape == exact.shape
    assert (error <= 2 * lost + 2 * half_ulp * np.abs(expected)).all(), (error.max(), lost)


def small(**fields):
    return dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize(
    ("leaves", "m", "leaf", "transpose_rhs", "config"),
    [
        (1, 3, 16, True, small(overlap=False)),
        (1, 17, 48, False, small()),
        (2, 1, 16, False, small(group=1)),
        (2, 3, 16, True, small(group=2)),
        (2, 3, 32, False, small(group=8, overlap=False)),
        (4, 3, 16, True, small(group=1, shared=1)),  # one waits in shared memory, one in global memory
        (4, 8, 64, False, small(group=2, shared=1, stages=3)),
        (4, 3, 16, True, small(group=4)),
        (4, 3, 32, False, small(group=4, overlap=False, boxes=2)),
        (8, 3, 16, False, small(group=1)),  # all wait in global memory
        (8, 17, 16, True, small(group=1, shared=2)),
        (8, 3, 32, False, small(group=2, shared=2, boxes=2)),  # all wait in shared memory
        (8, 1, 16, True, small(group=4, stages=5)),
        (8, 3, 16, False, small(group=8)),
        (8, 3, 48, True, small(group=8, overlap=False)),
    ],
)
def test_every_group_of_leaves_meets_in_the_tree(leaves, m, leaf, transpose_rhs, config):
    """Three tiles for two CTAs: one of them has two, and the end of the first overlaps with the second."""
    assert_in_order(config, m, 48, leaf, leaves, transpose_rhs)


@pytest.mark.parametrize(
    ("m", "n", "leaf", "leaves", "transpose_rhs", "config", "types"),
    [
        # Level 0 waits in shared memory, of level 1 one block of three.
        (65, 144, 32, 8, False, small(consumers=2, tile_n=48, boxes=2, group=2, shared=4), (BF16, BF16)),
        # Of the one level three blocks of five wait in shared memory.
        (130, 320, 128, 2, False, small(tile_m=128, tile_n=160, tile_k=32, boxes=4, shared=3), (BF16, F32)),
        (
            200,
            192,
            64,
            2,
            False,
            small(consumers=3, tile_n=192, tile_k=64, group=2, overlap=False),
            (F16, F32),
        ),
        # Tiles that reach outside of N.
        (130, 80, 64, 4, True, small(consumers=2, tile_n=64, tile_k=64, group=4, stages=3), (F16, F16)),
        (3, 48, 32, 4, False, small(consumers=2, tile_n=32, tile_k=32, group=2, shared=1), (BF16, F16)),
        # Five tiles down and three across, walked in a snake of two.
        (257, 48, 16, 2, True, small(group=2, snake=2, snake_rows=True), (F16, BF16)),
    ],
)
def test_tiles_and_types_never_show_in_the_bits(m, n, leaf, leaves, transpose_rhs, config, types):
    assert_in_order(config, m, n, leaf, leaves, transpose_rhs, *types)


@pytest.mark.parametrize(
    ("m", "n", "leaf", "leaves", "transpose_rhs", "config", "out_dtype"),
    [
        # More than two tiles take several rounds: a cluster's memory has to be free again.
        (3, 480, 32, 2, False, small(split=2, tile_n=96, tile_k=32), F32),
        (130, 192, 32, 8, True, small(split=2, consumers=2, tile_n=64, boxes=2, group=2, shared=1), BF16),
        (65, 192, 64, 4, False, small(split=4, consumers=2, tile_n=64, tile_k=64), F32),
        (17, 192, 16, 8, True, small(split=4, tile_n=64, stages=3), F32),
        # The interpreter has room for one tile of a cluster of 8 (see `_interpreted_clusters`).
        (17, 128, 32, 8, False, small(split=8, tile_n=128), F16),
        (1, 128, 64, 8, True, small(split=8, tile_n=128, tile_k=32), F32),
        # The second CTA's rows lie outside in part, and in the second row of tiles altogether.
        (150, 48, 32, 4, True, small(multicast=2, group=2), F32),
        (129, 96, 32, 4, False, small(multicast=2, split=2, consumers=2, tile_n=32, group=2, boxes=2), F32),
        (70, 80, 16, 8, True, small(multicast=2, split=2, tile_n=32, group=4, overlap=False), BF16),
    ],
)
def test_clusters_never_show_in_the_bits(m, n, leaf, leaves, transpose_rhs, config, out_dtype):
    assert_in_order(config, m, n, leaf, leaves, transpose_rhs, BF16, out_dtype)


#: (whole, cut) tiles of two clusters of two CTAs: at most two can be cut, one for each cluster.
LAST_ROUNDS = [
    # Ragged rows and columns; sums wait in shared memory where the output goes.
    ((4, 2), (70, 96, 32, 8, False, small(group=4, shared=1), F32)),
    ((8, 1), (130, 80, 16, 8, True, small(group=4, stages=3), BF16)),  # ... and in global memory
    ((12, 2), (200, 208, 32, 4, False, small(consumers=2, group=2, shared=1, boxes=2), BF16)),
    # One group is a whole tile, and half of a group a cut one.
    ((4, 1), (3, 160, 48, 4, True, small(group=4, overlap=False), F32)),
    ((4, 1), (17, 320, 64, 2, False, small(tile_n=64, tile_k=64, group=2, overlap=False), F32)),
    ((4, 2), (65, 96, 16, 8, True, small(group=8, overlap=False, snake=2, snake_rows=True), F16)),
    ((8, 2), (65, 160, 16, 2, False, small(group=1, shared=1), F32)),
    # No round before it; and three tiles for two clusters, which are a whole round.
    ((0, 2), (5, 64, 32, 8, False, small(group=4, shared=1, boxes=2), F32)),
    ((3, 0), (5, 96, 16, 4, True, small(group=2), F32)),
]


def last_round_cut(config):
    return dataclasses.replace(config, last_split=2, tile_n=max(32, config.tile_n))


def tiles_of(config, m, n):
    tiles = -(-m // config.rows) * -(-n // config.tile_n)
    whole = config.whole_tiles(tiles, min(tiles, mosaic_gpu._interpreted_clusters(config)))
    return whole, tiles - whole


@pytest.mark.parametrize(("tiles", "case"), LAST_ROUNDS)
def test_a_last_round_that_is_cut_never_shows_in_the_bits(tiles, case):
    m, n, leaf, leaves, transpose_rhs, config, out_dtype = case
    config = last_round_cut(config)
    assert tiles_of(config, m, n) == tiles
    assert_in_order(config, m, n, leaf, leaves, transpose_rhs, BF16, out_dtype)


@pytest.mark.parametrize("clusters", [1, 3])
def test_the_clusters_that_run_at_once_decide_which_tiles_are_cut_and_no_bit(monkeypatch, clusters):
    monkeypatch.setattr(mosaic_gpu, "_interpreted_clusters", lambda _: clusters)
    config = last_round_cut(small(group=4))
    assert tiles_of(config, 130, 96) == {1: (8, 1), 3: (6, 3)}[clusters]
    assert_in_order(config, 130, 96, 16, 8, True)


def test_without_the_other_half_of_the_leaves_the_cut_tiles_alone_have_other_bits(monkeypatch):
    """So a last round is cut, and the tests above see what goes wrong there."""
    m, n, leaf, leaves = 70, 96, 16, 4
    config = last_round_cut(small(group=2))
    assert tiles_of(config, m, n) == (4, 2)
    x, w = operands_with_exact_leaves(m, n, leaf * leaves, leaves)
    with monkeypatch.context() as patch:
        patch.setattr(mosaic_sums, "tree_join", lambda parts: parts[0])
        jax.clear_caches()
        out = np.asarray(interpreted(x, w, leaves, config=config))
    jax.clear_caches()
    expected = in_order(x, w, leaves)
    same = [
        [differing(out[i : i + 64, j : j + 32], expected[i : i + 64, j : j + 32]) == 0 for j in (0, 32, 64)]
        for i in (0, 64)
    ]
    assert sum(map(sum, same)) == 4
    assert_same_bits(interpreted(x, w, leaves, config=config), expected)


@pytest.mark.parametrize(("dtype", "leaves"), [(BF16, 4), (BF16, 8), (F16, 4)])
def test_the_inputs_show_the_order_of_the_adds(dtype, leaves):
    """What the tests above compare with is none of the orders that a wrong kernel might have."""
    x, w = operands_with_exact_leaves(17, 48, 16 * leaves, leaves, dtype)
    products, expected = leaves_of(x, w, leaves), in_order(x, w, leaves)
    assert differing(functools.reduce(np.add, products), expected)
    assert differing(functools.reduce(np.add, products[::-1]), expected)
    assert differing(in_order(x, w, leaves // 2), expected)
    half = leaves // 2
    apart = [left + right for left, right in zip(products[:half], products[half:], strict=True)]
    assert differing(functools.reduce(np.add, apart), expected)


@pytest.mark.parametrize(
    ("m", "n", "k", "leaves", "dtype", "out_dtype", "transpose_rhs"),
    [(1, 144, 512, 8, BF16, BF16, False), (65, 272, 64, 2, F16, F32, True)],
)
def test_is_as_near_as_the_plain_product(m, n, k, leaves, dtype, out_dtype, transpose_rhs):
    x, w = operands(m, n, k, dtype, transpose_rhs=transpose_rhs)
    out = interpreted(x, w, leaves, out_dtype, transpose_rhs=transpose_rhs)
    assert out.dtype == out_dtype
    assert_close(out, x, w.T if transpose_rhs else w, leaves)


def test_ranks_that_hold_half_of_k_meet_in_the_whole_product():
    x, w = operands(20, 48, 256)
    left, right = (interpreted(x[:, s], w[s], 4) for s in (slice(0, 128), slice(128, 256)))
    assert_same_bits(left + right, interpreted(x, w, 8))


def test_another_number_of_leaves_gives_other_bits():
    x, w = operands_with_exact_leaves(20, 48, 256, 8)
    assert differing(interpreted(x, w, 2), in_order(x, w, 8))


def test_a_row_keeps_its_bits_in_every_batch():
    x, w = operands(66, 48, 64)
    batch = interpreted(x, w, 4, BF16)
    assert_same_bits(interpreted(x[5:6], w, 4, BF16), batch[5:6])
    assert_same_bits(interpreted(x[::-1], w, 4, BF16), batch[::-1])


def several(count, m, n, leaf, leaves, transpose_rhs):
    """Operands of `count` products, and what each has to be."""
    size = n, leaf * leaves, leaves
    pairs = [operands_with_exact_leaves(m + i, *size, transpose_rhs=transpose_rhs) for i in range(count)]
    pairs = [(x[:m], w) for x, w in pairs]  # of more rows the numbers are others
    expected = [in_order(x, w.T if transpose_rhs else w, leaves) for x, w in pairs]
    x, w = (jnp.stack(each) for each in zip(*pairs, strict=True))
    return x, w, np.stack(expected)


@pytest.mark.parametrize(
    ("count", "m", "n", "leaf", "leaves", "transpose_rhs", "config"),
    [
        (3, 3, 32, 16, 2, False, small(overlap=False, group=2)),
        # Ragged rows and columns; sums wait in shared memory where the output goes, of one product and of the next.
        (2, 70, 48, 16, 8, True, small(group=2, shared=1)),
        (3, 65, 96, 32, 4, False, small(split=2, tile_n=64, stages=3)),
        (2, 129, 32, 32, 4, True, small(multicast=2, group=2, boxes=2)),
        (5, 3, 32, 16, 4, False, last_round_cut(small(group=2))),
        # Boxes that their leaf does not fill.
        (2, 5, 64, 80, 2, False, small(tile_n=64, tile_k=64)),
        (1, 17, 16, 16, 8, True, small(group=4)),
    ],
)
def test_products_in_one_launch_never_show_in_the_bits(count, m, n, leaf, leaves, transpose_rhs, config):
    x, w, expected = several(count, m, n, leaf, leaves, transpose_rhs)
    assert_same_bits(interpreted(x, w, leaves, transpose_rhs=transpose_rhs, config=config), expected)


def test_products_that_took_another_ones_operands_would_be_seen(monkeypatch):
    """The twin: every tile is of the first product."""
    x, w, expected = several(3, 5, 32, 16, 2, False)
    place = Problem.place
    monkeypatch.setattr(Problem, "place", lambda self, tile: place(self, tile % self.tiles_each))
    jax.clear_caches()
    out = interpreted(x, w, 2, config=small())
    jax.clear_caches()
    assert_same_bits(out[0], expected[0])
    assert differing(out[1:], expected[1:]) > expected[1:].size // 2


WHOLE = MosaicConfig(consumers=2, tile_n=128, tile_k=64, stages=4)


@pytest.mark.parametrize(
    ("m", "n", "k", "leaves", "config"),
    [
        (1, 1024, 2048, 8, None),
        (64, 4096, 12288, 8, None),
        (257, 1024, 3072, 4, None),
        (4096, 4096, 4096, 8, None),
        (4096, 18992, 1024, 1, None),
        (4096, 4096, 4096, 8, dataclasses.replace(WHOLE, multicast=2, group=2, shared=2)),
        (100, 4096, 4096, 8, dataclasses.replace(WHOLE, split=2, group=2)),
        (16, 4096, 4096, 8, dataclasses.replace(WHOLE, split=8, consumers=1, boxes=2, overlap=False)),
        (300, 4096, 4096, 4, dataclasses.replace(WHOLE, multicast=2, split=2, shared=1)),
        (1024, 5120, 4096, 8, dataclasses.replace(WHOLE, last_split=2, group=4, shared=2)),
        (1024, 5120, 4096, 4, dataclasses.replace(WHOLE, last_split=2, group=4, overlap=False)),
        (512, 512, 640, 8, dataclasses.replace(WHOLE, group=2)),
    ],
)
@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "three"])
def test_lowers_for_hopper(monkeypatch, m, n, k, leaves, config, transpose_rhs, lead):
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)
    x = jax.ShapeDtypeStruct((*lead, m, k), BF16)
    w = jax.ShapeDtypeStruct((*lead, *((n, k) if transpose_rhs else (k, n))), BF16)
    product = functools.partial(
        tree_matmul_mosaic_gpu,
        leaves=leaves,
        out_dtype=BF16,
        transpose_rhs=transpose_rhs,
        config=config,
    )
    text = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "dot_general" not in text


def refused(message, *, config=None, m=8, n=64, k=64, w_k=None, leaves=1, dtype=BF16, out_dtype=F32):
    x, w = jnp.zeros((m, k), dtype), jnp.zeros((w_k or k, n), dtype)
    with pytest.raises(ValueError, match=message):
        interpreted(x, w, leaves, out_dtype, config=config)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"leaves": 3}, "leaves=3"),
        ({"leaves": 8, "k": 192}, "k=192"),
        ({"n": 40}, "n=40 a multiple of 16; pad w to 48 columns"),
        ({"n": 8}, "n=8 a multiple of 16; pad w to 16 columns"),
        ({"m": 0}, "m=0 must be at least 1"),
        ({"w_k": 128}, r"x has K=64 and w \[K, N\] has K=128"),
        ({"dtype": F32}, "x is float32 and w is float32; both must be bfloat16, or both float16"),
        ({"out_dtype": jnp.int32}, "out_dtype=int32 is not supported; use bfloat16, float16 or float32"),
    ],
)
def test_refuses_operands_that_it_does_not_cover(case, message):
    refused(message, **case)


@pytest.mark.parametrize(
    ("fields", "case", "message"),
    [
        ({"split": 3}, {}, "split=3 does not cut 1 leaves"),
        ({"split": 2}, {}, "split=2 does not cut 1 leaves"),
        ({"split": 16}, {"leaves": 4}, "split=16 does not cut 4 leaves"),
        ({"group": 3}, {}, "group=3 must be 1, 2, 4 or 8"),
        ({"group": 2, "overlap": False}, {"leaves": 4}, "overlap=False needs a group of 4 leaves, not 2"),
        (
            {"group": 2, "overlap": False, "split": 2, "tile_n": 32},
            {"leaves": 8, "k": 128},
            "overlap=False needs a group of 4 leaves, not 2",
        ),
        (
            {"last_split": 4},
            {"leaves": 4},
            "last_split=4 with split=1, multicast=1 and gated=False; use 1, or 2",
        ),
        (
            {"last_split": 2, "split": 2, "tile_n": 64, "group": 2},
            {"leaves": 4},
            "last_split=2 with split=2, multicast=1 and gated=False; use 1, or 2 without the others",
        ),
        ({"last_split": 2, "multicast": 2}, {"leaves": 2}, "last_split=2 with split=1, multicast=2"),
        (
            {"last_split": 2},
            {},
            "last_split=2 needs two leaves or more and a group of half of them, not leaves=1",
        ),
        (
            {"last_split": 2, "group": 2, "tile_n": 32},
            {"leaves": 8, "k": 128},
            "a group of half of them, not leaves=8 and group=2",
        ),
        (
            {"last_split": 2, "tile_n": 48},
            {"leaves": 2},
            "last_split=2 leaves 24 columns of tile_n=48 to each part; use a multiple of 32",
        ),
        ({"multicast": 3}, {}, "multicast=3 with split=1; use 1 or 2"),
        (
            {"multicast": 2, "split": 8, "tile_n": 128},
            {"leaves": 8, "k": 128},
            "multicast=2 with split=8; use 1 or 2, and a cluster of at most 8",
        ),
        ({"tile_k": 48}, {}, "tile_k=48 must be of 16, 32 or 64 and divide the leaf of 64"),
        ({"boxes": 3}, {}, "3 boxes of tile_k=16 must be of 16, 32 or 64 and divide the leaf of 64"),
        ({"boxes": 0}, {}, "0 boxes"),
        ({"tile_k": 32}, {"leaves": 4}, "divide the leaf of 16"),
        ({"tile_m": 32}, {}, "consumers=1 with tile_m=32; use 1, 2 or 3, and a positive multiple of 64"),
        ({"tile_m": -64}, {}, "consumers=1 with tile_m=-64"),
        ({"consumers": 4}, {}, "consumers=4 with tile_m=64; use 1, 2 or 3"),
        ({"consumers": 0}, {}, "consumers=0 with tile_m=64; use 1, 2 or 3"),
        ({"tile_n": 24}, {}, r"24 columns .*of 16 columns"),
        ({"tile_n": 272}, {}, r"272 columns .*at most 256 of each"),
        (
            {"split": 2, "tile_n": 48},
            {"leaves": 2},
            "split=2 leaves 24 columns of tile_n=48 to each part; use a multiple of 32",
        ),
        (
            {"tile_n": 128, "tile_k": 64},
            {"n": 144},
            "n=144 columns .* tile_n=128 at tile_k=64; use tile_n=64",
        ),
        ({"tile_n": 48, "tile_k": 32}, {}, "do not divide into tile_n=48 at tile_k=32; use tile_n=32"),
        ({"stages": 1}, {}, "stages=1 need .* bytes of shared memory of .*; use 2 to 32"),
        ({"stages": 33}, {}, "stages=33 need .*; use 2 to 32"),
        (
            {"consumers": 2, "tile_n": 256, "tile_k": 64, "boxes": 2, "stages": 4},
            {"m": 256, "n": 256, "k": 128},
            f"stages=4 need 4260.. bytes of shared memory of {SMEM_BYTES}; use 2 to 2, or smaller tiles",
        ),
    ],
)
def test_refuses_configurations_that_cannot_run(fields, case, message):
    refused(message, config=small(**fields), **case)


def test_refuses_other_shapes_and_mixed_types():
    x, w = operands(8, 32, 64)
    with pytest.raises(ValueError, match="w is float16"):
        interpreted(x, w.astype(F16), 1)
    for rows, columns in ((x[None], w), (x[None], jnp.stack([w, w])), (x[None][:0], w[None][:0])):
        with pytest.raises(ValueError, match="must be two matrices, or as many of each, one at least"):
            interpreted(rows, columns, 1)
    with pytest.raises(
        ValueError, match="transpose_lhs=True and gated=False take two matrices, not 1 of each"
    ):
        interpreted(x.T[None], w[None], 1, transpose_lhs=True)


def test_refuses_a_device_that_is_no_hopper():
    x, w = operands(8, 32, 64)
    with pytest.raises(ValueError, match=r"needs a Hopper GPU .*none\); use backend='reference' there"):
        tree_matmul_mosaic_gpu(x, w, leaves=1, out_dtype=F32)


def swiglu_of(product):
    """SwiGLU of a product [m, 2F] in bfloat16, as the epilogue has it."""
    gate, up = (part.astype(jnp.float32) for part in jnp.split(product, 2, axis=1))
    return (gate / (1 + jnp.exp(-gate)) * up).astype(product.dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (70, 96, 64, small(tile_n=32)),  # a tile that ends among the gates, two of rows
        (5, 64, 128, small(tile_n=64, tile_k=32, boxes=2)),
        (130, 288, 64, small(consumers=2, tile_n=128, tile_k=64)),
    ],
)
def test_a_gated_product_is_the_swiglu_of_the_product(m, n, k, config):
    x, w = operands(m, n, k, transpose_rhs=True)
    common = {"leaves": 1, "out_dtype": BF16, "transpose_rhs": True}
    product = interpreted(x, w, config=config, **common)
    gated = interpreted(x, w, config=config, gated=True, **common)
    assert gated.shape == (m, n // 2)
    np.testing.assert_allclose(
        np.asarray(gated, np.float32), np.asarray(swiglu_of(product), np.float32), rtol=0.01, atol=1e-6
    )
    # twin: gates and values the other way round
    assert differing(swiglu_of(jnp.roll(product, n // 2, axis=1)), gated) > gated.size // 2


@pytest.mark.parametrize(
    ("n", "leaves", "transpose_rhs", "out_dtype", "message"),
    [
        (48, 1, True, BF16, "24 columns in bfloat16; it needs a multiple of 16"),
        (64, 1, True, F32, "in float32; it needs .* out_dtype=bfloat16"),
        (64, 2, True, BF16, "gated=True needs one leaf, .* not leaves=2"),
        (64, 1, False, BF16, "transpose_rhs=False"),
        (64, 2, True, BF16, "last_split=2 with split=1, multicast=1 and gated=True; use 1"),
    ],
)
def test_a_gated_product_that_is_not_covered(n, leaves, transpose_rhs, out_dtype, message):
    x, w = operands(5, n, 64, transpose_rhs=transpose_rhs)
    config = small(tile_n=32, last_split=2 if "last_split" in message else 1)
    with pytest.raises(ValueError, match=message):
        interpreted(x, w, leaves, out_dtype, transpose_rhs=transpose_rhs, gated=True, config=config)


@pytest.mark.parametrize(
    ("m", "n", "leaf", "leaves", "transpose_rhs", "consumers"),
    [
        (70, 48, 80, 2, True, 1),
        (17, 128, 144, 4, False, 1),
        (130, 64, 112, 1, True, 2),
        (3, 64, 208, 8, False, 1),
    ],
)
def test_the_last_box_of_a_leaf_may_be_partly_empty(m, n, leaf, leaves, transpose_rhs, consumers):
    config = small(consumers=consumers, tile_k=64, tile_n=64, group=min(2, leaves), stages=3)
    assert_in_order(config, m, n, leaf, leaves, transpose_rhs)


@pytest.mark.parametrize(
    ("m", "n", "leaf", "leaves", "transpose_rhs", "consumers"),
    [
        (144, 48, 64, 2, True, 2),
        (128, 64, 128, 4, False, 1),
        (336, 128, 64, 8, False, 2),
        (160, 64, 144, 2, False, 2),  # and the last box partly empty
    ],
)
def test_x_as_it_lies_transposed(m, n, leaf, leaves, transpose_rhs, consumers):
    config = small(consumers=consumers, tile_k=64, tile_n=64, group=min(2, leaves), stages=3)
    x, w = operands_with_exact_leaves(m, n, leaf * leaves, leaves, BF16, transpose_rhs=transpose_rhs)
    out = interpreted(x.T, w, leaves, transpose_rhs=transpose_rhs, transpose_lhs=True, config=config)
    assert_same_bits(out, jnp.asarray(in_order(x, w.T if transpose_rhs else w, leaves)))


@pytest.mark.parametrize(("m", "n", "leaf"), [(100, 64, 64), (128, 64, 48), (120, 64, 64), (128, 32, 64)])
def test_x_that_no_tiling_reads_transposed_is_transposed_first(m, n, leaf):
    x, w = operands_with_exact_leaves(m, n, 2 * leaf, 2, BF16)
    out = interpreted(x.T, w, 2, transpose_lhs=True, config=small(tile_k=16))
    assert_same_bits(out, jnp.asarray(in_order(x, w, 2)))


def test_x_transposed_refuses_a_tiling_that_does_not_read_it():
    x, w = operands_with_exact_leaves(128, 64, 128, 2, BF16)
    with pytest.raises(ValueError, match="x as \\[K, M\\] needs tile_k=64"):
        interpreted(x.T, w, 2, transpose_lhs=True, config=small(tile_k=32))
