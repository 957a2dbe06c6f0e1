"""The speed table's bookkeeping: what a resumed run keeps, and how results are written."""

import json

import jax
import pytest

from benchmarks import gpu_pool, matmul_speed
from benchmarks.matmul_shapes import Layer
from benchmarks.matmul_speed import Options, Report, dump, measure

LAYER = Layer(layer="qkv", model="1.7B", tp=2, k=64, n=64, leaves=1)


@pytest.fixture
def point(monkeypatch):
    """A point measured with a plain product in the kernel's place."""
    kernel = lambda x, w, *, out_dtype, **_: (x @ w).astype(out_dtype)  # noqa: E731
    monkeypatch.setattr(matmul_speed, "tree_matmul_mosaic_gpu", kernel)
    with jax.default_device(jax.devices("cpu")[0]):
        return measure(LAYER, 3, Options(dry=True))


def test_a_point_says_what_was_measured(point):
    assert (point["layer"], point["tp"], point["m"], point["k"], point["n"]) == ("qkv", 2, 3, 64, 64)
    assert set(point["us"]) == {"tree", "dot"} == set(point["tflops"]) == set(point["gb_per_s"])
    assert point["ratio"]["tree"] == pytest.approx(point["us"]["dot"] / point["us"]["tree"], abs=1e-4)
    assert point["errors"] == {} and point["layout"] == "[K, N]" and point["config"]
    moved, flops = 2 * (3 * 64 + 64 * 64 + 3 * 64), 2 * 3 * 64 * 64
    assert point["gb_per_s"]["dot"] == pytest.approx(moved / point["us"]["dot"] / 1e3, abs=0.06)
    assert point["tflops"]["dot"] == pytest.approx(flops / point["us"]["dot"] / 1e6, abs=0.006)


def test_a_variant_that_fails_does_not_take_the_others_with_it(monkeypatch):
    def kernel(*args, **kwargs):
        raise ValueError("no such tile")

    monkeypatch.setattr(matmul_speed, "tree_matmul_mosaic_gpu", kernel)
    with jax.default_device(jax.devices("cpu")[0]):
        found = measure(LAYER, 3, Options(dry=True))
    assert set(found["us"]) == {"dot"} and found["errors"] == {"tree": "ValueError: no such tile"}


def test_a_resumed_run_keeps_points_of_the_same_kernel_and_configuration(
    tmp_path, point, capsys, monkeypatch
):
    first = Report(tmp_path / "first.json", None, Options(dry=True))
    first.add(gpu_pool.Outcome(job=gpu_pool.Job(measure, (LAYER, 3, Options(dry=True))), value=point))
    first.finish(1)
    assert json.loads((tmp_path / "first.json").read_text())["missing"] == 0

    second = Report(tmp_path / "second.json", tmp_path / "first.json", Options(dry=True))
    assert second.keep(LAYER, 3) and not second.keep(LAYER, 4)
    assert second.data["points"] == [json.loads(json.dumps(point))]
    monkeypatch.setattr(matmul_speed, "_configs", lambda *_: {"config": {"tile_n": 1}})
    assert not Report(tmp_path / "x.json", tmp_path / "first.json", Options(dry=True)).keep(LAYER, 3)
    other = Report(tmp_path / "x.json", tmp_path / "first.json", Options(dry=True, cublas=True))
    assert not other.keep(LAYER, 3) and "measuring all again" in capsys.readouterr().out


def test_a_failed_job_is_recorded_and_shown(tmp_path, capsys):
    report = Report(tmp_path / "out.json", None, Options(dry=True))
    job = gpu_pool.Job(measure, (LAYER, 3, Options(dry=True)))
    report.add(gpu_pool.Outcome(job=job, error="the worker ended with SIGSEGV", note="timing tree"))
    report.finish(1)
    (failure,) = json.loads((tmp_path / "out.json").read_text())["failures"]
    assert (failure["m"], failure["while"]) == (3, "timing tree")
    assert "SIGSEGV" in capsys.readouterr().out


def test_dumped_lists_have_a_line_an_entry():
    data = {"a": 1, "b": [{"x": 1}, {"x": 2}], "c": [], "d": {"e": None}}
    text = dump(data)
    assert json.loads(text) == data
    assert len(text.splitlines()) == 2 + 3 + 4
