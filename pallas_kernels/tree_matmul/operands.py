"""What the GPU kernels multiply: one check for all of them."""

from typing import Any

import jax
import jax.numpy as jnp

from .plan import check_leaves

_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_FLOAT32 = jnp.dtype(jnp.float32)


def check_batch(x: jax.Array, w: jax.Array) -> int | None:
    """Returns B of x [B, M, K] and w [B, ...], None for matrices, or says what is not covered."""
    if x.ndim == w.ndim == 2:
        return None
    if not (x.ndim == w.ndim == 3 and x.shape[0] == w.shape[0] >= 1):
        raise ValueError(
            f"x {x.shape} and w {w.shape} must be two matrices, or as many of each, one at least, along a first "
            "dimension"
        )
    return x.shape[0]


def check_operands(
    x: jax.Array | jax.ShapeDtypeStruct,
    w: jax.Array | jax.ShapeDtypeStruct,
    leaves: int,
    out_dtype: Any,
    transpose_rhs: bool,
) -> tuple[int, int, int]:
    """Returns (m, n, k), or says what is not covered."""
    stored = "[N, K]" if transpose_rhs else "[K, N]"
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError(f"x {x.shape} and w {w.shape} must be matrices [M, K] and {stored}")
    (m, k), (n, w_k) = x.shape, w.shape if transpose_rhs else w.shape[::-1]
    if k != w_k:
        raise ValueError(f"x has K={k} and w {stored} has K={w_k} (shapes {x.shape} and {w.shape})")
    if x.dtype != w.dtype or x.dtype not in _HALF:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; both must be bfloat16, or both float16")
    if out_dtype not in (*_HALF, _FLOAT32):
        raise ValueError(f"out_dtype={out_dtype} is not supported; use bfloat16, float16 or float32")
    check_leaves(k, leaves)
    if m < 1 or n < 16 or n % 16:
        rounded = max(16, -(-n // 16) * 16)
        raise ValueError(f"m={m} must be at least 1 and n={n} a multiple of 16; pad w to {rounded} columns")
    return m, n, k
