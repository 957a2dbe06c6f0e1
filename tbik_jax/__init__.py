"""Deterministic LLM inference in JAX: the same bits on any mesh of 1 to 8 devices, in any batch.

`generate` and `score` run a Flax NNX Qwen3 whose every float reduction has one order, set by global shapes alone
(`docs/numerics.md` states the contract). `tree_matmul`, `tree_psum` and `tree_psum_scatter` are its parts.
"""

from . import models, optimizers, pallas_kernels, rl, training
from .checkpoint import RestoredCheckpoint, checkpoint_steps, restore_checkpoint, save_checkpoint
from .collectives import tree_all_gather, tree_psum, tree_psum_scatter
from .export import export_hugging_face
from .fingerprint import fingerprint
from .generation import GenerateOutput, generate, score
from .loading import load
from .mesh import make_mesh
from .pallas_kernels import tree_matmul
from .sampling import SamplingParams
from .training import TrainingModel, shard_model, train_step, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "GenerateOutput",
    "RestoredCheckpoint",
    "SamplingParams",
    "TrainingModel",
    "checkpoint_steps",
    "export_hugging_face",
    "fingerprint",
    "generate",
    "load",
    "make_mesh",
    "models",
    "optimizers",
    "pallas_kernels",
    "restore_checkpoint",
    "rl",
    "save_checkpoint",
    "score",
    "shard_model",
    "train_step",
    "training",
    "tree_all_gather",
    "tree_matmul",
    "tree_psum",
    "tree_psum_scatter",
    "value_and_grad",
]
