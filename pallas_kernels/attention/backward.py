"""Attention for training: `attention_with_lse`, and `attention_backward`, whose sums have one fixed order."""

import jax
import jax.numpy as jnp

from ..common.backend import require_hopper, resolve_backend
from ..common.gradient import inference_only
from .api import attention_backend, check_attention, pad_cache
from .backward_reference import attention_backward_reference
from .plan import AttentionPlan
from .reference import attention_with_lse_reference

__all__ = ["attention_backward", "attention_with_lse"]


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention`, bit for bit, and the log-sum-exp of each query's scaled scores.

    Args:
        q: [B, T, N, H], bfloat16, float16 or float32.
        k: [B, S, K, H] of the same dtype, key s at absolute position s; N is a multiple of K.
        v: like k.
        positions: int32 [B, T], as `attention` takes them.
        scale: multiplies the scores; H**-0.5 by default.
        plan: block and split sizes; the default of `AttentionPlan`.
        backend: "reference" or "mosaic_gpu"; None chooses as `attention` does.

    Returns:
        The output, [B, T, N, H] in q's dtype, and float32 [B, T, N]: maximum + log(total) of the online softmax.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run here or does not cover them.
    """
    check_attention(q, k, v, positions)
    plan = AttentionPlan() if plan is None else plan
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _resolve("attention_with_lse", backend, q, k) == "mosaic_gpu":
        from .mosaic_gpu import attention_mosaic_gpu  # imports the GPU lowering only where it is used

        k, v = pad_cache(k, v, max(plan.block - k.shape[1], -k.shape[1] % 8))
        out, lse = attention_mosaic_gpu(q, k, v, positions, plan=plan, scale=scale, with_lse=True)
    else:
        k, v = pad_cache(k, v, -k.shape[1] % plan.block)
        out, lse = attention_with_lse_reference(q, k, v, positions, plan=plan, scale=scale)
    return inference_only(out, "attention_with_lse"), inference_only(lse, "attention_with_lse")


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of causal attention over whole sequences, whose bits depend on the batch row and KV head alone.

    Not on the number of rows, the other rows, which KV heads stand beside one, or what follows a sequence, as long as
    `dout` is 0 and everything finite there. There are no atomic adds: every sum has one order.

    Args:
        q: [B, T, N, H], bfloat16, float16 or float32; query t at position t.
        k: [B, T, K, H] of the same dtype; N is a multiple of K.
        v: like k.
        out: like q, what `attention_with_lse` returned for positions 0 .. T - 1.
        lse: float32 [B, T, N], what it returned beside.
        dout: like q, the gradient of `out`.
        scale: what multiplied the scores; H**-0.5 by default.
        backend: "reference" or "mosaic_gpu" (Hopper; bfloat16 and float16, H 64 or 128); None chooses as `attention`
            does.

    Returns:
        The gradients of q, k and v, each in its shape and dtype, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run here or does not cover them.
    """
    _check_backward(q, k, v, out, lse, dout)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _resolve("attention_backward", backend, q, k) == "mosaic_gpu":
        from .backward_mosaic_gpu import attention_backward_mosaic_gpu

        gradients = attention_backward_mosaic_gpu(q, k, v, out, lse, dout, scale=scale)
    else:
        gradients = attention_backward_reference(q, k, v, out, lse, dout, scale=scale)
    dq, dk, dv = (inference_only(gradient, "attention_backward") for gradient in gradients)
    return dq, dk, dv


def _resolve(op: str, backend: str | None, q: jax.Array, k: jax.Array) -> str:
    if backend is None:
        chosen = resolve_backend(None, q.dtype)
        return attention_backend(chosen, head_dim=q.shape[3], group=q.shape[2] // k.shape[2])
    backend = resolve_backend(backend, q.dtype)
    if backend == "triton":
        raise ValueError(f"{op} has no backend 'triton'; use 'reference', or None to choose")
    if backend == "mosaic_gpu":
        require_hopper(op)
    return backend


def _check_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array
) -> None:
    if not q.shape == out.shape == dout.shape or q.ndim != 4 or k.ndim != 4 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention_backward takes q, out and dout [B, T, N, H] and k and v [B, T, K, H] of whole sequences, not "
            f"shapes {q.shape}, {out.shape}, {dout.shape}, {k.shape} and {v.shape}"
        )
    if lse.shape != q.shape[:3] or lse.dtype != jnp.float32:
        raise ValueError(
            f"attention_backward takes lse float32 {q.shape[:3]}, as attention_with_lse returns it, not {lse.dtype} "
            f"{lse.shape}"
        )
    if not q.dtype == out.dtype == dout.dtype:
        raise ValueError(f"q, out and dout must have one dtype, not {q.dtype}, {out.dtype} and {dout.dtype}")
    check_attention(q, k, v, jnp.zeros(q.shape[:2], jnp.int32))
