"""Engaged, for GPUs: what XLA makes of the programs for one to eight H200s, compiled without one."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: XLA has its compiler for NVIDIA GPUs for Linux only.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="XLA compiles for NVIDIA GPUs on Linux only")


def _compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    out = folder / "programs.json"
    command = [sys.executable, "-m", "benchmarks.gpu_programs", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())["programs"]


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """8B's shapes over tp=8, two layers."""
    programs = ["--programs", "decode", "prefill", "--layers", "2", "--batches", "1", "32"]
    rows = _compiled(tmp_path_factory.mktemp("inference"), "--models", "8B", "--meshes", "tp=8", *programs)
    return {(row["program"], row["rows"]): row for row in rows}


def test_no_sum_and_no_rounding_of_inference_is_left_to_xla(inference: Any) -> None:
    assert set(inference) == {("decode", 1), ("decode", 32), ("prefill", 8)}
    assert all(row["left_to_xla"] == [] for row in inference.values())


def test_the_kernels_are_those_for_hopper(inference: Any) -> None:
    few, many = inference["decode", 1]["kernels"], inference["decode", 32]["kernels"]
    assert few["norm_matmul"] == 4 and many["tree_matmul"] == 4 * 2 + 1
    for kernels in (few, many):
        assert kernels["attention_columns"] == kernels["qk_norm_rope"] == 2
        assert kernels["leaf_statistics"] == kernels["sample_argmax"] == 1
    assert (
        inference["prefill", 8]["kernels"]["attention_tiles"] == 1
    )  # of the last layer only keys and values are wanted


def test_the_sums_over_tp_take_the_transport_of_their_size(inference: Any) -> None:
    # two a layer; the gathers besides are of the vocabulary's statistics and of what was drawn
    assert inference["decode", 1]["collectives"]["all-gather"] == 2 * 2 + 2
    assert inference["decode", 32]["collectives"] == {"all-reduce": 1, "all-to-all": 4, "all-gather": 4 + 2}


def test_the_cache_is_written_in_place(inference: Any) -> None:
    for row in inference.values():
        assert row["gib"]["results"] == 0
    assert inference["decode", 32]["gib"]["temporaries"] < 0.01


def test_no_sum_of_a_gradient_is_left_to_xla(tmp_path: Path) -> None:
    mesh = ["--meshes", "data=2 fsdp=2 tp=2", "--programs", "gradient", "--layers", "1"]
    (row,) = _compiled(tmp_path, "--models", "0.6B", "--tokens", "512", *mesh)
    assert row["left_to_xla"] == []
    assert {"attention_backward_dkv", "attention_backward_dq", "tree_matmul"} <= set(row["kernels"])
    assert "reduce-scatter" not in row["collectives"] and row["collectives"]["collective-permute"] > 0


def test_ordinary_programs_are_found_out() -> None:
    """The twin: `lax.psum`, `jnp.dot` and `jnp.exp`, for the same devices."""
    program = """
        from benchmarks.gpu_programs import h200s
        import jax, jax.numpy as jnp, numpy as np
        from benchmarks.hlo import ordered_by_xla, rounded_by_xla
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

        mesh = Mesh(np.asarray(h200s(8)), ("tp",))
        f = jax.shard_map(lambda x: jax.lax.psum(jnp.exp(x @ x.T), "tp"), mesh=mesh, in_specs=P("tp"), out_specs=P())
        x = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=NamedSharding(mesh, P("tp")))
        hlo = jax.jit(f).lower(x).compile().as_text()
        found = "\\n".join(ordered_by_xla(hlo))
        assert "all-reduce" in found and (" dot(" in found or "cublas" in found), found
        assert rounded_by_xla(hlo)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--meshes", "tp=3"), "tp=3 does not cut the tree"),
        (("--meshes", "tp=16"), "invalid"),
        (("--meshes", "pp=2"), "invalid"),
        (("--models", "9B"), "9B"),
    ],
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_programs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
