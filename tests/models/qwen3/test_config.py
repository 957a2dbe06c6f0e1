"""config.json: every field that matters is read, and what the model does not implement is refused by name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tbik_jax import synthetic
from tbik_jax.models import Qwen3Config

RAW = synthetic.small_config()
FIELDS = {  # none of them is a default of RAW
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "max_position_embeddings": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 12345.5,
    "tie_word_embeddings": False,
}
SIZES = {  # hidden, intermediate, layers, heads, tied
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


def nested_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 5 writes it."""
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default"}
    raw = without(raw, "rope_theta", "rope_scaling", "torch_dtype")
    return {**raw, "dtype": "bfloat16", "rope_parameters": rope}


def assert_refused(raw: dict[str, Any], *words: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))) as error:
        Qwen3Config.from_dict(raw)
    assert "\n" not in str(error.value)


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_read(name: str) -> None:
    """One at a time, so that no field is taken for another."""
    raw = {**RAW, name: FIELDS[name]}
    if name == "num_attention_heads":
        raw["num_key_value_heads"] = 4
    changed, plain = Qwen3Config.from_dict(raw), Qwen3Config.from_dict(RAW)
    assert getattr(plain, name) != FIELDS[name]
    assert getattr(changed, name) == FIELDS[name]


def test_every_field_of_the_class_is_tested() -> None:
    assert {field.name for field in dataclasses.fields(Qwen3Config)} == {*FIELDS, "eos_token_id"}


@pytest.mark.parametrize("theta", [10000, 12345.5, 1e6])
def test_both_styles_of_hugging_face_give_one_config(theta: float) -> None:
    raw = {**RAW, "rope_theta": theta}
    assert Qwen3Config.from_dict(raw) == Qwen3Config.from_dict(nested_rope(raw))
    assert Qwen3Config.from_dict(raw).rope_theta == theta


def test_the_nested_rope_theta_wins() -> None:
    raw = {**nested_rope(RAW), "rope_theta": 1.0}
    assert Qwen3Config.from_dict(raw).rope_theta == RAW["rope_theta"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", None])
def test_the_stored_dtype_does_not_matter(dtype: str | None) -> None:
    assert Qwen3Config.from_dict({**RAW, "torch_dtype": dtype}) == Qwen3Config.from_dict(RAW)


def test_head_dim_is_not_derived() -> None:
    config = Qwen3Config.from_dict({**RAW, "head_dim": 64})
    assert config.head_dim == 64 != config.hidden_size // config.num_attention_heads
    assert config.queries_per_kv == 2


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 9], (5, 9)), ([], ()), (None, ()), (0, (0,))])
def test_end_tokens(eos: Any, expected: tuple[int, ...]) -> None:
    assert Qwen3Config.from_dict({**RAW, "eos_token_id": eos}).eos_token_id == expected


def test_fields_that_may_be_left_out() -> None:
    optional = (
        "eos_token_id",
        "hidden_act",
        "attention_bias",
        "rope_scaling",
        "sliding_window",
    )
    config = Qwen3Config.from_dict(without(RAW, *optional, "use_sliding_window", "max_window_layers"))
    plain = Qwen3Config.from_dict(RAW)
    assert config == dataclasses.replace(plain, eos_token_id=())


def test_layers_of_full_attention_and_a_window_that_is_off_are_accepted() -> None:
    raw = {**RAW, "layer_types": ["full_attention"] * RAW["num_hidden_layers"], "sliding_window": 4096}
    assert Qwen3Config.from_dict(raw) == Qwen3Config.from_dict(RAW)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", [dict, nested_rope])
def test_published_sizes(size: str, style: Any) -> None:
    config = Qwen3Config.from_dict(style(synthetic.qwen3_config(size)))
    assert SIZES[size] == (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.tie_word_embeddings,
    )
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (8, 128, 151936)
    assert (config.rope_theta, config.rms_norm_eps, config.eos_token_id) == (1e6, 1e-6, (151645,))


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3Config(
        **{**RAW, **FIELDS, "tie_word_embeddings": tied, "eos_token_id": [3, 4]}
    )
    theirs.save_pretrained(tmp_path)
    expected = Qwen3Config(**{**FIELDS, "tie_word_embeddings": tied, "eos_token_id": (3, 4)})
    assert Qwen3Config.from_folder(tmp_path) == expected


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("style", [dict, nested_rope])
def test_a_missing_field_is_named(name: str, style: Any) -> None:
    raw = without(style(RAW), name)
    if name == "rope_theta":
        raw.pop("rope_parameters", None)
    assert_refused(raw, "lacks the field", name)
    assert_refused({**raw, name: None}, "lacks the field", name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ("'llama'", "'qwen3'")),
        ({"model_type": "qwen3_moe"}, ("'qwen3_moe'",)),
        ({"model_type": None}, ("None", "'qwen3'")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
        ({"attention_bias": True}, ("attention_bias=True", "must be False")),
        ({"attention_dropout": 0.1}, ("attention_dropout=0.1",)),
        ({"use_sliding_window": True}, ("use_sliding_window=True", "must be False")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"layer_types": 5}, ("layer_types=5", "must be a list")),
        ({"is_causal": False}, ("is_causal=False", "must be True")),
        ({"use_qk_norm": False}, ("use_qk_norm=False", "must be True")),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping=30.0",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5", "must be 1")),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
            ("partial_rotary_factor=0.25",),
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": None}, "partial_rotary_factor": 0.5},
            ("partial_rotary_factor=0.5",),
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ("each kind of layer",)),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ("architectures", "Qwen3ForCausalLM")),
        ({"eos_token_id": [1, RAW["vocab_size"]]}, (f"eos_token_id={RAW['vocab_size']}", "below vocab_size")),
        ({"eos_token_id": -1}, ("eos_token_id=-1",)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_scaling", "yarn")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling", "linear")),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, ("rope_type='yarn'", "'default'")),
        ({"rope_parameters": {"rope_theta": 1e6, "type": "linear"}}, ("rope_type='linear'", "'default'")),
        ({"rope_parameters": [1e6]}, ("rope_parameters=[1000000.0]",)),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "fp8")),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused({**RAW, **change}, *words)


@pytest.mark.parametrize(
    "name",
    [name for name, value in FIELDS.items() if isinstance(value, int) and name[:4] != "tie_"],
)
@pytest.mark.parametrize("value", [0, -8, 2.0, "16", True])
def test_sizes_must_be_positive_whole_numbers(name: str, value: Any) -> None:
    assert_refused({**RAW, name: value}, f"{name}={value!r}")


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, "1e-6", True, float("nan"), float("inf")])
def test_constants_must_be_positive_numbers(name: str, value: Any) -> None:
    assert_refused({**RAW, name: value}, f"{name}={value!r}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 12}, ("num_attention_heads=12", "num_key_value_heads=8")),
        ({"head_dim": 24}, ("head_dim=24", "multiple of 16")),
        ({"tie_word_embeddings": "false"}, ("tie_word_embeddings='false'",)),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings=1",)),
        ({"eos_token_id": "</s>"}, ("eos_token_id='</s>'",)),
        ({"eos_token_id": [1, 2.5]}, ("eos_token_id=2.5",)),
        ({"eos_token_id": True}, ("eos_token_id=True",)),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused({**RAW, **change}, *words)


# --- the file --------------------------------------------------------------------------------------------


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert Qwen3Config.from_folder(tmp_path) == Qwen3Config.from_dict(RAW)
    assert Qwen3Config.from_folder(str(tmp_path)) == Qwen3Config.from_dict(RAW)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no config.json"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"vocab_size: 3", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[1, 2]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        Qwen3Config.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        Qwen3Config.from_folder(tmp_path)
