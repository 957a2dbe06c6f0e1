"""Deterministic LLM inference in JAX: the same bits on any mesh of 1 to 8 devices, in any batch.

`generate` and `score` run a Flax NNX Qwen3 whose every float reduction has one order, set by global shapes alone
(`docs/numerics.md` states the contract). `tree_matmul`, `tree_psum` and `tree_psum_scatter` are its parts. `ops` holds
drop-in ops for other people's models, with the usual signatures and gradients (`docs/drop-in.md`).
"""

from . import versions as versions  # first: it refuses another JAX before anything fails in JAX's own words

# isort: split
from . import bisect, models, ops, optimizers, pallas_kernels, rl, training
from .checkpoint import RestoredCheckpoint, checkpoint_steps, restore_checkpoint, save_checkpoint
from .collectives import tree_all_gather, tree_psum, tree_psum_scatter
from .export import export_hugging_face
from .fingerprint import fingerprint
from .generation import GenerateOutput, generate, score
from .loading import load
from .mesh import make_mesh
from .ops import (
    TreeDotGeneral,
    dot_general,
    dot_product_attention,
    einsum,
    layer_norm,
    log_softmax,
    logsumexp,
    matmul,
    mean,
    rms_norm,
    softmax,
    sum,
    var,
)
from .pallas_kernels import tree_matmul
from .sampling import SamplingParams
from .training import TrainingModel, shard_model, train_step, value_and_grad
from .transform import Rule, invariant, report

__version__ = "0.1.0"

__all__ = [
    "GenerateOutput",
    "RestoredCheckpoint",
    "Rule",
    "SamplingParams",
    "TrainingModel",
    "TreeDotGeneral",
    "bisect",
    "checkpoint_steps",
    "dot_general",
    "dot_product_attention",
    "einsum",
    "export_hugging_face",
    "fingerprint",
    "generate",
    "invariant",
    "layer_norm",
    "load",
    "log_softmax",
    "logsumexp",
    "make_mesh",
    "matmul",
    "mean",
    "models",
    "ops",
    "optimizers",
    "pallas_kernels",
    "report",
    "restore_checkpoint",
    "rl",
    "rms_norm",
    "save_checkpoint",
    "score",
    "shard_model",
    "softmax",
    "sum",
    "train_step",
    "training",
    "tree_all_gather",
    "tree_matmul",
    "tree_psum",
    "tree_psum_scatter",
    "value_and_grad",
    "var",
]
