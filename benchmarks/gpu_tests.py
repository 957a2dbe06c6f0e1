"""Runs the tests that need a GPU and keeps what passed, with hardware and versions.

python -m benchmarks.gpu_tests --out benchmarks/results/gpu_tests.json [pytest arguments]
"""

import argparse
import json
from pathlib import Path

import pytest

from tbik_jax.bench.environment import environment


class _Outcomes:
    """Collects the outcome of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result file")
    args, rest = parser.parse_known_args()
    outcomes = _Outcomes()
    code = pytest.main(rest or ["-m", "gpu or multi_gpu", "tests/gpu"], plugins=[outcomes])
    args.out.write_text(json.dumps({"environment": environment(), "tests": outcomes.tests}, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
