"""What is installed here: versions, plugin, driver, devices, links. Nothing is judged; `problems` does that."""

import dataclasses
import logging
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..versions import installed

PACKAGES = (
    "tbik-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "orbax-checkpoint",
    "transformers",
    "triton",
    "jax-triton",
)
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
#: Variables that change what is compiled or which devices are seen.
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", "LD_LIBRARY_PATH")

Ask = Callable[[Sequence[str]], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A device as JAX sees it.

    Attributes:
        kind: such as "NVIDIA H200".
        platform: "gpu", "cpu".
        capability: compute capability such as "9.0"; None where there is none.
        memory_gib: that JAX may allocate; None where the device does not say.
    """

    kind: str
    platform: str
    capability: str | None
    memory_gib: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found.

    Attributes:
        python: version.
        machine: such as "x86_64".
        versions: of packages, None where one is not installed.
        variables: of the environment, those that are set.
        gpus: names that the NVIDIA driver lists, whatever JAX sees.
        driver: version of the NVIDIA driver, None where there is none.
        devices: that JAX uses.
        messages: what JAX said when it started, warnings and errors.
        links: "GPU0-GPU1" -> "NV18", "PIX", "SYS", ...: how each pair is connected.
    """

    python: str
    machine: str
    versions: Mapping[str, str | None]
    variables: Mapping[str, str]
    gpus: tuple[str, ...]
    driver: str | None
    devices: tuple[Device, ...]
    messages: tuple[str, ...]
    links: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def collect_facts(ask: Ask | None = None) -> Facts:
    """Looks around.

    Args:
        ask: runs a program and returns its output, or None if there is no such program or it fails.

    Raises:
        RuntimeError: a backend that was asked for by JAX_PLATFORMS does not start; JAX's own message.
    """
    ask = ask or _run
    listed = ask(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]) or ""
    rows = [row.rsplit(",", 1) for row in listed.splitlines() if "," in row]
    devices, messages = _devices()
    return Facts(
        python=platform.python_version(),
        machine=platform.machine(),
        versions={name: installed(name) for name in (*PACKAGES, *PLUGINS)},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpus=tuple(name.strip() for name, _ in rows),
        driver=rows[0][1].strip() if rows else None,
        devices=devices,
        messages=messages,
        links=parse_links(ask(["nvidia-smi", "topo", "-m"]) or "") if len(rows) > 1 else {},
    )


def parse_links(matrix: str) -> dict[str, str]:
    """The pairs of GPUs in the matrix that `nvidia-smi topo -m` prints."""
    links: dict[str, str] = {}
    columns: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines():
        cells = line.split()
        if not columns:
            columns = [cell for cell in cells if re.fullmatch(r"GPU\d+", cell)]
        elif cells and cells[0] in columns:
            row = columns.index(cells[0])
            links |= {f"{cells[0]}-{columns[i]}": cells[1 + i] for i in range(row + 1, len(columns))}
    return links


def _devices() -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """JAX's devices, and what it logs when it starts on them."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addHandler(handler)
    try:
        found = jax.devices()
    finally:
        logger.removeHandler(handler)
    return tuple(map(_device, found)), tuple(heard)


def _device(device: jax.Device) -> Device:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Device(
        kind=device.device_kind,
        platform=device.platform,
        capability=getattr(device, "compute_capability", None),
        memory_gib=None if limit is None else round(limit / 2**30, 1),
    )


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
