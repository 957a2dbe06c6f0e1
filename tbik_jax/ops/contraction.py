"""`dot_general` and `matmul` in tree order, differentiable: the plan, the order, and the gradients of the same kind."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..collectives import tree_psum
from ..pallas_kernels.common.backend import resolve_backend
from ..pallas_kernels.common.dtypes import FLOATS
from ..pallas_kernels.tree_matmul.api import tree_matmul
from ..pallas_kernels.tree_matmul.plan import LEAF_MULTIPLE, LEAVES, check_leaves
from . import steps

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
_Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

_KERNEL_N = 16  # the GPU kernels take a multiple of this many columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductPlan:
    """How a contraction of any length is added up.

    Attributes:
        k: length of the contraction; of several contracted dimensions, their product.
        leaves: equal slices, each one fp32 accumulation in ascending k.
        padded: k with the zeros that fill the last leaves; a multiple of 16 * leaves.
    """

    k: int
    leaves: int
    padded: int


def plan_product(k: int, leaves: int = LEAVES) -> ProductPlan:
    """The plan of a contraction of length `k`: a pure function of k and the leaves that were asked for.

    The leaves are halved until each has 16 terms at least (or one is left), and zeros are appended until all are equal
    and a multiple of 16. A zero term is +0.0 * +0.0, and a leaf begins at +0.0: the padding changes no sum, except that
    a negative subnormal that the device flushed to -0.0 becomes +0.0. Like every sum that begins at +0.0, a sum of
    zeros is +0.0, never -0.0.

    Raises:
        ValueError: leaves other than 1, 2, 4 or 8.
    """
    if leaves not in (1, 2, 4, 8):
        raise ValueError(f"leaves={leaves} is not supported; use 1, 2, 4 or 8")
    while leaves > 1 and k < LEAF_MULTIPLE * leaves:
        leaves //= 2
    multiple = LEAF_MULTIPLE * leaves
    return ProductPlan(k=k, leaves=leaves, padded=max(1, -(-k // multiple)) * multiple)


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    leaves: int = LEAVES,
) -> jax.Array:
    """`lax.dot_general` in tree order: an element's bits depend on its two slices and on nothing beside them.

    The contracted dimensions, in the order in which `dimension_numbers` names them, are one row-major dimension of
    length K, which `plan_product` cuts into leaves. Products are exact or rounded to fp32 once; the tree is fp32; the
    result is rounded once. Free and batch dimensions do not enter.

    Reverse-mode gradients, of any order, are contractions of the same kind: the gradient of `lhs` over the free
    dimensions of `rhs`, that of `rhs` over the free dimensions of `lhs`. So the order of a weight's gradient depends on
    the number of rows, and on nothing else of them.

    Args:
        lhs: bfloat16, float16 or float32, any shape.
        rhs: likewise; operands of two dtypes are widened to their common one, which is exact.
        dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
        precision: None, a `lax.Precision`, its name, a pair of them, or an algorithm that accumulates in fp32. All have
            one meaning: this contract is at least as precise.
        preferred_element_type: of the result; the operands' common dtype by default.
        out_sharding: where the result goes, which moves bits; required on a mesh with explicit axes wherever
            `lax.dot_general` requires it.
        leaves: 1, 2, 4 or 8.

    Returns:
        Batch dimensions, free dimensions of lhs, free dimensions of rhs.

    Raises:
        ValueError: a dtype, precision or `leaves` that the contract does not cover.
        TypeError: dimension numbers that do not fit the shapes, as `lax.dot_general` raises it; or forward mode.
    """
    return contract(
        lhs,
        rhs,
        dimension_numbers,
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
        leaves=leaves,
    )


def matmul(x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, leaves: int = LEAVES) -> jax.Array:
    """x @ w, or x @ w + bias (torch's `mm` and `addmm`), in tree order.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        w: [K, N]; or [..., K, N], batch dimensions that broadcast with x's as in `jnp.matmul`.
        bias: [N], added to the fp32 sum, before the only rounding; its gradient is summed over all rows by `tree_sum`.
        leaves: 1, 2, 4 or 8, as in `dot_general`.

    Returns:
        [..., N] in the common dtype of x and w.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    if x.ndim < 1 or w.ndim < 2 or (w.ndim > 2 and x.ndim < 2) or x.shape[-1] != w.shape[-2]:
        raise ValueError(f"matmul takes x [..., K] and w [..., K, N], not shapes {x.shape} and {w.shape}")
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != w.shape[-1:]:
            raise ValueError(f"matmul by w {w.shape} takes bias [{w.shape[-1]}], not shape {bias.shape}")
    lead = w.ndim - 2
    if lead:
        batch = jnp.broadcast_shapes(x.shape[:-2], w.shape[:-2])
        x, w = _broadcast(x, (*batch, *x.shape[-2:])), _broadcast(w, (*batch, *w.shape[-2:]))
        lead = len(batch)
    every = tuple(range(lead))
    dims = (((x.ndim - 1,), (lead,)), (every, every))
    if bias is None:
        return contract(x, w, dims, leaves=leaves)
    config = _configure("matmul", x, w, dims, None, None, leaves, None)
    if bias.dtype.name not in FLOATS:
        raise ValueError(f"matmul: bias is {bias.dtype}; it must be one of {', '.join(FLOATS)}")
    x, w = (_as_dtype(a, config.dtype) for a in (x, w))
    return _add_bias(config, x, w, steps.widen(bias))


def contract(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    leaves: int = LEAVES,
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """`dot_general`, and with `axis` the tree over the ranks that hold consecutive parts of K."""
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    config = _configure(
        "dot_general", lhs, rhs, dimension_numbers, precision, preferred_element_type, leaves, axis
    )
    lhs, rhs = (_as_dtype(a, config.dtype) for a in (lhs, rhs))
    if jax.sharding.get_abstract_mesh().explicit_axes:  # lax's rules say where the result goes, or raise
        plain = functools.partial(lax.dot_general, dimension_numbers=config.dims, out_sharding=out_sharding)
        sharding = jax.eval_shape(plain, lhs, rhs).sharding
        return jax.sharding.auto_axes(functools.partial(_dot, config), out_sharding=sharding)(lhs, rhs)
    out = _dot(config, lhs, rhs)
    return out if out_sharding is None else _constrain(out, out_sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """What is static of a contraction; equal ones share their traces."""

    dims: _Dims
    dtype: str
    out_dtype: str
    leaves: int
    axis: str | tuple[str, ...] | None = None


def _configure(
    op: str,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    precision: Any,
    preferred_element_type: jax.typing.DTypeLike | None,
    leaves: int,
    axis: str | tuple[str, ...] | None,
) -> _Config:
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if operand.dtype.name not in FLOATS:
            raise ValueError(
                f"{op}: {name} is {operand.dtype}; it must be one of {', '.join(FLOATS)} (lax.dot_general is "
                "exact for integers)"
            )
    _check_precision(op, precision)
    plan_product(1, leaves)
    (lc, rc), (lb, rb) = dimension_numbers
    dims = (_places(lc, lhs), _places(rc, rhs)), (_places(lb, lhs), _places(rb, rhs))
    jax.eval_shape(  # checks shapes and dimension numbers as lax does
        functools.partial(lax.dot_general, dimension_numbers=dims),
        jax.ShapeDtypeStruct(lhs.shape, jnp.float32),
        jax.ShapeDtypeStruct(rhs.shape, jnp.float32),
    )
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    out_dtype = jnp.dtype(dtype if preferred_element_type is None else preferred_element_type)
    if out_dtype.name not in FLOATS:
        raise ValueError(f"{op} rounds to {', '.join(FLOATS)}, not to {out_dtype}")
    if axis is not None and not isinstance(axis, str):
        axis = tuple(axis)
    return _Config(dims=dims, dtype=dtype.name, out_dtype=out_dtype.name, leaves=leaves, axis=axis)


def _places(dims: Sequence[int], operand: jax.Array) -> tuple[int, ...]:
    return tuple(int(d) + operand.ndim if d < 0 else int(d) for d in dims)


def _check_precision(op: str, precision: Any) -> None:
    if isinstance(precision, tuple | list):
        for each in precision:
            _check_precision(op, each)
    elif isinstance(precision, lax.DotAlgorithmPreset):
        name = precision.name
        if name != "DEFAULT" and not name.endswith("_F32"):
            raise ValueError(
                f"{op} accumulates in float32, which is not algorithm {name}; use precision=None"
            )
    elif isinstance(precision, str):
        if precision not in ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32", "fastest"):
            raise ValueError(f"{op}: precision={precision!r} is unknown; use None")
    elif not (precision is None or isinstance(precision, lax.Precision)):
        raise ValueError(f"{op}: precision={precision!r} is not covered; use None or a lax.Precision")


def _as_dtype(x: jax.Array, dtype: str) -> jax.Array:
    """x in a dtype that holds its values; float16 and bfloat16 have float32 in common."""
    return x if x.dtype == jnp.dtype(dtype) else steps.widen(x)


def _broadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x broadcast to `shape`, with a gradient in tree order."""
    return x if x.shape == shape else steps.narrow(steps.expand(steps.widen(x), shape), x.dtype.name)


def _constrain(x: jax.Array, sharding: Any) -> jax.Array:
    return lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.jit, static_argnums=(0,))
def _dot(config: _Config, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _dot_vjp(config, lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot_vjp(config: _Config, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    if config.axis is None:
        return _forward(config, lhs, rhs, config.out_dtype)
    part = _forward(config, lhs, rhs, "float32")
    return tree_psum(part, config.axis, out_dtype=config.out_dtype)


def _dot_fwd(
    config: _Config, lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot_vjp(config, lhs, rhs), (lhs, rhs)


def _dot_bwd(
    config: _Config, saved: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if config.axis is not None:  # as lax.psum under check_vma=False: the sum of what the ranks hold
        ct = tree_psum(ct, config.axis, out_dtype=config.out_dtype)
    lhs, rhs = saved
    (lc, rc), (lb, rb) = config.dims
    swapped = (rc, lc), (rb, lb)
    return (
        _transposed(config, ct, lhs, rhs, config.dims, of_rhs=False),
        _transposed(config, ct, rhs, lhs, swapped, of_rhs=True),
    )


_dot_vjp.defvjp(_dot_fwd, _dot_bwd)


def _transposed(
    config: _Config, ct: jax.Array, x: jax.Array, y: jax.Array, dims: _Dims, *, of_rhs: bool
) -> jax.Array:
    """The cotangent of x: ct contracted with y over y's free dimensions, in x's order of dimensions."""
    (x_contract, y_contract), (x_batch, y_batch) = dims
    x_kept, y_kept = _kept(x, x_contract, x_batch), _kept(y, y_contract, y_batch)
    batch = tuple(range(len(x_batch)))
    first = len(batch) + (0 if of_rhs else len(x_kept))
    of_y = tuple(range(first, first + len(y_kept)))
    by_y = [x_contract[i] for i in np.argsort(y_contract)]
    places = [int(i) for i in np.argsort([*x_batch, *x_kept, *by_y])]
    new_dims = (of_y, y_kept), (batch, y_batch)
    out = contract(ct, y, new_dims, None, config.dtype, leaves=config.leaves)
    return jnp.transpose(out, places)


def _kept(x: jax.Array, *taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if not any(i in each for each in taken))


def _forward(config: _Config, lhs: jax.Array, rhs: jax.Array, out_dtype: str) -> jax.Array:
    """The contraction of what this rank holds, as a batch of matrix products."""
    (lc, rc), (lb, rb) = config.dims
    l_kept, r_kept = _kept(lhs, lc, lb), _kept(rhs, rc, rb)
    batch, m, k = (math.prod(lhs.shape[i] for i in each) for each in (lb, l_kept, lc))
    n = math.prod(rhs.shape[i] for i in r_kept)
    shape = (*(lhs.shape[i] for each in (lb, l_kept) for i in each), *(rhs.shape[i] for i in r_kept))
    if batch * m * n == 0:
        return jnp.zeros(shape, out_dtype)
    leaves, padded = _local_plan(config, k)
    rows = jnp.transpose(lhs, (*lb, *l_kept, *lc)).reshape(batch, m, k)
    transpose_rhs = (*r_kept, *rc) == tuple(i for i in range(rhs.ndim) if i not in rb) and bool(r_kept)
    order = (*rb, *r_kept, *rc) if transpose_rhs else (*rb, *rc, *r_kept)
    columns = jnp.transpose(rhs, order).reshape(batch, *((n, k) if transpose_rhs else (k, n)))
    rows = _pad(rows, 2, padded)
    columns = _pad(columns, 2 if transpose_rhs else 1, padded)
    product = _product(leaves, out_dtype, transpose_rhs)
    if batch == 1:
        return product(rows[0], columns[0]).reshape(shape)
    return _products(leaves, out_dtype, transpose_rhs)(rows, columns).reshape(shape)


def _local_plan(config: _Config, k: int) -> tuple[int, int]:
    """Leaves, and the padded length, of the part of K that this rank holds."""
    if config.axis is None:
        plan = plan_product(k, config.leaves)
        return plan.leaves, plan.padded
    axes = (config.axis,) if isinstance(config.axis, str) else config.axis
    ranks = math.prod(lax.axis_size(a) for a in axes)
    if config.leaves % ranks:
        raise ValueError(
            f"{config.leaves} leaves cannot be cut over the {ranks} ranks of axis {config.axis!r}; use 1, 2, 4 or "
            "8, and as many leaves at least"
        )
    check_leaves(k * ranks, config.leaves)  # zeros would stand between the ranks' parts
    return config.leaves // ranks, k


def _pad(x: jax.Array, dim: int, size: int) -> jax.Array:
    if x.shape[dim] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[dim] if i == dim else 0) for i in range(x.ndim)])


@functools.cache
def _product(leaves: int, out_dtype: str, transpose_rhs: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product of two matrices, which `jax.vmap` turns into more rows where it can, and a batch where it cannot."""

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        n = w.shape[0 if transpose_rhs else 1]
        if resolve_backend(None, x.dtype) != "reference":
            w = _pad(w, 0 if transpose_rhs else 1, -(-n // _KERNEL_N) * _KERNEL_N)
        return tree_matmul(x, w, leaves, out_dtype=out_dtype, transpose_rhs=transpose_rhs)[:, :n]

    @product.def_vmap
    def batched(size: int, is_batched: list[bool], x: jax.Array, w: jax.Array) -> tuple[jax.Array, bool]:
        if not is_batched[1]:
            rows = product(x.reshape(size * x.shape[1], x.shape[2]), w)
            return rows.reshape(size, x.shape[1], rows.shape[1]), True
        if not is_batched[0]:
            x = jnp.broadcast_to(x, (size, *x.shape))
        return _products(leaves, out_dtype, transpose_rhs)(x, w), True

    return product


@functools.cache
def _products(
    leaves: int, out_dtype: str, transpose_rhs: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """x [B, M, K] times w [B, K, N] or [B, N, K]; `jax.vmap` makes B larger."""

    @jax.custom_batching.custom_vmap
    def products(x: jax.Array, w: jax.Array) -> jax.Array:
        columns = 1 if transpose_rhs else 2
        n = w.shape[columns]
        if resolve_backend(None, x.dtype) != "reference":
            w = _pad(w, columns, -(-n // _KERNEL_N) * _KERNEL_N)
        return tree_matmul(x, w, leaves, out_dtype=out_dtype, transpose_rhs=transpose_rhs)[..., :n]

    @products.def_vmap
    def batched(size: int, is_batched: list[bool], x: jax.Array, w: jax.Array) -> tuple[jax.Array, bool]:
        x, w = (
            (operand if there else jnp.broadcast_to(operand, (size, *operand.shape)))
            for operand, there in zip((x, w), is_batched, strict=True)
        )
        count = x.shape[1]
        out = products(*(operand.reshape(size * count, *operand.shape[2:]) for operand in (x, w)))
        return out.reshape(size, count, *out.shape[1:]), True

    return products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(config: _Config, x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
    """The fp32 contraction plus the fp32 bias of the last dimension, rounded once."""
    product = _dot(dataclasses.replace(config, out_dtype="float32"), x, w)
    return steps.narrow(product + bias, config.out_dtype)


def _add_bias_bwd(
    config: _Config, saved: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # From the rounded cotangent, not from an fp32 copy of it, so that half-precision operands keep their kernels.
    return *_dot_bwd(config, saved, ct), steps.total(steps.widen(ct), tuple(range(ct.ndim - 1)))


_add_bias.defvjp(lambda config, x, w, bias: (_add_bias(config, x, w, bias), (x, w)), _add_bias_bwd)
