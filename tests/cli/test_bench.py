"""`tbik-jax bench`: its table, its JSON, and how many rows there are. What is timed runs in test_docs.py."""

import pytest

from tbik_jax.bench import tables
from tbik_jax.cli import bench

ROWS = [
    tables.Row(table="matmul", what="qkv, M=1", invariant_us=10.0, plain_us=5.0),
    tables.Row(table="matmul", what="qkv, M=8", invariant_us=10.0, plain_us=20.0),
    tables.Row(table="decode", what="step", invariant_us=8.0, plain_us=10.0),
]


def test_the_ratio_is_plain_over_invariant(run, run_json, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: iter(ROWS))
    result = run("bench")
    assert result.exit_code == 0 and "CPU, by the host's clock: references" in result.stdout
    mean = [line for line in result.stdout.splitlines() if "geometric mean" in line]
    assert "1.00" in mean[0] and "1.25" in mean[1]
    found = run_json("bench")
    assert [row["ratio"] for row in found["rows"]] == [0.5, 2.0, 1.25]
    assert found["environment"]["platform"] == "cpu" and found["clock"].startswith("CPU")


@pytest.mark.parametrize("sizes", [tables.Sizes.for_cpu(), tables.Sizes.for_gpu("8B", 4)])
def test_as_many_rows_as_were_announced(monkeypatch, sizes):
    times = {"invariant_us": 1.0, "plain_us": 1.0}
    monkeypatch.setattr(tables, "_time", lambda *_: times)
    monkeypatch.setattr(tables, "_random_model", lambda *_: None)
    monkeypatch.setattr(tables.Engine, "create", lambda *_: None)
    monkeypatch.setattr(tables, "_prepare", lambda *_: None)
    monkeypatch.setattr(tables, "_step_times", lambda *_: times)
    for chosen in (tables.TABLES, ("decode",), ("attention", "matmul")):
        rows = list(tables.measure(chosen, sizes))
        assert len(rows) == tables.count(chosen, sizes)
        assert {row.table for row in rows} == set(chosen) and len({row.what for row in rows}) == len(rows)


def test_mistakes(run):
    for line, message in (
        ("bench matmull", "there is no table 'matmull'"),
        ("bench --mesh tp=16", "mesh axis tp=16"),
    ):
        result = run(line)
        assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_an_unknown_size():
    with pytest.raises(ValueError, match=r"no dense Qwen3 of size '9B'; use one of 0\.6B"):
        tables.Sizes.for_gpu("9B", 4)


def test_a_decode_step_is_timed_by_turns():
    class Run:
        def __init__(self):
            self.limits, self.state = [], type("State", (), {"token": 0})

        def advance(self, limit):
            self.limits.append(limit)

    runs = {"invariant": Run(), "plain": Run()}
    times = tables._step_times(runs, 4)
    assert set(times) == {"invariant_us", "plain_us"} and all(us > 0 for us in times.values())
    assert runs["plain"].limits == [4, 8, 12, 16]
