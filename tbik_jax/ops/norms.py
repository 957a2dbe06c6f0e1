"""`rms_norm` and `layer_norm` with gradients: one order a row length, and one a number of rows for their parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.common.dtypes import check_floats
from . import steps


def rms_norm(x: jax.Array, scale: jax.Array | None = None, *, eps: float = 1e-6) -> jax.Array:
    """RMSNorm over the last axis; a row's bits depend on the row and the scale alone.

    The steps, and on the CPU the bits, of `pallas_kernels.rms_norm`:
    `inv = 1 / sqrt(tree_sum(x * x) * fp32(1/D) + eps)`, `(x * inv) * scale`, rounded once.

    The gradient of the scale is the sum over all rows, as one row in row-major order, by `tree_sum`.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        scale: [D], or None for ones.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an eps that is not positive.
    """
    return _rms_norm(_checked("rms_norm", eps, x, scale=scale), scale, float(eps))


@functools.partial(jax.jit, static_argnums=(2,))  # in one compiled program where it is called outside of jit
def _rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    wide, last = steps.widen(x), (x.ndim - 1,)
    mean = steps.scale(steps.total(steps.mul(wide, wide), last), 1 / x.shape[-1])
    inverse = steps.reciprocal_sqrt(mean + np.float32(eps))
    out = steps.mul(wide, steps.spread(inverse, x.shape, last))
    return steps.narrow(_scaled(out, scale), x.dtype.name)


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, *, eps: float = 1e-6
) -> jax.Array:
    """LayerNorm over the last axis; a row's bits depend on the row, the scale and the bias alone.

    In fp32: `mean = tree_sum(x) / D`, `c = x - mean`, `var = tree_sum(c * c) / D`, `inv = 1 / sqrt(var + eps)`,
    `(c * inv) * scale + bias`, each product and quotient rounded by itself; rounded to x's dtype once.

    The gradients of scale and bias are sums over all rows, as one row in row-major order, by `tree_sum`.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        scale: [D], or None for ones.
        bias: [D], or None for zeros.
        eps: added to the variance.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an eps that is not positive.
    """
    return _layer_norm(_checked("layer_norm", eps, x, scale=scale, bias=bias), scale, bias, float(eps))


@functools.partial(jax.jit, static_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    wide, last = steps.widen(x), (x.ndim - 1,)
    count = jnp.full(x.shape[:-1], x.shape[-1], jnp.float32)
    centred = wide - steps.spread(steps.div(steps.total(wide, last), count), x.shape, last)
    variance = steps.div(steps.total(steps.mul(centred, centred), last), count)
    inverse = steps.reciprocal_sqrt(variance + np.float32(eps))
    out = _scaled(steps.mul(centred, steps.spread(inverse, x.shape, last)), scale)
    if bias is not None:
        out = out + steps.expand(steps.widen(jnp.asarray(bias)), x.shape)
    return steps.narrow(out, x.dtype.name)


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return x if scale is None else steps.mul(x, steps.expand(steps.widen(jnp.asarray(scale)), x.shape))


def _checked(op: str, eps: float, x: jax.Array, **rows: jax.Array | None) -> jax.Array:
    x = jnp.asarray(x)
    given = {name: jnp.asarray(row) for name, row in rows.items() if row is not None}
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"{op} takes x [..., D] with D of 1 or more, not shape {x.shape}")
    for name, row in given.items():
        if row.shape != x.shape[-1:]:
            raise ValueError(f"{op} of x {x.shape} takes {name} [{x.shape[-1]}], not shape {row.shape}")
    check_floats(op, x=x, **given)
    if not eps > 0:
        raise ValueError(f"{op}: eps={eps} must be positive")
    return x
