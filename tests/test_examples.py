"""The training example: the same fingerprints on any mesh, and after an interruption."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _train(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "examples/train.py", "--rows", "8", "--width", "16", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout


def _fingerprints(out: str) -> list[str]:
    return re.findall(r"^(?:loss history|parameters)\s+([0-9a-f]{64})$", out, re.M)


def test_an_interrupted_run_on_two_meshes_ends_as_one_that_never_stopped(tmp_path):
    whole = _fingerprints(_train("--mesh", "fsdp=2,tp=2", "--steps", "3"))
    folder = ("--checkpoint", str(tmp_path / "run"))
    _train("--mesh", "tp=4", "--steps", "2", *folder)
    rest = _train("--mesh", "data=2", "--steps", "3", *folder)
    assert "goes on from step 2" in rest
    assert len(whole) == 2 and _fingerprints(rest) == whole
    refused = _train("--seed", "1", "--steps", "4", *folder, code=2)
    assert "was trained with seed=0, not 1" in refused.replace("\n", " ")


def test_a_mesh_that_is_none_is_refused_in_one_line():
    for mesh, message in (
        ("fsdp=x", "is no list such as"),
        ("tp=3", "use tp=1, 2, 4 or 8"),
        ("size=2", "size"),
    ):
        out = _train("--mesh", mesh, code=2)
        assert message in out and "Traceback" not in out and len(out.splitlines()) == 1
