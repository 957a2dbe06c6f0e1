"""`tree_matmul`: checks its operands and calls the backend."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ..common.backend import require_triton, resolve_backend
from ..common.gradient import inference_only
from .plan import check_leaves
from .reference import tree_matmul_reference


def tree_matmul(
    x: jax.Array,
    w: jax.Array,
    leaves: int = 8,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    transpose_rhs: bool = False,
    transpose_lhs: bool = False,
    backend: str | None = None,
) -> jax.Array:
    """Matrix product in tree order: the bits of a row depend on that row, on `w` and on `leaves`, and on nothing else.

    K is cut into `leaves` equal slices, each one fp32 accumulation in ascending k; the slices meet in a balanced binary
    tree of fp32 adds, neighbours first; the sum is rounded to `out_dtype` once. A rank that holds K/t consecutive k's
    and calls this with `leaves // t` and `out_dtype=jnp.float32` has a complete subtree; `tree_psum` adds the rest.

    Args:
        x: [..., K], bfloat16, float16 or float32; [K, M] with `transpose_lhs`.
        w: [K, N] of the same dtype; [N, K] with `transpose_rhs`. N is a multiple of 16 but on `reference`. Or B of
            them, [B, K, N] or [B, N, K], for an x [B, ..., K]: as many products, on Hopper in one launch.
        leaves: 1, 2, 4 or 8; K must be a multiple of 16 * leaves.
        out_dtype: of the result; the operands' dtype by default.
        transpose_rhs: `w` is stored [N, K].
        transpose_lhs: `x` is stored [K, M], as in the gradient of weights, which contracts over tokens. The bits are
            those of the [M, K] one.
        backend: "reference", "mosaic_gpu" (Hopper) or "triton" (Ampere, Ada, Hopper); None chooses by device.

    Returns:
        [..., N] in `out_dtype`; [M, N] with `transpose_lhs`; [B, ..., N] of B products.

    Raises:
        ValueError: shapes, dtypes or `leaves` that the contract does not cover, or a backend that cannot run here.

    Source: TBIK (arXiv 2511.17826), section 4; fp32 tree nodes instead of the paper's bfloat16 ones.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if transpose_lhs and not x.ndim == w.ndim == 2:
        raise ValueError(
            f"with transpose_lhs tree_matmul takes matrices x [K, M] and w, not shapes {x.shape} and {w.shape}"
        )
    backend = resolve_backend(backend, x.dtype)
    stored_km = transpose_lhs and backend == "mosaic_gpu"  # the others have it transposed in memory
    if transpose_lhs and not stored_km:
        x = x.T
    shape = x.shape[::-1] if stored_km else x.shape
    _check(shape, x.dtype, w, leaves, out_dtype, transpose_rhs)
    lead = w.shape[:-2]  # of several products
    rows = x if stored_km else x.reshape(*lead, math.prod(shape[len(lead) : -1]), shape[-1])
    n = w.shape[-2] if transpose_rhs else w.shape[-1]
    if rows.size == 0:
        return jnp.zeros((*shape[:-1], n), out_dtype)
    if backend == "mosaic_gpu":
        from .mosaic_gpu import tree_matmul_mosaic_gpu  # imports the GPU lowering only where it is used

        out = tree_matmul_mosaic_gpu(
            rows,
            w,
            leaves=leaves,
            out_dtype=out_dtype,
            transpose_rhs=transpose_rhs,
            transpose_lhs=stored_km,
        )
    elif backend == "triton":
        require_triton()
        from .triton import tree_matmul_triton  # imports packages that are optional

        one = functools.partial(
            tree_matmul_triton, leaves=leaves, out_dtype=out_dtype, transpose_rhs=transpose_rhs
        )
        out = lax.map(lambda pair: one(*pair), (rows, w)) if lead else one(rows, w)
    else:
        one = functools.partial(
            tree_matmul_reference, leaves=leaves, out_dtype=out_dtype, transpose_rhs=transpose_rhs
        )
        out = (jax.vmap(one) if lead else one)(rows, w)
    return inference_only(out.reshape(*shape[:-1], n), "tree_matmul")


def _check(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    w: jax.Array,
    leaves: int,
    out_dtype: jnp.dtype,
    transpose_rhs: bool,
) -> None:
    names = ("bfloat16", "float16", "float32")
    if len(shape) < 1 or w.ndim not in (2, 3):
        raise ValueError(
            f"tree_matmul takes x [..., K] and w [K, N], or B of each, not shapes {shape} and {w.shape}"
        )
    if w.ndim == 3 and (len(shape) < 2 or shape[0] != w.shape[0]):
        raise ValueError(f"tree_matmul takes x [B, ..., K] to w [B, K, N], not shapes {shape} and {w.shape}")
    if dtype != w.dtype or dtype.name not in names:
        raise ValueError(
            f"x is {dtype} and w is {w.dtype}; both must be one of {', '.join(names)}, and the same"
        )
    if out_dtype.name not in names:
        raise ValueError(f"out_dtype={out_dtype} is not supported; use one of {', '.join(names)}")
    k = w.shape[-1] if transpose_rhs else w.shape[-2]
    if shape[-1] != k:
        stored = "[N, K]" if transpose_rhs else "[K, N]"
        raise ValueError(f"x has K={shape[-1]} and w {stored} has K={k} (shapes {shape} and {w.shape})")
    check_leaves(k, leaves)
