"""Which Hugging Face tensors make up a Qwen3 parameter: slices of them on the way in, all of them on the way out."""

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
#: From config and parameter to its tensors by name, without prefix and ".weight".
_Splitting = Callable[[Qwen3Config, np.ndarray], dict[str, np.ndarray]]
_Mapping = tuple[_Reading, _Splitting]


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
    prefix, (read, _) = _mapping(path)
    return read(config, prefix, index, reader)


def split_parameter(config: Qwen3Config, path: ParameterPath, parameter: np.ndarray) -> dict[str, np.ndarray]:
    """The checkpoint's tensors that a parameter holds, by name: the inverse of `read_parameter`.

    Args:
        config: of the model.
        path: of the parameter in the module.
        parameter: all of it.

    Returns:
        Views where possible; their memory need not be contiguous.

    Raises:
        ValueError: the path is no parameter of the model.
    """
    prefix, (_, split) = _mapping(path)
    return {f"{prefix}{name}.weight": tensor for name, tensor in split(config, parameter).items()}


def _mapping(path: ParameterPath) -> tuple[str, _Mapping]:
    """Prefix of the tensors' names, and how to read and to split a parameter."""
    in_layer = path[0] == "layers" and len(path) > 2
    prefix, table = (f"model.layers.{path[1]}.", _LAYER) if in_layer else ("", _OUTSIDE)
    key = ".".join(map(str, path[2:] if in_layer else path))
    if key not in table:
        raise ValueError(f"{'.'.join(map(str, path))} is no parameter of Qwen3")
    return prefix, table[key]


def _as_stored(name: str) -> _Mapping:
    return (
        lambda config, prefix, index, reader: reader.read(f"{prefix}{name}.weight", *index),
        lambda config, parameter: {name: parameter},
    )


def _transposed(name: str) -> _Mapping:
    return (
        lambda config, prefix, index, reader: reader.read(f"{prefix}{name}.weight", index[1], index[0]).T,
        lambda config, parameter: {name: parameter.T},
    )


def _qkv(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    kv, g, h, d = index
    heads, size = kv.stop - kv.start, config.head_dim
    parts = []
    for name, per_kv in (("q", config.queries_per_kv), ("k", 1), ("v", 1)):
        rows = slice(kv.start * per_kv * size, kv.stop * per_kv * size)
        part = reader.read(f"{prefix}self_attn.{name}_proj.weight", rows, d)
        parts.append(part.reshape(heads, per_kv, size, -1))
    return np.concatenate(parts, axis=1)[:, g, h]


def _split_qkv(config: Qwen3Config, parameter: np.ndarray) -> dict[str, np.ndarray]:
    q, d = config.queries_per_kv, config.hidden_size
    parts = {"q": parameter[:, :q], "k": parameter[:, q], "v": parameter[:, q + 1]}
    return {f"self_attn.{name}_proj": part.reshape(-1, d) for name, part in parts.items()}


def _o(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    kv, q, h, d = index
    per_kv = config.queries_per_kv * config.head_dim
    part = reader.read(f"{prefix}self_attn.o_proj.weight", d, slice(kv.start * per_kv, kv.stop * per_kv))
    return part.T.reshape(kv.stop - kv.start, config.queries_per_kv, config.head_dim, -1)[:, q, h]


def _split_o(config: Qwen3Config, parameter: np.ndarray) -> dict[str, np.ndarray]:
    return {"self_attn.o_proj": parameter.reshape(-1, config.hidden_size).T}


def _gate_up(config: Qwen3Config, prefix: str, index: Index, reader: TensorReader) -> np.ndarray:
    c, f, d = index
    names = [("gate", "up")[i] for i in range(c.start, c.stop)]
    return np.stack([reader.read(f"{prefix}mlp.{name}_proj.weight", f, d) for name in names])


def _split_gate_up(config: Qwen3Config, parameter: np.ndarray) -> dict[str, np.ndarray]:
    return {"mlp.gate_proj": parameter[0], "mlp.up_proj": parameter[1]}


_OUTSIDE: Mapping[str, _Mapping] = {
    "embedding_vd": _as_stored("model.embed_tokens"),
    "final_norm.scale_d": _as_stored("model.norm"),
    "lm_head_weight_vd": _as_stored("lm_head"),
}
_LAYER: Mapping[str, _Mapping] = {
    "input_norm.scale_d": _as_stored("input_layernorm"),
    "post_attention_norm.scale_d": _as_stored("post_attention_layernorm"),
    "attention.q_norm.scale_d": _as_stored("self_attn.q_norm"),
    "attention.k_norm.scale_d": _as_stored("self_attn.k_norm"),
    "attention.qkv_weight_kghd": (_qkv, _split_qkv),
    "attention.o_weight_kqhd": (_o, _split_o),
    "mlp.gate_up_weight_cfd": (_gate_up, _split_gate_up),
    "mlp.down_weight_fd": _transposed("mlp.down_proj"),
}
