"""Every command in the README and in the pages about commands runs as it stands, and every command is documented."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tbik_jax import synthetic, synthetic_tokenizer
from tbik_jax.cli.app import _COMMANDS
from tests.cli.conftest import SMALL

ROOT = Path(__file__).parents[2]


def commands(name: str) -> list[str]:
    """The lines of bash blocks that call tbik-jax, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)
    code = [block for language, block in blocks if language in ("", "bash")]
    lines = [line.partition("  #")[0].strip() for block in code for line in block.splitlines()]
    return [line for line in lines if line.startswith("tbik-jax ")]


def prepare(folder: Path) -> None:
    """The files that the commands name."""
    model = synthetic.write_checkpoint(folder / "path/to/qwen3", synthetic.small_config(**SMALL))
    synthetic_tokenizer.write_tokenizer(model)
    (folder / "prompts.txt").write_text("a\nb\n")
    (folder / "chat.json").write_text(json.dumps([{"role": "user", "content": "How do you make bread?"}]))


@pytest.mark.parametrize("name", ["README.md", "docs/cli.md", "docs/bisect.md"])
def test_commands_run(run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    found = commands(name)
    assert len(found) >= 3, name
    if name == "README.md":  # those of docs/cli.md are not run twice
        found = [line for line in found if line not in commands("docs/cli.md")]
    for line in found:
        result = run(line.removeprefix("tbik-jax "))
        assert result.exit_code == 0, (line, result.stdout, result.stderr)
        assert result.stdout.strip()
        if "--json" in line:
            json.loads(result.stdout)


def test_every_command_and_example_is_documented():
    text = (ROOT / "docs/cli.md").read_text()
    documented = commands("docs/cli.md")
    for name, _, example in _COMMANDS:
        assert re.search(rf"^## .*\b{name}\b", text, re.M), name
        assert example in documented, example


def test_help_shows_the_example(run):
    assert run("--help").exit_code == 0
    for name, _, example in _COMMANDS:
        result = run(f"{name} --help", env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
        assert result.exit_code == 0
        shown = " ".join(result.stdout.replace("│", " ").split())
        assert " ".join(shlex.split(example)) in " ".join(shlex.split(shown.replace("'", ""), posix=True)), (
            name
        )
        for option in ("--json", "--debug"):
            assert option in result.stdout, (name, option)
