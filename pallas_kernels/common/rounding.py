"""Floating-point steps whose rounding no compiler pass can move.

XLA's CPU backend contracts `a * b + c` into a fused multiply-add inside a fusion, and its vector and scalar versions of
`exp` and `log` differ in the last bit, so a value could depend on the length of the array it stands in. The functions
here are built from single IEEE operations that stay single.

On a GPU XLA has two code generators, and which one makes a kernel is found out by timing them. They agree on single
operations but for two: the quotient of a number that the compiler knows, and the negative of a zero. So the numerator
is hidden here, and a sign is turned as a bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LN2_HI = np.float32(0.693359375)
LN2_LO = np.float32(-2.12194440e-4)
LOG2_E = np.float32(1.4426950408889634)
EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
LOG_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
SQRT_HALF = np.float32(0.70710678118654752440)
_SPARE_NAN = np.int32(0x7FEDCBA9)  # a NaN that no operation makes


def pin(x: jax.Array) -> jax.Array:
    """Returns fp32 `x` unchanged, as a value that a later add cannot absorb into a fused multiply-add.

    The select is the identity (one NaN becomes the canonical NaN), costs one blend, and stands between the product and
    the add in the generated code. It compares bits: LLVM proves of some products that `x == x` always holds and drops
    the select with the comparison. `tests/pallas_kernels/common/test_rounding.py` watches that it still does its work.
    """
    return jnp.where(lax.bitcast_convert_type(x, jnp.int32) != _SPARE_NAN, x, np.float32(np.nan))


def mul(a: jax.Array, b: jax.Array | np.float32) -> jax.Array:
    """The fp32 product of `a` and `b`, rounded by itself."""
    return pin(a * b)


def div(a: jax.Array, b: jax.Array | np.float32) -> jax.Array:
    """The fp32 quotient of `a` and `b`, which broadcasts to a's shape, rounded once.

    XLA turns a division by a broadcast value into a product with its reciprocal, which rounds twice; the barrier hides
    the broadcast. The select between b and b makes `jax.vmap` of `a` alone broadcast b before the barrier, too, and not
    behind it. And of two quotients in a row, `(a / b) / c`, XLA makes `a / (b * c)`: the quotient is pinned.
    """
    return _quotient(a, lax.optimization_barrier(jnp.where(a == a, b, b)))


def _quotient(a: jax.Array | np.float32, b: jax.Array) -> jax.Array:
    """a / b, a unknown to the compiler: a GPU may take another instruction for the quotient of a constant."""
    known = lax.bitcast_convert_type(b, jnp.int32) != _SPARE_NAN  # else the quotient is a NaN anyway
    return pin(jnp.where(known, a, np.float32(np.nan)) / b)


def neg(x: jax.Array) -> jax.Array:
    """-x of any float dtype, -0.0 of +0.0: a GPU may take it from zero, which is +0.0."""
    integer = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, integer)
    return lax.bitcast_convert_type(bits ^ integer(1 << (8 * x.dtype.itemsize - 1)), x.dtype)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds fp32 `x` to `dtype` once, to nearest even.

    For bfloat16 the rounding is a `reduce_precision`, which XLA never removes; the bare cast would be dropped inside
    fusions wherever `xla_allow_excess_precision` is left on.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def exp(x: jax.Array, *, multiply: Callable[..., jax.Array] = mul) -> jax.Array:
    """e**x of fp32 `x`, within 1 ulp for normal results; the same bits for a value wherever it stands.

    Range reduction by ln 2 in two parts and a degree-6 polynomial (Cephes `expf`), every product rounded alone.

    Args:
        x: float32.
        multiply: the product rounded alone; kernels have another way to it.
    """
    mul = multiply
    clipped = jnp.clip(x, np.float32(-104.0), np.float32(89.0))
    n = jnp.round(mul(clipped, LOG2_E))
    r = clipped - mul(n, LN2_HI)
    r = r - mul(n, LN2_LO)
    p = mul(r, EXP_COEFFICIENTS[0]) + EXP_COEFFICIENTS[1]
    for c in EXP_COEFFICIENTS[2:]:
        p = mul(p, r) + c
    y = mul(mul(p, r), r) + r + np.float32(1)
    n = n.astype(jnp.int32)
    half = (
        n >> 1
    )  # 2**n in two factors, so that n = 128 and subnormal results do not overflow the exponent field
    y = y * _power_of_two(half) * _power_of_two(n - half)
    return jnp.where(x == x, y, x)


def log(x: jax.Array) -> jax.Array:
    """Natural logarithm of fp32 `x` within 1 ulp (Cephes `logf`); -inf at 0, NaN below, the same bits everywhere."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - 126
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F000000, jnp.float32)  # in [0.5, 1)
    small = mantissa < SQRT_HALF
    e = jnp.where(small, exponent - 1, exponent).astype(jnp.float32)
    z = jnp.where(small, mantissa + mantissa, mantissa) - np.float32(1)
    zz = mul(z, z)
    p = jnp.full_like(z, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        p = mul(p, z) + c
    y = mul(mul(p, z), zz)
    y = y + mul(e, LN2_LO)
    y = y - mul(zz, np.float32(0.5))
    y = z + y + mul(e, LN2_HI)
    y = jnp.where(x == np.float32(np.inf), x, y)
    y = jnp.where(
        x < np.finfo(np.float32).tiny, np.float32(-np.inf), y
    )  # zero and subnormals, which XLA flushes
    return jnp.where((x < 0) | (x != x), np.float32(np.nan), y)


def reciprocal_sqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) of fp32 `x` as two steps; a fused `rsqrt` may be another approximation."""
    return _quotient(np.float32(1), pin(jnp.sqrt(x)))


def _power_of_two(n: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((n + 127) << 23, jnp.float32)
