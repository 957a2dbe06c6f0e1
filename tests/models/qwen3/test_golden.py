"""Parity with Hugging Face transformers over the golden files that `tests/data/make_golden.py` made.

A tolerance is a small multiple of what transformers itself loses against float64 on the same input. The twins at the
end break one thing each and show that the same checks then fail by far.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbik_jax import load, make_mesh, synthetic
from tbik_jax.mesh import BATCH_AXES
from tbik_jax.models.qwen3.modules import init_cache
from tbik_jax.pallas_kernels.rope.api import rope_tables
from tbik_jax.steps import Engine
from tests.checkpoints import SINGLE, edit_json, edit_tensors, read_tensors
from tests.helpers import assert_same_bits, differing

DATA = Path(__file__).parents[2] / "data"
NAMES = ("a", "b", "c", "d")
CAPACITY = 64

#: Multiples of transformers' own error: its largest over an array is a noisy figure, its mean is not.
MAX_FACTOR, MEAN_FACTOR, BFLOAT16_FACTOR = 3.0, 1.5, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Hidden states after the embedding, each layer and the final norm, [B, T, D] each, and logits [B, T, V]."""

    hidden: list[np.ndarray]
    logits: np.ndarray


@functools.cache
def golden(name: str) -> Mapping[str, np.ndarray]:
    """The arrays of a golden file."""
    with np.load(DATA / f"golden_{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the float32 checkpoint behind a golden file."""
    root = tmp_path_factory.mktemp("golden")

    @functools.cache
    def write(name: str) -> Path:
        config, seed = json.loads(str(golden(name)["config_json"])), int(golden(name)["seed"])
        return synthetic.write_checkpoint(root / name, config, seed=seed, dtype="float32")

    return write


def run(folder: Path, input_ids: np.ndarray, *, dtype: Any, tp: int, numerics: str) -> Output:
    """Loads a checkpoint and runs it over rows without padding."""
    mesh = make_mesh(tp=tp)
    model = load(folder, mesh=mesh, dtype=dtype)
    engine, config = Engine.create(model, mesh, numerics), model.config
    lengths = np.full(len(input_ids), input_ids.shape[1], np.int32)
    rows = jax.device_put((input_ids, lengths), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    tables = jax.device_put(
        rope_tables(CAPACITY, config.head_dim, config.rope_theta), NamedSharding(mesh, PartitionSpec())
    )
    cache = init_cache(engine.steps.cache_shapes(len(input_ids), CAPACITY))
    hidden, logits = jax.device_get(engine.steps.hidden_states(engine.parameters, cache, *rows, tables))
    return Output(hidden=hidden, logits=logits)


@pytest.fixture(scope="module")
def outputs(checkpoint: Callable[[str], Path]) -> Callable[..., Output]:
    """`run` on a golden file's checkpoint and tokens, once for each set of arguments."""

    @functools.cache
    def cached(name: str, dtype: str, tp: int, numerics: str) -> Output:
        ids = golden(name)["input_ids"]
        return run(checkpoint(name), ids, dtype=jnp.dtype(dtype), tp=tp, numerics=numerics)

    return cached


# --- errors, as multiples of what is allowed -------------------------------------------------------------


def float32_logits_excess(output: Output, name: str) -> float:
    """Error of the logits against float64, over the tolerance: at most 1 passes."""
    exact = golden(name)["logits_float64"]
    ours, theirs = np.abs(output.logits - exact), np.abs(golden(name)["logits"] - exact)
    return max(ours.max() / (MAX_FACTOR * theirs.max()), ours.mean() / (MEAN_FACTOR * theirs.mean()))


def float32_hidden_excess(output: Output, name: str) -> list[float]:
    """The same for each hidden state but the embedding, against transformers' float32.

    There is no float64 to compare with. What transformers loses up to the logits, relative to the largest of them,
    stands for what it loses up to a layer.
    """
    logits, exact = golden(name)["logits"], golden(name)["logits_float64"]
    relative = np.abs(logits - exact).max() / np.abs(exact).max()
    theirs = [*golden(name)["hidden_states"], golden(name)["final_norm"]]
    return [
        float(np.abs(our - their).max() / (MAX_FACTOR * relative * np.abs(their).max()))
        for our, their in zip(output.hidden[1:], theirs[1:], strict=True)
    ]


def bfloat16_logits_excess(output: Output, name: str) -> float:
    """Error of the logits against float64 of the rounded weights, over the tolerance."""
    exact = golden(name)["bf16_weights_logits_float64"]
    ours, theirs = np.abs(output.logits - exact), np.abs(golden(name)["bf16_logits"] - exact)
    return max(ours.max() / theirs.max(), ours.mean() / theirs.mean()) / BFLOAT16_FACTOR


# --- parity ----------------------------------------------------------------------------------------------


def test_the_golden_files_differ_where_a_model_can_go_wrong() -> None:
    configs = [json.loads(str(golden(name)["config_json"])) for name in NAMES]
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {"rope_parameters" in config for config in configs} == {True, False}
    assert any(
        config["head_dim"] * config["num_attention_heads"] != config["hidden_size"] for config in configs
    )
    for field, least in (("head_dim", 3), ("num_attention_heads", 3), ("rms_norm_eps", 2)):
        assert len({config[field] for config in configs}) >= least, field


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("numerics", "tp"), [("invariant", 1), ("invariant", 2), ("plain", 2)])
def test_float32_is_as_close_to_float64_as_transformers(
    outputs: Callable[..., Output], name: str, numerics: str, tp: int
) -> None:
    output = outputs(name, "float32", tp, numerics)
    assert len(output.hidden) == 1 + len(golden(name)["hidden_states"])
    assert_same_bits(output.hidden[0], golden(name)["hidden_states"][0])  # the embedding is exact
    assert max(float32_hidden_excess(output, name)) <= 1
    assert float32_logits_excess(output, name) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("numerics", "tp"), [("invariant", 2), ("plain", 2)])
def test_bfloat16_is_as_close_to_float64_as_transformers(
    outputs: Callable[..., Output], name: str, numerics: str, tp: int
) -> None:
    output = outputs(name, "bfloat16", tp, numerics)
    assert output.hidden[-1].dtype == jnp.bfloat16 and output.logits.dtype == np.float32
    assert bfloat16_logits_excess(output, name) <= 1


# --- bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_float32_bits_do_not_depend_on_tp(outputs: Callable[..., Output], name: str) -> None:
    one, two = (outputs(name, "float32", tp, "invariant") for tp in (1, 2))
    assert_same_bits(dataclasses.astuple(two), dataclasses.astuple(one))


def test_bfloat16_bits_do_not_depend_on_tp(outputs: Callable[..., Output]) -> None:
    one, two = (outputs("b", "bfloat16", tp, "invariant") for tp in (1, 2))
    assert_same_bits(dataclasses.astuple(two), dataclasses.astuple(one))


@pytest.mark.parametrize("name", ["b", "c"])
def test_the_twin_with_plain_numerics_does_depend_on_tp(outputs: Callable[..., Output], name: str) -> None:
    one, two = (outputs(name, "float32", tp, "plain") for tp in (1, 2))
    assert differing(one.logits, two.logits) > 0


# --- twins: what the checks above would catch ------------------------------------------------------------


def wrong_theta(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(rope_theta=1e6))


def wrong_eps(folder: Path) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(rms_norm_eps=1e-6))


def forgotten_q_norm(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_norm.weight"
    edit_tensors(folder / SINGLE, {name: np.ones_like(read_tensors(folder)[name])})


def forgotten_final_norm(folder: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(folder / SINGLE, {name: np.ones_like(read_tensors(folder)[name])})


def swapped_gate_and_up(folder: Path) -> None:
    tensors = read_tensors(folder)
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    edit_tensors(folder / SINGLE, {gate: tensors[up], up: tensors[gate]})


def rolled_query_heads(folder: Path) -> None:
    """Each query head meets the keys of the next one."""
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = read_tensors(folder)[name]
    heads = np.roll(weight.reshape(8, 16, -1), 1, axis=0)
    edit_tensors(folder / SINGLE, {name: heads.reshape(weight.shape)})


def run_damaged(folder: Path, damage: Callable[[Path], None], dtype: Any) -> Output:
    """File b again, of three layers, after a change of its checkpoint."""
    config, seed = json.loads(str(golden("b")["config_json"])), int(golden("b")["seed"])
    synthetic.write_checkpoint(folder, config, seed=seed, dtype="float32")
    damage(folder)
    return run(folder, golden("b")["input_ids"], dtype=dtype, tp=2, numerics="invariant")


@pytest.mark.parametrize(
    ("damage", "first", "at_least"),
    [
        (wrong_theta, 0, 1e3),
        (wrong_eps, 0, 5),  # 1e-6 for 1e-5: the smallest mistake here
        (forgotten_q_norm, 1, 1e3),
        (forgotten_final_norm, 3, 1e3),
        (swapped_gate_and_up, 1, 1e3),
        (rolled_query_heads, 1, 1e3),
    ],
)
def test_a_mistake_exceeds_the_tolerance_by_far(
    tmp_path: Path, damage: Callable[[Path], None], first: int, at_least: float
) -> None:
    """From the first layer that it concerns; the layers before it still agree."""
    output = run_damaged(tmp_path / "b", damage, jnp.float32)
    hidden = float32_hidden_excess(output, "b")
    assert max(hidden[:first], default=0) <= 1
    assert min(hidden[first:]) > at_least
    assert float32_logits_excess(output, "b") > at_least


@pytest.mark.parametrize("damage", [wrong_theta, forgotten_q_norm, swapped_gate_and_up])
def test_a_mistake_exceeds_the_tolerance_of_bfloat16_too(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    output = run_damaged(tmp_path / "b", damage, jnp.bfloat16)
    assert bfloat16_logits_excess(output, "b") > 2
