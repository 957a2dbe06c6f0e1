"""Makes golden_{a,b,c,d}.npz: what Hugging Face's Qwen3ForCausalLM computes for four tiny models.

The tests read the files; this script is run by hand, and only when a configuration below changes. It needs
an environment of its own, because the project does not depend on torch. The files here were made with

    Python 3.11, torch 2.13.0 (CPU), transformers 5.17.0, numpy 2.4.6, ml_dtypes 0.6.0, safetensors 0.8.0

    python tests/data/make_golden.py

The weights are not stored: `tbik_jax/synthetic.py` makes them again from the config and the seed, and
`weights_sha256` says whether it made the same ones. Each file holds, for B=2 rows of T=24 tokens and no
padding:

    config_json     str       the Hugging Face config; a and b in the style of the published files
                              (rope_theta, torch_dtype), c and d in that of transformers 5
                              (rope_parameters, dtype)
    seed            int64     of synthetic.random_tensors
    weights_sha256  str       of the float32 tensors' bytes, in the order of synthetic.tensor_shapes
    versions_json   str       package versions by name
    input_ids       int32     [B, T]
    hidden_states   float32   [1 + layers, B, T, hidden], after the embedding and after each layer
                              (so the last one is the input of the final norm)
    final_norm      float32   [B, T, hidden]
    logits          float32   [B, T, vocab]
    logits_float64  float64   [B, T, vocab]
    bf16_logits     float32   [B, T, vocab], of the model in bfloat16; every value is a bfloat16
    bf16_weights_logits_float64
                    float64   [B, T, vocab], of the weights rounded to bfloat16, computed in float64

So `abs(logits - logits_float64)` is what the ordinary implementation loses in float32, and
`abs(bf16_logits - bf16_weights_logits_float64)` what it loses in bfloat16.

The float64 logits come from the forward pass in NumPy below, because that of transformers keeps RMSNorm,
RoPE and softmax in float32 whatever the dtype of the model; the script checks the one against the other. To
keep the files small, they are rounded to multiples of 2**-28 (float32 weights) and 2**-22 (bfloat16 weights),
hundreds of times finer than the errors that they measure.
"""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

BATCH, LENGTH = 2, 24
HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "numpy", "ml_dtypes", "safetensors")


def load_synthetic() -> ModuleType:
    """Imports synthetic.py by its path, because importing the package would need jax."""
    spec = importlib.util.spec_from_file_location("synthetic", HERE.parents[1] / "tbik_jax" / "synthetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = load_synthetic()


def configs() -> dict[str, dict[str, Any]]:
    """Returns the Hugging Face config of each file; every one makes 8 leaves of a multiple of 16."""
    tiny = {"vocab_size": 256, "max_position_embeddings": 64, "num_hidden_layers": 2, "max_window_layers": 2}
    a = synthetic.small_config(**tiny, hidden_size=128, intermediate_size=256)
    b = synthetic.small_config(
        **{**tiny, "num_hidden_layers": 3, "max_window_layers": 3},
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=8,
        head_dim=16,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )
    c = synthetic.small_config(
        **tiny, hidden_size=128, intermediate_size=384, num_attention_heads=32, head_dim=16, rope_theta=5e5
    )
    d = synthetic.small_config(
        **tiny, hidden_size=128, intermediate_size=256, head_dim=48, tie_word_embeddings=False
    )
    return {"a": a, "b": b, "c": in_style_of_transformers_5(c), "d": in_style_of_transformers_5(d)}


def in_style_of_transformers_5(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with the keys that transformers 5 writes for RoPE and the dtype."""
    config = dict(config)
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    return config


def rope_theta(config: Mapping[str, Any]) -> float:
    return float(
        config["rope_parameters"]["rope_theta"] if "rope_parameters" in config else config["rope_theta"]
    )


def build_model(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: torch.dtype
) -> Qwen3ForCausalLM:
    """Returns the Hugging Face model with these weights, in `dtype`; no weight may be missing or unused."""
    hf_config = Qwen3Config(**{k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    assert hf_config.rope_parameters["rope_theta"] == rope_theta(config)
    hf_config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(hf_config).eval()
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    # `to` rounds the RoPE frequencies too, which loading a checkpoint in bfloat16 does not.
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    model.model.rotary_emb.inv_freq = inv_freq
    return model


@torch.no_grad()
def run_model(model: Qwen3ForCausalLM, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each part's output, caught by hooks, as `output_hidden_states` skips that of the last layer."""
    caught: list[torch.Tensor] = []
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [part.register_forward_hook(lambda _m, _i, output: caught.append(output)) for part in parts]
    logits = model(torch.from_numpy(input_ids).long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    hidden = [np.asarray(x.float()) for x in caught]
    return {
        "hidden_states": np.stack(hidden[:-1]),
        "final_norm": hidden[-1],
        "logits": np.asarray(logits.double()),
    }


def float64_logits(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], input_ids: np.ndarray
) -> np.ndarray:
    """Qwen3 in NumPy, all of it in float64. Returns [B, T, vocab]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, kv_heads, head_dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    batch, length = input_ids.shape
    angles = np.arange(length)[:, None] * rope_theta(config) ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]  # [T, 1, head_dim / 2]
    masked = np.triu(np.ones((length, length), bool), 1)

    def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def rotate(x: np.ndarray) -> np.ndarray:
        x1, x2 = np.split(x, 2, axis=-1)
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    x = w["model.embed_tokens.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = {n.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v for n, v in w.items()}
        h = rms_norm(x, layer["input_layernorm"])
        q, k, v = (
            (h @ layer[f"self_attn.{p}_proj"].T).reshape(batch, length, n, head_dim)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q = rotate(rms_norm(q, layer["self_attn.q_norm"]))
        k = rotate(rms_norm(k, layer["self_attn.k_norm"]))
        k, v = (np.repeat(y, heads // kv_heads, axis=2) for y in (k, v))
        scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(head_dim)
        scores[..., masked] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        x = x + np.einsum("bnqk,bknd->bqnd", p, v).reshape(batch, length, -1) @ layer["self_attn.o_proj"].T
        h = rms_norm(x, layer["post_attention_layernorm"])
        gate, up = h @ layer["mlp.gate_proj"].T, h @ layer["mlp.up_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return rms_norm(x, w["model.norm.weight"]) @ w[head].T


def golden(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one file."""
    weights = dict(synthetic.random_tensors(config, seed=seed))
    rounded = {name: np.asarray(torch.from_numpy(v).bfloat16().float()) for name, v in weights.items()}
    digest = hashlib.sha256(b"".join(value.tobytes() for value in weights.values()))
    # Ids from the raw stream of a bit generator, as synthetic.py draws the weights.
    input_ids = np.random.PCG64(seed).random_raw(BATCH * LENGTH) % config["vocab_size"]
    input_ids = input_ids.astype(np.int32).reshape(BATCH, LENGTH)

    float32 = run_model(build_model(config, weights, torch.float32), input_ids)
    bfloat16 = run_model(build_model(config, rounded, torch.bfloat16), input_ids)
    float64 = float64_logits(config, weights, input_ids)
    bf16_weights_float64 = float64_logits(config, rounded, input_ids)
    for mine, theirs in ((float64, weights), (bf16_weights_float64, rounded)):
        hf = run_model(build_model(config, theirs, torch.float64), input_ids)["logits"]
        np.testing.assert_allclose(mine, hf, rtol=0, atol=2e-5)
    packages = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {
        "config_json": np.array(json.dumps(config)),
        "seed": np.array(seed, np.int64),
        "weights_sha256": np.array(digest.hexdigest()),
        "versions_json": np.array(json.dumps(packages)),
        "input_ids": input_ids,
        "hidden_states": float32["hidden_states"],
        "final_norm": float32["final_norm"],
        "logits": float32["logits"].astype(np.float32),
        "logits_float64": np.round(float64 * 2.0**28) / 2.0**28,
        "bf16_logits": bfloat16["logits"].astype(np.float32),
        "bf16_weights_logits_float64": np.round(bf16_weights_float64 * 2.0**22) / 2.0**22,
    }


def main() -> None:
    """Writes the files and prints, for each, its size and the errors of the float32 and bfloat16 runs."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, config) in enumerate(configs().items()):
        arrays = golden(config, seed)
        file = HERE / f"golden_{name}.npz"
        np.savez_compressed(file, **arrays)
        error32 = np.abs(arrays["logits"] - arrays["logits_float64"])
        error16 = np.abs(arrays["bf16_logits"] - arrays["bf16_weights_logits_float64"])
        print(
            f"{file.name}: {file.stat().st_size} bytes, logits spread by {arrays['logits'].std():.2f}, "
            f"error of float32 max {error32.max():.1e} mean {error32.mean():.1e}, "
            f"of bfloat16 max {error16.max():.1e} mean {error16.mean():.1e}"
        )


if __name__ == "__main__":
    main()
