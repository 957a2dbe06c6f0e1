"""Runs programs that need a number of devices each, side by side on the devices of this machine.

A job is a command that prints lines of JSON. On a GPU it sees only the devices it was given
(`CUDA_VISIBLE_DEVICES`); on the CPU each has virtual devices of its own, and they run one after another.
"""

import dataclasses
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
    devices: list[str]
    process: subprocess.Popen[bytes]
    out: IO[bytes]


def run(
    jobs: Sequence[Job], devices: int, limit: float
) -> Iterator[tuple[Job, list[dict[str, Any]], str | None]]:
    """Runs each job as soon as enough devices are free, in the jobs' order where there is a choice.

    Args:
        jobs: to run.
        devices: to use of this machine's.
        limit: seconds after which the jobs still running are ended.

    Yields:
        A job that has ended, the lines it printed that were JSON, and what went wrong, if anything did.

    Raises:
        ValueError: a job needs more devices than there are.
    """
    most = max((job.devices for job in jobs), default=0)
    if most > devices:
        raise ValueError(f"a job needs {most} devices and {devices} are to be used")
    on_gpu = jax.default_backend() == "gpu"
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if on_gpu else []
    free = ([name for name in names if name] or [str(i) for i in range(devices)])[:devices]
    waiting, running, end = list(jobs), list[_Running](), time.monotonic() + limit
    while waiting or running:
        for job in list(waiting):
            if job.devices <= len(free) and (on_gpu or not running):
                waiting.remove(job)
                running.append(_start(job, [free.pop(0) for _ in range(job.devices)], on_gpu))
        time.sleep(_TICK)
        late = time.monotonic() > end
        for each in list(running):
            if each.process.poll() is None and not late:
                continue
            running.remove(each)
            free += each.devices
            yield each.job, *_finish(each, late)
        if late:
            for job in waiting:
                yield job, [], "out of time before it began"
            return


def _start(job: Job, devices: list[str], on_gpu: bool) -> _Running:
    env = dict(os.environ)
    if on_gpu:
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    else:
        env |= {"JAX_NUM_CPU_DEVICES": str(job.devices), "PJRT_NPROC": "32"}
    out = tempfile.TemporaryFile()  # noqa: SIM115, closed in _finish
    process = subprocess.Popen(job.command, stdout=out, stderr=subprocess.STDOUT, env=env)
    return _Running(job=job, devices=devices, process=process, out=out)


def _finish(each: _Running, late: bool) -> tuple[list[dict[str, Any]], str | None]:
    ended = each.process.poll() is not None
    if not ended:
        each.process.kill()
        each.process.wait()
    each.out.seek(0)
    text = each.out.read().decode(errors="replace").splitlines()
    each.out.close()
    lines = [json.loads(line) for line in text if line.startswith("{") and line.endswith("}")]
    if not ended and late:
        return lines, "out of time"
    if each.process.returncode or not each.job.result.exists():
        return lines, f"exit status {each.process.returncode}: " + "\n".join(text[-12:])[-1500:]
    return lines, None
