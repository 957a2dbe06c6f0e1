"""The gradient of `swiglu`, in plain JAX: elementwise, every step rounded alone."""

import jax
import jax.numpy as jnp
import numpy as np

from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..common.rounding import exp, mul, round_to


def swiglu_backward(gate: jax.Array, up: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient of `swiglu` with respect to gate and up; an element's bits depend on that element alone.

    The roundings of the forward (of gate and up before it, of its result) count as the identity. In fp32, every step
    rounded by itself, with `t = exp(-|gate|)`: `s = 1 / (1 + t)` and `r = t / (1 + t)`, exchanged where gate < 0, are
    the sigmoid and its complement, neither of which cancels; `dgate = (dy * up) * (s * (1 + gate * r))` and
    `dup = dy * (gate * s)`.

    Args:
        gate: [...], as the forward took it: bfloat16, float16 or float32.
        up: like gate.
        dy: [...], the cotangent of the result; gate's dtype or float32.

    Returns:
        dgate and dup, like gate, each rounded once.

    Raises:
        ValueError: shapes or dtypes do not fit, or another dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} must be alike")
    check_floats("swiglu_backward", gate=gate)
    if dy.shape != gate.shape or dy.dtype not in (gate.dtype, jnp.float32):
        raise ValueError(
            f"swiglu_backward of gate {gate.shape} {gate.dtype} takes dy of its shape and of its dtype or float32, "
            f"not {dy.shape} {dy.dtype}"
        )
    g, u, cotangent = (x.astype(jnp.float32) for x in (gate, up, dy))
    t = exp(-jnp.abs(g))
    negative = g < 0
    sigmoid = jnp.where(negative, t, np.float32(1)) / (np.float32(1) + t)
    complement = jnp.where(negative, np.float32(1), t) / (np.float32(1) + t)
    slope = mul(sigmoid, np.float32(1) + mul(g, complement))
    dgate = round_to(mul(mul(cotangent, u), slope), gate.dtype)
    dup = round_to(mul(cotangent, mul(g, sigmoid)), gate.dtype)
    return inference_only(dgate, "swiglu_backward"), inference_only(dup, "swiglu_backward")
