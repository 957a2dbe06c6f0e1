"""Side by side jobs: what each ends with."""

import fcntl
import sys
import time

import pytest

from benchmarks import mesh_jobs


def _job(tmp_path, name, code, devices=1):
    result = tmp_path / name
    program = f"import pathlib, sys, time; out = pathlib.Path({str(result)!r}); {code}"
    return mesh_jobs.Job(name=name, devices=devices, command=[sys.executable, "-c", program], result=result)


def test_a_job_gives_its_lines_or_what_went_wrong(tmp_path):
    jobs = [
        _job(tmp_path, "good", "print('{\"a\": 1}'); print('chatter'); out.touch()"),
        _job(tmp_path, "silent", "pass"),
        _job(tmp_path, "broken", "sys.exit('no such thing')"),
    ]
    ended = {job.name: (lines, error) for job, lines, error in mesh_jobs.run(jobs, 1, 60)}
    assert ended["good"] == ([{"a": 1}], None)
    assert ended["silent"][1].startswith("exit status 0")  # it left no result
    assert "no such thing" in ended["broken"][1] and ended["broken"][1].startswith("exit status 1")


def test_the_limit_ends_what_runs_and_what_waits(tmp_path):
    jobs = [_job(tmp_path, name, "time.sleep(600)") for name in ("first", "second")]
    began = time.monotonic()
    ended = {job.name: error for job, _, error in mesh_jobs.run(jobs, 1, 1.0)}
    assert ended["first"].startswith("out of time:") and ended["second"] == "out of time before it began"
    assert time.monotonic() - began < 60


def test_a_job_that_can_never_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs 9 devices and 8 are to be used"):
        list(mesh_jobs.run([_job(tmp_path, "large", "pass", devices=9)], 8, 1.0))


def test_jobs_get_devices_side_by_side():
    places = mesh_jobs.assign([8, 7, 1, 5, 3, 2], 8)
    assert [len(set(devices)) for devices in places] == [8, 7, 1, 5, 3, 2]
    assert all(0 <= device < 8 for devices in places for device in devices)
    assert not set(places[1]) & set(places[2]) and not set(places[3]) & set(places[4])  # rows of eight
    assert len({places[row][0] for row in (0, 1, 3)}) == 3  # each row begins at another device


def test_a_device_is_for_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("MESH_JOBS_LOCKS", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with mesh_jobs.wait_for_devices():
        for name, free in (("device0", False), ("device2", True)):
            with open(tmp_path / name, "w") as file:
                if free:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    with pytest.raises(BlockingIOError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "device0", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_jobs_at_a_time_than_asked_for(tmp_path, at_once):
    """Each job waits for the other one's file, a while: only jobs that run at the same time see it come."""
    code = (
        "(out.parent / ('began_' + out.name)).touch(); "
        "other = out.parent / ('began_' + {'a': 'b', 'b': 'a'}[out.name]); "
        "end = time.monotonic() + (60 if {many} else 0.5)\n"
        "while not other.exists() and time.monotonic() < end: time.sleep(0.05)\n"
        "print('{\"met\": %d}' % other.exists()); out.touch()"
    ).replace("{many}", str(at_once == 2))
    jobs = [_job(tmp_path, name, code) for name in ("a", "b")]
    met = {job.name: lines[0]["met"] for job, lines, _ in mesh_jobs.run(jobs, 2, 120, at_once)}
    assert met == ({"a": 1, "b": 1} if at_once == 2 else {"a": 0, "b": 1})
