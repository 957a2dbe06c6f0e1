"""Kernels with one reduction order each: one folder an op (`api`, `reference`, backends), no mesh, no model.

Every op has a `reference` in plain JAX that states the order of its adds. `tree_matmul` also has the backends
`mosaic_gpu` (Hopper) and `triton` (Ampere, Ada; Hopper when named), most others `mosaic_gpu`. The public call is the
function re-exported here; it chooses the backend by device, or takes `backend=`.
"""

from .attention.api import AttentionPlan, attention
from .attention.backward import attention_backward, attention_with_lse
from .common.tree import tree_join, tree_sum
from .embedding.api import embedding
from .few_rows.api import matmul_subtrees, norm_matmul
from .few_rows.boards import Boards
from .few_rows.rest import LayerRest, rest_of_layer
from .gated_matmul.api import gated_matmul
from .join_subtrees.api import join_subtrees
from .log_softmax.api import exp_sum, leaf_statistics, log_softmax
from .qk_norm_rope.api import qk_norm_rope
from .residual_add.api import residual_add
from .rms_norm.api import add_rms_norm, rms_norm
from .rope.api import rope, rope_tables
from .sampling.api import sample_argmax
from .swiglu.api import swiglu, swiglu_joint
from .tree_matmul.api import tree_matmul
from .tree_matmul.plan import ContractionPlan, plan_contraction

__all__ = [
    "AttentionPlan",
    "Boards",
    "ContractionPlan",
    "LayerRest",
    "add_rms_norm",
    "attention",
    "attention_backward",
    "attention_with_lse",
    "embedding",
    "exp_sum",
    "gated_matmul",
    "join_subtrees",
    "leaf_statistics",
    "log_softmax",
    "matmul_subtrees",
    "norm_matmul",
    "plan_contraction",
    "qk_norm_rope",
    "residual_add",
    "rest_of_layer",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample_argmax",
    "swiglu",
    "swiglu_joint",
    "tree_join",
    "tree_matmul",
    "tree_sum",
]
