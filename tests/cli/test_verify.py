"""`tbik-jax verify`: its verdict and exit status. The checks themselves run in test_docs.py and in tests/verify."""

import dataclasses

import numpy as np
import pytest

from tbik_jax.cli import verify
from tbik_jax.verify import Broken, Check
from tests.verify.test_problems import SOUND, facts


@pytest.fixture
def checks(monkeypatch):
    """Replaces the checks; one that holds by default."""
    some = [Check("an op", "rows alone", lambda: np.zeros(3))]
    monkeypatch.setattr(verify, "op_checks", lambda: some)
    monkeypatch.setattr(verify, "mesh_checks", list)
    return some


def broken():
    raise Broken("row 3 alone: 1 of 8 elements differ")


def test_all_held(run, run_json, checks):
    result = run("verify")
    assert result.exit_code == 0 and "all as it should be: 1 of 1 checks held on cpu" in result.stdout
    found = run_json("verify")
    assert found["ok"] and found["checks"][0]["ok"] and found["facts"]["versions"]["jax"] == "0.11.2"


def test_a_broken_promise(run, run_json, checks):
    checks.append(Check("another op", "rows alone", broken))
    result = run("verify", env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "NOT as it should be: 1 of 2 checks held" in result.stdout
    assert "row 3 alone: 1 of 8 elements differ" in result.stdout and "to do: compare with" in result.stdout
    found = run_json("verify", status=1)
    assert [check["ok"] for check in found["checks"]] == [True, False] and not found["ok"]


def test_what_was_not_reached_is_not_verified(run_json, checks):
    found = run_json("verify --limit 0", status=1)
    assert found["checks"][0]["ok"] is None


def test_a_wrong_installation(run, checks, monkeypatch):
    wrong = facts(driver="550.54.15")
    monkeypatch.setattr(verify, "collect_facts", lambda: wrong)
    result = run("verify")
    assert result.exit_code == 1 and "the NVIDIA driver 550.54.15 is older" in result.stdout
    assert "to do: pip install 'jax[cuda12]' instead" in result.stdout and "GPU0-GPU1 NV18" in result.stdout
    monkeypatch.setattr(verify, "collect_facts", lambda: dataclasses.replace(SOUND))
    assert run("verify").exit_code == 0


def test_a_backend_that_does_not_start(run, checks, monkeypatch):
    def fail():
        raise RuntimeError(
            "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: cpu. (set "
            "JAX_PLATFORMS='' to automatically choose an available backend)"
        )

    monkeypatch.setattr(verify, "collect_facts", fail)
    result = run("verify")
    assert result.exit_code == 2 and result.stderr.startswith("error: JAX cannot start the backend 'cuda'")
