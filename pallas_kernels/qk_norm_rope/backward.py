"""The gradient of `qk_norm_rope`, in plain JAX: the order of its adds; what runs on every device so far."""

import jax
import jax.numpy as jnp

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..common.rounding import mul, round_to
from ..common.token_leaves import check_token_leaves, token_leaf_sums
from ..common.tree import tree_sum
from ..rms_norm.backward import rms_norm_backward_rows


def qk_norm_rope_backward(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    dq: jax.Array,
    dk: jax.Array,
    dv: jax.Array,
    *,
    eps: float,
    leaves: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of `qk_norm_rope`, whose keys and values are those of these tokens, with respect to qkv and scales.

    The forward's two roundings (after the norm and after RoPE) count as the identity: from dq and dk to dqkv all is
    fp32. A head goes through `rope_backward_reference`, then `rms_norm_backward_rows`, and its bits depend on that head
    alone; dv is copied. A scale's gradient: the g query heads of a KV head meet first, token by token, in `tree_sum`'s
    order; then the tokens of a leaf, in `token_leaf_sums`'. The caller joins the leaves by the tree and then the KV
    heads, which tp cuts. Padding tokens need zero cotangents and finite qkv.

    Args:
        qkv: [B, T, K, g + 2, H], the forward's; bfloat16, float16 or float32.
        q_scale: [H], of qkv's dtype.
        k_scale: [H], of qkv's dtype.
        cos: float32 [S, H/2], from `rope_tables`.
        sin: float32 [S, H/2].
        positions: int32 [B, T], below S.
        dq: [B, T, K * g, H], the cotangent of the queries; qkv's dtype or float32.
        dk: [B, T, K, H], of the keys of these tokens; qkv's dtype or float32.
        dv: [B, T, K, H], of their values; qkv's dtype or float32.
        eps: the forward's.
        leaves: 1, 2, 4 or 8 equal runs that the B * T tokens (row-major) are cut into.

    Returns:
        dqkv like qkv, rounded once, and the gradients of q_scale and k_scale, float32 [leaves, K, H].

    Raises:
        ValueError: shapes or dtypes that do not fit, eps is not positive, or tokens do not cut into the leaves.
    """
    _check(qkv, q_scale, k_scale, cos, sin, positions, dq, dk, dv, eps)
    b, t, kv_heads, group, h = qkv.shape
    check_token_leaves("qk_norm_rope_backward", b * t, leaves)
    cos, sin = cos[positions], sin[positions]
    dq = rope_backward_reference(dq, cos, sin).reshape(b, t, kv_heads, group - 2, h)
    dk = rope_backward_reference(dk, cos, sin)
    dq, q_shares = rms_norm_backward_rows(qkv[..., :-2, :], q_scale, dq, eps=eps)
    dk, k_shares = rms_norm_backward_rows(qkv[..., -2, :], k_scale, dk, eps=eps)
    wide = jnp.concatenate([dq, dk[..., None, :], dv.astype(jnp.float32)[..., None, :]], axis=-2)
    q_shares = tree_sum(jnp.moveaxis(q_shares, 3, -1))  # over the heads of a group
    dq_scale, dk_scale = (
        token_leaf_sums(shares.reshape(b * t, kv_heads, h), leaves) for shares in (q_shares, k_shares)
    )
    dqkv, dq_scale, dk_scale = (
        inference_only(out, "qk_norm_rope_backward")
        for out in (round_to(wide, qkv.dtype), dq_scale, dk_scale)
    )
    return dqkv, dq_scale, dk_scale


def rope_backward_reference(dy: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dy [..., heads, H] back by cos, sin [..., H/2] (fp32), and leaves it in fp32.

    `first * cos + second * sin` and `second * cos - first * sin`, each product rounded, then the sum.
    """
    half = dy.shape[-1] // 2
    first, second = dy[..., :half].astype(jnp.float32), dy[..., half:].astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [mul(first, cos) + mul(second, sin), mul(second, cos) - mul(first, sin)]
    return jnp.concatenate(rotated, axis=-1)


def _check(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    dq: jax.Array,
    dk: jax.Array,
    dv: jax.Array,
    eps: float,
) -> None:
    op = "qk_norm_rope_backward"
    if qkv.ndim != 5 or qkv.shape[3] < 3 or qkv.shape[4] % 2 or not qkv.size:
        raise ValueError(f"{op} takes qkv [B, T, K, g + 2, H] with g >= 1 and even H, not {qkv.shape}")
    check_floats(op, qkv=qkv)
    b, t, kv_heads, group, h = qkv.shape
    cotangents = (qkv.dtype, jnp.dtype(jnp.float32))
    expected = {
        "q_scale": (q_scale, (h,), (qkv.dtype,)),
        "k_scale": (k_scale, (h,), (qkv.dtype,)),
        "cos": (cos, (*cos.shape[:1], h // 2), (jnp.dtype(jnp.float32),)),
        "sin": (sin, cos.shape, (jnp.dtype(jnp.float32),)),
        "positions": (positions, (b, t), (jnp.dtype(jnp.int32),)),
        "dq": (dq, (b, t, kv_heads * (group - 2), h), cotangents),
        "dk": (dk, (b, t, kv_heads, h), cotangents),
        "dv": (dv, (b, t, kv_heads, h), cotangents),
    }
    for name, (operand, shape, dtypes) in expected.items():
        if operand.shape != shape or operand.dtype not in dtypes:
            names = " or ".join(dict.fromkeys(map(str, dtypes)))
            raise ValueError(
                f"{op} of qkv {qkv.shape} {qkv.dtype} takes {name} {shape} {names}, "
                f"not {operand.shape} {operand.dtype}"
            )
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
