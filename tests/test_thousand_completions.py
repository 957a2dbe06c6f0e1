"""The famous experiment on a tiny model: one completion with invariant numerics, several with plain."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import tbik_jax
from tbik_jax import steps
from tbik_jax.program import Program
from tests.models_small import small_model

FILE = Path(__file__).parent.parent / "examples" / "thousand_completions.py"


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("thousand_completions", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["thousand_completions"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["thousand_completions"]


@pytest.fixture
def run(example, monkeypatch):
    """Runs the example with a smaller model than its small one."""
    monkeypatch.setattr(example, "make_model", lambda _, mesh: tbik_jax.shard_model(small_model(), mesh))
    app = typer.Typer()
    app.command()(example.main)
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])


# A prompt of one token needs no prefill, and each size is a program to compile.
SMALL = ("--batches", "3", "--prompt-tokens", 1, "--new-tokens", 16, "--completions", 12)


def test_one_completion_with_invariant_numerics_and_others_with_plain(run, tmp_path, monkeypatch):
    steps._steps.cache_clear()  # other tests may have compiled the same
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    compiled: list[object] = []
    compile_now = Program._compile
    monkeypatch.setattr(
        Program, "_compile", lambda self, shapes: compiled.append(shapes) or compile_now(self, shapes)
    )
    result = run(*SMALL, "--mesh", "tp=1", "--mesh", "data=1,tp=2", "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    invariant, plain = data["results"]
    assert invariant["numerics"] == "invariant" and invariant["completions"] == plain["completions"] == 12
    assert invariant["distinct_bits"] == 1 and invariant["prefixes"] == [1] * 16 and invariant["fingerprint"]
    assert plain["distinct_bits"] > 1 and plain["first_logprob_that_differs"] is not None
    assert {name.split(",")[0] for name in plain["by_source"]} == {"1 device", "tp=2"}
    assert {name.split()[-1] for name in plain["by_source"]} == {"3"}
    assert len(compiled) == 2 * 2  # generate finds the programs that were started beforehand
    assert data["environment"]["versions"]["jax"] and plot.read_bytes()[:4] == b"\x89PNG"


def test_one_bit_of_one_invariant_completion_is_a_failure(run, example, monkeypatch):
    calls = []

    def generate(model, prompts, **keywords):
        logprobs = [np.full(16, -1.5, np.float32) for _ in prompts]
        calls.append(len(prompts))
        if len(calls) == 3:
            logprobs = [np.nextafter(row, np.float32(0)) for row in logprobs]
        tokens = [np.arange(16, dtype=np.int32) for _ in prompts]
        return tbik_jax.GenerateOutput(tokens, logprobs)

    monkeypatch.setattr(example.tbik_jax, "generate", generate)
    monkeypatch.setattr(example, "start_compiling", lambda *_: None)
    result = run(*SMALL, "--mesh", "tp=1", "--numerics", "invariant")
    assert result.exit_code == 1 and "1 distinct among 12 completions, 2 with the bits" in result.output


def test_batches_hold_the_prompt_as_often_as_asked_at_random_places(example):
    settings = example.Settings(
        completions=0, batches=(1, 4, 9), prompt_tokens=3, new_tokens=1, seed=0, scan_layers=None
    )
    rows = list(example.plan(settings, 100, 0))
    assert sum(int(each.sum()) for each in rows) == 100 and {len(each) for each in rows} == {1, 4, 9}
    assert all(each.any() for each in rows) and not all(each.all() for each in rows)
    assert not all(each[0] for each in rows)
    again = list(example.plan(settings, 100, 0))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    other = list(example.plan(dataclasses.replace(settings, seed=1), 100, 0))
    assert [each.tolist() for each in rows] != [each.tolist() for each in other]


def test_the_summary_says_where_completions_part(example):
    found = example.Completions()
    for tokens, size in (([1, 2, 3], 1), ([1, 2, 4], 8), ([1, 5, 3], 8), ([1, 2, 3], 8)):
        found.tokens.append(np.asarray(tokens, np.int32))
        found.logprobs.append(np.zeros(3, np.float32))
        found.sources.append(("tp=1", size))
    found.logprobs[1][0] = -0.0
    summary = found.summary("plain")
    assert (summary["distinct"], summary["distinct_bits"], summary["counts"]) == (3, 3, [2, 1, 1])
    assert summary["prefixes"] == [1, 2, 3]  # 3 after 5 is not 3 after 2
    assert summary["first_token_that_differs"] == 1 and summary["first_logprob_that_differs"] == 0
    assert summary["by_source"] == {"tp=1, batch 1": {0: 1}, "tp=1, batch 8": {0: 1, 1: 1, 2: 1}}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batches", "1,x", "no list of whole numbers"),
        ("--mesh", "tp", "no list such as data=2,tp=4"),
        ("--mesh", "tp=3", "use tp=1, 2, 4 or 8"),
        ("--numerics", "exact", "--numerics exact is unknown"),
    ],
)
def test_mistakes_are_told_in_a_line(run, option, value, message):
    result = run(option, value)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_a_size_that_was_never_published_is_refused(example):
    with pytest.raises(ValueError, match="no dense Qwen3 of size '7B'"):
        example.make_model("qwen3-7b", tbik_jax.make_mesh())
