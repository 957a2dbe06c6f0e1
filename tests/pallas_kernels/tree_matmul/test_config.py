"""Which configuration of the Hopper kernel runs: a plan made from numbers, so nothing here needs a GPU."""

import dataclasses
import itertools

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.pallas_kernels.tree_matmul import tuned
from tbik_jax.pallas_kernels.tree_matmul.config import (
    SMEM_BYTES,
    MosaicConfig,
    candidate_configs,
    check_config,
    choose_config,
    gate_config,
    reads_transposed,
    tiles_evenly,
)

H200, UNKNOWN = "NVIDIA H200", "some other GPU"
TABLE = tuned.read_table(tuned.table_path(H200))
#: More rows than anything was measured with: the last entry serves them too.
MANY_ROWS = 100_000

shapes = st.builds(
    lambda m, columns, steps, leaves, transpose_rhs: (
        m,
        16 * columns,
        16 * leaves * steps,
        leaves,
        transpose_rhs,
    ),
    m=st.integers(1, 9000) | st.sampled_from([2**i + d for i in range(3, 14) for d in (0, 1)]),
    columns=st.integers(1, 1300),
    steps=st.integers(1, 200),
    leaves=st.sampled_from([1, 2, 4, 8]),
    transpose_rhs=st.booleans(),
)
slowly = settings(deadline=None)


def candidates(shape):
    m, n, k, leaves, transpose_rhs = shape
    return candidate_configs(m, n, k, leaves, transpose_rhs=transpose_rhs)


def choice(shape, device_kind):
    m, n, k, leaves, transpose_rhs = shape
    return choose_config(m, n, k, leaves, transpose_rhs=transpose_rhs, device_kind=device_kind)


def check(config, shape):
    m, n, k, leaves, transpose_rhs = shape
    for itemsize in (2, 4):
        check_config(config, m=m, n=n, k=k, leaves=leaves, transpose_rhs=transpose_rhs, itemsize=itemsize)
        assert config.smem_bytes(m, leaves, itemsize) <= SMEM_BYTES


@slowly
@given(shape=shapes)
def test_there_are_candidates_for_every_shape_and_all_can_run(shape):
    found = candidates(shape)
    assert found
    assert len(set(found)) == len(found)
    for config in found:
        check(config, shape)


@slowly
@given(shape=shapes, batch=st.integers(2, 300))
def test_there_are_candidates_for_several_products_and_all_can_run(shape, batch):
    m, n, k, leaves, transpose_rhs = shape
    found = candidate_configs(m, n, k, leaves, transpose_rhs=transpose_rhs, batch=batch)
    for config in found:
        check(config, shape)
    # Zeros behind leaves, which may show in the sign of a zero, are there for one product and for several.
    ragged = {k // leaves % config.depth > 0 for config in (*found, *candidates(shape))}
    assert len(ragged) == 1


def test_several_products_fill_the_gpu_without_clusters():
    """One has too few tiles, and many have enough: their leaves need not be spread."""
    assert candidate_configs(64, 128, 4096, 8, batch=1)[0].split > 1
    assert candidate_configs(64, 128, 4096, 8, batch=256)[0].split == 1


@slowly
@given(shape=shapes)
def test_the_first_candidates_differ_in_split_or_last_split_or_width(shape):
    """So the tuner sees something of everything when it may try only a few."""
    kinds = [(config.split, config.last_split, config.tile_n) for config in candidates(shape)]
    count = len(set(kinds))
    assert len(set(kinds[:count])) == count


@slowly
@given(shape=shapes)
def test_an_unknown_device_takes_the_best_guess(shape):
    assert choice(shape, UNKNOWN) == candidates(shape)[0]


def test_a_choice_depends_on_its_arguments_alone():
    shape = (128, 4096, 4096, 8, False)
    first = choice(shape, UNKNOWN)
    candidate_configs.cache_clear()
    with jax.default_device(jax.devices("cpu")[1]):
        assert choice(shape, UNKNOWN) == first
    assert choice(shape, None) == first  # the tests' own device has no table either
    assert choice(shape, H200) == choice(shape, H200)


def tuned_points():
    """(shape, fields) of each entry, for the most and the fewest rows that it serves."""
    points = []
    for (k, n, leaves, transpose_rhs), entries in TABLE.items():
        above = 0
        for most, fields in entries:
            points += [((m, n, k, leaves, transpose_rhs), fields) for m in sorted({above + 1, most})]
            above = most
        points.append(((MANY_ROWS, n, k, leaves, transpose_rhs), entries[-1][1]))
    return points


def test_a_tuned_shape_takes_its_entry_on_the_device_it_was_tuned_on():
    shape, fields = next(
        (s, f) for s, f in tuned_points() if f is not None and MosaicConfig(**f) != choice(s, UNKNOWN)
    )
    assert choice(shape, H200) == MosaicConfig(**fields)
    m, n, *rest = shape
    beside = (m, n + 16, *rest)
    assert (beside[2], beside[1], *beside[3:]) not in TABLE
    assert choice(beside, H200) == choice(beside, UNKNOWN)


def test_every_entry_of_the_table_can_run_for_every_number_of_rows_it_serves():
    """Shared memory grows with the rows, so the fewest and the most stand for those between."""
    wrong = []
    for shape, fields in tuned_points():
        config = choice(shape, H200)
        assert config == (choice(shape, UNKNOWN) if fields is None else MosaicConfig(**fields))
        try:
            check(config, shape)
        except ValueError as error:
            wrong.append((shape, str(error)))
    assert not wrong


@slowly
@given(shape=shapes)
def test_leaves_are_spread_over_a_cluster_only_where_there_are_few_rows(shape):
    m, _, _, leaves, _ = shape
    for config in candidates(shape):
        assert config.kind == ("serial" if config.split == 1 else "cluster")
        assert config.split == 1 or (m <= (1024 if config.split == 2 else 512) and config.split <= leaves)
    # Of more rows than the estimate was fitted to, for the tuner alone.
    assert candidates(shape)[0].split == 1 or m <= 512


#: The tiles of 128 x 128 of 1024 rows and as many columns, on 132 CTAs or 66 clusters of two.
@pytest.mark.parametrize(
    ("tiles", "clusters", "whole"),
    [
        (320, 66, 264),  # 56 of the last round
        (198, 66, 132),
        (199, 66, 199),  # more than one for every cluster
        (132, 66, 132),
        (264, 66, 264),
        (40, 66, 0),
        (40, 40, 0),
        (3, 1, 2),
    ],
)
def test_the_tiles_of_a_last_round_are_cut_if_every_cluster_has_at_most_one(tiles, clusters, whole):
    assert config(last_split=2).whole_tiles(tiles, clusters) == whole
    assert config().whole_tiles(tiles, clusters) == tiles


@slowly
@given(tiles=st.integers(1, 2000), clusters=st.integers(1, 132))
def test_every_tile_is_whole_or_cut_and_the_ctas_of_a_cluster_have_as_many(tiles, clusters):
    clusters = min(tiles, clusters)
    whole = config(last_split=2).whole_tiles(tiles, clusters)
    assert 0 <= tiles - whole <= clusters
    if whole < tiles:  # whoever meets must have come equally far
        assert whole % (2 * clusters) == 0


def test_the_tuner_sees_a_cut_last_round_soon_where_it_is_at_most_half_full():
    for k, leaves in ((25600, 8), (12800, 4), (6400, 2)):
        assert candidates((1024, 5120, k, leaves, False))[1].last_split == 2
    assert not any(c.last_split > 1 for c in candidates((1024, 5120, 3200, 1, False)))


@slowly
@given(shape=shapes)
def test_no_rule_cuts_the_last_round(shape):
    """The estimate was not fitted to it; a tuned table may, since the tuner times it and compares its bits."""
    assert choice(shape, UNKNOWN).last_split == 1


def test_a_last_round_that_is_nearly_full_is_no_candidate_to_be_cut():
    # 256 tiles: 124 of the last round. Half of a tile for each CTA would be as long as a tile for each.
    assert not any(c.last_split > 1 and c.tile_n == 128 for c in candidates((1024, 4096, 4096, 8, False)))


@slowly
@given(shape=shapes)
def test_a_last_round_is_cut_only_after_a_whole_one(shape):
    m, n, *_ = shape
    for config in candidates(shape):
        tiles = -(-m // config.rows) * -(-n // config.tile_n)
        assert config.last_split == 1 or (m > 256 and 0 < config.whole_tiles(tiles, 66) < tiles)


def test_the_tuner_sees_other_snakes_of_the_best_guess_where_there_are_many_rows():
    for m in (1000, 1024, 4096):
        found = candidates((m, 5120, 8192, 8, False))
        snakes = {c.snake for c in found if dataclasses.replace(c, snake=8) == found[0]}
        assert found[0].snake == 8 and snakes == ({8} if m == 1000 else {4, 8, 16})


def test_the_rule_spreads_the_leaves_of_few_tiles():
    assert choice((16, 1024, 4096, 8, True), UNKNOWN).kind == "cluster"
    assert choice((16, 151936, 4096, 8, True), UNKNOWN).kind == "serial"


def test_the_rule_narrows_the_tile_to_columns_that_do_not_divide():
    assert not tiles_evenly(18992, 64)
    assert choice((4096, 18992, 1024, 1, False), UNKNOWN).tile_n == 64
    assert choice((4096, 18992, 1024, 1, True), UNKNOWN).tile_n > 64


@pytest.mark.parametrize(
    ("n", "width", "evenly"), [(48, 64, True), (128, 64, True), (144, 64, False), (16, 16, True)]
)
def test_tiles_evenly(n, width, evenly):
    assert tiles_evenly(n, width) is evenly


def config(**fields):
    return MosaicConfig(**({"consumers": 2, "tile_n": 128, "tile_k": 64, "stages": 4} | fields))


def test_blocks_wait_in_shared_memory_first_and_the_rest_in_global_memory():
    one = config(group=2, shared=3)  # 4 groups, 2 levels, 2 blocks of 64 columns each
    assert (one.block, one.saved_blocks(8)) == (64, 4)
    assert (one.shared_blocks(8), one.global_blocks(8)) == (3, 1)
    assert (one.shared_blocks(4), one.global_blocks(4)) == (2, 0)  # no more than there are
    assert (config(split=4, group=2).saved_blocks(8), config(group=8).saved_blocks(2)) == (0, 0)
    assert [config(tile_n=width).block for width in (48, 160, 192)] == [16, 32, 64]


def test_shared_memory_is_that_of_the_stages_the_output_and_what_waits():
    barriers = 8 * (2 * 4 + 2 * 2)  # of 8 bytes, two for each stage and two for each consumer
    staged = 2 * 128 * 32 * 4  # 2 slots of 32 columns of fp32
    # 128 rows of x and 128 columns of w, 64 deep, 2 bytes each, 4 times.
    stages = 4 * 2 * 64 * (128 + 128)
    assert config().smem_bytes(4096, 1) == stages + staged + barriers
    # Few rows: fewer are copied, and the tensor cores read past the last box.
    few = 4 * 2 * 64 * (16 + 128) + 2 * 64 * (128 - 16)
    assert config().smem_bytes(9, 1) == few + staged + barriers
    # What waits and the output share their memory, ...
    saved = 2 * 128 * 64 * 4
    assert config(shared=2).smem_bytes(4096, 2) == stages + saved + barriers
    # ... but not in a cluster, but for one that shares only the last round.
    assert config(shared=2, split=2).smem_bytes(4096, 4) == stages + saved + staged + barriers
    assert config(shared=2, last_split=2).smem_bytes(4096, 2) == stages + saved + barriers


def test_the_staged_output_is_no_wider_than_what_a_cta_stores_of_a_cut_tile():
    assert config(tile_n=64).staged(2, 2) == (1, 64)
    assert config(tile_n=64, last_split=2).staged(2, 2) == (2, 32)
    assert config(last_split=2).staged(2, 2) == config().staged(2, 2) == (2, 64)


def test_with_stages_takes_as_many_as_fit():
    filled = config(tile_n=256).with_stages(4096, 8)
    assert filled.stages == 4
    assert filled.smem_bytes(4096, 8) <= SMEM_BYTES < filled.smem_bytes(4096, 8) + filled.stage_bytes(4096)
    assert config(tile_n=16, tile_k=16).with_stages(1, 1).stages == 12
    assert config(tile_n=16, tile_k=16).with_stages(1, 1, most=7).stages == 7


@slowly
@given(
    m=st.integers(1, 5000),
    n=st.integers(1, 400),
    k=st.integers(1, 300),
    device=st.sampled_from([H200, UNKNOWN]),
)
def test_a_gated_configuration_can_run_for_every_shape(m, n, k, device):
    shape = (m, 32 * n, 16 * k, 1, True)
    gated = gate_config(choice(shape, device), m)
    assert gated.gated
    check(gated, shape)


def test_a_gated_tile_that_grows_gives_stages_up():
    """As its first form did not: tiles of 16 columns became 32 wide, and no longer fitted."""
    narrow = MosaicConfig(consumers=1, tile_n=16, tile_k=64, boxes=4, stages=12)
    narrow = narrow.with_stages(40, 1)
    gated = gate_config(narrow, 40)
    assert gated.tile_n == 32 and 2 <= gated.stages < narrow.stages
    with pytest.raises(ValueError, match="shared memory"):
        check(dataclasses.replace(gated, stages=narrow.stages), (40, 6144, 1024, 1, True))


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_an_x_that_is_read_transposed_has_a_tiling(transpose_rhs):
    sizes = itertools.product(
        (100, 128, 144, 4096), (16, 32, 48, 64, 272, 5120), (16, 48, 64, 80, 144, 1024), (1, 8)
    )
    taken = 0
    for m, n, leaf, leaves in sizes:
        stored = {"transpose_rhs": transpose_rhs, "transpose_lhs": True}
        if reads_transposed(m, n, leaf * leaves, leaves, transpose_rhs=transpose_rhs):
            for device in (H200, UNKNOWN):
                config = choose_config(m, n, leaf * leaves, leaves, device_kind=device, **stored)
                check_config(config, m=m, n=n, k=leaf * leaves, leaves=leaves, itemsize=4, **stored)
            taken += 1
        else:  # the twin: nothing is given up that there is
            with pytest.raises(ValueError, match="no tiling serves"):
                if m % 16 or m < 128:
                    raise ValueError("no tiling serves such rows")
                choose_config(m, n, leaf * leaves, leaves, device_kind=UNKNOWN, **stored)
    assert taken > 50


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(
    ("leaf", "fills"), [(64, True), (112, True), (144, False), (1008, False), (18992, False)]
)
def test_a_leaf_fills_its_last_box_for_any_number_of_rows_or_for_none(leaf, fills, transpose_rhs):
    for m in (1, 16, 100, 300, 1000, 5000):
        configs = candidates((m, 2048, 8 * leaf, 8, transpose_rhs))
        assert {leaf % config.depth == 0 for config in configs} == {fills}
