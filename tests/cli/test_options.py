"""Virtual devices are asked for before JAX starts, which only a process of its own can show."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_fresh_process_has_the_devices_it_asks_for():
    line = [sys.executable, "-m", "tbik_jax", "verify", "--cpu-devices", "3", "--limit", "0", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1, done.stderr  # no check was reached
    found = json.loads(done.stdout)
    assert [device["kind"] for device in found["facts"]["devices"]] == ["cpu"] * 3
    assert "collectives over 2" in [check["name"] for check in found["checks"]]
