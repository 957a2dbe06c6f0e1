"""`rope` and its tables."""

import jax
import numpy as np

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import rope_reference


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for positions 0 .. length - 1.

    Made on the host, so that they are data: no device's `cos` enters the bits. The angle is the fp32 product of
    position and inverse frequency, as in Hugging Face's Qwen3; its cosine is taken in float64 and rounded to fp32.

    Args:
        length: number of positions.
        head_dim: H, even.
        theta: base of the frequencies, `rope_theta` of the model's config.

    Returns:
        (cos, sin), each float32 [length, H/2].

    Raises:
        ValueError: length < 1, head_dim odd or theta not positive.
    """
    if length < 1 or head_dim < 2 or head_dim % 2 or not theta > 0:
        raise ValueError(
            f"rope needs length >= 1, an even head_dim and theta > 0, not {length}, {head_dim}, {theta}"
        )
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse_frequency = (1.0 / np.power(np.float64(theta), exponent.astype(np.float64))).astype(np.float32)
    angle = (np.arange(length, dtype=np.float32)[:, None] * inverse_frequency[None, :]).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of each head.

    Args:
        x: [..., heads, H], bfloat16, float16 or float32.
        cos: float32 [..., H/2], the rows of `rope_tables` at x's positions.
        sin: float32 [..., H/2].

    Returns:
        Like x, rounded once.

    Raises:
        ValueError: the shapes do not fit, or another dtype.
    """
    expected = (*x.shape[:-2], x.shape[-1] // 2)
    if x.ndim < 2 or x.shape[-1] % 2 or cos.shape != expected or sin.shape != expected:
        raise ValueError(f"rope of x {x.shape} takes cos and sin {expected}, not {cos.shape} and {sin.shape}")
    check_floats("rope", x=x)
    if cos.dtype != np.float32 or sin.dtype != np.float32:
        raise ValueError(f"rope takes float32 cos and sin, not {cos.dtype} and {sin.dtype}")
    return inference_only(rope_reference(x, cos, sin), "rope")
