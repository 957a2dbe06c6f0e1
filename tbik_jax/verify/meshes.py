"""The collectives over the devices at hand, and a small model on every mesh of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ..collectives import TRANSPORTS, Transport, tree_all_gather, tree_psum, tree_psum_scatter
from ..generation import GenerateOutput, generate
from ..mesh import TP_SIZES, make_mesh
from ..models import Qwen3, Qwen3Config
from ..sampling import SamplingParams
from ..synthetic import random_values
from .checks import Check, differs, same, wide_values

_CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
)
#: On a GPU the model is wide enough for its kernels.
_GPU_CONFIG = dataclasses.replace(
    _CONFIG, hidden_size=1024, intermediate_size=3072, head_dim=64, vocab_size=8192
)
_PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [100], [3, 1, 4, 1, 5])
_CPU_PROMPTS = ([5], [100], [3])  # without prefill, which takes as long to compile as decoding
_NEW_TOKENS = 8


def mesh_checks() -> list[Check]:
    """The checks that the number of devices allows; with one device, the model alone."""
    count = len(jax.devices())
    sizes = [size for size in TP_SIZES if 1 < size <= count]
    checks = [
        Check(
            f"collectives over {size}",
            "tree_psum by every transport, scatter, gather",
            functools.partial(_collectives, size),
        )
        for size in sizes
    ]
    return [*checks, Check("model", f"batches and meshes of up to {count} devices", lambda: _model(sizes))]


def _collectives(ranks: int) -> Any:
    mesh = make_mesh(tp=ranks)
    parts = wide_values((64, ranks), ranks).T.copy()  # the spread is over the ranks, which are added
    expected = _tree(list(parts))

    def over(body: Any, out: Any) -> Any:
        mapped = jax.shard_map(body, mesh=mesh, in_specs=P("tp"), out_specs=out, check_vma=False)
        return jax.jit(mapped)(jnp.asarray(parts))

    def psum(transport: Transport | None) -> Any:
        return over(lambda x: tree_psum(x, "tp", transport=transport), P("tp"))

    for transport in (None, *TRANSPORTS):
        same(
            psum(transport),
            np.tile(expected, (ranks, 1)),
            f"tree_psum by {transport or 'choice'} over {ranks}",
        )
    scattered = over(lambda x: tree_psum_scatter(x[0], "tp", tiled=True), P("tp"))
    same(scattered, expected, f"tree_psum_scatter over {ranks}")
    gathered = over(lambda x: tree_all_gather(x, "tp", tiled=True), P("tp"))
    same(gathered.reshape(ranks, ranks, 64), np.tile(parts, (ranks, 1, 1)), f"tree_all_gather over {ranks}")
    if ranks > 2:  # two numbers have one sum
        differs(functools.reduce(np.add, parts), expected, "ranks added one after another")
    return psum(None)


def _tree(parts: list[np.ndarray]) -> np.ndarray:
    """The balanced binary tree, neighbours first, in numpy: one IEEE add a node."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _model(sizes: list[int]) -> Any:
    """Generates on one device, alone and in a batch, and on other meshes."""
    on_gpu = jax.devices()[0].platform == "gpu"
    config = _GPU_CONFIG if on_gpu else _CONFIG
    model = _small_model(config)
    expected = _generate(model, range(3), {"tp": 1})
    for shape in _meshes(sizes):  # with data=3 each rank has one prompt, alone
        out = _generate(model, range(3), shape)
        same((out.tokens, out.logprobs), (expected.tokens, expected.logprobs), f"{shape} against one device")
    if not sizes:
        alone = _generate(model, [2], {"tp": 1})
        same((alone.tokens, alone.logprobs), (expected.tokens[2:], expected.logprobs[2:]), "a prompt alone")
    weight = model.layers[0].mlp.down_weight_fd
    weight[...] = weight[...].at[0].multiply(1.25)
    differs(_generate(model, range(3), {"tp": 1}).logprobs, expected.logprobs, "another row of one weight")
    return expected.tokens, expected.logprobs


def _small_model(config: Qwen3Config) -> Qwen3:
    """Random parameters in bfloat16, made by numpy: nothing to compile, and the same in every version of JAX."""
    abstract = nnx.eval_shape(lambda: Qwen3(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def parameter(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if len(leaf.shape) == 1:
            return jnp.asarray(1 + random_values(name, leaf.shape, 0, 0.2), leaf.dtype)
        # what goes through a layer keeps its size: 1 / sqrt(fan_in), which is close to 1 / sqrt(hidden_size)
        return jnp.asarray(random_values(name, leaf.shape, 0, config.hidden_size**-0.5), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(parameter, state))


def _meshes(sizes: list[int]) -> list[dict[str, int]]:
    """Data with tp as far as the devices reach; on GPUs the largest tp too (on CPUs compiling it takes too long)."""
    count = len(jax.devices())
    meshes = [{"data": 3, "tp": 2 if count >= 6 else 1}] if count >= 3 else []
    if jax.devices()[0].platform == "gpu" or not meshes:
        meshes += [{"tp": size} for size in sizes[-1:]]
    return meshes


def _generate(model: Qwen3, indices: Any, shape: dict[str, int], **options: Any) -> GenerateOutput:
    return generate(
        model,
        [(_PROMPTS if jax.devices()[0].platform == "gpu" else _CPU_PROMPTS)[i] for i in indices],
        mesh=make_mesh(shape.get("data", 1), 1, shape["tp"]),
        max_new_tokens=_NEW_TOKENS,
        sampling=[SamplingParams(temperature=0.8 * (i % 2), seed=i) for i in indices],
        **options,
    )
