"""Checkpoints: every bit comes back on every mesh, each device reads its shards, and mismatches are named."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint._src.serialization import replica_slices, serialization

from tbik_jax import checkpoint_arrays, make_mesh, restore_checkpoint, save_checkpoint
from tbik_jax.loading import parameter_shardings
from tbik_jax.models import Qwen3
from tests.helpers import assert_same_bits
from tests.training_states import (
    CONFIG,
    TWO_LAYERS,
    TX,
    State,
    abstract_model,
    abstract_optimizer,
    assert_same_state,
    empty_state,
    new_state,
    restore,
    save,
    write_two_steps,
)

MESHES = (
    {"tp": 1},
    {"tp": 2},
    {"tp": 4},
    {"tp": 8},
    {"fsdp": 2},
    {"fsdp": 3},  # divides nothing
    {"data": 2, "tp": 4},
    {"fsdp": 2, "tp": 4},
    {"data": 2, "fsdp": 2, "tp": 2},
)


def mesh_name(sizes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes.items())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A folder with steps 1 and 2, not to be changed, and the state of step 2."""
    folder = tmp_path_factory.mktemp("template")
    return folder, write_two_steps(folder)


@pytest.fixture
def template(written: tuple[Path, State]) -> Path:
    return written[0]


@pytest.fixture
def state(written: tuple[Path, State]) -> State:
    return written[1]


# --- bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(MESHES)), ids=lambda i: mesh_name(MESHES[i]))
def test_every_bit_comes_back_on_another_mesh(i: int, tmp_path: Path) -> None:
    """Each mesh saves for two others, and restores for two others."""
    others = [MESHES[(i + step) % len(MESHES)] for step in (1, 4)]
    assert_comes_back(MESHES[i], others, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("saved_on", MESHES, ids=mesh_name)
def test_every_bit_comes_back_on_every_mesh(saved_on: dict[str, int], tmp_path: Path) -> None:
    assert_comes_back(saved_on, MESHES, tmp_path)


def assert_comes_back(saved_on: dict[str, int], meshes: Sequence[dict[str, int]], folder: Path) -> None:
    state = new_state(make_mesh(**saved_on), seed=3)
    save(folder, 7, state, extra={"loss": 1.5})
    for sizes in meshes:
        found = empty_state()
        mesh = make_mesh(**sizes)
        restored = restore(folder, found, mesh=mesh)
        assert_same_state(found, state)
        assert (restored.step, restored.extra, restored.rng) == (7, {"loss": 1.5}, found[2])
        assert_lies_on(found, mesh)


def assert_lies_on(state: State, mesh: Mesh) -> None:
    """Parameters and moments are cut as `load` cuts parameters, the rest is on every device of the mesh."""
    model, optimizer, _ = state
    cuts = parameter_shardings(nnx.state(model), mesh)
    wanted = dict(nnx.to_flat_state(cuts))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert leaf.get_value().sharding == wanted[path].get_value(), path
    for path, leaf in nnx.to_flat_state(nnx.state(optimizer)):
        value = leaf.get_value()
        if path[2:3] in (("mu",), ("nu",)):
            assert value.sharding == wanted[path[3:]].get_value(), path
        else:
            assert value.sharding.is_fully_replicated, path
            assert value.sharding.device_set == set(mesh.devices.flat), path


def test_the_comparison_sees_one_bit(state: State) -> None:
    """The twin of the test above: one bit of one moment, and -0.0 for 0.0."""
    for name, change in {
        "opt_state.1.mu.final_norm.scale_d": lambda x: jax.lax.bitcast_convert_type(
            jax.lax.bitcast_convert_type(x, jnp.uint32) ^ jnp.uint32(1), x.dtype
        ),
        "opt_state.1.count": lambda x: x + 1,
    }.items():
        changed = abstract_optimizer(abstract_model())
        arrays = checkpoint_arrays.node_arrays("optimizer", state[1])
        checkpoint_arrays.update_node(changed, {**arrays, name: change(arrays[name])})
        with pytest.raises(AssertionError):
            assert_same_state((state[0], changed, state[2]), state)
    with pytest.raises(AssertionError):
        assert_same_bits(np.float32(-0.0), np.float32(0.0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_and_tied_embeddings(dtype: Any, tmp_path: Path) -> None:
    model = Qwen3(dataclasses.replace(CONFIG, tie_word_embeddings=True), dtype=dtype, rngs=nnx.Rngs(1))
    save_checkpoint(tmp_path, 0, model=model)
    found = abstract_model(dtype, tie_word_embeddings=True)
    restored = restore_checkpoint(tmp_path, model=found, mesh=make_mesh(tp=4))
    assert_same_state((found,), (model,))
    assert restored.rng is None and restored.extra is None


@pytest.mark.parametrize(
    "key",
    [
        jax.random.key(3),
        jax.random.key(4, impl="rbg"),
        jax.random.split(jax.random.key(5), (2, 3)),
        jax.random.PRNGKey(6),
    ],
    ids=["threefry", "rbg", "keys", "raw"],
)
def test_keys_give_the_same_numbers(key: jax.Array, tmp_path: Path, state: State) -> None:
    save_checkpoint(tmp_path, 0, model=state[0], rng=key)
    like = jnp.zeros(key.shape, key.dtype)
    rng = restore_checkpoint(tmp_path, model=abstract_model(), rng=like, mesh=make_mesh(tp=2)).rng
    assert rng.dtype == key.dtype
    draw = (
        jax.random.bits if key.ndim == 0 or key.dtype == jnp.uint32 else jax.vmap(jax.vmap(jax.random.bits))
    )
    np.testing.assert_array_equal(draw(rng), draw(key))
    assert (np.asarray(draw(like)) != np.asarray(draw(key))).any()


def test_streams_go_on(tmp_path: Path, state: State) -> None:
    rngs = nnx.Rngs(params=1, noise=2)
    rngs.noise()
    save_checkpoint(tmp_path, 0, model=state[0], rng=rngs)
    found, fresh = nnx.Rngs(params=0, noise=0), nnx.Rngs(params=1, noise=2)
    restore_checkpoint(tmp_path, model=abstract_model(), rng=found)
    drawn = [np.asarray(jax.random.key_data(stream())) for stream in (rngs.noise, found.noise, fresh.noise)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_factored_moments_are_replicated(tmp_path: Path) -> None:
    """Adafactor's have a parameter's path and another shape; MultiSteps' gradients have both."""
    tx = optax.MultiSteps(optax.adafactor(0.1, min_dim_size_to_factor=16), 2)
    model = Qwen3(CONFIG, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    save_checkpoint(tmp_path, 0, model=model, optimizer=optimizer)
    found = abstract_model()
    found_optimizer = abstract_optimizer(found, tx)
    restore_checkpoint(tmp_path, model=found, optimizer=found_optimizer, mesh=make_mesh(tp=4, fsdp=2))
    assert_same_state((found, found_optimizer), (model, optimizer))
    arrays = checkpoint_arrays.node_arrays("optimizer", found_optimizer)
    rows = next(v for name, v in arrays.items() if "v_row.embedding_vd" in name)
    assert rows.shape != found.embedding_vd[...].shape and rows.sharding.is_fully_replicated
    assert arrays["opt_state.acc_grads.embedding_vd"].sharding == found.embedding_vd[...].sharding


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    mesh = make_mesh(tp=2)

    def start() -> tuple[Qwen3, nnx.Optimizer]:
        model = Qwen3(CONFIG, rngs=nnx.Rngs(1))
        nnx.update(model, jax.device_put(nnx.state(model), parameter_shardings(nnx.state(model), mesh)))
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def update(model: Qwen3, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.sin, nnx.state(model)))

    def train(model: Qwen3, optimizer: nnx.Optimizer, steps: int) -> None:
        for _ in range(steps):
            update(model, optimizer)

    whole, first, second, forgetful = start(), start(), start(), start()
    train(*whole, 3)
    train(*first, 2)
    save_checkpoint(tmp_path, 2, model=first[0], optimizer=first[1])
    restore_checkpoint(tmp_path, model=second[0], optimizer=second[1], mesh=mesh)
    train(*second, 1)
    assert_same_state(second, whole)
    restore_checkpoint(tmp_path, model=forgetful[0], mesh=mesh)  # the moments and the step start again
    train(*forgetful, 1)
    with pytest.raises(AssertionError):
        assert_same_state(forgetful, whole)


# --- nothing is gathered -----------------------------------------------------------------------------------


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the size of each array that Orbax reads on the host is appended to this list."""
    sizes: list[int] = []
    read = serialization._read_shard

    async def recording(*args: Any, **kwargs: Any) -> np.ndarray:
        out = await read(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(serialization, "_read_shard", recording)
    return sizes


@pytest.mark.parametrize("sizes", [{"tp": 8}, {"fsdp": 2, "tp": 4}, {"data": 2, "tp": 4}], ids=mesh_name)
def test_each_device_reads_its_shards_only(
    sizes: dict[str, int], template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reads(monkeypatch)
    found = empty_state()
    restore(template, found, mesh=make_mesh(**sizes))
    arrays = [v for part in zip(("m", "o"), found[:2], strict=True) for v in arrays_of(*part)]
    arrays += arrays_of("r", found[2])
    # a shard that several devices hold is read once
    shards = [s.data.nbytes for v in arrays for s in v.addressable_shards if s.replica_id == 0]
    assert sorted(read) == sorted(shards)
    cut = sizes["tp"] * sizes.get("fsdp", 1)
    assert (
        max(read) == TWO_LAYERS.intermediate_size * TWO_LAYERS.hidden_size * 2 * 4 // cut
    )  # gate_up in float32


def arrays_of(part: str, node: Any) -> list[jax.Array]:
    arrays = checkpoint_arrays.node_arrays(part, node).values()
    return [
        jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in arrays
    ]


def test_one_device_reads_whole_arrays(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the list above can hold whole arrays."""
    read = reads(monkeypatch)
    restore(template, empty_state(), mesh=make_mesh())
    assert max(read) == TWO_LAYERS.intermediate_size * TWO_LAYERS.hidden_size * 2 * 4


@pytest.mark.parametrize("limit", [40_000, 2 << 30])
def test_a_group_of_shards_is_on_the_host_at_a_time(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the limit, or of one larger array. The usual limit holds all of a small model, so the test can fail."""
    state = new_state(make_mesh(tp=4))
    shards: list[int] = []
    at_once: list[int] = []
    transfer = replica_slices.transfer_arrays_to_host

    def recording(*args: Any, **kwargs: Any) -> Any:
        slices = transfer(*args, **kwargs)
        parts = [part.unsliced_data.nbytes for array in slices for part in array.replica_slices]
        shards.extend(parts)
        at_once.append(sum(parts))
        return slices

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", recording)
    monkeypatch.setattr(checkpoint_arrays, "GROUP_BYTES", limit)
    save(tmp_path, 0, state)
    gate_up = 4 * 2 * TWO_LAYERS.intermediate_size * TWO_LAYERS.hidden_size  # in float32: the largest array
    assert max(shards) == gate_up // 4
    assert (max(at_once) <= max(40_000, gate_up)) == (limit == 40_000)
    found = empty_state()
    restore(tmp_path, found, mesh=make_mesh(fsdp=2))
    assert_same_state(found, state)


# --- mismatches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=1 and the model has num_hidden_layers=2"),
        ({"intermediate_size": 128}, "intermediate_size=256 and the model has intermediate_size=128"),
        ({"rope_theta": 1e4}, "rope_theta=1000000.0 and the model has rope_theta=10000.0"),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings=False and the model has tie_word_embeddings=True",
        ),
    ],
    ids=str,
)
def test_another_config_is_named(fields: dict[str, Any], message: str, template: Path) -> None:
    with pytest.raises(ValueError, match=f"step_00000002 was saved with {message}"):
        restore_checkpoint(template, model=abstract_model(**fields))


def test_another_dtype_is_named(template: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.embedding_vd is bfloat16 in .*step_00000002 and float32 here"
    ):
        restore_checkpoint(template, model=abstract_model(jnp.float32))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            optax.sgd(0.1),
            r"holds optimizer.opt_state.1.count of shape \(\) int32, which the optimizer here lacks",
        ),
        (optax.adam(0.1), r"lacks optimizer.opt_state.0.count of shape \(\) int32"),
        (
            optax.chain(*[optax.identity()] * 1, optax.scale_by_adam(), *[optax.identity()] * 2),
            "optimizer.opt_state.1.mu.embedding_vd is float32 in .* and bfloat16 here",
        ),
    ],
    ids=["less", "other", "dtype"],
)
def test_another_optimizer_is_named(tx: optax.GradientTransformation, message: str, template: Path) -> None:
    model = abstract_model()
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(template, model=model, optimizer=abstract_optimizer(model, tx))


def test_another_shape_is_named(template: Path) -> None:
    model = abstract_model()
    optimizer = abstract_optimizer(model)
    count = optimizer.opt_state[1].count
    count.set_value(jax.ShapeDtypeStruct((2,), jnp.int32))
    with pytest.raises(
        ValueError, match=r"optimizer.opt_state.1.count has shape \(\) in .*step_00000002 and \(2,\) here"
    ):
        restore_checkpoint(template, model=model, optimizer=optimizer)


def test_what_was_not_saved_is_not_restored(tmp_path: Path, state: State, template: Path) -> None:
    save_checkpoint(tmp_path, 0, model=state[0])
    model = abstract_model()
    with pytest.raises(ValueError, match="step_00000000 was saved without optimizer; pass optimizer=None"):
        restore_checkpoint(tmp_path, model=model, optimizer=abstract_optimizer(model))
    with pytest.raises(ValueError, match="step_00000000 was saved without rng; pass rng=None"):
        restore_checkpoint(tmp_path, model=model, rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"holds an nnx.Rngs and rng is a key; pass an nnx.Rngs"):
        restore_checkpoint(template, model=model, rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"holds rng.noise.count .*, which the rng here lacks"):
        restore_checkpoint(template, model=model, rng=nnx.Rngs(params=0))
    save_checkpoint(tmp_path, 1, model=state[0], rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"rng.key is key<fry> in .* and key<rbg> here"):
        restore_checkpoint(tmp_path, model=model, rng=jax.random.key(0, impl="rbg"))


def test_a_mesh_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_key_value_heads=2)
    save_checkpoint(tmp_path, 0, model=Qwen3(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="num_key_value_heads=2 cannot be cut over tp=4"):
        restore_checkpoint(tmp_path, model=abstract_model(num_key_value_heads=2), mesh=make_mesh(tp=4))


def test_versions_and_config_are_in_the_manifest(template: Path) -> None:
    manifest = json.loads((template / "step_00000002" / "checkpoint.json").read_text())
    assert manifest["step"] == 2
    assert manifest["model"]["config"] == {**dataclasses.asdict(CONFIG), "eos_token_id": []}
    restored = restore_checkpoint(template, model=abstract_model())
    assert restored.versions == manifest["versions"]
    assert restored.versions["jax"] == jax.__version__
    assert {"python", "tbik-jax", "flax", "optax", "orbax-checkpoint"} <= restored.versions.keys()
