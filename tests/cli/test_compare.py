"""`tbik-jax compare`: what it counts, which promise it checks, its plot; with a `generate` that is made up."""

import numpy as np
import pytest

from tbik_jax.cli import compare
from tbik_jax.generation import GenerateOutput


@pytest.fixture
def outputs(monkeypatch):
    """Replaces `generate`: outputs[numerics](tp, batch) says by how much log-probabilities are off, and tokens."""
    wrong = {}

    def generate(_, prompts, *, mesh, max_new_tokens, sampling, numerics):
        off, other = wrong.get(numerics, lambda tp, batch: (0, False))(mesh.shape["tp"], len(prompts))
        tokens, logprobs = [], []
        for ids in prompts:
            row = (np.arange(max_new_tokens) + sum(ids)).astype(np.int32)
            row[3:] += 7 * other
            tokens.append(row)
            logprobs.append((np.full(max_new_tokens, -1.0) + off).astype(np.float32))
        return GenerateOutput(tokens, logprobs)

    monkeypatch.setattr(compare, "generate", generate)
    return wrong


LINE = "compare synthetic --mesh tp=1 --mesh tp=2 --batch 1 --batch 2 --max-new-tokens 6"


def results(found):
    return {row["numerics"]: row for row in found["results"]}


def test_equal_outputs_keep_every_promise(run, run_json, outputs):
    found = run_json(LINE)
    rows = results(found)
    assert list(rows) == ["invariant", "batch_invariant", "plain"]
    assert all(row["same_bits"] and row["runs"] == 4 for row in rows.values())
    assert [row["promise_kept"] for row in rows.values()] == [True, True, None]
    assert found["prompts"] == 3 and rows["plain"]["distinct_outputs"] == [1, 1, 1]
    assert "plain numerics did not differ either" in run(LINE).stderr


def test_a_bit_of_invariant_numerics_breaks_the_promise(run, run_json, outputs):
    outputs["invariant"] = lambda tp, batch: (1e-7 * (tp == 2), False)
    row = results(run_json(LINE, status=1))["invariant"]
    assert row["promise_kept"] is False and row["first_diverging_token"] is None
    assert 0 < row["largest_probability_difference"] < 1e-6 and row["mean_distinct_outputs"] == 1
    result = run(LINE)
    assert result.exit_code == 1 and "BROKEN" in result.stdout and "run `tbik-jax verify`" in result.stderr


def test_batch_invariant_numerics_may_follow_tp_and_not_the_batch(run_json, outputs):
    outputs["batch_invariant"] = lambda tp, batch: (0, tp == 2)
    row = results(run_json(LINE))["batch_invariant"]
    assert row["promise_kept"] and not row["same_bits"]
    assert row["first_diverging_token"] == 3 and row["distinct_outputs"] == [2, 2, 2]
    outputs["batch_invariant"] = lambda tp, batch: (0, batch == 2)
    assert results(run_json(LINE, status=1))["batch_invariant"]["promise_kept"] is False


def test_plain_numerics_promise_nothing(run_json, outputs, run):
    outputs["plain"] = lambda tp, batch: (0.01 * batch, tp == 2)
    row = results(run_json(LINE))["plain"]
    assert row["promise_kept"] is None and row["mean_distinct_outputs"] == 2
    assert "2.00 (max 2)" in run(LINE).stdout


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot(run, outputs, tmp_path, ending):
    outputs["plain"] = lambda tp, batch: (0.01 * batch, tp == 2)
    file = tmp_path / f"plot.{ending}"
    result = run(f"{LINE} --plot {file}")
    assert result.exit_code == 0, result.stderr
    assert file.stat().st_size > 5000 and f"plot: {file}" in result.stderr


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("--mesh tp=1 --batch 2", "one mesh and one batch size give nothing to compare"),
        ("--plot x.bmp", "ends in none of .png, .svg, .pdf"),
        ("--plot {tmp}/no/x.png", "there is no folder"),
        ("--prompts {tmp}/none.txt", "cannot be read as text"),
        ("--numerics exact", "'exact' is not one of"),
    ],
)
def test_mistakes(run, outputs, tmp_path, rest, message):
    result = run(f"compare synthetic {rest.format(tmp=tmp_path)}")
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_by_default_the_meshes_that_fit(run_json, outputs):
    found = run_json("compare synthetic a b c d e f g h")
    shapes = {(c["mesh"]["data"], c["mesh"]["tp"]) for c in found["configurations"]}
    assert shapes == {(1, 1), (1, 2), (1, 4), (1, 8), (3, 2)}
    assert {c["batch"] for c in found["configurations"]} == {1, 3, 8}
