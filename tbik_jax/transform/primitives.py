"""What becomes of each primitive: exact as it stands, a step of the contract, or a reason why not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..collectives import tree_psum_scatter
from ..ops import steps
from ..pallas_kernels.common import rounding
from ..pallas_kernels.common.dtypes import FLOATS
from . import elementary, prefix, scatters, windows
from .extremes import EXTREMES, extreme

#: Copies, choices, comparisons, signs and integer steps: no rounding, in any order.
EXACT = frozenset(
    [
        "abs",
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "and",
        "argmax",
        "argmin",
        "axis_index",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "complex",
        "concatenate",
        "conj",
        "copy",
        "copy_p",
        "cummax",
        "cummin",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "empty",
        "empty2",
        "eq",
        "expand_dims",
        "floor",
        "gather",
        "ge",
        "gt",
        "imag",
        "iota",
        "is_finite",
        "layout_constraint",
        "le",
        "le_to",
        "lt",
        "lt_to",
        "max",
        "min",
        "name",
        "ne",
        "nextafter",
        "not",
        "optimization_barrier",
        "or",
        "pad",
        "ppermute",
        "pvary",
        "pbroadcast",
        "random_bits",
        "random_fold_in",
        "random_seed",
        "random_split",
        "random_unwrap",
        "random_wrap",
        "real",
        "reduce_and",
        "reduce_or",
        "reduce_precision",
        "reduce_xor",
        "reshape",
        "reshard",
        "rev",
        "round",
        "select_n",
        "sharding_constraint",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "threefry2x32",
        "tile",
        "top_k",
        "transpose",
        "unstack",
        "xor",
    ]
)
#: Elementwise steps that round; each is made a step of its own.
_ROUNDED = frozenset(
    [
        "add",
        "add_any",
        "sub",
        "sqrt",
        "cbrt",
        "exp2",
        "erf_inv",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "sinh",
        "cosh",
        "pow",
        "rem",
    ]
)
#: Those that are made of other steps.
_ELEMENTARY = {
    "tanh": elementary.tanh,
    "log1p": elementary.log1p,
    "log2": elementary.log2,
    "expm1": elementary.expm1,
    "asinh": elementary.asinh,
    "acosh": elementary.acosh,
    "atanh": elementary.atanh,
    "erf": elementary.erf,
    "erfc": elementary.erfc,
}
#: Kernels, which nobody can see into; `mpmd_map` is one of Mosaic GPU's.
KERNELS = frozenset(
    (
        "pallas_call",
        "mpmd_map",
        "core_map",
        "run_state",
        "triton_kernel_call",
        "ffi_call",
        "custom_call",
        "cudnn_fusion",
    )
)
#: Other computations that nobody can see into, whatever their dtypes.
HIDDEN = frozenset(
    ("pure_callback", "io_callback", "debug_callback", "debug_print", "call_exported", "custom_partitioning")
)
#: Which of them have no results, as `jax.debug.print` has none, and so change no bit.
SILENT = frozenset(("debug_callback", "debug_print"))
#: Primitives without an order of the contract, and what to use in their place.
_REMEDIES = {
    "ragged_dot_general": "groups of rows have no order of the contract; use one dot_general a group, or a mask",
    "reduce_window": "its function is not known; use lax.add, lax.max or lax.min with a constant initial value",
    "reduce": "its function is not known; use jnp.sum, jnp.prod, jnp.max or jnp.min",
    "fft": "its order is the library's; use a product with a DFT matrix",
}


def has_floats(eqn: Any) -> bool:
    """Whether an operand, a result, or a value of a function that `eqn` holds is floating-point or complex."""
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if any(jnp.issubdtype(a.dtype, jnp.inexact) for a in avals if hasattr(a, "dtype")):
        return True
    held = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
    )
    return any(has_floats(e) for x in held for e in getattr(getattr(x, "jaxpr", x), "eqns", ()))


def has_effects(eqn: Any) -> bool:
    """Whether `eqn` does something beside its results; naming a mesh axis is no such thing."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def is_exact(eqn: Any) -> bool:
    """Whether `eqn` is on the list; the magnitude and the sign of a complex number are none of it."""
    rounds = eqn.primitive.name in ("abs", "sign") and jnp.iscomplexobj(eqn.invars[0].aval)
    return eqn.primitive.name in EXACT and not rounds and not follows_the_batch(eqn)


def follows_the_batch(eqn: Any) -> bool:
    """Whether these are random bits of a key that gives others under vmap: all but threefry's."""
    return eqn.primitive.name == "random_bits" and "fry" not in str(eqn.invars[0].aval.dtype)


def refusal(eqn: Any) -> str | None:
    """Why no step of the contract takes the place of `eqn`, or None if one does."""
    name = eqn.primitive.name
    if name in HIDDEN or has_effects(eqn):
        return "it hides a computation, or has an effect"
    if follows_the_batch(eqn):
        return f"keys of {eqn.invars[0].aval.dtype} give other numbers in a batch; use threefry's"
    if name not in REPLACED and name not in CONTRACTIONS and name not in ("psum", "psum_invariant"):
        return _REMEDIES.get(name, "it has no order of the contract")
    if name == "scatter" and eqn.params["update_jaxpr"] is not None:
        return "it applies a function once for each index; use .set of the gathered results"
    kinds = {
        v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    }
    if kinds - set(FLOATS) and name not in ("sort", *EXTREMES):
        return f"{', '.join(sorted(kinds - set(FLOATS)))} is not one of {', '.join(FLOATS)}"
    if eqn.params.get("axis_index_groups") is not None and name not in EXTREMES:
        return "axis_index_groups has no tree; use a mesh with an axis for each group"
    if name in ("psum", "psum_invariant") and not all(isinstance(a, str) for a in eqn.params["axes"]):
        return f"axes {eqn.params['axes']} are positions, not mesh axes; use jnp.sum, or name mesh axes"
    return None


def _one_place_each(eqn: Any) -> bool:
    indices = eqn.invars[1].aval.shape
    return eqn.params["unique_indices"] or int(np.prod(indices[:-1])) == 1


def _alone(step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An elementwise step in fp32, of operands of the result's shape, rounded to the result's dtype."""

    def run(eqn: Any, *args: jax.Array) -> jax.Array:
        aval = eqn.outvars[0].aval
        wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]
        out = step(eqn, *(jnp.broadcast_to(x, aval.shape) for x in wide))
        return rounding.round_to(out, aval.dtype)

    return run


def _elementary(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return lambda eqn, x: function(x)


def _bound(eqn: Any, *args: jax.Array) -> jax.Array:
    return rounding.pin(eqn.primitive.bind(*args, **eqn.params))


def _neg(eqn: Any, x: jax.Array) -> jax.Array:
    return rounding.neg(x) if jnp.issubdtype(x.dtype, jnp.floating) else -x


def _logistic(eqn: Any, x: jax.Array) -> jax.Array:
    small = rounding.exp(-jnp.abs(x))
    near = rounding.div(jnp.ones_like(x), small + np.float32(1))
    return jnp.where(x < 0, rounding.mul(small, near), near)


def _integer_pow(eqn: Any, x: jax.Array) -> jax.Array:
    exponent = eqn.params["y"]
    out = functools.reduce(rounding.mul, [x] * abs(exponent), jnp.ones_like(x))
    return rounding.div(jnp.ones_like(x), out) if exponent < 0 else out


def _sum(eqn: Any, x: jax.Array) -> jax.Array:
    return rounding.round_to(steps.total(x.astype(jnp.float32), tuple(sorted(eqn.params["axes"]))), x.dtype)


def _convert(eqn: Any, x: jax.Array) -> jax.Array:
    dtype, x = eqn.params["new_dtype"], jnp.asarray(x)  # a constant of NumPy's converts as NumPy does
    return (
        rounding.round_to(x, dtype)
        if x.dtype == jnp.float32 and dtype in (jnp.bfloat16, jnp.float16)
        else x.astype(dtype)
    )


def _scatter_psum(eqn: Any, x: jax.Array) -> jax.Array:
    params = eqn.params
    dim = params["scatter_dimension"]
    return tree_psum_scatter(x, params["axis_name"], scatter_dimension=dim, tiled=params["tiled"])


def _scatter(eqn: Any, *args: jax.Array) -> jax.Array:
    bound = _one_place_each(eqn)
    return eqn.primitive.bind(*args, **eqn.params) if bound else scatters.scatter(eqn, *args)


def _product(eqn: Any, x: jax.Array) -> jax.Array:
    return rounding.round_to(prefix.product(x.astype(jnp.float32), eqn.params["axes"]), x.dtype)


def _sort(eqn: Any, *args: jax.Array) -> list[jax.Array]:
    return eqn.primitive.bind(*args, **{**eqn.params, "is_stable": True})  # else equal keys come in any order


REPLACED: dict[str, Callable[..., Any]] = {
    **{name: _alone(_bound) for name in _ROUNDED},
    "mul": _alone(lambda eqn, a, b: rounding.mul(a, b)),
    "one_minus_square": _alone(lambda eqn, a: np.float32(1) - rounding.mul(a, a)),
    "square": _alone(lambda eqn, a: rounding.mul(a, a)),
    "div": _alone(lambda eqn, a, b: rounding.div(a, b)),
    "exp": _alone(lambda eqn, x: rounding.exp(x)),
    "log": _alone(lambda eqn, x: rounding.log(x)),
    **{name: _alone(_elementary(function)) for name, function in _ELEMENTARY.items()},
    "rsqrt": _alone(lambda eqn, x: rounding.reciprocal_sqrt(x)),
    "logistic": _alone(_logistic),
    "integer_pow": _alone(_integer_pow),
    "neg": _neg,
    "convert_element_type": _convert,
    "reduce_sum": _sum,
    "reduce_scatter": _scatter_psum,
    "reduce_prod": _product,
    "reduce_window_sum": windows.window_sum,
    "select_and_scatter_add": windows.select_and_scatter_add,
    "sort": _sort,
    **dict.fromkeys(EXTREMES, extreme),
    **{name: prefix.cumulative for name in ("cumsum", "cumprod", "cumlogsumexp")},
    **{name: _scatter for name in scatters.KINDS},
}
#: What takes leaves.
CONTRACTIONS = ("dot_general", "conv_general_dilated")
