"""The pool of benchmark workers, with jobs that need no GPU."""

import collections
import itertools
import operator
import os
import time

from benchmarks import gpu_pool
from benchmarks.gpu_pool import Job


def outcomes(*jobs, **kwargs):
    """Outcomes by the index of their job."""
    found = {}
    for outcome in gpu_pool.run(collections.deque(jobs), **kwargs):
        found[jobs.index(outcome.job)] = outcome
    return found


def test_jobs_run_in_several_other_processes_at_a_time():
    jobs = [Job(_sleep_and_name, (0.5, i)) for i in range(4)]
    start = time.monotonic()
    values = [outcome.value for outcome in outcomes(*jobs, workers=2).values()]
    spans = sorted(span for _, span in values)
    assert len({pid for pid, _ in values}) == 2 and os.getpid() not in {pid for pid, _ in values}
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
    assert time.monotonic() - start < 60


def test_a_job_that_raises_or_crashes_stops_no_other():
    jobs = [
        Job(operator.truediv, (1, 0)),
        Job(os._exit, (3,)),
        Job(os.abort),
        *(Job(abs, (-i,)) for i in range(4)),
    ]
    found = outcomes(*jobs, workers=2)
    assert found[0].error is not None and "ZeroDivisionError" in found[0].error
    assert found[1].error is not None and "exit code 3" in found[1].error
    assert found[2].error is not None and "SIGABRT" in found[2].error
    assert [found[i].value for i in range(3, 7)] == [0, 1, 2, 3]


def test_a_job_that_hangs_is_ended_and_says_what_it_was_doing():
    found = outcomes(Job(_note_and_sleep, ("the last step", 60)), Job(abs, (-2,)), workers=2, work_limit=5)
    assert found[0].error is not None and "hung" in found[0].error
    assert found[0].note == "the last step"
    assert found[1].value == 2


def test_the_limit_ends_the_run_and_keeps_what_is_there():
    start = time.monotonic()
    found = outcomes(Job(abs, (-2,)), Job(time.sleep, (60,)), Job(abs, (-3,)), workers=1, limit=6)
    assert [found[i].value for i in found] == [2]
    assert time.monotonic() - start < 30


def test_jobs_may_be_appended_while_outcomes_arrive():
    jobs, values = collections.deque([Job(abs, (-1,))]), []
    for outcome in gpu_pool.run(jobs, workers=1):
        values.append(outcome.value)
        if len(values) < 3:
            jobs.append(Job(abs, (-len(values) - 1,)))
    assert values == [1, 2, 3]


def test_one_job_at_a_time_has_the_gpu():
    found = outcomes(*(Job(_hold, (0.3, i)) for i in range(3)), workers=3)
    spans = sorted(outcome.value for outcome in found.values())
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))
    assert all(0.25 <= outcome.held < 5 for outcome in found.values())


def test_gpu_outside_of_a_pool_is_free():
    with gpu_pool.gpu():
        gpu_pool.note("nothing")


# Jobs.


def _sleep_and_name(seconds, _):
    start = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), (start, time.monotonic())


def _note_and_sleep(text, seconds):
    gpu_pool.note(text)
    time.sleep(seconds)


def _hold(seconds, _):
    with gpu_pool.gpu():
        start = time.monotonic()
        time.sleep(seconds)
        return start, time.monotonic()
