"""Elementary functions of float32 from steps that are rounded by themselves, as `exp` and `log` are.

XLA's own are polynomials of multiply-adds that its CPU backend contracts, and not the same way at every place of an
array: with what else is fused, a batch's last elements could differ. Errors against float64 stand with each function.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..pallas_kernels.common.rounding import div, exp, log, mul, pin

# Cephes' tanhf and ndtrf, the highest power first.
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF = (
    7.853861353153693e-5,
    -8.010193625184903e-4,
    5.188327685732524e-3,
    -2.685381193529856e-2,
    1.128358514861418e-1,
    -3.761262582423300e-1,
    1.128379165726710,
)
_ERFC_FROM_2 = (
    -1.047766399936249e1,
    1.297719955372516e1,
    -7.495518717768503,
    2.921019019210786,
    -1.015265279202700,
    4.218463358204948e-1,
    -2.820767439740514e-1,
    5.641895067754075e-1,
)
_ERFC_TO_2 = (
    2.326819970068386e-2,
    -1.387039388740657e-1,
    3.687424674597105e-1,
    -5.824733027278666e-1,
    6.210004621745983e-1,
    -4.944515323274145e-1,
    3.404879937665872e-1,
    -2.741127028184656e-1,
    5.638259427386472e-1,
)
_ONE, _TWO = np.float32(1), np.float32(2)
_PER_LN_2 = np.float32(1 / np.log(2))
_LN_2 = np.float32(np.log(2))
_NOTHING = np.float32(30)  # whose erfc is 0
_LARGE = np.float32(1e9)  # from which on x * x + 1 is x * x


def tanh(x: jax.Array) -> jax.Array:
    """Within 2 ulp."""
    size, square = jnp.abs(x), mul(x, x)
    near = mul(mul(_polynomial(_TANH, square), square), x) + x
    far = _ONE - div(jnp.full_like(x, 2), exp(size + size) + _ONE)
    return _with_sign(jnp.where(size < np.float32(0.625), near, far), x)


def log1p(x: jax.Array) -> jax.Array:
    """Within 3 ulp; -inf at -1, NaN below."""
    whole = pin(_ONE + x)
    added = whole - _ONE  # what of x has entered
    out = mul(log(whole), div(x, jnp.where(added == 0, _ONE, added)))
    return jnp.where((whole == _ONE) | (x == np.inf), x, out)


def log2(x: jax.Array) -> jax.Array:
    """Within 3 ulp."""
    return mul(log(x), _PER_LN_2)


def expm1(x: jax.Array) -> jax.Array:
    """Within 3 ulp."""
    whole = exp(x)
    added = pin(whole - _ONE)
    exponent = log(whole)  # what of x has entered
    out = mul(added, div(x, jnp.where((exponent == 0) | (exponent == np.inf), _ONE, exponent)))
    out = jnp.where(added == -_ONE, -_ONE, jnp.where(whole == np.inf, np.float32(np.inf), out))
    return jnp.where(whole == _ONE, x, out)


def asinh(x: jax.Array) -> jax.Array:
    """Within 4 ulp."""
    size = jnp.abs(x)
    bounded = jnp.minimum(size, _LARGE)
    square = mul(bounded, bounded)
    near = log1p(bounded + div(square, _ONE + pin(jnp.sqrt(square + _ONE))))
    return _with_sign(jnp.where(size < _LARGE, near, log(size) + _LN_2), x)


def acosh(x: jax.Array) -> jax.Array:
    """Within 4 ulp; NaN below 1."""
    bounded = jnp.clip(x, _ONE, _LARGE) - _ONE
    near = log1p(bounded + pin(jnp.sqrt(mul(bounded, bounded + _TWO))))
    return jnp.where(x >= _ONE, jnp.where(x < _LARGE, near, log(x) + _LN_2), np.float32(np.nan))


def atanh(x: jax.Array) -> jax.Array:
    """Within 4 ulp; infinite at -1 and 1, NaN beyond."""
    size = jnp.abs(x)
    return _with_sign(mul(log1p(div(size + size, _ONE - size)), np.float32(0.5)), x)


def erf(x: jax.Array) -> jax.Array:
    """Within 3 ulp."""
    return jnp.where(jnp.abs(x) < _ONE, _erf_near(x), _with_sign(_ONE - _erfc_far(jnp.abs(x)), x))


def erfc(x: jax.Array) -> jax.Array:
    """Within 11 ulp."""
    far = _erfc_far(jnp.abs(x))
    return jnp.where(jnp.abs(x) < _ONE, _ONE - _erf_near(x), jnp.where(x < 0, _TWO - far, far))


def _erf_near(x: jax.Array) -> jax.Array:
    return mul(x, _polynomial(_ERF, mul(x, x)))


def _erfc_far(size: jax.Array) -> jax.Array:
    """From 1 on."""
    size = jnp.where(size < _ONE, _ONE, jnp.where(size > _NOTHING, _NOTHING, size))  # a NaN stays
    inverse = div(jnp.ones_like(size), size)
    square = mul(inverse, inverse)
    tail = jnp.where(size < _TWO, _polynomial(_ERFC_TO_2, square), _polynomial(_ERFC_FROM_2, square))
    # exp(-size * size): twelve bits of the size have an exact square, the others a small product.
    bits = lax.bitcast_convert_type(size, np.int32)
    short = lax.bitcast_convert_type(bits & np.int32(-(1 << 12)), np.float32)
    rest = mul(short - size, short + size)
    return mul(mul(mul(exp(-mul(short, short)), exp(rest)), inverse), tail)


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    out = jnp.full_like(x, coefficients[0])
    for each in coefficients[1:]:
        out = mul(out, x) + np.float32(each)
    return out


def _with_sign(size: jax.Array, x: jax.Array) -> jax.Array:
    """`size` with the sign of x, of zeros too."""
    return jnp.copysign(size, x)
