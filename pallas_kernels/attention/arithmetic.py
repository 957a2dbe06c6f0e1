"""Everything of the GPU kernel that is rounded, apart from the two matrix products."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import ROWS

LANES = 8  # partial sums of a row's weights: key j of a block goes to lane j % 8
NEG_INF = float("-inf")
_ROW = plgpu.Layout.WGMMA.reduce(1)  # a number a row


@functools.partial(jax.tree_util.register_dataclass, data_fields=["maximum", "lanes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Softmax:
    """A split so far: maximum [rows] of its exponents and the sum of its weights in lanes [rows, LANES]."""

    maximum: jax.Array
    lanes: jax.Array

    @staticmethod
    def empty() -> "Softmax":
        maximum = plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        lanes = plgpu.layout_cast(jnp.zeros((ROWS, LANES), jnp.float32), plgpu.Layout.WGMMA)
        return Softmax(maximum, lanes)

    @property
    def total(self) -> jax.Array:
        return jnp.sum(self.lanes, axis=1)


def softmax_step(
    old: Softmax, scores: jax.Array, factor: float, product: "Product"
) -> tuple[Softmax, jax.Array, jax.Array]:
    """Takes a block's scores [rows, block]; returns the weights as well, and what scales the old values [rows].

    A row without a visible key in the block keeps its bits: weights 0, scale 1 (or 0 on values that are 0).
    """
    maximum = jnp.maximum(old.maximum, jnp.max(scores, axis=1) * factor)
    finite = jnp.where(maximum == NEG_INF, 0.0, maximum)  # no -inf - -inf where a row has seen no key yet
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(finite, scores.shape, [0]))
    shrink = jnp.exp2(old.maximum - finite)
    added = weights[:, :LANES]
    for i in range(LANES, weights.shape[1], LANES):
        added = added + weights[:, i : i + LANES]
    lanes = product(old.lanes, lax.broadcast_in_dim(shrink, old.lanes.shape, [0])) + added
    return Softmax(maximum, lanes), weights, shrink


def rescale(values: jax.Array, shrink: jax.Array, axis: int = 0) -> jax.Array:
    return values * lax.broadcast_in_dim(shrink, values.shape, [axis])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["maximum", "total"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Partial:
    """Splits that were joined, or one split: maximum and sum of weights, both [rows]. The values go beside it."""

    maximum: jax.Array
    total: jax.Array


def merge(
    left: Partial,
    right: Partial,
    left_values: jax.Array,
    right_values: jax.Array,
    product: "Product",
    axis: int = 0,
) -> tuple[Partial, jax.Array]:
    """Joins a split, on the right, to those before it. A side without keys leaves the other one's bits as they are.

    `axis` of the values counts the rows that have a maximum and a total each.
    """
    maximum = jnp.maximum(left.maximum, right.maximum)
    a, b = jnp.exp2(left.maximum - maximum), jnp.exp2(right.maximum - maximum)

    def join(x: jax.Array, y: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return product(x, a) + product(y, b)

    wide_a, wide_b = a, b
    if left_values.ndim > a.ndim:
        wide_a, wide_b = (lax.broadcast_in_dim(x, left_values.shape, [axis]) for x in (a, b))
    total = join(left.total, right.total, a, b)
    return Partial(maximum, total), join(left_values, right_values, wide_a, wide_b)


def normalise(partial: Partial, values: jax.Array, dtype: Any, axis: int = 0) -> jax.Array:
    inverse = 1.0 / partial.total
    if values.ndim > inverse.ndim:
        inverse = lax.broadcast_in_dim(inverse, values.shape, [axis])
    # A split that a row does not see can turn its -0.0 into +0.0; the add leaves no -0.0 to any variant.
    return ((values + 0.0) * inverse).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Product:
    """Products of fp32 arrays, each rounded by itself.

    LLVM and ptxas both contract `a * b + c * d` to a fused multiply-add, of either product, unless a multiplication
    says its rounding. The interpreter has no such instruction and no such compilers.
    """

    interpret: bool
    matrix: Any = plgpu.Layout.WGMMA
    vector: Any = _ROW

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if self.interpret:
            return lax.optimization_barrier(a * b)
        layout = self.matrix if a.ndim == 2 else self.vector
        result = plgpu.ShapeDtypeStruct(a.shape, jnp.float32, layout=layout)

        @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=result)
        def multiply(_: Any, x: Any, y: Any) -> Any:
            return x._pointwise(x._lift_fast_instr("mul.rn.f32"), y)

        return multiply(a, b)


def choose(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """a or b, whole; the Mosaic lowering does not broadcast a scalar condition itself."""
    return jnp.where(lax.broadcast_in_dim(condition, a.shape, ()), a, b)
