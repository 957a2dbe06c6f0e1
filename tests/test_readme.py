"""The README's proof and the example run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_proof():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    assert _run("-c", code.group(1)).split() == ["invariant", "True", "plain", "False"]


def test_the_example():
    out = _run("examples/same_bits.py")
    assert "invariant: log-probabilities on 1 and on 4 devices are equal" in out
    assert "plain: log-probabilities on 1 and on 4 devices are different" in out


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_figures_name_files_that_exist():
    for text in ("README.md", "docs/numerics.md"):
        for name in re.findall(r"benchmarks/results/[\w.\-]+\.json", (ROOT / text).read_text()):
            assert (ROOT / name).is_file(), name
