"""The example's own loop: rollout and trainer on different meshes, and not one bit between them."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from flax import nnx
from rich.console import Console
from typer.testing import CliRunner

import tbik_jax
from tbik_jax import rl
from tests.helpers import assert_same_bits

FILE = Path(__file__).parent.parent / "examples" / "rl_grpo.py"


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("rl_grpo", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rl_grpo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rl_grpo"]


def _three_steps(example, numerics, rollout, trainer):
    """Of 8 samples each, with a reward that random parameters earn now and then: the log, and the parameters then."""
    settings = example.Settings(
        rollout_mesh=tbik_jax.make_mesh(**rollout),
        train_mesh=tbik_jax.make_mesh(**trainer),
        prompts=2,
        group_size=4,
        warmup=0,
        steps=3,
        learning_rate=1e-2,
    )
    run = example.Run(settings, numerics, seed=0)
    before = jax.device_get(jax.tree.leaves(nnx.state(run.model)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "reward", lambda prompt, tokens: float(tokens[0] % 3 == 0))
        records = list(run.reinforce())
    after = jax.device_get(jax.tree.leaves(nnx.state(run.model)))
    assert any((a != b).any() for a, b in zip(after, before, strict=True))  # it has learnt something
    return records, after


@pytest.fixture(scope="module")
def runs(example):
    meshes = {
        "invariant": ("invariant", {"tp": 4}, {"fsdp": 2, "tp": 2}),
        "elsewhere": ("invariant", {}, {"data": 2}),
        "plain": ("plain", {"tp": 4}, {"fsdp": 2, "tp": 2}),
    }
    return {name: _three_steps(example, *each) for name, each in meshes.items()}


@pytest.mark.parametrize("name", ["invariant", "elsewhere"])
def test_ratios_are_one_and_the_divergence_is_zero(runs, name):
    for record in runs[name][0]:
        assert record["tokens"] >= 8 and record["different"] == 0
        assert (record["max_abs"], record["min_ratio"], record["max_ratio"], record["kl"]) == (
            0.0,
            1.0,
            1.0,
            0.0,
        )


def test_plain_numerics_are_apart(runs):
    """The twin."""
    records, _ = runs["plain"]
    assert all(
        record["different"] > 4 and record["max_abs"] > 1e-4 and record["kl"] > 0 for record in records
    )
    assert all(record["min_ratio"] < 1 < record["max_ratio"] for record in records)


def test_the_curve_is_the_same_bits_on_another_pair_of_meshes(runs):
    kept = ("reward", "loss", "entropy", "tokens")
    (here, parameters), (there, others) = runs["invariant"], runs["elsewhere"]
    assert [[r[k] for k in kept] for r in here] == [[r[k] for k in kept] for r in there]
    assert_same_bits(parameters, others)
    assert {r["reward"] for r in here} - {0.0, 1.0}  # groups whose samples differ


def test_a_stale_rollout_ends_an_invariant_run(example, runs, monkeypatch):
    """Weights that are not handed over after the first step."""
    real, first = rl.hand_over, []

    def once(model, mesh):
        first.append(real(model, mesh))
        return first[0]

    monkeypatch.setattr(rl, "hand_over", once)
    with pytest.raises(rl.DivergenceError, match=r"sequence \d+ at position \d+ .*: rollout -.*, trainer -"):
        _three_steps(example, "invariant", {"tp": 4}, {"fsdp": 2, "tp": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--numerics", "invariant,plian"],
            "'plian' is unknown or there twice; use invariant, plain, batch_invariant",
        ),
        (["--numerics", "plain,plain"], "unknown or there twice"),
        (["--log", "kept.jsonl"], "it exists already; name another file"),
        (["--plot", "kept.jsonl"], "it exists already; name another file"),
        (["--log", "nowhere/new.jsonl"], "there is no folder nowhere"),
        (["--plot", "new.foo"], "is no image; use one of"),
        (["--train-mesh", "fsdp=2,fsdp=4"], "--train-mesh fsdp=2,fsdp=4 names an axis twice"),
        (["--rollout-mesh", "tp=3"], "tp=3"),
    ],
    ids=str,
)
def test_a_mistake_at_the_command_line_is_a_line_before_anything_is_done(
    example, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.jsonl").write_text("mine")
    monkeypatch.setattr(example, "Run", None)  # nothing is trained
    app = typer.Typer()
    app.command()(example.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
    assert (tmp_path / "kept.jsonl").read_text() == "mine"


def test_the_step_that_differs_is_logged_before_the_run_ends(example, tmp_path, monkeypatch):
    def reinforce(self):
        yield {"step": 1, "reward": 0.5, "kl": float("nan")}
        raise rl.DivergenceError("1 of 8 sampled tokens")

    run = types.SimpleNamespace(
        settings=types.SimpleNamespace(steps=2, warmup=0), numerics="invariant", seed=0, warm_up=lambda: 0.0
    )
    run.reinforce = lambda: reinforce(run)
    monkeypatch.setattr(example, "line", lambda record: "")
    records = []
    with pytest.raises(rl.DivergenceError):
        example.follow(run, Console(), tmp_path / "log.jsonl", records)
    [record] = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert record == {"step": 1, "reward": 0.5, "kl": None} and len(records) == 1


def test_the_loop_in_the_documentation_runs(example, runs, monkeypatch, capsys):
    """`runs` has compiled its rollout."""
    text = (FILE.parent.parent / "docs" / "rl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "max_new_tokens=512" in code and "group_size=8" in code
    code = code.replace("max_new_tokens=512", "max_new_tokens=4").replace("group_size=8", "group_size=4")

    def load(path, mesh):
        return tbik_jax.shard_model(example.Qwen3(example.CONFIG, rngs=nnx.Rngs(0)), mesh)

    monkeypatch.setattr(tbik_jax, "load", load)
    prompts = [example.encode("3+4="), example.encode("9+9=")]
    exec(code, {"steps": 2, "prompts": lambda index: prompts, "reward": lambda prompt, tokens: tokens[0] % 3})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(" 0.0 1.0 1.0 0.0") for line in lines)


def test_the_table_in_the_documentation_is_what_its_log_says():
    root = FILE.parent.parent
    text = (root / "docs" / "rl.md").read_text()
    log = [
        json.loads(line) for line in (root / "benchmarks/results/rl_grpo_cpu.jsonl").read_text().splitlines()
    ]
    for name in ("invariant", "batch_invariant", "plain"):
        rows = [row for row in log if row["numerics"] == name]
        assert len(rows) == 3 * 50
        different, tokens = (sum(row[key] for row in rows) for key in ("different", "tokens"))
        ratios = min(row["min_ratio"] for row in rows), max(row["max_ratio"] for row in rows)
        apart, kl = max(row["max_abs"] for row in rows), np.mean([row["kl"] for row in rows])
        early, late = (
            np.mean([row["reward"] for row in rows if first <= row["step"] <= last])
            for first, last in ((1, 5), (41, 50))
        )
        if name == "invariant":
            assert (different, apart, kl, *ratios) == (0, 0, 0, 1, 1)
            middle = f"**0** of {tokens} | **0** | **1** | **0**"
        else:
            middle = f"{different} of {tokens} | {apart:.3f} | {ratios[0]:.2f} .. {ratios[1]:.2f} | {kl:.1e}"
        assert f"| {name} | {middle} | {early:.2f} | {late:.2f} |" in text


def test_the_log_makes_a_plot(example, runs, tmp_path):
    records = [json.loads(json.dumps(record)) for name in ("invariant", "plain") for record in runs[name][0]]
    example.draw(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp", "--train-mesh tp is no list such as data=2,tp=4"),
        ("pp=2", "axis pp is unknown; use data, fsdp and tp"),
        ("fsdp=16", "needs 16 devices and 8 are there"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(example, text, message):
    with pytest.raises(ValueError, match=message):
        example.parse_mesh("--train-mesh", text, jax.devices())


def test_problems_have_their_answers(example):
    assert example.answer("9+8=") == "17\n"
    assert example.reward(example.encode("3+4="), example.encode("7\n")) == 1
    assert example.reward(example.encode("3+4="), example.encode("7")) == 0
    batch = example.supervised_batch(np.random.default_rng(0), 8)
    text = "".join(map(chr, batch["tokens"][0])).rstrip("\0")
    assert text == text.split("=")[0] + "=" + example.answer(text.split("=")[0] + "=")
    assert batch["weights"][0].sum() == len(text) - text.index("=") - 1
