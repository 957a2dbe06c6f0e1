"""Worker processes that compile side by side and take turns on the GPU.

Compiling a kernel takes a CPU core a second, running it takes the GPU a few milliseconds. So many processes compile,
and each enters `gpu()` to run something: an exclusive lock, since a figure taken beside another kernel is none.

A job is a function of a module and its arguments. One that raises, crashes or hangs is recorded, its worker replaced
(an exception may have left a broken CUDA context), and the others go on.
"""

import collections
import contextlib
import dataclasses
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Seconds without a word from a job after which it counts as hung: while it compiles, and while it holds the GPU.
WORK_LIMIT = 180.0
HOLD_LIMIT = 45.0
_TICK = 0.5
_NICE = 10  # of a worker that compiles


@dataclasses.dataclass(frozen=True)
class Job:
    """A call that a worker shall make. Both go through pickle."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: The job.
        value: What it returned.
        error: What went wrong, or None.
        note: What it last said it was doing.
        seconds: From its start to its end.
        held: Seconds of those in which it had the GPU.
    """

    job: Job
    value: Any = None
    error: str | None = None
    note: str | None = None
    seconds: float = 0.0
    held: float = 0.0


def prepare_environment(workers: int, autotune_cache: Path | None = None) -> None:
    """Sets what XLA reads in this process and in workers it starts. Call it before JAX finds its devices.

    Args:
        workers: That will share the GPU's memory.
        autotune_cache: Folder in which XLA keeps what it chose for each of its own matmuls.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # A bound for each, taken only as needed: twice a fair share, since few jobs are large.
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", f"{min(0.9, 1.8 / (workers + 1)):.4f}")
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # XLA warns about every autotuned candidate that it drops
    if autotune_cache is not None:
        autotune_cache.mkdir(parents=True, exist_ok=True)
        flag = f"--xla_gpu_per_fusion_autotune_cache_dir={autotune_cache.resolve()}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


# In a worker.


class _Turn:
    """A worker's line to its pool, and its place at the GPU."""

    def __init__(self, pipe: Connection, lock: str):
        self.pipe = pipe
        self.lock = open(lock, "w")  # noqa: SIM115  # kept until the process ends

    def say(self, state: str, value: Any = None) -> None:
        self.pipe.send((state, value))


_turn: _Turn | None = None


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """The GPU to oneself, among the workers of a pool. Outside of a pool it does nothing."""
    if _turn is None:
        yield
        return
    _turn.say("wait")
    fcntl.flock(_turn.lock, fcntl.LOCK_EX)
    _turn.say("hold")
    _set_niceness(0)
    try:
        yield
    finally:
        fcntl.flock(_turn.lock, fcntl.LOCK_UN)
        _set_niceness(_NICE)
        _turn.say("work")


def _set_niceness(value: int) -> None:
    """Of every thread of this process: all wait for the one that has the GPU, so the CPUs are its first.

    Where a process may not become less nice again, all keep the same niceness.
    """
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), value)


def note(text: str) -> None:
    """Says what this job is about to do: a crash can be laid at something's door, and the job counts as alive."""
    if _turn is not None:
        _turn.say("note", text)


def _serve(pipe: Connection, lock: str) -> None:
    global _turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool ends its workers itself
    _turn = _Turn(pipe, lock)
    _set_niceness(_NICE)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            value = job.function(*job.arguments)
        except Exception as error:
            _turn.say("failed", f"{type(error).__name__}: {str(error)[:2000]}")
            return
        _turn.say("done", value)


# In the process that owns the pool.


class _Worker:
    def __init__(self, lock: str):
        context = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, lock), daemon=True)
        self.process.start()
        theirs.close()  # so that reading from a worker that died ends
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job, self.note, self.held = job, None, 0.0
        self.state, self.since = "work", time.monotonic()
        self.start = self.heard = self.since
        with contextlib.suppress(BrokenPipeError):  # it died while idle; reading from it will say so
            self.pipe.send(job)

    def hear(self) -> Outcome | None:
        """Takes one message; an outcome if the job has ended."""
        try:
            state, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            return self.outcome(error=f"the worker ended with {_exit_reason(self.process.exitcode)}")
        self.heard = time.monotonic()
        if state == "note":
            self.note = value
            return None
        self._enter(state)
        if state == "done":
            return self.outcome(value=value)
        return self.outcome(error=value) if state == "failed" else None

    def _enter(self, state: str) -> None:
        now = time.monotonic()
        self.held += now - self.since if self.state == "hold" else 0.0
        self.state, self.since = state, now

    def overdue(self, work_limit: float, hold_limit: float) -> str | None:
        seconds = time.monotonic() - self.heard
        limits = {"work": work_limit, "hold": hold_limit}  # not while it waits for its turn
        limit = limits.get(self.state, float("inf"))
        return f"hung: no word for {seconds:.0f} s in state {self.state!r}" if seconds > limit else None

    def outcome(self, **kwargs: Any) -> Outcome:
        seconds = time.monotonic() - self.start
        assert self.job is not None
        outcome = Outcome(job=self.job, note=self.note, seconds=seconds, held=self.held, **kwargs)
        self.job = None
        return outcome

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def run(
    jobs: collections.deque[Job],
    *,
    workers: int,
    limit: float = float("inf"),
    work_limit: float = WORK_LIMIT,
    hold_limit: float = HOLD_LIMIT,
) -> Iterator[Outcome]:
    """Runs `jobs` in order on `workers` processes, and yields their outcomes as they end.

    Args:
        jobs: What to do; emptied on the way. The caller may append more as outcomes arrive.
        workers: Processes at a time.
        limit: Seconds after which the rest is left; what is running then is ended and yields nothing.
        work_limit: Seconds without a word from a job that works, after which it counts as hung.
        hold_limit: The same for one that holds the GPU, and keeps the others from it.
    """
    deadline = time.monotonic() + limit
    team: list[_Worker] = []
    with tempfile.NamedTemporaryFile(prefix="gpu-lock-") as lock:
        try:
            while time.monotonic() < deadline:
                _assign(jobs, team, workers, lock.name)
                busy = {w.pipe: w for w in team if w.job is not None}
                if not busy:
                    return
                wait = max(0.0, min(_TICK, deadline - time.monotonic()))
                ready = multiprocessing.connection.wait(list(busy), timeout=wait)
                ended = [(busy[pipe], busy[pipe].hear()) for pipe in ready]  # type: ignore[index]
                ended += [
                    (w, w.outcome(error=why))
                    for w in team
                    if w.job and (why := w.overdue(work_limit, hold_limit))
                ]
                for worker, outcome in ended:
                    if outcome is None:
                        continue
                    if outcome.error is not None:
                        team.remove(worker)
                        worker.end()
                    yield outcome
        finally:
            for worker in team:
                worker.end()


def _assign(jobs: collections.deque[Job], team: list[_Worker], workers: int, lock: str) -> None:
    """Gives each idle worker a job, and starts workers while there are jobs for them."""
    for worker in team:
        if worker.job is None and jobs:
            worker.give(jobs.popleft())
    while jobs and len(team) < workers:
        team.append(_Worker(lock))
        team[-1].give(jobs.popleft())


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
