"""The README's proof and the example run as they stand."""

import json
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
    for text in ("README.md", "docs/numerics.md", "docs/performance.md"):
        for name in re.findall(r"benchmarks/results/[\w.\-]+\.json", (ROOT / text).read_text()):
            assert (ROOT / name).is_file(), name


def test_the_table_is_what_the_result_file_says():
    file = ROOT / "benchmarks/results/matrix_8b_4xh200.json"
    report, text = json.loads(file.read_text()), (ROOT / "README.md").read_text()
    for row in report["results"]:
        if row["numerics"] == "invariant":
            assert row["same_bits"] and row["most_distinct_outputs"] == 1 and row["configurations"] == 12
            assert row["largest_probability_difference"] == 0
            continue
        distinct = f"{row['mean_distinct_outputs']:.1f} on average, at most {row['most_distinct_outputs']}"
        assert f"{distinct} | {row['largest_probability_difference']:.1e} |" in text


def test_the_cost_is_what_the_result_files_say():
    for size, texts in (
        ("8b", ("README.md", "docs/performance.md")),
        ("0.6b", ("docs/performance.md",)),
        ("1.7b", ("docs/performance.md",)),
        ("32b", ("docs/performance.md",)),
        ("8b_tp2_2x", ("docs/performance.md",)),
        ("8b_tp2_prefill_2x", ("docs/performance.md",)),
    ):
        name = f"generate_speed_{size}h200.json" if size.endswith("x") else f"generate_speed_{size}_h200.json"
        report = json.loads((ROOT / "benchmarks/results" / name).read_text())
        for text in texts:
            table = (ROOT / text).read_text()
            for row in report["rows"]:
                places = 2 if row["what"] == "decode" else 1
                ours, plain = (f"{row['ms'][name]:.{places}f}" for name in ("invariant", "plain"))
                cells = f"| {ours} | {plain} | {row['ratio']:.2f} |"
                if "overlapped" in row["ms"]:
                    cells += f" {row['ms']['overlapped']:.1f} | {row['ratio_overlapped']:.2f} |"
                assert cells in table, (
                    text,
                    row["what"],
                    row["batch"],
                )
