"""Small Qwen3 checkpoints, made from a seed: no download, no torch, no JAX.

The demo, the tests and the benchmarks need weights of a given shape, not trained ones. Everything here is a
pure function of its arguments, down to the bit: values come from the raw stream of a PCG64 bit generator,
which NumPy keeps stable across versions (it does not promise that of `Generator.standard_normal`), through
integer sums and one float32 rounding or two. A tensor depends on the seed, its own name, its shape and the
scale, so neither the order of the tensors nor the number of files matters.

    from tbik_jax import synthetic

    path = synthetic.write_checkpoint("tiny-qwen3", synthetic.small_config())

`synthetic_tokenizer.write_tokenizer(path)` adds a tokenizer. This file imports nothing of the package, so that
`tests/data/make_golden.py` can import it by its path, without JAX.
"""

import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BOS_ID, EOS_ID = 0, 2
"""Ids that `small_config` names; `write_tokenizer` gives them to special tokens."""

_DTYPES: dict[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

_DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# hidden, intermediate, layers, heads, tied; all have 8 KV heads and a head_dim of 128.
_QWEN3_SHAPES: dict[str, tuple[int, int, int, int, bool]] = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}

_LEAVES, _LEAF_MULTIPLE = 8, 16
_BLOCK = 1 << 18  # values drawn at a time, so that the temporaries stay small
_SUM_MEAN, _SUM_STD = 4 * 65535 // 2, 65536 / math.sqrt(3)  # of a sum of four uniform uint16

_NORM_STD = 0.2  # a norm weight left out changes every activation by about 20 %
_LOGIT_STD = 2.5  # of the logits over the vocabulary


# --- configurations ------------------------------------------------------------------------------------


def small_config(**overrides: Any) -> dict[str, Any]:
    """Returns the Hugging Face config of the demo model: 4.2 million parameters, tied, TP sizes up to 8.

    Args:
        **overrides: Values that replace the defaults, by their Hugging Face names.

    Raises:
        ValueError: A name is unknown, a dimension is not a positive integer, a contraction that tensor
            parallelism cuts (`intermediate_size`, `num_attention_heads * head_dim`) does not make 8 leaves of
            a multiple of 16, or `vocab_size` is no multiple of 8.
    """
    config = _config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=16,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    unknown = sorted(set(overrides) - set(config))
    if unknown:
        raise ValueError(f"small_config knows no field {unknown}; use some of {sorted(config)}")
    config.update(overrides)
    _check_config(config)
    _check_leaves("intermediate_size", config["intermediate_size"])
    _check_leaves("num_attention_heads * head_dim", config["num_attention_heads"] * config["head_dim"])
    if config["vocab_size"] % _LEAVES:
        remedy = -(-config["vocab_size"] // _LEAVES) * _LEAVES
        raise ValueError(f"vocab_size={config['vocab_size']} is no multiple of {_LEAVES}; use {remedy}")
    return config


def qwen3_config(size: str) -> dict[str, Any]:
    """Returns the published Hugging Face config of a dense Qwen3 model.

    Args:
        size: One of "0.6B", "1.7B", "4B", "8B", "14B" and "32B".

    Raises:
        ValueError: The size is another one.
    """
    if size not in _QWEN3_SHAPES:
        raise ValueError(f"no dense Qwen3 of size {size!r}; use one of {', '.join(_QWEN3_SHAPES)}")
    hidden, intermediate, layers, heads, tied = _QWEN3_SHAPES[size]
    return _config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=151645,
    )


def _config(**fields: Any) -> dict[str, Any]:
    """Fills in what all configs share, in the style of the published files (`rope_theta`, `torch_dtype`)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": fields["num_hidden_layers"],
        "model_type": "qwen3",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **fields,
    }


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the config describes tensors that this module can name and shape."""
    for name in _DIMENSIONS:
        _check_int(name, config.get(name), 1)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if config["head_dim"] % 2:
        raise ValueError(f"head_dim={config['head_dim']} is odd and RoPE turns pairs; use an even one")
    if config.get("attention_bias"):
        raise ValueError("attention_bias=True: no dense Qwen3 has attention biases; set it to False")


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} is out of range; use an integer {limits}")


def _check_leaves(name: str, k: int) -> None:
    multiple = _LEAVES * _LEAF_MULTIPLE
    if k % multiple:
        raise ValueError(
            f"{name}={k} cannot be cut into {_LEAVES} leaves of a multiple of {_LEAF_MULTIPLE}; "
            f"use a multiple of {multiple} such as {-(-k // multiple) * multiple}"
        )


# --- tensors -------------------------------------------------------------------------------------------


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a Qwen3 checkpoint by Hugging Face name, from first to last layer.

    Projections are `[out_features, in_features]`, as Hugging Face stores them. There is no `lm_head.weight`
    where `tie_word_embeddings` is true.

    Raises:
        ValueError: The config lacks a dimension or asks for attention biases.
    """
    _check_config(config)
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_out, kv_out = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_out, hidden),
        "self_attn.k_proj": (kv_out, hidden),
        "self_attn.v_proj": (kv_out, hidden),
        "self_attn.o_proj": (hidden, q_out),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(
    config: Mapping[str, Any], *, seed: int, scale: float = 2.0
) -> Iterator[tuple[str, np.ndarray]]:
    """Draws the tensors of a Qwen3 checkpoint, one at a time.

    Values are close to normal: a centred sum of four uniforms, at most 3.5 standard deviations. Norm weights
    have mean 1 and deviation 0.2, so that one left out shows. The embedding and `lm_head.weight` have
    deviation `2.5 / sqrt(hidden_size)`, so logits spread by 2.5 and one token leads, now and then by very
    little. Projections have deviation `scale / sqrt(fan_in)`. At the default scale four layers raise the
    residual stream to about 10, far above the embedding in it; at 1 a tied model repeats its last token.

    Args:
        config: A Hugging Face Qwen3 config.
        seed: Any non-negative integer.
        scale: Deviation of a projection's output for an input of deviation 1.

    Returns:
        An iterator over (Hugging Face name, float32 array), in the order of `tensor_shapes`.

    Raises:
        ValueError: The config, the seed or the scale is out of range.
    """
    _check_int("seed", seed, 0)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale!r} is out of range; use a positive finite number")
    shapes = tensor_shapes(config)
    return ((name, _random_tensor(name, shape, seed, scale)) for name, shape in shapes.items())


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, scale: float) -> np.ndarray:
    if len(shape) == 1:
        return np.float32(1) + random_values(name, shape, seed, _NORM_STD)
    gain = _LOGIT_STD if name in ("model.embed_tokens.weight", "lm_head.weight") else scale
    return random_values(name, shape, seed, gain / math.sqrt(shape[1]))


def random_values(name: str, shape: tuple[int, ...], seed: int, std: float) -> np.ndarray:
    """Returns float32 values of mean 0, close to normal; exact integer sums, then one rounded product each.

    Args:
        name: Another name gives other values.
        shape: Of the array.
        seed: Any non-negative integer.
        std: Standard deviation.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    values = np.empty(math.prod(shape), np.float32)
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        parts = bits.random_raw(block.size).view(np.uint16).reshape(-1, 4)
        total = parts[:, 0].astype(np.int32)
        for i in range(1, 4):
            total += parts[:, i]
        total -= _SUM_MEAN
        np.multiply(total.astype(np.float32), np.float32(std / _SUM_STD), out=block)
    return values.reshape(shape)


# --- checkpoints ---------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int = 1,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder: config.json and model.safetensors, or several shards and their index.

    The folder is written beside `path` under another name and renamed when complete. One shard at a time is
    held in memory, in `dtype`, so a large checkpoint wants several. Call `write_tokenizer` afterwards, not
    before, because `overwrite` replaces the whole folder.

    Args:
        path: The folder to make. Its parents are made too.
        config: A Hugging Face Qwen3 config, written as it is except for the field that names the dtype.
        seed: Seed of `random_tensors`.
        dtype: "bfloat16" (rounded to nearest even) or "float32".
        shards: Number of safetensors files, at most one a tensor.
        overwrite: Replace an existing checkpoint folder, tokenizer and all.

    Returns:
        The path.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: The path is a file, or a folder that is not empty while `overwrite` is false or the
            folder holds no config.json (nothing but a checkpoint is ever replaced).
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(_DTYPES)}")
    tensors = random_tensors(config, seed=seed)
    sizes = {name: math.prod(s) * _DTYPES[dtype].itemsize for name, s in tensor_shapes(config).items()}
    files = _assign_files(sizes, shards)
    target = Path(path).expanduser().resolve()
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        dtype_fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["torch_dtype"]
        _write_json(partial / "config.json", {**config, **dict.fromkeys(dtype_fields, dtype)})
        _write_shards(partial, tensors, files, _DTYPES[dtype])
        if shards > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            _write_json(partial / "model.safetensors.index.json", index)
        _replace_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Path(path)


def _assign_files(sizes: Mapping[str, int], shards: int) -> dict[str, str]:
    """Cuts the tensors, in order, into runs of about equal bytes, none empty; returns file name by tensor."""
    _check_int("shards", shards, 1, len(sizes))
    if shards == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    total, done, shard, files = sum(sizes.values()), 0, -1, {}
    for i, (name, size) in enumerate(sizes.items()):
        by_bytes = min(done * shards // total, shard + 1)
        shard = max(by_bytes, shards - (len(sizes) - i))  # the tensors left must still fill the shards left
        files[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        done += size
    return files


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], files: Mapping[str, str], dtype: np.dtype
) -> None:
    """Writes the tensors to their files; each file's tensors must come one after another."""
    pending: dict[str, np.ndarray] = {}
    last_of_file = {file: name for name, file in files.items()}
    for name, value in tensors:
        pending[name] = value.astype(dtype, copy=False)
        if last_of_file[files[name]] == name:
            save_file(pending, folder / files[name], metadata={"format": "pt"})
            # safetensors makes its files private to the user; the umask decided for config.json.
            shutil.copymode(folder / "config.json", folder / files[name])
            pending = {}


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{target} is not empty and holds no config.json; name another folder")
    if not overwrite:
        raise FileExistsError(f"{target} holds a checkpoint; pass overwrite=True or name another folder")


def _replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; an old `target` is moved aside first and removed last."""
    if not target.exists():
        source.rename(target)
        return
    old = target.with_name(f"{source.name}-old")
    target.rename(old)
    source.rename(target)
    shutil.rmtree(old)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
