"""Keeps the fingerprints of a run of `tbik-jax verify --json`, as those that its kind of device must have.

python -m tbik_jax.verify.keep result.json [...]

To be run with the bits that a change of the contract gives, on each kind of device at hand, and in no other case.
"""

import json
import sys
from pathlib import Path

_FILE = Path(__file__).with_name("expected.json")


def keep(results: list[Path], file: Path = _FILE) -> None:
    """Adds the fingerprints of results to those in a file.

    Raises:
        ValueError: in a result a check did not hold, for another reason than the fingerprint that was kept before.
    """
    kept = json.loads(file.read_text(encoding="utf-8"))
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        broken = [check["name"] for check in result["checks"] if check["fingerprint"] is None]
        if broken:
            raise ValueError(f"{path}: {', '.join(broken)} did not hold; nothing is kept")
        kept[result["device"]] = {check["name"]: check["fingerprint"] for check in result["checks"]}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep(list(map(Path, sys.argv[1:])))
