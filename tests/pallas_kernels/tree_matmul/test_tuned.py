"""The tables of tuned configurations: what they answer, and that a malformed one says where."""

import dataclasses
import json

import pytest

from tbik_jax.pallas_kernels.tree_matmul import tuned
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import MosaicConfig

A, B = {"tile_n": 64, "snake_rows": False}, {"tile_n": 128, "snake_rows": True}
TABLE: tuned.Table = {
    (4096, 4096, 8, False): ((16, A), (64, None), (128, B)),
    (4096, 4096, 8, True): ((1, B),),
    (1024, 4096, 1, False): ((8192, A),),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    tuned.write_table(TABLE, tmp_path / "nvidia_h200.json")
    yield tmp_path
    tuned._table.cache_clear()


def find(m, shape=(4096, 4096, 8, False), device="NVIDIA H200"):
    k, n, leaves, transpose_rhs = shape
    return tuned.lookup(device, m, n, k, leaves, transpose_rhs)


def test_a_number_of_rows_takes_the_next_larger_entry(folder):
    assert [find(m) for m in (1, 16, 17, 64, 65, 128)] == [A, A, None, None, B, B]


def test_more_rows_than_any_entry_take_the_last_one(folder):
    assert [find(m) for m in (129, 8192, 10**9)] == [B, B, B]
    tuned.write_table({(64, 64, 1, False): ((16, A), (64, None))}, folder / "other.json")
    assert [find(m, (64, 64, 1, False), "other") for m in (16, 64, 65)] == [A, None, None]


def test_every_part_of_the_shape_counts(folder):
    assert find(1, (4096, 4096, 8, True)) == B
    assert find(1, (4096, 4096, 4, False)) is None
    assert find(1, (4096, 1024, 1, False)) is None
    assert find(1, (1024, 4096, 1, False)) == A


def test_a_device_without_a_table_has_no_entries(folder):
    assert find(1, device="NVIDIA H100 80GB HBM3") is None
    assert tuned.table_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"


def test_an_answer_cannot_be_changed_by_its_reader(folder):
    find(1)["tile_n"] = 0
    assert find(1) == A


def test_a_table_is_written_sorted_with_a_line_for_each_shape(folder):
    path = folder / "nvidia_h200.json"
    assert tuned.read_table(path) == TABLE
    assert len(path.read_text().splitlines()) == len(TABLE) + 2
    rows = json.loads(path.read_text())
    assert [row["k"] for row in rows] == [1024, 4096, 4096]
    tuned.write_table({}, path)
    assert tuned.read_table(path) == {}


GOOD = '{"k": 64, "n": 16, "leaves": 1, "transpose_rhs": false, "configs": [[1, {"tile_n": 64}]]}'


@pytest.mark.parametrize(
    ("lines", "line", "why"),
    [
        ([GOOD], 1, "must be a JSON array"),
        (["[", GOOD], 1, "must be a JSON array"),
        (["[", GOOD, GOOD, "]"], 2, "needs a comma"),
        (["[", GOOD + ",", "]"], 2, "needs a comma"),
        (["[", GOOD + ",", GOOD, "]"], 3, "a second time"),
        (["[", GOOD + ",", "", "{", "]"], 4, "Expecting"),
        (["[", GOOD.replace('"k"', '"K"'), "]"], 2, "an object of k, n,"),
        (["[", GOOD.replace('"n": 16', '"n": true'), "]"], 2, "n=True must be whole"),
        (["[", GOOD.replace('"leaves": 1', '"leaves": 3'), "]"], 2, "leaves=3 must be"),
        (["[", GOOD.replace("false", "0"), "]"], 2, "transpose_rhs=0 true or false"),
        (["[", GOOD.replace('[[1, {"tile_n": 64}]]', "[]"), "]"], 2, "must be a list of"),
        (["[", GOOD.replace('[1, {"tile_n": 64}]', "[1]"), "]"], 2, "most rows, configuration"),
        (["[", GOOD.replace('[1, {"tile_n": 64}]', "[8, null], [8, null]"), "]"], 2, "entry for 8 rows"),
        (["[", GOOD.replace("64}", '"64"}'), "]"], 2, "must be null or an object of whole"),
    ],
)
def test_a_malformed_table_names_its_line(tmp_path, lines, line, why):
    path = tmp_path / "some.json"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=why) as error:
        tuned.read_table(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_shipped_tables_hold_configurations():
    fields = {field.name for field in dataclasses.fields(MosaicConfig)} - {
        "gated"
    }  # which the product decides
    for path in tuned.FOLDER.glob("*.json"):
        for key, entries in tuned.read_table(path).items():
            for most, config in entries:
                # Lines that were written before a cut last round was known leave it out.
                where = f"{path.name} {key} up to {most} rows"
                assert config is None or set(config) | {"last_split"} == fields, where
                assert config is None or MosaicConfig(**config), where
