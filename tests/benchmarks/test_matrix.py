"""The matrix: which meshes it walks, and that a single bit of one configuration shows."""

import math

import numpy as np
import pytest

from benchmarks import matrix
from tbik_jax.mesh import mesh_label


def test_every_number_of_devices_up_to_the_limit_has_a_mesh():
    for devices in (1, 2, 4, 8):
        sizes = {math.prod(mesh.shape.values()) for mesh in matrix.meshes(devices)}
        assert sizes == set(range(1, devices + 1))
    assert [mesh_label(mesh) for mesh in matrix.meshes(2)] == ["1 device", "tp=2", "data=2", "fsdp=2"]
    assert {mesh.shape["tp"] for mesh in matrix.meshes(8)} == {1, 2, 4, 8}


@pytest.mark.parametrize("change", [None, "logprob", "token"])
def test_one_bit_of_one_configuration_shows(change):
    def output():
        return np.arange(4, dtype=np.int32), np.linspace(-3, -1, 4, dtype=np.float32)

    rows = [[output() for _ in range(3)] for _ in range(2)] + [[]]  # the last prompt ran nowhere
    if change == "logprob":
        rows[1][2][1].view(np.uint32)[3] ^= 1
    elif change == "token":
        rows[1][2][0][3] += 1
    found = matrix._result("invariant", "greedy", rows)
    assert found["same_bits"] == (change is None) and found["configurations"] == 3
    assert found["most_distinct_outputs"] == (2 if change == "token" else 1)


def test_a_tiny_matrix_runs(tmp_path):
    out = tmp_path / "matrix.json"
    arguments = (
        "--dry --layers 1 --devices 1 --batches 2 --new-tokens 2 --prompt-tokens 4 --numerics invariant"
    )
    assert matrix.main([*arguments.split(), "--out", str(out)]) == 0
    assert '"same_bits": true' in out.read_text()
