"""Checkpoints: every bit comes back on every mesh, each device reads its shards, and no half of one is ever used."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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

from tbik_jax import checkpoint_arrays, checkpoint_steps, make_mesh, restore_checkpoint, save_checkpoint
from tbik_jax.checkpoint_folder import new_step
from tbik_jax.loading import parameter_shardings
from tbik_jax.models import Qwen3
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG as TWO_LAYERS

CONFIG = dataclasses.replace(TWO_LAYERS, num_hidden_layers=1)
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
#: Moments in float32 and bfloat16, counts in int32, and a key.
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(mu_dtype=jnp.float32),
    optax.add_noise(0.1, 0.5, jax.random.key(5)),
    optax.scale_by_learning_rate(0.01),
)
State = tuple[Qwen3, nnx.Optimizer, nnx.Rngs]


def mesh_name(sizes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes.items())


def abstract_model(dtype: Any = jnp.bfloat16, **fields: Any) -> Qwen3:
    config = dataclasses.replace(CONFIG, **fields)
    return nnx.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))


def abstract_optimizer(model: Qwen3, tx: optax.GradientTransformation = TX) -> nnx.Optimizer:
    return nnx.eval_shape(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param), model)


def any_bits(rng: np.random.Generator, like: Any) -> jax.Array:
    """Random bits of an array's shape and dtype: NaNs of any payload, infinities, subnormals and -0.0 among them."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(int(rng.integers(2**31))), like.shape)
    count = int(np.prod(like.shape)) * like.dtype.itemsize
    return jnp.asarray(np.frombuffer(rng.bytes(count), np.dtype(like.dtype)).reshape(like.shape))


def new_state(mesh: Mesh, seed: int = 0) -> State:
    """A state of arbitrary bits on a mesh, as a train step would leave it: moments lie like the parameters."""
    rng = np.random.default_rng(seed)
    model = abstract_model()
    optimizer = abstract_optimizer(model)
    shardings = checkpoint_arrays.node_shardings({"model": model, "optimizer": optimizer}, mesh)
    for part, node in {"model": model, "optimizer": optimizer}.items():
        shapes = checkpoint_arrays.node_arrays(part, node, abstract=True)
        values = {name: jax.device_put(any_bits(rng, s), shardings[part][name]) for name, s in shapes.items()}
        checkpoint_arrays.update_node(node, values)
    rngs = nnx.Rngs(params=jax.random.key(seed), noise=seed + 1)
    rngs.noise()
    return model, optimizer, rngs


def empty_state() -> State:
    model = abstract_model()
    return model, abstract_optimizer(model), nnx.Rngs(params=0, noise=0)


def values(*nodes: Any) -> dict[str, np.ndarray]:
    """Every array of the nodes by name."""
    flat = {}
    for i, node in enumerate(nodes):
        for name, value in checkpoint_arrays.node_arrays(str(i), node).items():
            key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
            flat[f"{i}.{name}"] = np.asarray(jax.random.key_data(value) if key else value)
    return flat


def assert_same_state(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    a, e = values(*actual), values(*expected)
    assert a.keys() == e.keys()
    for name in e:
        assert_same_bits(a[name], e[name])


def save(folder: Path, step: int, state: State, **more: Any) -> Path:
    model, optimizer, rngs = state
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, rng=rngs, **more)


def restore(folder: Path, state: State, **more: Any) -> Any:
    model, optimizer, rngs = state
    return restore_checkpoint(folder, model=model, optimizer=optimizer, rng=rngs, **more)


@pytest.fixture(scope="module")
def state() -> State:
    return new_state(make_mesh(fsdp=2, tp=2))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    """A folder with steps 1 and 2, not to be changed."""
    folder = tmp_path_factory.mktemp("template")
    save(folder, 1, new_state(make_mesh(), seed=1), extra={"cursor": 1})
    save(folder, 2, state, extra={"cursor": 2, "names": ["a"]})
    return folder


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(template, tmp_path / "run"))


# --- bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_on", MESHES, ids=mesh_name)
def test_every_bit_comes_back_on_every_mesh(saved_on: dict[str, int], tmp_path: Path) -> None:
    state = new_state(make_mesh(**saved_on), seed=3)
    save(tmp_path, 7, state, extra={"loss": 1.5})
    for sizes in MESHES:
        found = empty_state()
        mesh = make_mesh(**sizes)
        restored = restore(tmp_path, found, mesh=mesh)
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

    def train(model: Qwen3, optimizer: nnx.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.update(model, jax.tree.map(jnp.sin, nnx.state(model)))

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
    """The limit, or one larger array; and with the usual limit a small model is one group, so that the test can fail."""
    state = new_state(make_mesh(tp=4))
    largest: list[int] = []
    at_once: list[int] = []
    transfer = replica_slices.transfer_arrays_to_host

    def recording(*args: Any, **kwargs: Any) -> Any:
        slices = transfer(*args, **kwargs)
        parts = [s.unsliced_data.nbytes for array in slices for s in array.replica_slices]
        largest.append(max(parts))
        at_once.append(sum(parts))
        return slices

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", recording)
    monkeypatch.setattr(checkpoint_arrays, "GROUP_BYTES", limit)
    save(tmp_path, 0, state)
    gate_up = TWO_LAYERS.intermediate_size * TWO_LAYERS.hidden_size * 2 * 4
    assert max(largest) == gate_up // 4  # a rank's shard of the largest array
    few = max(at_once) <= max(limit, gate_up)
    assert few == (len(at_once) > 3) == (limit == 40_000) or (limit > gate_up and len(at_once) == 3)
    found = empty_state()
    restore(tmp_path, found, mesh=make_mesh(fsdp=2))
    assert_same_state(found, state)


# --- whole or not at all -----------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from tbik_jax import checkpoint, checkpoint_folder
from tests import test_checkpoint as t

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

write_group = checkpoint.write_group
def killed_after_the_model(path, arrays):
    write_group(path, arrays)
    kill()

if sys.argv[2] == "arrays":
    checkpoint.write_group = killed_after_the_model
else:  # the manifest is there, and the name is not
    checkpoint_folder.flush = kill
t.save(Path(sys.argv[1]), 3, t.new_state(t.make_mesh(tp=2), seed=9))
print("not killed")
"""


@pytest.mark.parametrize("where", ["arrays", "name"])
def test_a_killed_save_is_passed_over(where: str, folder: Path, state: State) -> None:
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), where],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    (partial,) = folder.glob(".step_00000003.partial-*")
    assert (partial / "model-0000").is_dir() and (partial / "checkpoint.json").exists() == (where == "name")
    assert checkpoint_steps(folder) == [1, 2]
    found = empty_state()
    with pytest.warns(UserWarning, match=f"{partial.name} was interrupted .*; step 2 is restored instead"):
        assert restore(folder, found).step == 2
    assert_same_state(found, state)
    with pytest.raises(
        ValueError, match="step 3 is not whole: .*partial-.* was interrupted .*step 1, step 2"
    ):
        restore(folder, found, step=3)
    save(folder, 3, state, keep=2)  # the run goes on, and clears what the kill left
    assert checkpoint_steps(folder) == [2, 3] and not partial.exists()


def test_an_error_leaves_nothing(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tbik_jax.checkpoint_folder.flush", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 0, model=state[0])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save_checkpoint(tmp_path, 0, model=state[0])
    assert checkpoint_steps(tmp_path) == [0]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_every_file_counts(damage: Callable[[Path], None], folder: Path, template: Path) -> None:
    path = folder / "step_00000002"
    for file in files_of(path):
        damage(file)
        if file.name == "checkpoint.json" and damage is truncate:
            os.truncate(file, file.stat().st_size - 1)  # the last byte is only a line's end
        assert checkpoint_steps(folder) == [1], file
        shutil.copy(template / file.relative_to(folder), file)
        assert checkpoint_steps(folder) == [1, 2], file


@pytest.mark.parametrize(
    ("pattern", "damage", "reason"),
    [
        ("checkpoint.json", Path.unlink, "lacks checkpoint.json"),
        ("model-0000/d/*", truncate, r"holds \d+ bytes and was saved with \d+"),
        ("optimizer-0000/manifest.ocdbt", Path.unlink, "lacks the file optimizer-0000/manifest.ocdbt of"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over(
    pattern: str, damage: Callable[[Path], None], reason: str, folder: Path, state: State
) -> None:
    path = folder / "step_00000002"
    damage(next(path.glob(pattern)))
    found = empty_state()
    with pytest.warns(UserWarning, match=f"step_00000002.*{reason}.*; step 1 is restored instead"):
        restored = restore(folder, found)
    assert (restored.step, restored.extra) == (1, {"cursor": 1})
    assert_same_state(found, new_state(make_mesh(), seed=1))
    with pytest.raises(ValueError, match=f"^step 2 is not whole: .*{reason}.*; whole are step 1$"):
        restore(folder, found, step=2)
    with pytest.raises(ValueError, match=f"step 2 of .* though damaged .*{reason}.*remove"):
        save(folder, 2, state)
    assert restore(folder, found, step=1).step == 1


def test_a_whole_newest_one_is_taken_without_a_warning(folder: Path) -> None:
    """Warnings are errors here; what an earlier kill left beside newer checkpoints is no news."""
    (folder / ".step_00000001.partial-0123abcd").mkdir()
    assert restore(folder, empty_state()).step == 2


def test_changed_contents_are_refused_and_change_nothing(folder: Path, state: State) -> None:
    """Sizes are as they were, so the checkpoint counts as whole; reading it finds out, after the model was read."""
    for file in (folder / "step_00000002" / "optimizer-0000").glob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    found = new_state(make_mesh(tp=2), seed=5)
    with pytest.raises(ValueError, match="step_00000002/optimizer-0000 is damaged and cannot be read"):
        restore(folder, found)
    assert_same_state(found, new_state(make_mesh(), seed=5))
    restore_checkpoint(folder, model=found[0])
    assert_same_state(found[:1], state[:1])


def test_nothing_to_restore(tmp_path: Path) -> None:
    model = abstract_model()
    assert checkpoint_steps(tmp_path / "none") == []
    with pytest.raises(ValueError, match="no whole checkpoint: there is no such folder"):
        restore_checkpoint(tmp_path / "none", model=model)
    with pytest.raises(ValueError, match="no whole checkpoint: it is empty"):
        restore_checkpoint(tmp_path, model=model)
    (tmp_path / ".step_00000004.partial-0123abcd").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint: .*partial-0123abcd was interrupted"):
        restore_checkpoint(tmp_path, model=model)
    with pytest.raises(ValueError, match="no checkpoint of step 5; whole are none"):
        restore_checkpoint(tmp_path, model=model, step=5)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        checkpoint_steps(tmp_path / "file")


def test_another_format_is_named(folder: Path) -> None:
    manifest = folder / "step_00000002" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="is of format 9; this version reads format 1"):
        restore(folder, empty_state())


# --- saving ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder: Path, template: Path) -> None:
    with pytest.raises(ValueError, match="step 2 of .* is there already and is not overwritten"):
        save(folder, 2, new_state(make_mesh(), seed=4))
    for file in files_of(template):
        assert (folder / file.relative_to(template)).read_bytes() == file.read_bytes()
    assert len(files_of(folder)) == len(files_of(template))


def test_the_slower_of_two_writers_is_told(tmp_path: Path, template: Path) -> None:
    with pytest.raises(ValueError, match="step 2 of .* is there already"), new_step(tmp_path, 2):
        shutil.copytree(template / "step_00000002", tmp_path / "step_00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert checkpoint_steps(tmp_path) == [2]


def test_old_ones_go_when_the_new_one_is_whole(
    folder: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = state[0]

    def fails(path: Path) -> None:
        assert checkpoint_steps(folder) == [1, 2]
        raise OSError("the disk")

    with monkeypatch.context() as patch:
        patch.setattr("tbik_jax.checkpoint_folder.flush", fails)
        with pytest.raises(OSError, match="the disk"):
            save_checkpoint(folder, 3, model=model, keep=1)
    assert checkpoint_steps(folder) == [1, 2]
    save_checkpoint(folder, 3, model=model)
    assert checkpoint_steps(folder) == [1, 2, 3]
    save_checkpoint(folder, 4, model=model, keep=3)
    assert checkpoint_steps(folder) == [2, 3, 4]
    next((folder / "step_00000002").glob("model-0000/d/*")).unlink()
    save_checkpoint(folder, 6, model=model, keep=2)
    assert checkpoint_steps(folder) == [4, 6]
    assert (folder / "step_00000002").is_dir()  # damaged: for somebody to look at
    save_checkpoint(
        folder, 5, model=model, keep=1
    )  # a run that went back keeps what it wrote before and after
    assert checkpoint_steps(folder) == [5, 6]
    assert sorted(p.name for p in folder.iterdir()) == [f"step_0000000{i}" for i in (2, 5, 6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step=-1 must be a whole number of at least 0"),
        ({"step": True}, "step=True must be a whole number"),
        ({"step": 1.0}, "step=1.0 must be a whole number"),
        ({"keep": 0}, "keep=0 must be a whole number of at least 1"),
        ({"extra": {"x": float("nan")}}, "does not come back from JSON"),
        ({"extra": {"x": (1, 2)}}, "does not come back from JSON"),
        ({"extra": {1: 2}}, "does not come back from JSON"),
        ({"extra": {"x": np.ones(2)}}, "does not come back from JSON"),
        ({"extra": [1]}, "does not come back from JSON"),
        ({"rng": 3}, "rng is a int; pass a key"),
        ({"model": abstract_model()}, "model.embedding_vd is a ShapeDtypeStruct"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, Any], message: str, tmp_path: Path, state: State) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, **{"step": 0, "model": state[0], **change})
    assert list(tmp_path.iterdir()) == []


def test_more_processes_are_refused(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="JAX runs in 2 processes"):
        save_checkpoint(tmp_path, 0, model=state[0])
    with pytest.raises(ValueError, match="JAX runs in 2 processes"):
        restore_checkpoint(tmp_path, model=state[0])


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
        ValueError, match="model.embedding_vd is bfloat16 in .*step_00000002 and float32 here"
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
    with pytest.raises(ValueError, match="holds an nnx.Rngs and rng is a key; pass an nnx.Rngs"):
        restore_checkpoint(template, model=model, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="holds rng.noise.count .*, which the rng here lacks"):
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
