"""What a result was measured on."""

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Devices, driver and versions, for the head of a result file."""
    devices = jax.devices()
    versions: dict[str, str | None] = {}
    for name in ("jax", "jaxlib", "flax", "numpy", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "platform": devices[0].platform,
        "driver": _driver(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
