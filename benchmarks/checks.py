"""Runs named checks, side by side where that does no harm, and keeps what came of each as it comes."""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tbik_jax.bench.environment import environment

Check = tuple[str, Callable[[], dict[str, Any]]]


class Checks:
    """The result of a script that checks and times.

    Attributes:
        result: what is written: the environment, and rows of "checks" and, for names that begin so, of "speed".
    """

    def __init__(self, out: Path | None, limit: float):
        """Begins the clock.

        Args:
            out: JSON file to write; None for none.
            limit: seconds after which no check begins.
        """
        self.result: dict[str, Any] = {"environment": environment(), "checks": [], "speed": []}
        self._out, self._limit, self._start = out, limit, time.monotonic()

    def run(self, checks: Iterable[Check], threads: int) -> None:
        """Runs each; a failure is recorded. What is called "compile ..." leaves a row only if it fails."""
        with ThreadPoolExecutor(threads) as pool:
            for future in as_completed([pool.submit(self._one, *check) for check in checks]):
                row = {**future.result(), "at_s": self._seconds()}
                kind = "speed" if row["name"].startswith("speed") else "checks"
                if not row["name"].startswith("compile") or "failed" in row:
                    self.result[kind].append(row)
                print(json.dumps(row), flush=True)
                self._save()  # at every step: a run that is ended from outside keeps what it has

    def finish(self) -> int:
        """Writes the result, and returns how many checks failed."""
        failures = sum("failed" in row for row in self.result["checks"] + self.result["speed"])
        self.result |= {"failures": failures, "seconds": self._seconds()}
        self._save()
        print(f"{failures} failures in {self.result['seconds']} s")
        return failures

    def _one(self, name: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if time.monotonic() - self._start > self._limit:
            return {"name": name, "failed": "out of time"}
        try:
            return {"name": name, **check()}
        except Exception as error:  # one broken case must not hide the others
            last = traceback.format_exc().strip().splitlines()[-6:]
            return {"name": name, "failed": f"{type(error).__name__}: {str(error)[:400]}", "trace": last}

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)

    def _save(self) -> None:
        if self._out:
            self._out.write_text(json.dumps(self.result, indent=1) + "\n")


def verdict(differs: dict[str, int], **more: Any) -> dict[str, Any]:
    """A row of the result; every number in `differs` must be 0."""
    bad = {what: count for what, count in differs.items() if count}
    return {"compared": len(differs), **({"failed": "bits differ", "differing": bad} if bad else {}), **more}
