"""What training refuses before anything is computed: each error says which number or name, and what to do."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from .loading import parameter_path, parameter_shardings
from .mesh import BATCH_AXES, mesh_label
from .models.qwen3 import Qwen3, Qwen3Config
from .pallas_kernels.tree_matmul.plan import LEAF_MULTIPLE, LEAVES


def check_gradient_plans(config: Qwen3Config) -> None:
    """Raises `ValueError` if a contraction of the backward pass does not cut into leaves: N of the column-parallel."""
    kv_heads, group = config.num_key_value_heads, config.queries_per_kv
    multiple = LEAVES * LEAF_MULTIPLE
    for what, size in (
        ("vocab_size", config.vocab_size),
        ("num_key_value_heads * (queries_per_kv + 2) * head_dim", kv_heads * (group + 2) * config.head_dim),
        ("2 * intermediate_size", 2 * config.intermediate_size),
    ):
        if size % multiple:
            raise ValueError(
                f"config: gradients contract over {what}={size}, which is no multiple of {multiple} and does not cut "
                f"into {LEAVES} leaves; resize it to {-(-size // multiple) * multiple}"
            )
    if kv_heads & (kv_heads - 1):
        raise ValueError(
            f"config field num_key_value_heads={kv_heads}: gradients of their norm's scale need a power of two"
        )


def check_batch(batch: Any, mesh: Mesh, microbatches: int) -> None:
    """Raises `ValueError` if a batch's rows do not cut into the equal parts of ranks and passes."""
    rows = {x.shape[0] if getattr(x, "ndim", 0) else None for x in jax.tree.leaves(batch)}
    if len(rows) != 1 or None in rows:
        raise ValueError(
            "every leaf of a batch must be an array with the same number of leading rows; these have "
            f"{', '.join(sorted('no rows' if n is None else str(n) for n in rows))}"
        )
    (count,) = rows
    ranks = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = ranks * microbatches
    if ranks not in (1, 2, 4, 8) or parts > LEAVES:
        shape = mesh.shape
        raise ValueError(
            f"data={shape['data']} x fsdp={shape['fsdp']} ranks and {microbatches} micro-batches cut the batch "
            f"into {parts} parts; a tree of {LEAVES} leaves has complete subtrees for 1, 2, 4 or {LEAVES} parts"
        )
    if not count or count % parts:
        raise ValueError(
            f"{count} rows cannot be cut into {parts} equal parts ({ranks} ranks x {microbatches} "
            f"micro-batches); use a multiple of {parts}"
        )


def check_result(result: Any, has_aux: bool) -> None:
    """Raises `ValueError` if a loss function did not return two arrays, and with `has_aux` something beside them."""
    pair = result[0] if has_aux and isinstance(result, tuple) and len(result) == 2 else result
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, jax.Array) for x in pair)):
        wanted = "((losses, weights), aux)" if has_aux else "(losses, weights)"
        raise ValueError(
            f"the loss function must return {wanted}, two arrays [B, T], not {type(result).__name__}"
        )


def check_losses(loss: jax.Array, weights: jax.Array) -> None:
    """Raises `ValueError` if losses and weights are not alike, [B, T], or the losses not float32."""
    if loss.ndim != 2 or loss.shape != weights.shape or loss.dtype != jnp.float32:
        raise ValueError(
            "the loss function returned losses "
            f"{loss.dtype} {loss.shape} and weights {weights.dtype} {weights.shape}; it must return float32 losses "
            "[B, T] and weights of the same shape"
        )


def check_aux(aux: Any, rows: int) -> None:
    """Raises `ValueError` if an array that a loss function returned beside its losses has no entry for each row."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        shape = getattr(leaf, "shape", ())
        if not shape or shape[0] != rows:
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)} of the loss function has shape {tuple(shape)}; it must have a "
                f"leading entry for each of the {rows} rows, as ranks and passes are put together by rows"
            )


def check_placed(model: Qwen3, mesh: Mesh) -> None:
    """Raises `ValueError` if a parameter does not lie where training on the mesh has it."""
    state = nnx.state(model, nnx.Param)
    wanted = jax.tree.leaves(parameter_shardings(state, mesh))
    for (path, value), sharding in zip(jax.tree_util.tree_leaves_with_path(state), wanted, strict=True):
        if not value.sharding.is_equivalent_to(sharding, value.ndim):
            raise ValueError(
                f"parameter {parameter_path(path)[-1]} does not lie on the mesh {mesh_label(mesh)} as training cuts "
                "it; take model = tbik_jax.shard_model(model, mesh), and make the optimiser from that"
            )
