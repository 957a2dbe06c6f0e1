"""The gradient of `rms_norm`, in plain JAX: the order of its adds, and its implementation on every device so far."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..common.rounding import mul, reciprocal_sqrt, round_to
from ..common.token_leaves import check_token_leaves, token_leaf_sums
from ..common.tree import tree_sum


def rms_norm_backward(
    x: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    *,
    eps: float,
    leaves: int,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of `rms_norm` with respect to x and scale.

    The forward's rounding of y counts as the identity. The order is `rms_norm_backward_rows`'s for a row, whose dx
    depends on the row alone, and `token_leaf_sums`' for dscale; the caller joins the leaves, its own and other ranks',
    by the tree.

    Args:
        x: [..., D], the forward's input; bfloat16, float16 or float32.
        scale: [D].
        dy: [..., D], the cotangent of the output; x's dtype or float32.
        eps: the forward's.
        leaves: 1, 2, 4 or 8 equal runs that the tokens (the leading dimensions, row-major) are cut into.
        residual: like x, the cotangent that reaches x past the norm, along the residual stream; None for none.

    Returns:
        dx [..., D] in x's dtype, the norm's gradient plus `residual` rounded once, and dscale float32 [leaves, D].

    Raises:
        ValueError: shapes or dtypes that do not fit, eps is not positive, or tokens do not cut into the leaves.
    """
    _check(x, scale, dy, eps, residual)
    check_token_leaves("rms_norm_backward", math.prod(x.shape[:-1]), leaves)
    dx, dscale = rms_norm_backward_rows(x, scale, dy, eps=eps)
    if residual is not None:
        dx = dx + residual.astype(jnp.float32)
    sums = token_leaf_sums(dscale.reshape(-1, x.shape[-1]), leaves)
    return inference_only(round_to(dx, x.dtype), "rms_norm_backward"), inference_only(
        sums, "rms_norm_backward"
    )


def rms_norm_backward_rows(
    x: jax.Array, scale: jax.Array, dy: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The gradient of each row [..., D] in fp32, before its rounding and before any sum over rows.

    Every product is rounded by itself. `inverse` has the forward's steps; then `n = x * inverse`, `g = dy * scale`,
    `mean = tree_sum(g * n) * fp32(1/D)`, `dx = (g - n * mean) * inverse`, and the row's share of dscale is `dy * n`.

    Returns:
        dx and the shares of dscale, both float32 [..., D].
    """
    d = x.shape[-1]
    wide, cotangent = x.astype(jnp.float32), dy.astype(jnp.float32)
    square = mul(tree_sum(mul(wide, wide)), np.float32(1 / d))
    inverse = reciprocal_sqrt(square + np.float32(eps))[..., None]
    normalised = mul(wide, inverse)
    scaled = mul(cotangent, scale.astype(jnp.float32))
    mean = mul(tree_sum(mul(scaled, normalised)), np.float32(1 / d))
    return mul(scaled - mul(normalised, mean[..., None]), inverse), mul(cotangent, normalised)


def _check(x: jax.Array, scale: jax.Array, dy: jax.Array, eps: float, residual: jax.Array | None) -> None:
    if x.ndim < 1 or scale.shape != x.shape[-1:] or dy.shape != x.shape:
        raise ValueError(
            "rms_norm_backward takes x [..., D], scale [D] and dy [..., D], not shapes "
            f"{x.shape}, {scale.shape} and {dy.shape}"
        )
    check_floats("rms_norm_backward", x=x, scale=scale)
    if dy.dtype not in (x.dtype, jnp.float32):
        raise ValueError(f"rms_norm_backward: dy is {dy.dtype}; it must be {x.dtype}, as x, or float32")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm_backward: residual {residual.shape} {residual.dtype} and x {x.shape} {x.dtype} must be alike"
        )
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
