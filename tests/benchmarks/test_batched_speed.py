"""`benchmarks/batched_speed.py`, tried on the CPU."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import batched_speed


def test_a_dry_run_measures_and_compares_each_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert batched_speed.main(["--dry", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == list(batched_speed.DRY)
    assert all(row["differ"] == 0 and row["us"].keys() == {"chosen", "turns", "plain"} for row in rows)


def test_bits_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = batched_speed.tree_matmul

    def wrong(x, w, **options):
        return ours(x, w, **options) * (1 + jnp.bfloat16(0.01) * (x.ndim == 3))

    monkeypatch.setattr(batched_speed, "tree_matmul", wrong)
    assert batched_speed.main(["--dry"]) == 1


def test_what_finds_no_time_is_left_and_said(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert batched_speed.main(["--dry", "--limit", "0", "--out", str(out)]) == 0
    assert all(row["left"] for row in json.loads(out.read_text())["rows"])
