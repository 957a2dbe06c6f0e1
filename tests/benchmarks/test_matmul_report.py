"""What is concluded from matmul times, on made-up ones."""

import pytest

from benchmarks.matmul_report import plot, print_table, ratio, summarize


def point(layer, tp, m, us, leaves=None):
    row = layer in ("o_proj", "down_proj")
    leaves = leaves or (8 // tp if row else 1)
    return {"layer": layer, "model": "8B", "tp": tp, "m": m, "row_parallel": row, "leaves": leaves, "us": us}


POINTS = [
    point("o_proj", 1, 1, {"dot": 8.0, "tree": 4.0, "chain": 2.0}),
    point("o_proj", 2, 128, {"dot": 8.0, "tree": 16.0, "chain": 8.0}),
    point("down_proj", 8, 64, {"dot": 9.0, "tree": 10.0}),
    point("o_proj", 1, 4096, {"dot": 92.0, "tree": 100.0, "chain": 92.0}),
    point("o_proj", 2, 4096, {"dot": 90.0, "tree": 100.0, "chain": 90.0}),
    point("qkv", 1, 512, {"dot": 10.0, "tree": 10.0, "triton": 20.0}),
    point("qkv", 4, 8192, {"dot": 9.5, "tree": 10.0, "triton": 20.0}),
]


def summary(variant, group):
    (row,) = [r for r in summarize(POINTS) if (r["variant"], r["group"]) == (variant, group)]
    return row


def test_groups_of_the_tree_and_their_targets():
    small = summary("tree", "row, M <= 128")
    assert small["geomean"] == pytest.approx((2.0 * 0.5 * 0.9) ** (1 / 3), abs=1e-4)
    assert (small["points"], small["min"], small["min_at"]) == (3, 0.5, "o_proj 8B TP 2 M 128")
    assert (small["target_geomean"], small["target_min"], small["met"]) == (1.0, 0.85, False)
    assert summary("tree", "row, M >= 1024, TP 1")["met"]  # 0.92 of 0.90
    assert not summary("tree", "row, M >= 1024, TP 2 to 8")["met"]  # 0.90 of 0.95
    assert summary("tree", "column, all M")["met"]
    assert summary("tree", "all")["points"] == len(POINTS)


def test_a_chain_that_is_the_tree_counts_as_one():
    assert ratio(POINTS[2], "chain") == ratio(POINTS[2], "tree") == 0.9
    chain = summary("chain", "row, M <= 128")
    assert (chain["points"], chain["geomean"]) == (3, pytest.approx((4.0 * 1.0 * 0.9) ** (1 / 3), abs=1e-4))
    assert "met" not in chain


def test_a_variant_that_failed_is_left_out():
    failed = point("o_proj", 1, 1, {"dot": 8.0, "chain": 2.0})
    assert ratio(failed, "tree") is None
    assert [r["variant"] for r in summarize([failed]) if r["group"] == "all"] == ["chain"]
    assert summary("triton", "all")["geomean"] == pytest.approx((0.5 * 0.475) ** 0.5, abs=1e-4)


def test_table_and_plot(tmp_path, capsys):
    print_table(POINTS, summarize(POINTS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tree", "/", "jnp.dot", "1", "64", "128", "512", "4096", "8192"]
    assert lines[1].split() == ["o_proj", "8B", "TP", "1", "2.00", "-", "-", "-", "0.92", "-"]
    assert any("MISSED" in line for line in lines) and any(" met " in line for line in lines)
    plot(POINTS, tmp_path / "plot.png", "made up")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
