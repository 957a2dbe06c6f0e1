"""The demonstration: what it concludes, its exit status, and its errors."""

import dataclasses

import numpy as np
import pytest
from typer.testing import CliRunner

from tbik_jax import demo, synthetic
from tbik_jax.divergence import judge
from tbik_jax.synthetic_tokenizer import write_tokenizer


def _output(tokens, logprobs):
    return np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32)


def test_judge_counts_outputs_and_measures_probabilities_up_to_where_they_part():
    a = _output([1, 2, 3], [-1.0, -2.0, -3.0])
    b = _output([1, 2, 4], [-1.0, -2.5, -0.1])
    verdict = judge([[a, a], [a, b]])
    assert (verdict.configurations, verdict.distinct, verdict.same_bits) == (2, [1, 2], False)
    assert verdict.divergence == pytest.approx(np.exp(-2.0) - np.exp(-2.5))
    assert judge([[a, a, a]]).same_bits and judge([[a, a]]).divergence == 0


def test_judge_sees_a_single_bit():
    a, b = _output([1], [-0.0]), _output([1], [0.0])
    verdict = judge([[a, b]])
    assert not verdict.same_bits and verdict.distinct == [1] and verdict.divergence == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    config = synthetic.small_config(num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    synthetic.write_checkpoint(folder, config)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    """Runs the demo on two meshes and two batch sizes."""
    monkeypatch.setattr(demo, "_MESHES", ({"tp": 1}, {"data": 3, "tp": 2}))
    monkeypatch.setattr(demo, "_BATCHES", (1, 2))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\n\nanother prompt\n")
    import typer

    app = typer.Typer()
    app.command()(demo.main)

    def invoke(*arguments):
        given = {"--model": str(checkpoint), "--prompts": str(prompts), "--new-tokens": "4"}
        given.update(zip(arguments[::2], arguments[1::2], strict=True))
        return CliRunner().invoke(app, [part for pair in given.items() for part in pair])

    return invoke


def test_the_demo_passes_and_repeats_its_fingerprint(run):
    first, second = run(), run()
    assert first.exit_code == 0, first.output
    assert "PASS" in first.output and "distinct" in first.output
    fingerprint = [line for line in first.output.splitlines() if "fingerprint" in line]
    assert fingerprint and fingerprint == [
        line for line in second.output.splitlines() if "fingerprint" in line
    ]


def test_the_demo_fails_when_invariant_outputs_differ(run, monkeypatch):
    generate = demo.generate

    def one_bit_off(*arguments, **keywords):
        out = generate(*arguments, **keywords)
        if keywords["mesh"].shape["tp"] == 2 and keywords["numerics"] == "invariant":
            logprobs = [np.nextafter(row, np.float32(0)) for row in out.logprobs]
            return dataclasses.replace(out, logprobs=logprobs)
        return out

    monkeypatch.setattr(demo, "generate", one_bit_off)
    result = run()
    assert result.exit_code == 1 and "FAIL" in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "/nowhere", "no tokenizer can be loaded"),
        ("--prompts", "/nowhere.txt", "cannot be read as text"),
    ],
)
def test_the_demo_reports_mistakes_in_one_line(run, option, value, message):
    result = run(option, value)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


def test_an_empty_prompt_file(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    result = run("--prompts", str(empty))
    assert result.exit_code == 2 and "holds no prompt" in result.output
