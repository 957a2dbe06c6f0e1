"""Every notebook runs in a kernel of its own and shows what it says; its claims are asserts in its cells."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))

#: What the cells print, and how many plots they draw.
CLAIMS = {
    "01_tree_matmul": (r"invariant: elements that differ from tp=1: \{1: 0, 2: 0, 4: 0, 8: 0\}", 3),
    "02_mesh_shapes": (
        r"plain +[2-9] distinct outputs of 5, .*\ninvariant +1 distinct outputs of 5, .* 0.0e\+00",
        2,
    ),
    "03_train_any_mesh": (
        r"invariant +2 meshes, 1 loss curves, 1 final states\nplain +2 meshes, 2 loss curves, 2 final states",
        1,
    ),
    "04_on_policy_rl": (
        r"invariant +0 of 8192 tokens with other bits, ratios 1.0000 .. 1.0000, mean KL 0.0e\+00",
        1,
    ),
}


def _execute(file, folder):
    """Executes it as `make notebooks` does, in a process of its own; that, and the outputs of its cells."""
    to = folder / "executed.ipynb"
    command = ["-m", "jupytext", "--to", "ipynb", "--execute", "--run-path", ROOT, "--output", to, file]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=500)
    cells = nbformat.read(to, as_version=4).cells if done.returncode == 0 else []
    return done, [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_no_others():
    assert [file.stem for file in NOTEBOOKS] == list(CLAIMS)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_shows_what_it_says(file, tmp_path):
    done, outputs = _execute(file, tmp_path)
    assert done.returncode == 0, done.stderr
    streams = [output for output in outputs if output.output_type == "stream"]
    assert {output.name for output in streams} == {"stdout"}  # no warning
    claim, plots = CLAIMS[file.stem]
    text = "".join(output.text for output in streams)
    assert re.search(claim, text), text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == plots


def test_a_claim_that_does_not_hold_ends_it(tmp_path):
    """The twin: the ranks of the first notebook meet by `lax.psum` of rounded parts instead of the tree."""
    tree, psum = (
        'tbik_jax.tree_psum(part, "tp", out_dtype=x.dtype)',
        'jax.lax.psum(part.astype(x.dtype), "tp")',
    )
    source = NOTEBOOKS[0].read_text()
    assert tree in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(tree, psum))
    done, _ = _execute(broken, tmp_path)
    assert done.returncode != 0 and "assert not any(compare(invariant_outs)" in done.stderr
