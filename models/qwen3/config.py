"""Qwen3's configuration, read from a Hugging Face `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Fields whose other values this model does not implement.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "use_qk_norm": (True, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Shapes and constants of a dense Qwen3; the names are those of Hugging Face's `config.json`.

    Raises:
        ValueError: a value that no Qwen3 can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"config field {name}={value!r} must be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 16:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of 16")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = _is_whole(value) or isinstance(value, float)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"config field {name}={value!r} must be a positive number")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings={self.tie_word_embeddings!r} must be true or false")
        for token in self.eos_token_id:
            if not _is_whole(token) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"eos_token_id={token!r} must be a whole number below vocab_size={self.vocab_size}"
                )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Qwen3Config":
        """The configuration from the dictionary in `config.json`, in the style of transformers 4 or 5.

        Raises:
            ValueError: another model type, a missing field, or a feature that this model does not implement.
        """
        if raw.get("model_type") != "qwen3":
            raise ValueError(
                f"config.json is of model_type {raw.get('model_type')!r}; tbik_jax.models.Qwen3 is 'qwen3'"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={raw['hidden_act']!r} is not implemented; Qwen3 uses 'silu'")
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config field rope_parameters={rope!r} must be an object")
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                "config field rope_parameters has an object for each kind of layer, which is not implemented; give "
                "one for all"
            )
        rope_type = rope.get("rope_type", rope.get("type", "default"))  # "type" is the old name
        if rope_type != "default":
            raise ValueError(f"rope_type={rope_type!r} is not implemented; only 'default' is")
        for name, values in _IMPLEMENTED.items():
            for value in (raw.get(name), rope.get(name) if name == "partial_rotary_factor" else None):
                if value is not None and value not in values:
                    raise ValueError(
                        f"config field {name}={value!r} is not implemented; it must be {values[0]}"
                    )
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"config field layer_types={kinds!r} must be a list of 'full_attention' alone")
        architectures = raw.get("architectures") or ["Qwen3ForCausalLM"]
        if architectures != ["Qwen3ForCausalLM"]:
            raise ValueError(
                f"config field architectures={architectures!r} is not implemented; it must be ['Qwen3ForCausalLM']"
            )
        # transformers 5 nests rope_theta; a default here would be a silently wrong model
        raw = {**raw, "rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in raw and raw[field.name] is not None:
                found[field.name] = raw[field.name]
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"config.json lacks the field {field.name}")
        eos = found.get("eos_token_id", [])
        found["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(**found)

    def to_dict(self, *, dtype: str) -> dict[str, Any]:
        """The dictionary for a `config.json` in the style of the published files (`rope_theta`).

        Args:
            dtype: of the checkpoint's tensors: "bfloat16", "float16" or "float32".
        """
        fields = dataclasses.asdict(self)
        eos = fields.pop("eos_token_id")
        if eos:  # one id or a list of them, as published
            fields["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_window_layers": self.num_hidden_layers,
            "model_type": "qwen3",
            "rope_scaling": None,
            "sliding_window": None,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            **fields,
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Qwen3Config":
        """The configuration of a checkpoint folder.

        Raises:
            ValueError: no readable config.json there, or as `from_dict`.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no config.json; is it a Hugging Face checkpoint folder?"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} does not hold a JSON object")
        return cls.from_dict(raw)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
