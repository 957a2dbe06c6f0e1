"""Which variant of the Hopper kernel a call takes: only ones that fit it, and "columns" only as compared on a GPU."""

import itertools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from tbik_jax.pallas_kernels.attention.config import (
    AttentionConfig,
    AttentionShape,
    choose_config,
    columns_compared,
)
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan

BF16, F16 = jnp.bfloat16, jnp.float16
PLAN = AttentionPlan()
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SMS = 132


def shape(b, t, s, kv_heads=8, group=4, h=128):
    return AttentionShape(b=b, t=t, s=s, kv_heads=kv_heads, group=group, h=h)


def choice(b, t, s, *, dtype=BF16, plan=PLAN, **heads):
    return choose_config(shape(b, t, s, **heads), dtype, plan)


def name(config):
    """As in the result file."""
    kind = "L" if config.second_launch else "C" if config.parts > 1 else "A"
    return f"{kind}{'H' * (config.value_parts - 1)}{config.parts}:{config.stages}/{config.value_stages}"


def measured(file="decode_variants_h200.json"):
    return json.loads((RESULTS / file).read_text())["rows"]


def measured_between():
    """Lengths that are no power of two, as caches' capacities often are."""
    return measured("decode_clusters_h200.json")


# --- decode as it was measured ------------------------------------------------------------------------------


def test_the_measured_points_get_the_fastest_or_one_within_a_hundredth():
    rows = measured()
    assert len(rows) == 12
    for row in rows:
        chosen = choice(row["b"], 1, row["s"])
        assert chosen.variant == "columns"
        best = min(us[0] for variant, us in row["us"].items() if variant != "cudnn")
        assert row["us"][name(chosen)][0] <= 1.01 * best, (row["b"], row["s"], name(chosen))
    # the twin: no single configuration would do
    everywhere = set.intersection(*(set(row["us"]) for row in rows)) - {"cudnn"}
    assert everywhere == {"present"}
    assert any(
        row["us"]["present"][0] > 1.01 * row["us"][name(choice(row["b"], 1, row["s"]))][0] for row in rows
    )


def test_between_powers_of_two_the_choice_is_the_fastest_or_one_within_four_hundredths():
    for row in measured_between():
        best = min(us[0] for variant, us in row["us"].items() if not variant.startswith("cudnn"))
        chosen = name(choice(row["b"], 1, row["s"]))
        assert row["us"][chosen][0] <= 1.04 * best, (row["b"], row["s"], chosen)
    three_splits = next(row["us"] for row in measured_between() if (row["b"], row["s"]) == (1, 1280))
    assert three_splits["CH2:8/8"][0] > 1.2 * three_splits["CH4:8/8"][0]  # the twin: clusters of two lose


def test_the_documented_ratios_are_those_of_what_is_chosen():
    lines = {}
    speed = json.loads((RESULTS / "check_attention_h200.json").read_text())["speed"]
    now = {(row["b"], row["s"]): row for row in speed if row["t"] == 1}
    for row in sorted(measured(), key=lambda row: row["s"]):
        ours = now[row["b"], row["s"]]
        assert ours["chosen"] == str(choice(row["b"], 1, row["s"]))
        lines.setdefault(row["b"], []).append(f"{ours['ratio']:.2f} ({row['ratio']['present']:.2f})")
    text = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    for b, cells in lines.items():
        assert f"| batch {b} | {' | '.join(cells)} |" in text


def test_every_configuration_of_columns_was_compared_on_a_gpu():
    compared = {variant: bits for row in measured() for variant, bits in row["bits"].items()}
    assert all(
        row["bits"][v] == {"full": 0, "ragged": 0, "seams": 0} for row in measured() for v in row["bits"]
    )
    chosen = {
        name(config)
        for b, s, kv_heads in itertools.product(range(1, 140), range(128, 66000, 512), (1, 2, 4, 8))
        if (config := choice(b, 1, s, kv_heads=kv_heads)).variant == "columns"
    }
    # Four CTAs a head, twice: at the end of the cache here, ragged and at seams in tests/gpu/test_attention_bits.py.
    between = [row["bits"]["CH4:8/8"] for row in measured_between() if "CH4:8/8" in row["bits"]]
    assert between == [{"full": 0}] * 7
    assert {"CH2:8/8", "CH8:8/8"} <= set(compared)
    assert chosen <= {*compared, "CH4:8/8"}
    assert {"A1:3/3", "A1:6/6", "C2:6/6", "C4:6/6", "C8:6/6", "CH2:8/8", "CH4:8/8", "L32:3/3"} <= chosen
    assert "C2:7/5" not in compared  # the twin: not every name is in the file


@pytest.mark.parametrize(
    "change",
    [
        {"t": 3},
        {"group": 9},
        {"group": 3, "t": 3},
        {"plan": AttentionPlan(blocks_per_split=2)},
    ],
)
def test_what_was_not_compared_keeps_the_other_variants(change):
    call = {"b": 4, "t": 1, "s": 4096, "kv_heads": 8, "group": 4, "h": 128, "dtype": BF16, "plan": PLAN}
    sizes = ("b", "t", "s", "kv_heads", "group", "h")

    def compared_and_chosen(call):
        of = AttentionShape(**{size: call[size] for size in sizes})
        rest = call["dtype"], call["plan"]
        return columns_compared(of, *rest), choose_config(of, *rest).variant

    assert compared_and_chosen(call) == (True, "columns")
    assert compared_and_chosen(call | change) == (False, "split")


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_ranks_with_fewer_kv_heads_take_columns_too(kv_heads):
    assert choice(8, 1, 4096, kv_heads=kv_heads).variant == "columns"


@pytest.mark.parametrize(("group", "t"), [(1, 1), (1, 8), (2, 1), (2, 4), (3, 2), (8, 1)])
@pytest.mark.parametrize(("h", "dtype"), [(64, BF16), (128, F16)])
def test_up_to_eight_rows_take_columns(group, t, h, dtype):
    call = AttentionShape(b=4, t=t, s=4104, kv_heads=8, group=group, h=h)
    assert choose_config(call, dtype, PLAN).variant == "columns"


# --- all calls ----------------------------------------------------------------------------------------------


def grid():
    sizes = (1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 66, 67, 128, 133, 600)
    lengths = (128, 136, 512, 520, 1024, 1536, 2048, 2560, 4096, 12288, 12800, 16384, 32768, 131072)
    heads = [(1, 1), (2, 3), (1, 4), (4, 4), (8, 4), (8, 8), (16, 2), (2, 64)]
    for b, t, s, (kv_heads, group), h in itertools.product(sizes, (1, 2, 17), lengths, heads, (64, 128)):
        yield shape(b, t, s, kv_heads, group, h)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_chosen_variant_fits_the_call(dtype):
    seen = set()
    for call in grid():
        config = choose_config(call, dtype, PLAN)
        rows, heads = call.t * call.group, call.b * call.kv_heads
        assert rows <= {"tiles": math.inf, "split": 64, "columns": 8}[config.variant]
        splits = -(-call.s // PLAN.split)
        idle = config.in_cluster and config.variant == "columns"  # CTAs of a cluster, less than half of them
        assert config.parts < 2 * splits if idle else config.parts <= splits, (call, config)
        assert config.value_parts * 64 <= call.h
        if config.parts > 1 and config.in_cluster:
            assert heads * config.parts * config.value_parts <= SMS, (call, config)  # all run at once
        if config.variant == "columns":
            assert columns_compared(call, dtype, PLAN)
            # Of each KV head, keys and shares of the values; 227 KiB an SM, some of them for the rest.
            kibibytes = 16 * (config.stages + config.value_stages // config.value_parts)
            ctas_an_sm = -(-heads * config.parts * config.value_parts // SMS)
            assert kibibytes * min(2, ctas_an_sm) <= 208, (call, config)
        seen.add((config.variant, config.second_launch))
    expected = {("tiles", False), ("split", False), ("split", True)}
    assert seen == expected | {("columns", False), ("columns", True)}


def test_equal_calls_get_equal_variants():
    calls = list(grid())[::37]
    before = [choose_config(call, BF16, PLAN) for call in calls]
    again = [choose_config(call, jnp.dtype("bfloat16"), AttentionPlan()) for call in reversed(calls)]
    assert before == again[::-1]
    assert len(set(before)) > 10  # the twin: it is no constant


def test_few_queries_share_out_the_splits_and_many_do_not():
    assert choice(1, 3, 4096) == AttentionConfig(variant="split", parts=8, value_stages=3)
    assert choice(1, 3, 1024).parts == 2  # no more CTAs than splits
    assert choice(8, 3, 4096).parts == 2
    assert choice(32, 3, 4096).parts == 1
    assert choice(1, 16, 4096).variant == "split"
    assert choice(1, 17, 4096).variant == "tiles"


def test_a_second_launch_fills_the_gpu_where_clusters_do_not():
    long = AttentionConfig(variant="split", parts=16, second_launch=True, value_stages=3)
    assert choice(1, 3, 32768) == long
    assert choice(3, 3, 32768).parts == 5
    for t in (1, 3):
        assert choice(1, t, 32768).second_launch
        assert not choice(1, t, 8192).second_launch  # too little to gain
        assert not choice(8, t, 32768).second_launch


def test_halves_of_the_values_go_where_splits_are_few_and_sms_idle():
    assert choice(1, 1, 1024).value_parts == 2
    assert choice(1, 1, 4096).value_parts == choice(8, 1, 1024).value_parts == 1


def test_what_runs_side_by_side_fits_the_cache():
    assert choice(1, 2048, 2048).kv_group == 8
    assert choice(1, 16384, 16384).kv_group == 2
    assert choice(1, 262144, 262144).kv_group == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "other"}, "variant='other' must be 'tiles', 'split' or 'columns'"),
        ({"variant": "split", "parts": 3}, "parts=3 must be 1, 2, 4 or 8 as a cluster"),
        ({"variant": "columns", "parts": 16}, "parts=16 .* or 2 to 132 with second_launch"),
        ({"variant": "split", "parts": 1, "second_launch": True}, "2 to 132 with second_launch"),
        ({"variant": "columns", "parts": 133, "second_launch": True}, "parts=133"),
        ({"variant": "split", "value_stages": 1}, "value_stages=1 must be at least 2"),
        ({"variant": "tiles", "parts": 2}, "parts=2 must be 1"),
        ({"variant": "tiles", "stages": 1}, "stages=1 and value_stages=2 must be at least 2"),
        ({"variant": "columns", "stages": 1}, "stages=1 and value_stages=2 must be at least 2"),
        ({"variant": "tiles", "kv_group": 0}, "kv_group=0 at least 1"),
        (
            {"variant": "split", "value_parts": 2},
            "value_parts=2 of variant='split' must be 1; 'columns' takes 1 or 2",
        ),
        ({"variant": "columns", "value_parts": 3}, "value_parts=3 of variant='columns'"),
    ],
)
def test_a_variant_that_cannot_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**fields)
