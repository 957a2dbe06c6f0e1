"""Which Hugging Face tensors, and which slices of them, make up a slice of a Qwen3 parameter."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from .config import Qwen3Config

Index = tuple[slice, ...]
ParameterPath = tuple[str | int, ...]


class TensorReader(Protocol):
    """Reads slices of a checkpoint's tensors."""

    def read(self, name: str, *index: slice) -> np.ndarray:
        """The slice of tensor `name`; all tensors in one dtype."""
        ...


#: From config, prefix of the tensors' names, index and reader.
_Reading = Callable[[Qwen3Config, str, Index, TensorReader], np.ndarray]


def tensor_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen3ForCausalLM checkpoint and its shape; linear weights are [out, in]."""
    d, f, h, v = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    q, k = config.num_attention_heads * h, config.num_key_value_heads * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(config.num_hidden_layers):
        for name, shape in {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (k, d),
            "self_attn.v_proj": (k, d),
            "self_attn.o_proj": (d, q),
            "self_attn.q_norm": (h,),
            "self_attn.k_norm": (h,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def tied_duplicates(config: Qwen3Config) -> dict[str, str]:
    """Tensors that a checkpoint may hold although another makes them redundant: name -> the tensor they must equal."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def read_parameter(
    config: Qwen3Config, path: ParameterPath, index: Index, reader: TensorReader
) -> np.ndarray:
    """A slice of a parameter, put together from slices of the checkpoint's tensors.

    Args:
        config: of the model.
        path: of the parameter in the module, e.g. ("layers", 0, "attention", "qkv_weight_kghd").
        index: one slice with explicit bounds a dimension.
        reader: of the checkpoint.

    Raises:
        ValueError: the path is no parameter of the model.
    """
    in_layer = path[0] == "layers" and len(path) > 2
    prefix, table = (f"model.layers.{path[1]}.", _LAYER) if in_layer else ("", _OUTSIDE)
    key = ".".join(map(str, path[2:] if in_layer else path))
    if key not in table:
        raise ValueError(f"{'.'.join(map(str, path))} is no parameter of Qwen3")
    return table[key](config, prefix, index, reader)


def _as_stored(name: str) -> _Reading:
    return lambda config, prefix, index, reader: reader.read(f"{prefix}{name}.weight", *index)


def _transposed(name: str) -> _Reading:
    return lambda config, prefix, index, reader: reader.read(f"{prefix}{name}.weight", index[1], index[0]).T


def _qkv(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    kv, g, h, d = index
    heads, size = kv.stop - kv.start, config.head_dim
    parts = []
    for name, per_kv in (("q", config.queries_per_kv), ("k", 1), ("v", 1)):
        rows = slice(kv.start * per_kv * size, kv.stop * per_kv * size)
        part = reader.read(f"{prefix}self_attn.{name}_proj.weight", rows, d)
        parts.append(part.reshape(heads, per_kv, size, -1))
    return np.concatenate(parts, axis=1)[:, g, h]


def _o(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    kv, q, h, d = index
    per_kv = config.queries_per_kv * config.head_dim
    part = reader.read(f"{prefix}self_attn.o_proj.weight", d, slice(kv.start * per_kv, kv.stop * per_kv))
    return part.T.reshape(kv.stop - kv.start, config.queries_per_kv, config.head_dim, -1)[:, q, h]


def _gate_up(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    c, f, d = index
    names = [("gate", "up")[i] for i in range(c.start, c.stop)]
    return np.stack([reader.read(f"{prefix}mlp.{name}_proj.weight", f, d) for name in names])


_OUTSIDE: Mapping[str, _Reading] = {
    "embedding_vd": _as_stored("model.embed_tokens"),
    "final_norm.scale_d": _as_stored("model.norm"),
    "lm_head_weight_vd": _as_stored("lm_head"),
}
_LAYER: Mapping[str, _Reading] = {
    "input_norm.scale_d": _as_stored("input_layernorm"),
    "post_attention_norm.scale_d": _as_stored("post_attention_layernorm"),
    "attention.q_norm.scale_d": _as_stored("self_attn.q_norm"),
    "attention.k_norm.scale_d": _as_stored("self_attn.k_norm"),
    "attention.qkv_weight_kghd": _qkv,
    "attention.o_weight_kqhd": _o,
    "mlp.gate_up_weight_cfd": _gate_up,
    "mlp.down_weight_fd": _transposed("mlp.down_proj"),
}
