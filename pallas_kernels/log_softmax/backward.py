"""The gradient of a token's log-probability with respect to the logits, in plain JAX: elementwise."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..common.dtypes import FLOATS
from ..common.gradient import inference_only
from ..common.rounding import exp, mul, round_to


def token_logprob_backward(
    logits: jax.Array,
    targets: jax.Array,
    row_max: jax.Array,
    log_total: jax.Array,
    ct: jax.Array,
    *,
    offset: jax.Array | int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The gradient of `(logits[target] - row_max) - log_total`, the target's log-probability, with respect to logits.

    `p = exp((logit - row_max) - log_total)`, in the forward's steps; `ct * (hot - p)` with hot 1 at the target and 0
    elsewhere: fp32, every step rounded by itself. Nothing is added up, so neither the cut of the vocabulary nor the
    number of rows enters an element's bits.

    Args:
        logits: float32 [..., V'], the part of the vocabulary from `offset` on.
        targets: integer [...], ids of the whole vocabulary; a target outside of this part is hot nowhere in it.
        row_max: float32 [...], the largest logit of the whole row.
        log_total: float32 [...], the logarithm of the sum of exp(logit - row_max) over the whole row.
        ct: float32 [...], the cotangent of the log-probability; zero gives a row of zeros.
        offset: the id of the first logit.
        out_dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [..., V'] in `out_dtype`, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    out_dtype = jnp.dtype(out_dtype)
    rows = {"row_max": row_max, "log_total": log_total, "ct": ct}
    if logits.ndim < 1 or logits.dtype != jnp.float32:
        raise ValueError(
            f"token_logprob_backward takes float32 logits [..., V], not {logits.dtype} {logits.shape}"
        )
    for name, row in rows.items():
        if row.shape != logits.shape[:-1] or row.dtype != jnp.float32:
            raise ValueError(
                f"token_logprob_backward of logits {logits.shape} takes float32 {name} {logits.shape[:-1]}, not "
                f"{row.dtype} {row.shape}"
            )
    if targets.shape != logits.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"token_logprob_backward of logits {logits.shape} takes integer targets {logits.shape[:-1]}, not "
            f"{targets.dtype} {targets.shape}"
        )
    if out_dtype.name not in FLOATS:
        raise ValueError(f"out_dtype={out_dtype} is not supported; use one of {', '.join(FLOATS)}")
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + offset
    hot = jnp.where(ids == targets.astype(jnp.int32)[..., None], np.float32(1), np.float32(0))
    p = exp((logits - row_max[..., None]) - log_total[..., None])
    return inference_only(round_to(mul(hot - p, ct[..., None]), out_dtype), "token_logprob_backward")
