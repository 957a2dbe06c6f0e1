"""`swiglu` and `swiglu_joint`: check their operands and choose a backend."""

import math

import jax

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from .reference import swiglu_reference


def swiglu(gate: jax.Array, up: jax.Array, *, backend: str | None = None) -> jax.Array:
    """silu(gate) * up, elementwise.

    Args:
        gate: [...], bfloat16, float16 or float32.
        up: like gate.
        backend: `reference` or `mosaic_gpu`, whose exponential is another; None chooses by device.

    Returns:
        Like gate, rounded once.

    Raises:
        ValueError: shapes or dtypes differ, another dtype, or the backend does not cover them.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} must be alike")
    check_floats("swiglu", gate=gate)
    if _takes_kernel(gate, gate.shape[-1:], backend):
        from .mosaic_gpu import swiglu_mosaic_gpu  # imports the GPU lowering only where it is used

        rows = (-1, gate.shape[-1])
        out = swiglu_mosaic_gpu(gate.reshape(rows), up.reshape(rows)).reshape(gate.shape)
    else:
        out = swiglu_reference(gate, up)
    return inference_only(out, "swiglu")


def swiglu_joint(gate_up: jax.Array, *, backend: str | None = None) -> jax.Array:
    """`swiglu` of the two halves of rows, as one matmul leaves them: nothing is copied apart.

    Args:
        gate_up: [..., 2F], the gates first; bfloat16, float16 or float32.
        backend: as in `swiglu`.

    Returns:
        [..., F] in gate_up's dtype, rounded once.

    Raises:
        ValueError: an odd last dimension, another dtype, or the backend does not cover them.
    """
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_joint takes [..., 2F], gates first, not shape {gate_up.shape}")
    check_floats("swiglu_joint", gate_up=gate_up)
    f = gate_up.shape[-1] // 2
    if _takes_kernel(gate_up, (f,), backend):
        from .mosaic_gpu import swiglu_mosaic_gpu

        out = swiglu_mosaic_gpu(gate_up.reshape(-1, 2 * f)).reshape(*gate_up.shape[:-1], f)
    else:
        out = swiglu_reference(gate_up[..., :f], gate_up[..., f:])
    return inference_only(out, "swiglu")


def _takes_kernel(x: jax.Array, width: tuple[int, ...], backend: str | None) -> bool:
    refusal = None
    if not width or width[0] % 16:
        refusal = f"takes gate and up [..., F] with F a multiple of 16, not F={width} of shape {x.shape}"
    return resolve_row_backend("swiglu", backend, x.dtype, refusal) == "mosaic_gpu" and math.prod(x.shape) > 0
