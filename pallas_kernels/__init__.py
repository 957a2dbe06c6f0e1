"""Kernels with one reduction order each: one folder an op (`api`, `reference`, backends), no mesh, no model.

Every op has a `reference` in plain JAX that states the order of its adds. `tree_matmul` also has the backends
`mosaic_gpu` (Hopper) and `triton` (Ampere, Ada; Hopper when named); `log_softmax` and `sampling` have `mosaic_gpu`.
The public call is the function re-exported here; it chooses the backend by device, or takes `backend=`.
"""

from .attention.api import AttentionPlan, attention
from .common.tree import tree_join, tree_sum
from .embedding.api import embedding
from .log_softmax.api import exp_sum, leaf_statistics, log_softmax
from .rms_norm.api import rms_norm
from .rope.api import rope, rope_tables
from .sampling.api import sample_argmax
from .swiglu.api import swiglu
from .tree_matmul.api import tree_matmul
from .tree_matmul.plan import ContractionPlan, plan_contraction

__all__ = [
    "AttentionPlan",
    "ContractionPlan",
    "attention",
    "embedding",
    "exp_sum",
    "leaf_statistics",
    "log_softmax",
    "plan_contraction",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample_argmax",
    "swiglu",
    "tree_join",
    "tree_matmul",
    "tree_sum",
]
