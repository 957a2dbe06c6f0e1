"""Checkpoints made from a seed: the same bits every time, in the layout of Hugging Face."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tbik_jax import synthetic

DATA = Path(__file__).parent / "data"
TINY = synthetic.small_config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    head_dim=16,
)

# Number of parameters of the published checkpoints, tied embeddings counted once.
PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


# --- configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(size: str) -> None:
    shapes = synthetic.tensor_shapes(synthetic.qwen3_config(size))
    assert sum(map(math.prod, shapes.values())) == PUBLISHED[size]


def test_small_config_takes_overrides_and_names_the_tokenizers_ids() -> None:
    config = synthetic.small_config(num_hidden_layers=2)
    assert config["num_hidden_layers"] == 2
    assert synthetic.small_config()["num_hidden_layers"] == 4
    assert (config["bos_token_id"], config["eos_token_id"]) == (synthetic.BOS_ID, synthetic.EOS_ID)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 64}, "hiden_size"),
        ({"vocab_size": 1020}, "vocab_size=1020 .* use 1024"),
        ({"intermediate_size": 800}, "intermediate_size=800 .* such as 896"),
        ({"head_dim": 20}, "head_dim=320 .* such as 384"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"num_attention_heads": 12}, "num_attention_heads=12 .* num_key_value_heads=8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_small_config_refuses_what_cannot_be_cut(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.small_config(**overrides)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'7B'; use one of 0\.6B, 1\.7B"):
        synthetic.qwen3_config("7B")


# --- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_tensors_have_the_bits_that_the_golden_files_were_made_with(name: str) -> None:
    with np.load(DATA / f"golden_{name}.npz") as golden:
        config, seed = json.loads(str(golden["config_json"])), int(golden["seed"])
        expected = str(golden["weights_sha256"])
    digest = hashlib.sha256()
    for _, value in synthetic.random_tensors(config, seed=seed):
        digest.update(value.tobytes())
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes(tied: bool) -> None:
    tensors = dict(synthetic.random_tensors({**TINY, "tie_word_embeddings": tied}, seed=0))
    assert {name: value.shape for name, value in tensors.items() if "layers.1." in name} == {
        "model.layers.1.input_layernorm.weight": (64,),
        "model.layers.1.self_attn.q_proj.weight": (128, 64),
        "model.layers.1.self_attn.k_proj.weight": (128, 64),
        "model.layers.1.self_attn.v_proj.weight": (128, 64),
        "model.layers.1.self_attn.o_proj.weight": (64, 128),
        "model.layers.1.self_attn.q_norm.weight": (16,),
        "model.layers.1.self_attn.k_norm.weight": (16,),
        "model.layers.1.post_attention_layernorm.weight": (64,),
        "model.layers.1.mlp.gate_proj.weight": (128, 64),
        "model.layers.1.mlp.up_proj.weight": (128, 64),
        "model.layers.1.mlp.down_proj.weight": (64, 128),
    }
    outside = {name for name in tensors if ".layers." not in name}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight"} | (
        set() if tied else {"lm_head.weight"}
    )
    assert tensors["model.embed_tokens.weight"].shape == (512, 64)
    assert len(tensors) == 2 * 11 + len(outside)
    assert all(value.dtype == np.float32 for value in tensors.values())


def test_a_tensor_depends_on_seed_and_name_but_not_on_its_neighbours() -> None:
    two = dict(synthetic.random_tensors(TINY, seed=3))
    one = dict(synthetic.random_tensors({**TINY, "num_hidden_layers": 1}, seed=3))
    other = dict(synthetic.random_tensors(TINY, seed=4))
    assert_same_bits(one, {name: two[name] for name in one})
    assert len({value.tobytes() for value in two.values()}) == len(two)
    assert all((two[name] != other[name]).mean() > 0.99 for name in two)


def test_values_have_the_documented_spread() -> None:
    tensors = dict(synthetic.random_tensors(synthetic.small_config(), seed=0, scale=1.5))
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    embedding = tensors["model.embed_tokens.weight"]
    norms = np.concatenate([value for value in tensors.values() if value.ndim == 1])
    assert down.std() * math.sqrt(768) == pytest.approx(1.5, rel=0.01)
    assert embedding.std() * math.sqrt(256) == pytest.approx(2.5, rel=0.01)
    assert norms.mean() == pytest.approx(1, abs=0.02) and norms.std() == pytest.approx(0.2, rel=0.05)
    assert norms.min() > 0.25 and abs(down.mean()) < 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "seed=-1"), ({"seed": 0.5}, "seed=0.5"), ({"seed": 0, "scale": math.inf}, "scale=inf")],
)
def test_random_tensors_refuses_at_the_call(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.random_tensors(TINY, **arguments)


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)]
)
def test_checkpoint_holds_the_rounded_tensors_and_its_config(
    tmp_path: Path, dtype: str, numpy_dtype: type
) -> None:
    path = synthetic.write_checkpoint(tmp_path / "made" / "here", TINY, seed=5, dtype=dtype)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((path / "config.json").read_text()) == {**TINY, "torch_dtype": dtype}
    expected = {name: v.astype(numpy_dtype) for name, v in synthetic.random_tensors(TINY, seed=5)}
    assert_same_bits(read_tensors(path), expected)


def test_dtype_is_named_in_the_style_of_the_config(tmp_path: Path) -> None:
    config = {name: value for name, value in TINY.items() if name != "torch_dtype"}
    path = synthetic.write_checkpoint(tmp_path / "new", {**config, "dtype": "float32"})
    assert json.loads((path / "config.json").read_text()) == {**config, "dtype": "bfloat16"}


def test_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    files = [synthetic.write_checkpoint(tmp_path / name, TINY) / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("shards", [2, 3, 24])
def test_shards_hold_what_the_single_file_holds(tmp_path: Path, shards: int) -> None:
    single = synthetic.write_checkpoint(tmp_path / "single", TINY)
    sharded = synthetic.write_checkpoint(tmp_path / "sharded", TINY, shards=shards)
    assert_same_bits(read_tensors(single), read_tensors(sharded))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    assert (
        sorted(set(index["weight_map"].values()))
        == names
        == [f.name for f in sorted(sharded.glob("*.saf*rs"))]
    )
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in read_tensors(sharded).values())
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, framework="numpy") as handle:
            assert name in handle.keys()  # noqa: SIM118


def test_shards_are_balanced_where_the_tensors_allow_it(tmp_path: Path) -> None:
    path = synthetic.write_checkpoint(tmp_path / "c", synthetic.small_config(), shards=4)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert max(sizes) < 1.3 * min(sizes)


def test_overwrites_only_checkpoints_and_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()  # an empty folder is free to use
    synthetic.write_checkpoint(path, TINY, shards=2)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        synthetic.write_checkpoint(path, TINY)
    synthetic.write_checkpoint(path, TINY, overwrite=True)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for target in (other, other / "thesis.txt"):
        with pytest.raises(FileExistsError, match="name a"):
            synthetic.write_checkpoint(target, TINY, overwrite=True)
    assert (other / "thesis.txt").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "other"]


def test_an_interrupted_run_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = synthetic.write_checkpoint(tmp_path / "c", TINY)
    before = (path / "model.safetensors").read_bytes()

    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "save_file", interrupt)
    for name in ("c", "new"):
        with pytest.raises(KeyboardInterrupt):
            synthetic.write_checkpoint(tmp_path / name, TINY, seed=1, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
    assert (path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "'float16' .* use one of bfloat16, float32"),
        ({"shards": 0}, "shards=0 .* from 1 to 24"),
        ({"shards": 25}, "shards=25 .* from 1 to 24"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_write_checkpoint_refuses(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.write_checkpoint(tmp_path / "c", TINY, **arguments)
    assert not any(tmp_path.iterdir())
