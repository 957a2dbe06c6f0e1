"""`sample_argmax`: checks its operands and chooses the backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..common.backend import resolve_float32_backend
from ..common.gradient import inference_only
from .plan import kernel_refusal
from .reference import Draw, sample_argmax_reference


def sample_argmax(
    logits: jax.Array,
    row_max: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    *,
    offset: jax.Array | int = 0,
    backend: str | None = None,
) -> Draw:
    """The token of a row, or of a rank's part of it: argmax of (logits - row_max) / temperature + Gumbel noise.

    The noise is a function of (key, position, vocabulary id) alone. Parts of a vocabulary combine exactly: the token of
    the largest `value`, the lowest part's where several are equal. Rows of temperature 0 draw nothing and are not read:
    their value is -inf, their token is `offset`. So are rows of NaN or infinity, whose result means nothing.

    Args:
        logits: float32 [B, V].
        row_max: float32 [B], the largest logit of the whole vocabulary.
        temperature: float32 [B].
        key: uint32 [B, 2], a Threefry key: the seed's high and low word.
        positions: int32 [B], the position that the token will have.
        offset: vocabulary id of the first column, int32.
        backend: "mosaic_gpu" or "reference"; None takes the kernel on Hopper, for the V that it takes.

    Returns:
        Value, token and logit, [B] each.

    Raises:
        ValueError: a shape or dtype is another one, or the named backend does not take V.
    """
    rows = logits.shape[:1]
    expected = {
        "logits": (logits, (*rows, *logits.shape[1:2]), jnp.float32),
        "row_max": (row_max, rows, jnp.float32),
        "temperature": (temperature, rows, jnp.float32),
        "key": (key, (*rows, 2), jnp.uint32),
        "positions": (positions, rows, jnp.int32),
    }
    for name, (value, shape, dtype) in expected.items():
        if value.shape != shape or value.dtype != dtype or logits.ndim != 2:
            raise ValueError(
                f"sample_argmax: {name} is {value.dtype} {value.shape}; with logits {logits.shape} as [B, V] it must "
                f"be {jnp.dtype(dtype)} {shape}"
            )
    backend = resolve_float32_backend("sample_argmax", backend, kernel_refusal(logits.shape[1]))
    if backend == "mosaic_gpu":
        from .mosaic_gpu import sample_argmax_mosaic_gpu  # imports the GPU lowering only where it is used

        run: Callable[..., Any] = sample_argmax_mosaic_gpu
    else:
        run = sample_argmax_reference
    drawn = run(logits, row_max, temperature, key, positions, jnp.asarray(offset, jnp.int32))
    value, logit = (inference_only(x, "sample_argmax") for x in (drawn.value, drawn.logit))
    return drawn._replace(value=value, logit=logit)
