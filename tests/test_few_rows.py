"""Decoding of few rows: fused ops, the same bits; and which program runs them."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tbik_jax import generate, make_mesh, steps
from tbik_jax.layers import InvariantNumerics, few_rows
from tbik_jax.layers.base import Stream
from tbik_jax.layers.few_rows import ParallelOfFewRows
from tbik_jax.layers.turns import alone
from tbik_jax.models import Qwen3
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG

#: The fewest columns that the kernels take.
WIDE = dataclasses.replace(CONFIG, hidden_size=128, num_hidden_layers=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fuses on the CPU too, by the references; the ops that were fused."""
    found: list[str] = []

    def recorded(name: str) -> Any:
        op = getattr(few_rows, name)

        def call(*args: Any, **options: Any) -> Any:
            found.append(name)
            parts = {"parts": 4} if name == "matmul_subtrees" else {}  # the reference's own choice is one
            return op(*args, **(parts | options))

        return call

    for name in ("norm_matmul", "matmul_subtrees", "join_subtrees"):
        monkeypatch.setattr(few_rows, name, recorded(name))
    monkeypatch.setattr(few_rows, "matmul_subtrees_refusal", lambda x, w, leaves: None)
    monkeypatch.setattr(ParallelOfFewRows, "_fuses", lambda self, x: True)
    steps._steps.cache_clear()
    yield found
    steps._steps.cache_clear()


def _prompts(rows: int) -> list[list[int]]:
    return [[3 + i, 7, 11 + i] for i in range(rows)]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fused_ops_generate_the_same(dtype: Any, scan_layers: bool, request: pytest.FixtureRequest) -> None:
    """In float32 as well, as in a model so small the rounding to bfloat16 hides most of another order."""
    model = Qwen3(WIDE, dtype=dtype, rngs=nnx.Rngs(3))
    options: dict[str, Any] = {"max_new_tokens": 4, "scan_layers": scan_layers}
    expected = generate(model, _prompts(1), **options)
    calls = request.getfixturevalue("calls")
    found = generate(model, _prompts(1), **options)
    assert {"norm_matmul", "matmul_subtrees"} <= set(calls)
    assert ("join_subtrees" in calls) == scan_layers
    assert_same_bits((found.tokens, found.logprobs), (expected.tokens, expected.logprobs))


@pytest.mark.parametrize(
    ("rows", "sizes", "fused"),
    [
        (1, {"tp": 1}, {"norm_matmul", "matmul_subtrees"}),
        (1, {"tp": 2}, {"norm_matmul"}),  # ranks exchange whole sums
        (3, {"tp": 1}, {"matmul_subtrees"}),
        (2, {"data": 2}, {"norm_matmul", "matmul_subtrees"}),
    ],
)
def test_what_is_fused_depends_on_a_rank_s_rows(
    rows: int, sizes: dict[str, int], fused: set[str], calls: list[str]
) -> None:
    model = Qwen3(WIDE, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    generate(model, _prompts(rows), mesh=make_mesh(**sizes), max_new_tokens=2, scan_layers=False)
    assert set(calls) == fused


@pytest.mark.parametrize("numerics", ["plain", "batch_invariant"])
def test_other_numerics_are_never_fused(numerics: Any, calls: list[str]) -> None:
    model = Qwen3(WIDE, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    generate(model, _prompts(1), max_new_tokens=2, numerics=numerics)
    assert not calls


def test_a_lost_last_add_shows(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin of the first test: an op that adds the subtrees up in another order."""
    model = Qwen3(WIDE, dtype=jnp.float32, rngs=nnx.Rngs(3))
    right = generate(model, _prompts(1), max_new_tokens=4, scan_layers=False)
    op = few_rows.matmul_subtrees

    def turned(*args: Any, **options: Any) -> jax.Array:
        return op(*args, **options, parts=8)[jnp.asarray([0, 4, 1, 5, 2, 6, 3, 7])]

    monkeypatch.setattr(few_rows, "matmul_subtrees", turned)
    steps._steps.cache_clear()
    wrong = generate(model, _prompts(1), max_new_tokens=4, scan_layers=False)
    assert any((a != b).any() for a, b in zip(wrong.logprobs, right.logprobs, strict=True))


def _kernels(
    monkeypatch: pytest.MonkeyPatch, rows: int, tp: int, d: int = 2048, name: str = "mosaic_gpu"
) -> list[str]:
    """The kernels of o_proj, norm, gate and up on a Hopper GPU, in order."""
    monkeypatch.setattr(backend, "device_backend", lambda device: name)
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)
    parallel = ParallelOfFewRows(numerics=InvariantNumerics(backend=name))

    def body(heads: jax.Array, x: jax.Array, scale: jax.Array, out_w: jax.Array, w: jax.Array) -> Any:
        attended = alone(parallel.row_parallel(heads, out_w))
        return parallel.norm_column_parallel(Stream(x, attended), scale, w, eps=1e-6, gated=True)

    shapes = ((rows, 1, 2048), (rows, 1, d), (d,), (2048, d), (6144, d))
    specs = (P(None, None, "tp"), P(), P(), P("tp"), P("tp"))
    mapped = jax.shard_map(
        body, mesh=make_mesh(tp=tp), in_specs=specs, out_specs=(P(), P(None, None, "tp")), check_vma=False
    )
    jaxpr = jax.make_jaxpr(mapped)(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    return re.findall(r"\bname=(norm_matmul|matmul_subtrees|tree_matmul|add_rms_norm)\b", str(jaxpr))


def test_a_hopper_gpu_runs_the_fused_kernels_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = functools.partial(_kernels, monkeypatch)
    assert kernels(1, 1) == ["matmul_subtrees", "norm_matmul"]
    assert kernels(8, 1) == ["matmul_subtrees", "add_rms_norm", "tree_matmul"]
    assert kernels(9, 1) == ["tree_matmul", "add_rms_norm", "tree_matmul"]
    assert kernels(1, 2) == ["tree_matmul", "norm_matmul"]  # ranks exchange whole sums
    assert kernels(1, 1, d=5120) == ["tree_matmul", "norm_matmul"]  # too many tiles of parts
    assert kernels(1, 1, name="reference") == []  # the twin: nothing is fused elsewhere
