"""The tuner: which entries its measurements ask for, and that it throws out what has other bits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tune_matmul
from benchmarks.matmul_bits import reference_config
from benchmarks.matmul_shapes import Layer
from benchmarks.tune_matmul import Log, Task, config_name, table_of, tune, with_all_fields
from tbik_jax.bench import device_time

A, B = {"tile_n": 64}, {"tile_n": 128}


def point(m, gain, best, k=64):
    shape = {"k": k, "n": 32, "leaves": 1, "transpose_rhs": False, "m": m}
    return shape | {"best": best} | ({} if gain is None else {"gain": gain})


SHAPE = (64, 32, 1, False)


@pytest.fixture
def few_rows_counts(monkeypatch):
    monkeypatch.setattr(tune_matmul, "MS", (1, 16, 64, 128, 256, 1024, 4096))


def test_an_entry_serves_up_to_its_rows_and_only_where_it_is_faster(few_rows_counts):
    points = [
        point(1, 1.5, A),
        point(16, 1.01, B),
        point(64, 1.1, B),
        point(256, 1.3, B),
        point(1024, 1.0, A),
        point(4096, 1.2, A),
    ]
    assert table_of(points) == {SHAPE: ((1, A), (16, None), (256, B), (1024, None), (4096, A))}


def test_equal_neighbours_are_one_entry_and_the_rule_may_be_the_last(few_rows_counts):
    points = [point(64, 1.1, A), point(256, 1.0, B), point(1024, 1.01, B)]
    assert table_of(points) == {SHAPE: ((64, A), (1024, None))}


def test_up_to_one_tile_an_entry_serves_all_rows_above_the_next_smaller_measured_count(few_rows_counts):
    assert table_of([point(1, 1.5, A), point(128, 1.5, B)]) == {SHAPE: ((1, A), (128, B))}


def test_of_more_rows_those_that_were_not_measured_are_left_to_the_rule(few_rows_counts):
    points = [point(64, 1.5, A), point(1024, 1.5, B)]
    assert table_of(points) == {SHAPE: ((64, A), (256, None), (1024, B))}


def test_the_last_entry_is_that_of_the_most_measured_rows(few_rows_counts):
    assert table_of([point(256, 1.5, A)]) == {SHAPE: ((256, A),)}


def test_a_choice_of_the_rule_that_failed_is_replaced_and_a_shape_without_entries_is_left_out():
    points = [point(1, None, A), point(1, 1.0, A, k=128), point(1, None, None, k=256)]
    assert table_of(points) == {(64, 32, 1, False): ((1, A),)}


FIELDS = ["consumers", "tile_n", "tile_k", "stages"]
GOOD = {"consumers": 1, "tile_n": 64, "tile_k": 64, "stages": 2}


def measured(**changes):
    rows = [[list(GOOD.values()), 2.0, 1.5]]
    lists = {"best": GOOD, "default": GOOD, "rows": rows, "thrown_out": {}, "failed": {}}
    return point(16, 1.5, GOOD) | lists | changes


def test_a_point_from_before_a_field_was_known_has_its_default():
    wrong = {json.dumps(GOOD | {"stages": 3}): "1 of 2 differ"}
    found = with_all_fields(measured(thrown_out=wrong), FIELDS)
    config = reference_config(64, 1)
    fields = json.loads(config_name(config))
    assert fields["last_split"] == 1
    assert found["best"] == found["default"] == fields
    assert found["rows"] == [[list(fields.values()), 2.0, 1.5]]
    assert found["thrown_out"] == {config_name(dataclasses.replace(config, stages=3)): "1 of 2 differ"}
    assert with_all_fields(found, list(fields)) == found
    assert with_all_fields(measured(best=None), FIELDS)["best"] is None


@pytest.mark.parametrize("fields", [["warps", *FIELDS[1:]], FIELDS[1:]])
def test_a_point_with_unknown_or_missing_fields_is_refused(fields):
    with pytest.raises((TypeError, ValueError)):
        with_all_fields(measured(), fields)


def test_files_are_taken_over_if_their_fields_and_device_are_understood(tmp_path):
    def log(fields, device="cpu"):
        path = tmp_path / "earlier.json"
        environment = {"device": device}
        path.write_text(json.dumps({"environment": environment, "fields": fields, "points": [measured()]}))
        return Log(tmp_path / "out.json", [path])

    assert list(log(FIELDS).points) == [(64, 32, 1, False, 16)]
    with pytest.raises(ValueError, match=r"earlier\.json has fields .*'warps'.* measure again without it"):
        log(["warps", *FIELDS[1:]])
    with pytest.raises(ValueError, match="has device H200, not cpu"):
        log(FIELDS, "H200")


@pytest.fixture
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_a_configuration_with_other_bits_is_thrown_out_however_fast(monkeypatch, on_cpu):
    layer = Layer(layer="o_proj", model="8B", tp=4, k=128, n=64, leaves=2)
    good = reference_config(layer.k, layer.leaves)
    wrong = dataclasses.replace(good, stages=3)
    broken = dataclasses.replace(good, stages=4)
    real = tune_matmul.tree_matmul_mosaic_gpu

    def kernel(x, w, *, config, **kwargs):
        if config == broken:
            raise ValueError("does not fit")
        return real(x, w, config=config, **kwargs) + (config == wrong) * jnp.ones((), kwargs["out_dtype"])

    def compare(functions, sets, clock):
        return {
            name: device_time.Timing(us=index + 1.0, p10=1, p90=1, calls=1, kernels=1)
            for index, name in enumerate(functions)
        }

    monkeypatch.setattr(tune_matmul, "candidates", lambda layer, m: (good, wrong, broken))
    monkeypatch.setattr(tune_matmul, "tree_matmul_mosaic_gpu", kernel)
    monkeypatch.setattr(device_time, "screen", lambda f, *_: {name: len(f) - i for i, name in enumerate(f)})
    monkeypatch.setattr(device_time, "compare", compare)
    found = tune(Task(layer=layer, m=3, dry=True, skip=("{}",)))
    assert list(found["thrown_out"]) == [config_name(wrong)]
    assert found["failed"] == {config_name(broken): "ValueError: does not fit", "{}": "ended its worker"}
    assert found["best"] == found["default"] == json.loads(config_name(good))
    assert found["gain"] == 1.0
    assert json.loads(json.dumps(found)) == found
