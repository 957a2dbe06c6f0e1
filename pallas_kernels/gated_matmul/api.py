"""`gated_matmul`: checks its operands and calls the backend."""

import math

import jax
import jax.numpy as jnp

from ..common.backend import resolve_backend
from ..common.gradient import inference_only
from ..swiglu.api import swiglu
from ..tree_matmul.api import tree_matmul
from ..tree_matmul.plan import check_leaves
from .reference import gated_matmul_reference


def gated_matmul(x: jax.Array, w: jax.Array, *, backend: str | None = None) -> jax.Array:
    """SwiGLU of gates and values in one kernel: `swiglu(x @ w[:F].T, x @ w[F:].T)`, bit for bit.

    One leaf: the contraction of a column-parallel layer, which no mesh axis cuts. Gates and values are rounded to x's
    dtype before SwiGLU and its result after, as the two ops do it; what is saved is their way through memory.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        w: [2F, K] of the same dtype, gates first; F is a multiple of 16 but on `reference`.
        backend: "reference", "mosaic_gpu" or "triton"; None chooses by device.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that the contract does not cover, or a backend that cannot run here.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1] or w.shape[0] % 2:
        raise ValueError(f"gated_matmul takes x [..., K] and w [2F, K], not shapes {x.shape} and {w.shape}")
    if x.dtype != w.dtype or x.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ValueError(
            f"x is {x.dtype} and w is {w.dtype}; both must be one of bfloat16, float16, float32, and the same"
        )
    check_leaves(w.shape[1], 1)
    f = w.shape[0] // 2
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    backend = resolve_backend(backend, x.dtype)
    if rows.shape[0] == 0:
        return jnp.zeros((*x.shape[:-1], f), x.dtype)
    if backend == "mosaic_gpu":
        from ..tree_matmul.mosaic_gpu import (
            tree_matmul_mosaic_gpu,
        )  # imports the GPU lowering where it is used

        out = tree_matmul_mosaic_gpu(rows, w, leaves=1, out_dtype=x.dtype, transpose_rhs=True, gated=True)
    elif backend == "triton":  # kept simple: two kernels
        product = tree_matmul(rows, w, 1, transpose_rhs=True, backend=backend)
        out = swiglu(product[:, :f], product[:, f:])
    else:
        out = gated_matmul_reference(rows, w)
    return inference_only(out.reshape(*x.shape[:-1], f), "gated_matmul")
