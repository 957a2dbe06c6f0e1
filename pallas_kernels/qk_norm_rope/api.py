"""`qk_norm_rope`: checks its operands and chooses a backend."""

import jax
import jax.numpy as jnp

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import qk_norm_rope_reference

HEAD_DIMS = (32, 64, 128, 256)  # that the kernel takes


def qk_norm_rope(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the qkv product to attention: RMSNorm and RoPE of queries and keys, keys and values into the cache.

    A head's bits depend on the head, its scale and its position alone.

    Args:
        qkv: [B, T, K, g + 2, H], bfloat16, float16 or float32: per KV head its g query heads, its key, its value.
        q_scale: [H], of qkv's dtype; of the norm of queries.
        k_scale: [H], of qkv's dtype; of the norm of keys.
        cos: float32 [S', H/2], from `rope_tables`, for every position.
        sin: float32 [S', H/2].
        positions: int32 [B, T], absolute and consecutive in a row; the last is below S and S'.
        lengths: int32 [B]; zeros are written for positions from a row's length on.
        k_cache: [B, S, K, H] of qkv's dtype; entry s is position s.
        v_cache: like k_cache.
        eps: of the norms.
        backend: `reference` or `mosaic_gpu`, which has the bits that the reference has on a CPU (on a GPU XLA's
            division and square root are not always the nearest number) and writes the caches in place where they are
            given up; None chooses by device, dtype and H.

    Returns:
        Queries [B, T, K * g, H], and the caches with the keys and values of these positions.

    Raises:
        ValueError: shapes or dtypes that do not fit, eps is not positive, or the backend does not cover them.
    """
    _check(qkv, q_scale, k_scale, cos, sin, positions, lengths, k_cache, v_cache, eps)
    operands = (qkv, q_scale, k_scale, cos, sin, positions, lengths, k_cache, v_cache)
    resolved = resolve_row_backend("qk_norm_rope", backend, qkv.dtype, kernel_refusal(qkv.shape[-1]))
    if resolved == "mosaic_gpu":
        from .mosaic_gpu import qk_norm_rope_mosaic_gpu  # imports the GPU lowering only where it is used

        outs = qk_norm_rope_mosaic_gpu(*operands, eps=eps)
    else:
        outs = qk_norm_rope_reference(*operands, eps=eps)
    q, k_cache, v_cache = (inference_only(out, "qk_norm_rope") for out in outs)
    return q, k_cache, v_cache


def kernel_refusal(head_dim: int) -> str | None:
    """Why the Hopper kernel does not take heads of `head_dim`, or None if it does."""
    return None if head_dim in HEAD_DIMS else f"takes head_dim 32, 64, 128 or 256, not {head_dim}"


def _check(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    eps: float,
) -> None:
    if qkv.ndim != 5 or qkv.shape[3] < 3 or qkv.shape[4] % 2 or not qkv.size:
        raise ValueError(
            f"qk_norm_rope takes qkv [B, T, K, g + 2, H] with g >= 1 and even H, not {qkv.shape}"
        )
    b, t, kv_heads, _, h = qkv.shape
    expected = {
        "q_scale": (q_scale, (h,), qkv.dtype),
        "k_scale": (k_scale, (h,), qkv.dtype),
        "cos": (cos, (*cos.shape[:1], h // 2), jnp.float32),
        "sin": (sin, cos.shape, jnp.float32),
        "positions": (positions, (b, t), jnp.int32),
        "lengths": (lengths, (b,), jnp.int32),
        "k_cache": (k_cache, (b, *k_cache.shape[1:2], kv_heads, h), qkv.dtype),
        "v_cache": (v_cache, k_cache.shape, qkv.dtype),
    }
    for name, (operand, shape, dtype) in expected.items():
        if operand.shape != shape or operand.dtype != dtype:
            raise ValueError(
                f"qk_norm_rope of qkv {qkv.shape} {qkv.dtype} takes {name} {shape} {jnp.dtype(dtype)}, not "
                f"{operand.shape} {operand.dtype}"
            )
    check_floats("qk_norm_rope", qkv=qkv)
    if t > k_cache.shape[1] or t > cos.shape[0]:
        raise ValueError(
            f"qk_norm_rope: {t} positions do not fit a cache of {k_cache.shape[1]} and tables of {cos.shape[0]}"
        )
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
