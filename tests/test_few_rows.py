"""Decoding of few rows: fused ops, the same bits; and which program runs them."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from tbik_jax.pallas_kernels import Boards, LayerRest
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.few_rows.rest import runs_all_ctas
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

    for name in ("norm_matmul", "matmul_subtrees", "join_subtrees", "rest_of_layer"):
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


@pytest.fixture
def whole_gpu(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> list[str]:
    """`calls`, on GPUs whose CTAs may wait for one another."""
    monkeypatch.setattr(steps, "runs_all_ctas", lambda device: True)
    monkeypatch.setattr(few_rows, "rest_of_layer_refusal", lambda *operands: None)
    steps._steps.cache_clear()
    return calls


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_rest_of_a_layer_in_one_op_generates_the_same(
    dtype: Any, scan_layers: bool, request: pytest.FixtureRequest
) -> None:
    model = Qwen3(WIDE, dtype=dtype, rngs=nnx.Rngs(3))
    options: dict[str, Any] = {"max_new_tokens": 4, "scan_layers": scan_layers}
    expected = generate(model, _prompts(1), **options)
    calls = request.getfixturevalue("whole_gpu")
    found = generate(model, _prompts(1), **options)
    # Before the first layer's qkv nothing was put off; behind the last one's rest there is no product.
    behind = ["norm_matmul", "rest_of_layer", "join_subtrees"]
    assert calls == (behind if scan_layers else ["norm_matmul", "rest_of_layer", "rest_of_layer"])
    assert_same_bits((found.tokens, found.logprobs), (expected.tokens, expected.logprobs))


def test_a_rest_that_belongs_to_another_layer_shows(
    whole_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: the norm before the MLP takes the scale of the one behind it."""
    rngs = nnx.Rngs(3)
    model = Qwen3(WIDE, dtype=jnp.float32, rngs=rngs)
    for layer in model.layers:
        layer.post_attention_norm.scale_d[...] = jnp.linspace(0.5, 2, WIDE.hidden_size)
    right = generate(model, _prompts(1), max_new_tokens=4, scan_layers=False)
    op = few_rows.rest_of_layer

    def other(x: Any, rest: Any, behind: Any, boards: Any, **options: Any) -> Any:
        return op(
            x, rest._replace(scale=rest.scale if behind is None else behind[0]), behind, boards, **options
        )

    monkeypatch.setattr(few_rows, "rest_of_layer", other)
    steps._steps.cache_clear()
    wrong = generate(model, _prompts(1), max_new_tokens=4, scan_layers=False)
    assert any((a != b).any() for a, b in zip(wrong.logprobs, right.logprobs, strict=True))


@pytest.mark.parametrize(
    ("sizes", "put_off"), [({"data": 2}, True), ({"tp": 2}, False), ({"fsdp": 2}, False)]
)
def test_a_rest_is_put_off_where_no_collective_may_run_meanwhile(
    sizes: dict[str, int], put_off: bool, whole_gpu: list[str]
) -> None:
    """A GPU that waits for another one in a collective holds multiprocessors that CTAs wait for."""
    model = Qwen3(WIDE, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    generate(model, _prompts(2), mesh=make_mesh(**sizes), max_new_tokens=2, scan_layers=False)
    assert ("rest_of_layer" in whole_gpu) == put_off


def test_only_gpus_that_run_all_ctas_at_once_take_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
    devices = [SimpleNamespace(core_count=n) for n in (132, 144, 114, 16)]
    assert list(map(runs_all_ctas, (*devices, SimpleNamespace()))) == [True, True, False, False, False]
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))  # processes share the GPU
    assert not runs_all_ctas(devices[0])


def _layers(
    monkeypatch: pytest.MonkeyPatch, rows: int, d: int, whole_gpu: bool = True
) -> tuple[list[str], int]:
    """The kernels of two layers' products on a Hopper GPU, in order, and how many boards were made."""
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)
    made: list[int] = []
    create = Boards.create

    def counted(words: int) -> Boards:
        made.append(words)
        return create(words)

    monkeypatch.setattr(Boards, "create", counted)
    parallel = ParallelOfFewRows(numerics=InvariantNumerics(backend="mosaic_gpu"), whole_gpu=whole_gpu)

    def body(x: jax.Array, qkv_w: jax.Array, rest: LayerRest) -> jax.Array:
        stream = Stream(x)
        for _ in range(2):
            stream, product = parallel.norm_column_parallel(stream, rest.scale, qkv_w, eps=1e-6)
            todo = rest._replace(heads=product[..., : rest.out_w.shape[0]], eps=1e-6)
            later = parallel.put_off(stream, lambda todo=todo: todo)
            if later is None:
                attended = alone(parallel.row_parallel(todo.heads, rest.out_w))
                stream, hidden = parallel.norm_column_parallel(
                    stream._replace(pending=attended), rest.scale, rest.gate_up_w, eps=1e-6, gated=True
                )
                later = stream._replace(pending=alone(parallel.row_parallel(hidden, rest.down_w)))
            stream = later
        return parallel.norm(stream, rest.scale, eps=1e-6)[1]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    rest = LayerRest(array(rows, 1, d), array(d, d), array(d), array(6 * d, d), array(3 * d, d), 0)
    mapped = jax.shard_map(body, mesh=make_mesh(), in_specs=(P(), P(), P()), out_specs=P(), check_vma=False)
    jaxpr = jax.make_jaxpr(mapped)(array(rows, 1, d), array(2 * d, d), rest)
    names = "norm_matmul|matmul_subtrees|tree_matmul|add_rms_norm|rms_norm|rest_of_layer"
    return re.findall(rf"\bname=({names})\b", str(jaxpr)), len(made)


def test_a_hopper_gpu_runs_the_rest_of_a_layer_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = functools.partial(_layers, monkeypatch)
    assert layers(1, 2048) == (["norm_matmul", "rest_of_layer", "rest_of_layer", "add_rms_norm"], 1)
    single = {"norm_matmul", "matmul_subtrees", "add_rms_norm"}
    for d, whole_gpu in ((4096, True), (2048, False)):  # 8B's ring would be too short
        kernels, made = layers(1, d, whole_gpu=whole_gpu)
        assert (set(kernels), made) == (single, 0)
    assert "rest_of_layer" not in layers(2, 2048)[0]


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
        stream, hidden = parallel.norm_column_parallel(Stream(x, attended), scale, w, eps=1e-6, gated=True)
        return stream.x, hidden

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
