"""Drop-in ops for any JAX code: the usual signatures, one order of every sum, gradients of the same kind."""

from .attention import dot_product_attention
from .contraction import ProductPlan, dot_general, matmul, plan_product
from .einsum import einsum
from .injection import TreeDotGeneral
from .norms import layer_norm, rms_norm
from .reductions import mean, sum, var
from .softmax import log_softmax, logsumexp, softmax

__all__ = [
    "ProductPlan",
    "TreeDotGeneral",
    "dot_general",
    "dot_product_attention",
    "einsum",
    "layer_norm",
    "log_softmax",
    "logsumexp",
    "matmul",
    "mean",
    "plan_product",
    "rms_norm",
    "softmax",
    "sum",
    "var",
]
