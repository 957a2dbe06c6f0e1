"""`norm_matmul` and `matmul_subtrees`: check their operands and choose a backend."""

import math

import jax

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..join_subtrees.api import check_addend
from ..tree_matmul.plan import check_leaves
from .config import MOST_GATED, choose_norm_config, choose_subtree_config, size_refusal
from .single_ops import matmul_subtrees_by_single_ops, norm_matmul_by_single_ops


def norm_matmul(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    w: jax.Array,
    *,
    eps: float,
    gated: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residual add, RMSNorm, and the product of a column-parallel layer behind it, in one kernel.

    The bits are those of `add_rms_norm` (`rms_norm` where y is None) and then `tree_matmul` with one leaf, or
    `gated_matmul`.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        y: like x; or float32 [P, ..., D], subtrees of a sum as `matmul_subtrees` gives them, which are joined first; or
            None.
        scale: [D] of x's dtype.
        w: [N, D] of x's dtype; with `gated` [2F, D], gates first. N and F are multiples of 16 but on `reference`.
        eps: added to the mean square.
        gated: whether the result is the SwiGLU of gates and values.
        backend: `reference` or `mosaic_gpu`, which takes up to 8 rows; None runs the kernel where it takes the sizes,
            and else the single ops as they choose, which have its bits.

    Returns:
        x + y rounded once (x where y is None), and the product, [..., N] or [..., F], in x's dtype.

    Raises:
        ValueError: the shapes do not fit, another dtype, eps is not positive, or the backend does not cover them.
    """
    d = x.shape[-1] if x.ndim else 0
    check_floats("norm_matmul", x=x, scale=scale, w=w)
    if not d or scale.shape != (d,) or w.ndim != 2 or w.shape[1] != d or (gated and w.shape[0] % 2):
        raise ValueError(
            f"norm_matmul takes x [..., D], scale [D] and w [N, D], N even if gated, not shapes {x.shape}, "
            f"{scale.shape} and {w.shape}"
        )
    if w.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; both must be the same")
    if y is not None:
        check_addend("norm_matmul", x, y)
    check_leaves(d, 1)
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    m = math.prod(x.shape[:-1])
    rows = x.reshape(m, d)
    terms = None if y is None else y.reshape(*y.shape[: y.ndim - x.ndim], m, d)
    if resolve_row_backend("norm_matmul", backend, x.dtype, norm_matmul_refusal(x, scale, w, gated)) == (
        "mosaic_gpu"
    ):
        from .mosaic_gpu import norm_matmul_mosaic_gpu  # imports the GPU lowering only where it is used

        config = choose_norm_config(m, d, w.shape[0] // (1 + gated), gated=gated)
        total, out = norm_matmul_mosaic_gpu(rows, terms, scale, w, eps=eps, gated=gated, config=config)
    else:
        total, out = norm_matmul_by_single_ops(rows, terms, scale, w, eps=eps, gated=gated, backend=backend)
    total, out = total.reshape(x.shape), out.reshape(*x.shape[:-1], out.shape[-1])
    return inference_only(total, "norm_matmul"), inference_only(out, "norm_matmul")


def norm_matmul_refusal(x: jax.Array, scale: jax.Array, w: jax.Array, gated: bool) -> str | None:
    """Why the Hopper kernel of `norm_matmul` does not take the operands, or None if it does."""
    columns = w.shape[0] // 2 if gated else w.shape[0]
    if columns % 16 or not columns:
        return f"takes a multiple of 16 columns, not {columns}"
    if gated and columns > MOST_GATED:
        return f"takes up to {MOST_GATED} gated columns, a tile a CTA, not {columns}"
    if scale.dtype != x.dtype:
        return f"takes a scale of x's dtype, not {x.dtype} and {scale.dtype}"
    return size_refusal(math.prod(x.shape[:-1]), x.shape[-1], normalised=True)


def matmul_subtrees(
    x: jax.Array, w: jax.Array, leaves: int = 8, *, parts: int | None = None, backend: str | None = None
) -> jax.Array:
    """`tree_matmul` but for its last adds and its rounding, which `join_subtrees` or `norm_matmul` do.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        w: [K, N] of the same dtype.
        leaves: 1, 2, 4 or 8; K must be a multiple of 16 * leaves.
        parts: subtrees that the leaves are cut into, a power of two up to `leaves`; None chooses for the kernel, and is
            one elsewhere. The joined sum does not depend on it.
        backend: `reference` or `mosaic_gpu`, which takes up to 8 rows; None runs the kernel where it takes the sizes,
            and else `tree_matmul` as it chooses, which has its bits.

    Returns:
        float32 [parts, ..., N].

    Raises:
        ValueError: the shapes do not fit, another dtype, or parts or a backend that do not cover them.
    """
    check_floats("matmul_subtrees", x=x, w=w)
    if not x.ndim or w.ndim != 2 or x.shape[-1] != w.shape[0] or x.dtype != w.dtype:
        raise ValueError(
            f"matmul_subtrees takes x [..., K] and w [K, N] of one dtype, not {x.shape} {x.dtype} and "
            f"{w.shape} {w.dtype}"
        )
    check_leaves(w.shape[0], leaves)
    if parts is not None and parts not in [each for each in (1, 2, 4, 8) if each <= leaves]:
        raise ValueError(
            f"parts={parts} does not cut {leaves} leaves evenly; use 1, 2, 4 or 8, up to {leaves}"
        )
    m = math.prod(x.shape[:-1])
    rows = x.reshape(m, x.shape[-1])
    refusal = matmul_subtrees_refusal(x, w, leaves, parts)
    if resolve_row_backend("matmul_subtrees", backend, x.dtype, refusal) == "mosaic_gpu":
        from .mosaic_gpu import matmul_subtrees_mosaic_gpu  # imports the GPU lowering only where it is used

        config = choose_subtree_config(w.shape[1], w.shape[0], leaves, parts, m=m)
        assert config is not None
        out = matmul_subtrees_mosaic_gpu(rows, w, leaves=leaves, config=config)
    else:
        out = matmul_subtrees_by_single_ops(rows, w, leaves=leaves, parts=parts or 1, backend=backend)
    return inference_only(out.reshape(len(out), *x.shape[:-1], w.shape[1]), "matmul_subtrees")


def matmul_subtrees_refusal(
    x: jax.Array, w: jax.Array, leaves: int = 8, parts: int | None = None
) -> str | None:
    """Why the Hopper kernel of `matmul_subtrees` does not take the operands, or None if it does."""
    k, n = w.shape
    m = math.prod(x.shape[:-1])
    refusal = size_refusal(m, k, normalised=False)
    if refusal is None and choose_subtree_config(n, k, leaves, parts, m=m) is None:
        return f"has no tiling for {m} rows, K={k}, N={n}, leaves={leaves} and parts={parts}"
    return refusal
