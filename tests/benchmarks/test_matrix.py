"""The matrix: which meshes it walks, and that a single bit of one configuration shows."""

import argparse
import json
import math

import numpy as np
import pytest

from benchmarks import matrix


def _sizes(devices, model="8B"):
    return matrix._sizes(argparse.Namespace(devices=devices, meshes=None), model)


def test_every_number_of_devices_up_to_the_limit_has_a_mesh():
    for devices in (1, 2, 4, 8):
        assert {math.prod(sizes) for sizes in _sizes(devices)} == set(range(1, devices + 1))
    labels = [matrix._label(sizes) for sizes in _sizes(2)]
    assert labels == ["tp=2", "data=2", "fsdp=2", "1 device"]
    assert {sizes[2] for sizes in _sizes(8)} == {1, 2, 4, 8}


def test_a_model_too_large_for_copies_runs_under_tensor_parallelism_alone():
    assert _sizes(8, "32B") == [(1, 1, 8), (1, 1, 4), (1, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("change", [None, "logprob", "token"])
def test_one_bit_of_one_configuration_shows(change):
    def output():
        return np.arange(4, dtype=np.int32), np.linspace(-3, -1, 4, dtype=np.float32)

    rows = [[output() for _ in range(3)] for _ in range(2)] + [[]]  # the last prompt ran nowhere
    if change == "logprob":
        rows[1][2][1].view(np.uint32)[3] ^= 1
    elif change == "token":
        rows[1][2][0][3] += 1
    found = matrix._result("8B", "invariant", "greedy", rows)
    assert found["same_bits"] == (change is None) and found["configurations"] == 3
    assert found["most_distinct_outputs"] == (2 if change == "token" else 1)


def test_a_tiny_matrix_runs(tmp_path):
    out = tmp_path / "matrix.json"
    arguments = (
        "--models small --layers 1 --devices 1 --batches 2 --new-tokens 2 --prompt-tokens 4 --scan-layers"
    )
    assert matrix.main([*arguments.split(), "--numerics", "invariant", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["same_bits"] for row in found["results"]] == [True, True] and not found["failures"]
    assert {call["mesh"] for call in found["calls"]} == {"1 device"}


def test_a_mesh_that_fails_is_no_success(tmp_path):
    out = tmp_path / "matrix.json"
    assert matrix.main(["--models", "no such size", "--devices", "1", "--out", str(out)]) == 1
    (failure,) = json.loads(out.read_text())["failures"]
    assert failure["job"] == "no such size 1 device" and "exit status 1" in failure["error"]
