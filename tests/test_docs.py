"""The pages under docs/: their code runs, their commands exist, and what they list is complete."""

import contextlib
import importlib.util
import io
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import tbik_jax
from tests.models_small import small_model

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ("index", "concepts", "faq", "add-an-op", "add-a-model", "notebooks")


def _blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)


def _run(page, blocks, **names):
    """Runs the blocks of a page one after the other, in one namespace; that, and what they print."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for code in blocks:
            exec(compile(code, f"{page}.md", "exec"), names)
    return names, out.getvalue()


@pytest.mark.parametrize("page", ["concepts", "add-an-op", "add-a-model"])
def test_the_code_of_a_page_runs(page):
    blocks = _blocks(page, "python")
    assert any("assert " in code for code in blocks)
    _run(page, blocks)


def test_the_start_is_the_readme_s_proof_and_a_call_that_works(monkeypatch):
    """`tests/test_readme.py` runs the proof."""
    proof, call = _blocks("index", "python")
    assert f"```python\n{proof}```" in (ROOT / "README.md").read_text()
    monkeypatch.setattr(tbik_jax, "load", lambda path, mesh, dtype: small_model(dtype))
    names, _ = _run("index", [call], prompts=[[5], [8]])  # one token needs no prefill to be compiled
    for logprobs, scores in zip(names["out"].logprobs, names["scores"], strict=True):
        assert logprobs.tobytes() == scores[-len(logprobs) :].tobytes()


def test_the_errors_of_the_faq_are_those_that_come():
    blocks = _blocks("faq", "python")
    comments = re.findall(r"print\(error\)  # (.*)", "".join(blocks))
    printed = _run("faq", blocks)[1].splitlines()
    assert len(comments) == len(printed) == 2
    for comment, line in zip(comments, printed, strict=True):
        assert line.startswith(comment.removesuffix(" ..."))


def test_commands_exist():
    """`make` says what it would run; extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for line in "".join(_blocks(page, "bash")).splitlines():
            command = line.partition(" #")[0].strip()
            if install := re.fullmatch(r"pip install '\.\[([\w,]+)\]' -c constraints.txt", command):
                assert set(install[1].split(",")) <= set(extras), command
                continue
            assert re.fullmatch(r'make \w+( ARGS="tests/[\w/]+")?', command), command
            done = subprocess.run(
                ["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            for folder in re.findall(r"tests/[\w/]+", command):
                assert (ROOT / folder).exists()


def test_the_figure_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("draw_tree", DOCS / "draw_tree.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text() == script.svg()


def test_the_reference_has_every_public_name():
    listed = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    }
    modules = {"models", "ops", "optimizers", "pallas_kernels", "rl", "training"}
    missing = (
        (set(tbik_jax.__all__) - modules) | set(tbik_jax.rl.__all__) | set(tbik_jax.pallas_kernels.__all__)
    )
    assert missing - listed == set()


def test_every_page_has_its_place():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [file.name for file in DOCS.glob("*.md") if f": {file.name}\n" not in nav] == []
