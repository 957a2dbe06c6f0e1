"""The command bisect: sides, traces in files, exit status, JSON; the runs themselves are tests/bisect's."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tbik_jax.bench.environment import environment
from tbik_jax.bisect import Op, Trace, load_trace
from tbik_jax.cli import app
from tbik_jax.cli import bisect as module
from tbik_jax.cli.bisect import parse_side


def trace(numerics="invariant", tp=1, wrong=0.0):
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    value[1, 2] += wrong
    ops = (Op(name="layer 0/o_proj", op="o_proj", layer=0, dtype="float32", shape=(4,)),)
    return Trace(
        kind="model",
        label=f"{numerics}, tp={tp}",
        numerics=numerics,
        tp=tp,
        environment=environment(),
        faithful=True,
        ops=ops,
        values={"layer 0/o_proj": value},
        sequences=((1, 2), (3, 4, 5)),
    )


@pytest.fixture
def run(monkeypatch):
    """Runs the command with traces that nobody computes: what tp=4 gives is wrong in one element."""
    asked = []

    def trace_model(model, sequences, configuration, *, keep, check):
        asked.append((configuration, keep, check, [len(each) for each in sequences]))
        tp = configuration.mesh.shape["tp"]
        return trace(configuration.numerics, tp, wrong=0.25 if tp == 4 else 0.0)

    monkeypatch.setattr(module, "trace_model", trace_model)
    result = lambda *arguments: CliRunner().invoke(app, ["bisect", *map(str, arguments)])  # noqa: E731
    result.asked = asked
    return result


def test_a_broken_promise_is_exit_status_1_and_no_promise_is_none(run):
    broken = run("tp=1", "tp=4")
    assert broken.exit_code == 1 and "first op that differs: layer 0/o_proj" in broken.output, broken.output
    plain = run("tp=1,numerics=plain", "tp=4,numerics=plain")
    assert plain.exit_code == 0 and "1 of 12 elements" in plain.output
    same = run("tp=1", "tp=2,batch=3")
    assert same.exit_code == 0 and "all 1 ops have the same bits" in same.output


def test_json_is_all_that_is_written(run):
    result = run("tp=1", "tp=4", "--json", "--random", "4,2", "--keep", "fingerprints", "--no-check")
    data = json.loads(result.stdout)
    assert result.exit_code == 1 and data["broken"] and data["first"]["differing"] == 1
    assert data["first"]["at"] == [1, 0] and data["left"] == "invariant, tp=1"
    assert [each[1:] for each in run.asked] == [("fingerprints", False, [4, 2])] * 2


def test_a_trace_is_kept_and_compared_later(run, tmp_path):
    file = tmp_path / "left.trace"
    assert run("tp=4", "--save", file).exit_code == 0
    assert load_trace(file).tp == 4 and len(run.asked) == 1
    found = run(file, "tp=1", "--plot", tmp_path / "a.png")
    assert found.exit_code == 1 and len(run.asked) == 2 and (tmp_path / "a.png").is_file()
    assert run(file, file).exit_code == 0 and len(run.asked) == 2
    elsewhere = dataclasses.replace(trace(wrong=0.25), environment=environment() | {"device": "NVIDIA H200"})
    elsewhere.save(tmp_path / "right.trace")
    other = run(tmp_path / "right.trace", "tp=1")
    assert other.exit_code == 0 and "other machines or versions" in other.output


def test_two_runs_of_one_configuration_are_two(run):
    assert run("tp=1", "tp=1").exit_code == 0 and len(run.asked) == 2


def test_sides_are_read():
    side = parse_side("tp=2, data=3,numerics=batch-invariant,batch=8,chunk=1")
    assert dict(side.mesh.shape) == {"data": 3, "fsdp": 1, "tp": 2}
    assert (side.numerics, side.batch_size, side.chunk) == ("batch_invariant", 8, 1)
    assert parse_side("numerics=plain").mesh.size == 1 and parse_side("batch=2").numerics == "invariant"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tp=1",), "nothing to compare"),
        (("tp=1", "missing.trace"), "is no file, and no list such as"),
        (("tp=1", "rows=3"), "names 'rows', which is none of"),
        (("tp=1", "tp=2,tp=4"), "names 'tp', twice"),
        (("tp=1", "tp=3"), "use tp=1, 2, 4 or 8"),
        (("tp=1", "tp=16"), "tp=16"),
        (("tp=1", "numerics=exact"), "numerics=exact is unknown"),
        (("tp=1", "batch=x"), "must be a whole number of at least 1"),
        (("tp=1", "batch=0"), "must be a whole number of at least 1"),
        (("tp=1", "tp=2", "--random", "1"), "no list of whole numbers of at least 2"),
        (("tp=1", "tp=2", "--save", "a"), "--save is given 1 times and 2 sides are run"),
        (("tp=1", "tp=2", "--model", "/nowhere/model"), "/nowhere/model"),
    ],
)
def test_mistakes_are_exit_status_2_and_a_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_help_has_an_example(run):
    assert "Example: tbik-jax bisect" in run("--help").output
