"""Another JAX is refused before anything else, in one line that says what to install."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest

from tbik_jax import versions


@pytest.mark.parametrize("version", ["0.11.2", "0.11.9", "0.11.3.dev20260101", "0.11.12"])
def test_the_series_is_taken(version):
    assert versions.version_problem("jax", version) is None


@pytest.mark.parametrize("version", ["0.11.1", "0.12.0", "0.10.3", "1.0", "0.9.12"])
def test_another_series_is_a_problem_with_a_remedy(version):
    found = versions.version_problem("jax", version)
    assert f"{version} is installed" in found and "run: pip install 'jax>=0.11.2,<0.12'" in found


def test_a_package_that_is_missing():
    assert "flax>=0.12.10,<0.13 and it is not installed" in versions.version_problem("flax", None)


@pytest.fixture
def old_jax(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.35" if name == "jax" else real(name))


def test_importing_is_an_import_error(old_jax):
    with pytest.raises(
        ImportError, match=r"needs jax>=0.11.2,<0.12, .* 0.4.35 is installed; run: pip install"
    ):
        versions.check_versions()


def test_the_command_line_ends_with_one_line(old_jax, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tbik-jax", "verify"])
    with pytest.raises(SystemExit) as caught:
        versions.check_versions()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: tbik-jax needs jax>=0.11.2,<0.12")


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for package in versions.SUPPORTED:
        wanted = versions.version_problem(package, None).split("'")[1]
        assert wanted in project["dependencies"]
