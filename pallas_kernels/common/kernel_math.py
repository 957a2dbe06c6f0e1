"""`exp` and `log` for the inside of a Mosaic GPU kernel, with the bits of `rounding.exp` and `rounding.log`.

Mosaic GPU marks every float multiply and add as one that may be contracted, so LLVM makes `a * b + c` one fused
multiply-add, which rounds once where the reference rounds twice. `KernelMath.mul` is PTX's `mul.rn.f32`, which neither
LLVM nor ptxas contracts. Products that are exact are written `a * b`: contracted or not, they have the same bits.

Values are warpgroup vectors of `LANES` elements, one a thread. A kernel reads rows of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import rounding

LANES = 128
_MAGIC = np.float32(
    1.5 * 2.0**23
)  # adding it leaves the nearest integer, ties to even, in the low mantissa bits
_MAGIC_BITS = np.int32(0x4B400000)


#: The layout of every vector: element i in thread i.
LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def vector(value: Any, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """A number as a vector [LANES]."""
    return plgpu.layout_cast(jnp.full((LANES,), value, dtype), LAYOUT)


@functools.cache
def _instruction(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A PTX instruction of two operands, which no compiler pass takes apart or joins with another."""
    from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, LAYOUT),
        return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=LAYOUT),
    )
    def run(_: object, a: FragmentedArray, b: FragmentedArray) -> FragmentedArray:
        return a._pointwise(FragmentedArray._lift_fast_instr(name), b)

    return run


@dataclasses.dataclass(frozen=True)
class KernelMath:
    """Arithmetic on float32 vectors [LANES].

    Attributes:
        interpret: Whether the kernel is interpreted on the CPU, where XLA contracts too and `rounding.mul` stands in.
    """

    interpret: bool

    def mul(self, a: jax.Array, b: jax.Array | np.float32) -> jax.Array:
        """The product, rounded by itself."""
        if self.interpret:
            return rounding.mul(a, b)
        return _instruction("mul.rn.f32")(a, b if isinstance(b, jax.Array) else vector(b))

    def div(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The quotient, as XLA's GPU backend divides: within 2 ulps. `a / b` follows a global option of LLVM's."""
        return rounding.div(a, b) if self.interpret else _instruction("div.full.f32")(a, b)

    def exp_of_nonpositive(self, x: jax.Array) -> jax.Array:
        """`rounding.exp` of x <= 0 (-inf too); any number where x is NaN."""
        clipped = jnp.maximum(x, np.float32(-104))
        shifted = self.mul(clipped, rounding.LOG2_E) + _MAGIC
        if self.interpret:
            shifted = rounding.pin(shifted)  # XLA's CPU backend takes (a + b) - b for a
        n = shifted - _MAGIC
        r = clipped - n * rounding.LN2_HI  # the product is exact: 8 bits times 9
        r = r - self.mul(n, rounding.LN2_LO)
        p = vector(rounding.EXP_COEFFICIENTS[0])
        for c in rounding.EXP_COEFFICIENTS[1:]:
            p = self.mul(p, r) + c
        y = self.mul(self.mul(p, r), r) + r + np.float32(1)
        # y * 2**n: n + 64 into the exponent, which stays normal, then one product that rounds if the result is not.
        exponent = (_bits(shifted) << 23) + np.int32(64 << 23)  # of the magic number's bits none is left
        return self.mul(_float(_bits(y) + exponent), np.float32(2.0**-64))

    def log_of_normal(self, x: jax.Array) -> jax.Array:
        """`rounding.log` of finite x >= 2**-126."""
        bits = _bits(x)
        exponent = (bits >> 23) - 126
        mantissa = _float((bits & 0x007FFFFF) | 0x3F000000)
        small = mantissa < rounding.SQRT_HALF
        e = jnp.where(small, exponent - 1, exponent)
        e = _float(e + _MAGIC_BITS) - _MAGIC  # a conversion would take four times as long
        z = jnp.where(small, mantissa + mantissa, mantissa) - np.float32(1)
        zz = self.mul(z, z)
        p = vector(rounding.LOG_COEFFICIENTS[0])
        for c in rounding.LOG_COEFFICIENTS[1:]:
            p = self.mul(p, z) + c
        y = self.mul(self.mul(p, z), zz)
        y = y + self.mul(e, rounding.LN2_LO)
        y = y - self.mul(zz, np.float32(0.5))
        return z + y + self.mul(e, rounding.LN2_HI)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
