"""`load`: the parameters are those of the checkpoint bit for bit on every mesh, and every mistake has its own line."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status
from jax.sharding import Mesh

from tbik_jax import load, loading, make_mesh, memory, synthetic
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.sharding import QWEN3_SHARDING
from tests.checkpoints import (
    EMBEDDING,
    HEAD,
    SINGLE,
    TINY,
    UNTIED,
    count_reads,
    edit_json,
    edit_tensors,
    expected_parameters,
    parameters,
    read_tensors,
    rounded,
)
from tests.helpers import assert_same_bits

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
LAYER = "model.layers.1."
CASES = {"single": (TINY, 1), "sharded": (UNTIED, 3)}


def mesh_name(sizes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Checkpoints by (case, stored dtype); not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (case, dtype): synthetic.write_checkpoint(root / case / dtype, config, dtype=dtype, shards=shards)
        for case, (config, shards) in CASES.items()
        for dtype in ("bfloat16", "float32")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one float32 file, to be damaged."""
    return synthetic.write_checkpoint(tmp_path / "checkpoint", TINY, dtype="float32")


def assert_holds(model: Qwen3, raw: dict[str, Any], tensors: dict[str, np.ndarray], dtype: Any) -> None:
    """The shards on every device hold what the tensors say, each rounded once."""
    expected, loaded = expected_parameters(raw, tensors), parameters(model)
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        want = rounded(expected[name], dtype)
        assert value.shape == want.shape and value.dtype == want.dtype, name
        for shard in value.addressable_shards:
            assert_same_bits(shard.data, want[shard.index])


def assert_refused(folder: str | Path, words: Sequence[str], **arguments: Any) -> None:
    """`load` raises one line that holds the words."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load(folder, **arguments)
    for word in words:
        assert word in str(error.value)


# --- what is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_parameters_are_those_of_the_checkpoint_on_every_mesh(
    folders: dict[tuple[str, str], Path], case: str, sizes: dict[str, int]
) -> None:
    raw, mesh, folder = CASES[case][0], make_mesh(**sizes), folders[case, "bfloat16"]
    model = load(folder, mesh=mesh)
    assert_holds(model, raw, read_tensors(folder), jnp.bfloat16)
    for name, value in parameters(model).items():
        field = name.rsplit(".", 1)[-1]
        assert value.sharding.mesh == mesh
        assert value.sharding.spec == QWEN3_SHARDING.partition_spec(field, value.shape, mesh)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_stored_values_are_rounded_once(
    folders: dict[tuple[str, str], Path], stored: str, dtype: Any
) -> None:
    folder = folders["sharded", stored]
    model = load(str(folder), mesh=make_mesh(fsdp=2, tp=2), dtype=dtype)
    assert model.dtype == dtype
    assert_holds(model, UNTIED, read_tensors(folder), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_ties_subnormals_and_signed_zeros(folder: Path, dtype: Any) -> None:
    tricky = [-0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1e-42, -1e-39, 65504, 2**-24, 3 * 2**-26, 2**-25]
    tensors = read_tensors(folder)
    for name in (EMBEDDING, LAYER + "self_attn.k_proj.weight", LAYER + "mlp.down_proj.weight"):
        tensors[name][-1, -len(tricky) :] = tricky
    edit_tensors(folder / SINGLE, tensors)
    assert_holds(load(folder, mesh=make_mesh(tp=2), dtype=dtype), TINY, tensors, dtype)


def test_tensors_of_one_parameter_may_be_stored_in_different_dtypes(folder: Path) -> None:
    tensors = read_tensors(folder)
    for name, dtype in {
        "self_attn.q_proj": ml_dtypes.bfloat16,
        "self_attn.k_proj": np.float16,
        "mlp.gate_proj": ml_dtypes.bfloat16,
        "mlp.up_proj": np.float16,
    }.items():
        tensors[f"{LAYER}{name}.weight"] = tensors[f"{LAYER}{name}.weight"].astype(dtype)
    edit_tensors(folder / SINGLE, tensors)
    as_float32 = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_holds(load(folder, dtype=jnp.float32), TINY, as_float32, jnp.float32)


def test_the_module_is_one_that_qwen3_makes(folders: dict[tuple[str, str], Path]) -> None:
    model = load(folders["sharded", "bfloat16"])
    fresh = Qwen3(Qwen3Config.from_dict(UNTIED), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == nnx.graphdef(fresh)
    assert model.config == fresh.config


def test_a_tied_head_that_equals_the_embedding_is_accepted(folder: Path) -> None:
    tensors = read_tensors(folder)
    edit_tensors(folder / SINGLE, {HEAD: tensors[EMBEDDING].copy()})
    assert_holds(load(folder, dtype=jnp.float32), TINY, tensors, jnp.float32)


# --- where it is loaded to -------------------------------------------------------------------------------


def devices_of(model: Qwen3) -> set[jax.Device]:
    return set().union(*(value.devices() for value in parameters(model).values()))


def test_without_a_mesh_it_is_the_ambient_one_else_one_device(folders: dict[tuple[str, str], Path]) -> None:
    folder = folders["single", "bfloat16"]
    assert devices_of(load(folder)) == {jax.devices()[0]}
    with jax.set_mesh(make_mesh(tp=2, devices=jax.devices()[4:])):
        assert devices_of(load(folder)) == set(jax.devices()[4:6])


@pytest.mark.parametrize("axes", [("tp",), ("tp", "data"), ("fsdp", "tp")], ids="-".join)
def test_a_plain_mesh_serves(folders: dict[tuple[str, str], Path], axes: tuple[str, ...]) -> None:
    devices = np.asarray(jax.devices()[:4]).reshape((4,) if len(axes) == 1 else (2, 2))
    model = load(folders["single", "bfloat16"], mesh=Mesh(devices, axes))
    assert devices_of(model) == set(devices.flat)
    assert_holds(model, TINY, read_tensors(folders["single", "bfloat16"]), jnp.bfloat16)


@pytest.mark.parametrize(("kv_heads", "tp"), [(4, 8), (2, 4), (1, 2)])
def test_kv_heads_bound_tp(tmp_path: Path, kv_heads: int, tp: int) -> None:
    folder = synthetic.write_checkpoint(tmp_path / "c", {**TINY, "num_key_value_heads": kv_heads})
    remedy = "use tp=" + " or ".join(str(t) for t in (1, 2, 4, 8) if t <= kv_heads)
    assert_refused(folder, [f"num_key_value_heads={kv_heads}", f"tp={tp}", remedy], mesh=make_mesh(tp=tp))
    load(folder, mesh=make_mesh(tp=kv_heads))


def test_a_vocabulary_that_tp_does_not_divide_is_refused(tmp_path: Path) -> None:
    folder = synthetic.write_checkpoint(tmp_path / "c", {**TINY, "vocab_size": 66})
    assert_refused(folder, ["vocab_size=66", "tp=4", "use tp=1 or 2"], mesh=make_mesh(tp=4))


# --- how much is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_every_element_is_read_once_whatever_the_mesh(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, case: str, sizes: dict[str, int]
) -> None:
    """So replicas, over data or where fsdp does not divide, share one read."""
    reads = count_reads(monkeypatch)
    load(folders[case, "bfloat16"], mesh=make_mesh(**sizes))
    elements: dict[str, int] = {}
    for name, size in reads:
        elements[name] = elements.get(name, 0) + size
    shapes = synthetic.tensor_shapes(CASES[case][0])
    assert elements == {name: math.prod(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("sizes", [{"tp": 8}, {"fsdp": 2, "tp": 4}, {"fsdp": 8}], ids=mesh_name)
def test_a_device_reads_its_eighth(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    reads = count_reads(monkeypatch)
    load(folders["sharded", "bfloat16"], mesh=make_mesh(**sizes))
    for name, shape in synthetic.tensor_shapes(UNTIED).items():
        sizes_read = [size for read, size in reads if read == name]
        parts = 1 if len(shape) == 1 else 8
        assert sizes_read == [math.prod(shape) // parts] * parts, name


def test_the_twin_without_a_mesh_reads_whole_tensors(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    load(folders["sharded", "bfloat16"])
    assert dict(reads) == {n: math.prod(shape) for n, shape in synthetic.tensor_shapes(UNTIED).items()}


# --- values that cannot be loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [EMBEDDING, "model.norm.weight"]
    + [f"{LAYER}{part}.weight" for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")],
)
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_nan_and_infinity_are_refused(folder: Path, name: str, value: float, stored: Any) -> None:
    damaged = read_tensors(folder)[name].astype(stored)
    damaged[-1] = value
    edit_tensors(folder / SINGLE, {name: damaged})
    assert_refused(folder, [name, "NaN or infinity", "damaged"], mesh=make_mesh(tp=2))


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (65520.0, np.float32, jnp.float16),
        (1e38, ml_dtypes.bfloat16, jnp.float16),
        (np.finfo(np.float32).max, np.float32, jnp.bfloat16),
    ],
)
def test_an_overflow_is_refused(folder: Path, value: float, stored: Any, dtype: Any) -> None:
    name = LAYER + "mlp.gate_proj.weight"
    large = read_tensors(folder)[name].astype(stored)
    large[3, 3] = value
    edit_tensors(folder / SINGLE, {name: large})
    assert_refused(folder, [name, f"overflows {jnp.dtype(dtype)}", "load it as float32"], dtype=dtype)
    load(folder, dtype=jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float64, jnp.float8_e4m3fn, "int32"])
def test_another_dtype_is_refused(folder: Path, dtype: Any) -> None:
    assert_refused(folder, [jnp.dtype(dtype).name, "bfloat16, float16 or float32"], dtype=dtype)


# --- folders and hub ids ---------------------------------------------------------------------------------


def forbid_download(*_: Any, **__: Any) -> str:
    raise AssertionError("no download was asked for")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, [str(tmp_path), "no config.json"])


def test_a_file_is_refused(folder: Path) -> None:
    assert_refused(folder / SINGLE, [str(folder / SINGLE), "is a file", "folder"])


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./model", "../model", "/no/where", "/nowhere", "./a/b"]
)
def test_a_name_that_is_neither_folder_nor_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbid_download)
    assert_refused(name, [name, "no folder", "no hub id", "owner/name"])


def hub_error(status: int, code: str | None) -> Exception:
    """The error that the hub's client raises for a response."""
    request = httpx.Request("GET", "https://huggingface.co/api/models/owner/name/revision/main")
    response = httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)
    try:
        hf_raise_for_status(response)
    except Exception as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("Cannot find a snapshot.\nSet 'HF_HUB_OFFLINE=0'."), "HF_HUB_OFFLINE=0"),
        (OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."), "HF_HUB_OFFLINE is set"),
        (HFValidationError("Repo id must use alphanumeric chars"), "alphanumeric"),
        (
            hub_error(404, "RepoNotFound"),
            "knows no such model; check the name at https://huggingface.co/owner/name",
        ),
        (
            hub_error(403, "GatedRepo"),
            "gated; ask for access at https://huggingface.co/owner/name, then run: hf auth",
        ),
        (hub_error(500, None), "500"),
        (
            httpx.ProxyError("proxy refused"),
            "the hub cannot be reached and it is not in the cache; check the network",
        ),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "Name or service not known"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (PermissionError(13, "Permission denied", "/cache"), "Permission denied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_hub_id_that_cannot_be_downloaded(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert_refused("owner/name", ["owner/name", "no folder here", "cannot be downloaded", reason])


def test_a_model_that_the_devices_do_not_hold_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    monkeypatch.setattr(loading, "SafetensorsReader", lambda *_: pytest.fail("read"))
    assert_refused(folder, ["the parameters need", "GiB free; cut them over more devices with tp or fsdp"])
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000_000)
    load(folder)


def test_a_hub_id_is_downloaded_and_loaded(
    folders: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = folders["sharded", "bfloat16"], []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_holds(load("owner/name"), UNTIED, read_tensors(folder), jnp.bfloat16)
    assert asked == [("owner/name", ["*.json", "*.safetensors"])]


def test_a_folder_that_reads_like_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.write_checkpoint(tmp_path / "owner" / "name", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbid_download)
    load("owner/name")


# --- a config that the tensors do not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, ["lacks the tensor model.layers.2.", "shape"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "does not use"]),
        ({"intermediate_size": 256}, ["mlp.", "(128, 32)", "(256, 32)"]),
        ({"tie_word_embeddings": False}, ["lacks the tensor lm_head.weight of shape (64, 32)"]),
        ({"num_key_value_heads": 4}, ["k_proj", "(128, 32)", "(64, 32)"]),
        ({"model_type": "llama"}, ["'llama'"]),
    ],
)
def test_a_config_of_another_model_is_refused(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(change))
    assert_refused(folder, words)


def test_a_tied_head_that_differs_is_refused(folder: Path) -> None:
    head = read_tensors(folder)[EMBEDDING]
    head[5, 5] = -head[5, 5]
    edit_tensors(folder / SINGLE, {HEAD: head})
    assert_refused(folder, [HEAD, EMBEDDING, "differs", "tie_word_embeddings"])
    edit_json(folder / "config.json", lambda raw: raw.update(tie_word_embeddings=False))
    loaded = parameters(load(folder, dtype=jnp.float32))["lm_head_weight_vd"]
    assert_same_bits(loaded, head)
