"""Runs programs that need a number of devices each, side by side on the devices of this machine.

A job is a command that prints lines of JSON. On a GPU all begin at once, each sees only the devices it was given
(`CUDA_VISIBLE_DEVICES`), and compiles beside the others; before it computes it calls `wait_for_devices`, which returns
when it has these devices for itself. On the CPU each has virtual devices of its own, and they run one after another.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax

_TICK = 0.2  # seconds
_LOCKS = "MESH_JOBS_LOCKS"  # folder of one file a device, locked by whoever computes on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command to run.

    Attributes:
        name: for messages.
        devices: it needs.
        command: program and arguments.
        result: file that it writes last.
    """

    name: str
    devices: int
    command: list[str]
    result: Path


@dataclasses.dataclass(kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    out: IO[bytes]


def run(
    jobs: Sequence[Job], devices: int, limit: float, at_once: int | None = None
) -> Iterator[tuple[Job, list[dict[str, Any]], str | None]]:
    """Runs each job on devices of its own.

    Args:
        jobs: to run; those that come first get the devices first.
        devices: to use of this machine's.
        limit: seconds after which the jobs still running are ended.
        at_once: most jobs at a time, where the memory of a device does not hold all; None for all of them on GPUs.

    Yields:
        A job that has ended, the lines it printed that were JSON, and what went wrong, if anything did.

    Raises:
        ValueError: a job needs more devices than there are.
    """
    most = max((job.devices for job in jobs), default=0)
    if most > devices:
        raise ValueError(f"a job needs {most} devices and {devices} are to be used")
    on_gpu = jax.default_backend() == "gpu"
    most_running = (len(jobs) if on_gpu else 1) if at_once is None else at_once
    places = assign([job.devices for job in jobs], devices)
    waiting, running, end = list(zip(jobs, places, strict=True)), list[_Running](), time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        locks = os.environ.get(_LOCKS, folder)  # another of these programs may share the devices
        while waiting or running:
            while waiting and len(running) < most_running:
                running.append(_start(*waiting.pop(0), on_gpu, locks))
            time.sleep(_TICK)
            late = time.monotonic() > end
            for each in list(running):
                if each.process.poll() is not None or late:
                    running.remove(each)
                    yield each.job, *_finish(each)
            if late:
                for job, _ in waiting:
                    yield job, [], "out of time before it began"
                return


def assign(sizes: Sequence[int], devices: int) -> list[list[int]]:
    """Devices for jobs of these sizes: rows of jobs side by side, the first device of a row another each time.

    A job's first device holds the whole model for a moment; so these moments are spread.
    """
    places: list[list[int]] = [[] for _ in sizes]
    left, turn = list(range(len(sizes))), 0
    while left:
        used = 0
        for i in list(left):
            if used + sizes[i] <= devices:
                places[i] = [(turn + used + n) % devices for n in range(sizes[i])]
                used += sizes[i]
                left.remove(i)
        turn += 1
    return places


def named(sizes: Sequence[int], names: Sequence[str] | None) -> bool:
    """Whether a mesh of these sizes is among `names` such as "1,2,1"; without names every mesh is."""
    return not names or ",".join(map(str, sizes)) in names


@contextlib.contextmanager
def wait_for_devices() -> Iterator[None]:
    """Inside, this job has its devices for itself."""
    folder, names = os.environ.get(_LOCKS), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with contextlib.ExitStack() as stack:
        if folder:
            for name in sorted(names.split(",")):  # one order for all, so that nobody waits in a circle
                file = stack.enter_context(open(Path(folder) / f"device{name}", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(job: Job, places: list[int], on_gpu: bool, locks: str) -> _Running:
    env = dict(os.environ)
    if on_gpu:
        names = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        visible = [names[i] if names else str(i) for i in places]
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(visible), _LOCKS: locks}
    else:
        env |= {"JAX_NUM_CPU_DEVICES": str(job.devices), "PJRT_NPROC": "32"}
    out = tempfile.TemporaryFile()  # noqa: SIM115, closed in _finish
    process = subprocess.Popen(job.command, stdout=out, stderr=subprocess.STDOUT, env=env)
    return _Running(job=job, process=process, out=out)


def _finish(each: _Running) -> tuple[list[dict[str, Any]], str | None]:
    ended = each.process.poll() is not None
    if not ended:
        each.process.kill()
        each.process.wait()
    each.out.seek(0)
    text = each.out.read().decode(errors="replace").splitlines()
    each.out.close()
    lines = [json.loads(line) for line in text if line.startswith("{") and line.endswith("}")]
    if not ended:
        return lines, "out of time: " + "\n".join(text[-3:])[-500:]
    if each.process.returncode or not each.job.result.exists():
        return lines, f"exit status {each.process.returncode}: " + "\n".join(text[-12:])[-1500:]
    return lines, None
