"""Tiny Hugging Face checkpoints, ways to damage them, and what they hold said a second time in numpy."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tbik_jax import synthetic
from tbik_jax.models import Qwen3
from tbik_jax.safetensors_reader import SafetensorsReader

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

#: Every dimension has another size, and heads * head_dim is not hidden_size. tp 1, 2, 4 and 8 fit; 3 divides nothing.
TINY = synthetic.small_config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=16,
    head_dim=16,
    max_position_embeddings=64,
)
UNTIED = {**TINY, "tie_word_embeddings": False}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder by name, index or not."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(file: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Replaces or adds tensors of a safetensors file; None removes one."""
    tensors = {**load_file(file), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Lets `change` alter the object in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def expected_parameters(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The parameters of the module by dotted name, in the stored dtype, one head at a time."""
    parameters = {
        "embedding_vd": tensors[EMBEDDING],
        "final_norm.scale_d": tensors["model.norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {
            name.removeprefix(prefix).removesuffix(".weight"): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        parameters |= {f"layers.{i}.{name}": value for name, value in _layer(config, layer).items()}
    if not config["tie_word_embeddings"]:
        parameters["lm_head_weight_vd"] = tensors[HEAD]
    return parameters


def _layer(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    gate, up = tensors["mlp.gate_proj"], tensors["mlp.up_proj"]
    qkv, o = _attention(config, tensors)
    return {
        "input_norm.scale_d": tensors["input_layernorm"],
        "post_attention_norm.scale_d": tensors["post_attention_layernorm"],
        "attention.q_norm.scale_d": tensors["self_attn.q_norm"],
        "attention.k_norm.scale_d": tensors["self_attn.k_norm"],
        "attention.qkv_weight_kghd": qkv,
        "attention.o_weight_kqhd": o,
        "mlp.gate_up_weight_cfd": np.array([gate, up]),
        "mlp.down_weight_fd": tensors["mlp.down_proj"].T,
    }


def _attention(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    kv_heads, h, d = config["num_key_value_heads"], config["head_dim"], config["hidden_size"]
    per_kv = config["num_attention_heads"] // kv_heads
    dtype = tensors["self_attn.q_proj"].dtype
    qkv, o = np.zeros((kv_heads, per_kv + 2, h, d), dtype), np.zeros((kv_heads, per_kv, h, d), dtype)
    for kv in range(kv_heads):
        for j in range(per_kv):
            head = kv * per_kv + j  # Hugging Face repeats a KV head for per_kv query heads in a row
            rows = slice(head * h, (head + 1) * h)
            qkv[kv, j] = tensors["self_attn.q_proj"][rows]
            o[kv, j] = tensors["self_attn.o_proj"][:, rows].T
        rows = slice(kv * h, (kv + 1) * h)
        qkv[kv, per_kv] = tensors["self_attn.k_proj"][rows]
        qkv[kv, per_kv + 1] = tensors["self_attn.v_proj"][rows]
    return qkv, o


def parameters(model: Qwen3) -> dict[str, jax.Array]:
    """The parameters of a module, or their shapes, by dotted name."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """One rounding to nearest even; that to bfloat16 in integers."""
    wide = x.astype(np.float32)  # exact
    if np.dtype(dtype) != ml_dtypes.bfloat16:
        return wide.astype(dtype)
    bits = wide.view(np.uint32)
    halfway_or_less = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return ((bits + halfway_or_less) >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """From now on each read of a `SafetensorsReader` appends (tensor, elements) to this list."""
    reads: list[tuple[str, int]] = []
    read = SafetensorsReader.read

    def counting(self: SafetensorsReader, name: str, *index: slice) -> np.ndarray:
        array = read(self, name, *index)
        reads.append((name, array.size))
        return array

    monkeypatch.setattr(SafetensorsReader, "read", counting)
    return reads
