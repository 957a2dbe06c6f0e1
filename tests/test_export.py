"""`export_hugging_face`: from any mesh the bytes that transformers writes, and `load` gives the same bits back."""

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from tbik_jax import export, export_hugging_face, load, make_mesh, synthetic
from tbik_jax.checkpoint_arrays import node_arrays, update_node
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.checkpoint import read_parameter, split_parameter, tensor_shapes
from tests.checkpoints import (
    HEAD,
    INDEX,
    SINGLE,
    TINY,
    UNTIED,
    expected_parameters,
    parameters,
    read_tensors,
)
from tests.helpers import assert_same_bits

DATA = Path(__file__).resolve().parent / "data"
GOLDEN = json.loads((DATA / "golden_export.json").read_text())["cases"]
CONFIGS = {"tied": TINY, "untied": UNTIED}
MESHES = (
    {"tp": 1},
    {"tp": 8},
    {"fsdp": 3},  # divides nothing
    {"data": 2, "fsdp": 2, "tp": 2},
)
SHARDED = 30_000


def mesh_name(sizes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes.items())


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as `synthetic` writes them, by case; not to be changed."""
    root = tmp_path_factory.mktemp("originals")
    return {
        case: synthetic.write_checkpoint(root / case, CONFIGS[case.split("-")[0]], dtype=case.split("-")[1])
        for case in GOLDEN
    }


@pytest.fixture(scope="module")
def model(originals: dict[str, Path]) -> Qwen3:
    return load(originals["untied-bfloat16"], mesh=make_mesh(fsdp=2, tp=4))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what transformers writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
@pytest.mark.parametrize("case", GOLDEN)
def test_files_are_those_of_transformers_byte_for_byte(
    case: str, sizes: dict[str, int], originals: dict[str, Path], tmp_path: Path
) -> None:
    """The golden file holds what `save_pretrained` made of the same weights."""
    golden, dtype = GOLDEN[case], case.split("-")[1]
    assert golden["config"] == CONFIGS[case.split("-")[0]]
    loaded = load(originals[case], mesh=make_mesh(**sizes), dtype=dtype)
    for kind, limit in {"single": 5_000_000_000, "sharded": SHARDED}.items():
        folder = export_hugging_face(loaded, tmp_path / kind, max_shard_bytes=limit)
        assert names(folder) == sorted(["config.json", *golden["files"][kind]])
        for name, digest in golden["files"][kind].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert len(golden["files"]["sharded"]) > 3


def test_one_bit_changes_the_bytes(originals: dict[str, Path], tmp_path: Path) -> None:
    """The twin: of one value of one layer."""
    case = "tied-bfloat16"
    loaded = load(originals[case])
    scale = loaded.layers[1].attention.k_norm.scale_d
    scale[...] = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(scale[...], jnp.uint16).at[3].add(jnp.uint16(1)), jnp.bfloat16
    )
    file = export_hugging_face(loaded, tmp_path / "export") / SINGLE
    assert hashlib.sha256(file.read_bytes()).hexdigest() != GOLDEN[case]["files"]["single"][SINGLE]


@pytest.mark.parametrize("case", GOLDEN)
def test_config_is_the_one_of_transformers(case: str, originals: dict[str, Path], tmp_path: Path) -> None:
    folder = export_hugging_face(load(originals[case], dtype=case.split("-")[1]), tmp_path / "export")
    mine, theirs = json.loads((folder / "config.json").read_text()), GOLDEN[case]["saved_config"]
    assert Qwen3Config.from_dict(mine) == Qwen3Config.from_dict(theirs)
    style = {
        "dtype": mine["torch_dtype"],
        "rope_parameters": {"rope_theta": mine["rope_theta"], "rope_type": "default"},
    }
    same = {name: value for name, value in {**mine, **style}.items() if name in theirs}
    same["max_window_layers"] = theirs["max_window_layers"]  # without a sliding window it says nothing
    rest = {name: value for name, value in theirs.items() if name not in same}
    assert same | rest == theirs
    layers = theirs["num_hidden_layers"]
    assert rest == {  # nothing that the model needs; of the tokens only eos is in `Qwen3Config`
        "bos_token_id": 0,
        "layer_types": ["full_attention"] * layers,
        "pad_token_id": None,
        "transformers_version": theirs["transformers_version"],
    }


@pytest.mark.parametrize("size", ["0.6B", "4B", "32B"])
@pytest.mark.parametrize("eos", [(), (3,), (151645, 151643)])
def test_config_of_published_models_comes_back(size: str, eos: tuple[int, ...]) -> None:
    published = synthetic.qwen3_config(size)
    config = dataclasses.replace(Qwen3Config.from_dict(published), eos_token_id=eos)
    written = json.loads(json.dumps(config.to_dict(dtype="bfloat16")))
    assert Qwen3Config.from_dict(written) == config
    assert written == {k: v for k, v in published.items() if k not in ("bos_token_id", "eos_token_id")} | (
        {"eos_token_id": eos[0] if len(eos) == 1 else list(eos)} if eos else {}
    )


def test_header_is_the_one_of_the_library(tmp_path: Path) -> None:
    """Names that sort, shapes of any rank, and lengths that need blanks."""
    rng = np.random.default_rng(0)
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        for count in range(1, 9):
            tensors = {
                f"{'b.a'[i % 3]}{'x' * i}": rng.normal(size=(i + 1, 3)).astype(dtype) for i in range(count)
            }
            save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
            header, starts = export._header({name: t.shape for name, t in tensors.items()}, np.dtype(dtype))
            whole = (tmp_path / "library").read_bytes()
            assert whole.startswith(header)
            for name, tensor in tensors.items():
                assert whole[starts[name] :].startswith(tensor.tobytes())


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="transformers needs torch to run a model"
)
@pytest.mark.parametrize("case", GOLDEN)
def test_transformers_computes_the_same_logits(case: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """Of the original and of the export; with torch elsewhere, `make_export_golden.py --compare` is run by hand."""
    loaded = load(originals[case], mesh=make_mesh(tp=4), dtype=case.split("-")[1])
    folder = export_hugging_face(loaded, tmp_path / "export", max_shard_bytes=SHARDED)
    script = [sys.executable, str(DATA / "make_export_golden.py"), "--compare", str(originals[case])]
    subprocess.run([*script, str(folder)], check=True, timeout=300)
    scale = loaded.final_norm.scale_d
    scale[...] = -scale[...]
    other = export_hugging_face(loaded, tmp_path / "other")
    assert subprocess.run([*script, str(other)], check=False, timeout=300).returncode == 1


# --- and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("limit", [SHARDED, 5_000_000_000])
def test_load_gives_the_same_bits(config: dict[str, Any], dtype: Any, limit: int, tmp_path: Path) -> None:
    made = Qwen3(Qwen3Config.from_dict(config), dtype=dtype, rngs=nnx.Rngs(5))
    folder = export_hugging_face(made, tmp_path / "export", max_shard_bytes=limit)
    loaded = load(folder, mesh=make_mesh(fsdp=2, tp=2), dtype=dtype)
    assert loaded.config == made.config
    assert_same_bits(parameters(loaded), parameters(made))
    other = Qwen3(Qwen3Config.from_dict(config), dtype=dtype, rngs=nnx.Rngs(6))
    with pytest.raises(AssertionError):
        assert_same_bits(parameters(loaded), parameters(other))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_splitting_is_the_inverse_of_reading(config: dict[str, Any]) -> None:
    """Against the second account of the layout in tests/checkpoints.py, which goes head by head."""
    tensors = dict(synthetic.random_tensors(config, seed=3))
    raw = Qwen3Config.from_dict(config)
    found: dict[str, np.ndarray] = {}
    for name, value in expected_parameters(config, tensors).items():
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        found |= split_parameter(raw, path, value)
    assert found.keys() == tensors.keys() == tensor_shapes(raw).keys()
    for name, tensor in tensors.items():
        assert_same_bits(found[name], tensor)


@pytest.mark.parametrize("path", [("nothing",), ("layers", 0, "nothing"), ("layers", 0)])
def test_a_path_that_is_no_parameter(path: tuple[str | int, ...]) -> None:
    with pytest.raises(ValueError, match="is no parameter of Qwen3"):
        split_parameter(Qwen3Config.from_dict(TINY), path, np.zeros((1, 1)))
    with pytest.raises(ValueError, match="is no parameter of Qwen3"):
        read_parameter(Qwen3Config.from_dict(TINY), path, (slice(0, 1),), export)  # type: ignore[arg-type]


def test_files_hold_what_the_index_says(model: Qwen3, tmp_path: Path) -> None:
    folder = export_hugging_face(model, tmp_path / "export", max_shard_bytes=SHARDED)
    index = json.loads((folder / INDEX).read_text())
    held = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), file.name)
            size = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118  no mapping
        assert size <= SHARDED
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(folder).values())


def test_a_tensor_beyond_the_limit_has_a_file_of_its_own(model: Qwen3, tmp_path: Path) -> None:
    folder = export_hugging_face(model, tmp_path / "export", max_shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == len(tensor_shapes(model.config))
    assert_same_bits(parameters(load(folder)), parameters(model))


def test_one_parameter_is_on_the_host_at_a_time(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no copy of it stays with the model, as `np.asarray` of an array in several shards leaves one."""
    sizes: list[int] = []
    on_host = export._on_host

    def recording(value: jax.Array) -> np.ndarray:
        whole = on_host(value)
        sizes.append(whole.nbytes)
        return whole

    monkeypatch.setattr(export, "_on_host", recording)
    model = load(originals["untied-bfloat16"], mesh=make_mesh(fsdp=2, tp=4))
    export_hugging_face(model, tmp_path / "export")
    values = parameters(model)
    assert sorted(sizes) == sorted(value.nbytes for value in values.values())
    assert not [name for name, value in values.items() if value._npy_value is not None]  # type: ignore[attr-defined]
    np.asarray(values["embedding_vd"])
    assert values["embedding_vd"]._npy_value is not None  # type: ignore[attr-defined]


# --- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", SINGLE, INDEX, "model-00001-of-00002.safetensors", "x.safetensors"]
)
def test_nothing_is_overwritten(name: str, model: Qwen3, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name} already and is not overwritten"):
        export_hugging_face(model, tmp_path / "export")
    assert names(tmp_path) == ["export"] and names(tmp_path / "export") == [name]
    assert (tmp_path / "export" / name).read_text() == "mine"


def test_other_files_may_be_there(model: Qwen3, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert export_hugging_face(model, folder, max_shard_bytes=SHARDED) == folder
    assert (folder / "tokenizer.json").read_text() == "{}" and names(tmp_path) == ["export"]
    assert_same_bits(parameters(load(folder)), parameters(model))
    (tmp_path / "empty").mkdir()
    export_hugging_face(model, tmp_path / "empty")
    assert names(tmp_path / "empty") == ["config.json", SINGLE]


def test_config_gets_its_name_last(model: Qwen3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two names, the folder is refused for lack of it."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "config.json":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export_hugging_face(model, folder)
    assert names(folder) == [SINGLE, "tokenizer.json"] and names(tmp_path) == ["export"]
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load(folder)


def test_an_error_leaves_nothing(model: Qwen3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        assert not (tmp_path / "deep" / "export").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        export_hugging_face(model, tmp_path / "deep" / "export")
    assert names(tmp_path / "deep") == []


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_load_would_refuse_are_refused(value: float, tmp_path: Path) -> None:
    made = Qwen3(Qwen3Config.from_dict(UNTIED), rngs=nnx.Rngs(5))
    made.lm_head_weight_vd[...] = made.lm_head_weight_vd[...].at[3, 4].set(value)
    with pytest.raises(ValueError, match=f"tensor {HEAD} holds NaN or infinity"):
        export_hugging_face(made, tmp_path / "export")
    assert names(tmp_path) == []


def test_other_mistakes(model: Qwen3, tmp_path: Path) -> None:
    config = Qwen3Config.from_dict(TINY)
    shapes = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="is a ShapeDtypeStruct, not an array; load or restore the model first"
    ):
        export_hugging_face(shapes, tmp_path / "export")
    mixed = Qwen3(config, rngs=nnx.Rngs(0))
    arrays = node_arrays("model", mixed)
    name = "layers.1.mlp.down_weight_fd"
    update_node(mixed, {**arrays, name: arrays[name].astype(jnp.float32)})
    with pytest.raises(ValueError, match=f"{name} is float32 and the embedding bfloat16"):
        export_hugging_face(mixed, tmp_path / "export")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        export_hugging_face(model, tmp_path / "file")
    for limit in (0, -1, True, 1.5, "5GB"):
        with pytest.raises(ValueError, match=r"max_shard_bytes=.* must be a whole number of at least 1"):
            export_hugging_face(model, tmp_path / "export", max_shard_bytes=limit)  # type: ignore[arg-type]
    assert names(tmp_path) == ["file"]


def test_permissions_are_the_umasks(model: Qwen3, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    for path in export_hugging_face(model, tmp_path / "export").iterdir():
        assert path.stat().st_mode == usual, path
