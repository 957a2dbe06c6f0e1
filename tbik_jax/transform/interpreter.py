"""`invariant`: a function whose contractions and reductions follow the contract, and `report`: what that replaces.

A jaxpr interpreter. It knows a list of primitives; whatever is not on it raises, so nothing keeps another order unseen.
"""

import contextlib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from ..pallas_kernels.tree_matmul.plan import LEAVES
from . import kernels, psums, windows
from .primitives import (
    CONTRACTIONS,
    EXACT,
    HIDDEN,
    KERNELS,
    REPLACED,
    SILENT,
    follows_the_batch,
    has_effects,
    has_floats,
    is_exact,
    refusal,
)
from .rules import Entry, Kind, Report, Rule

#: Primitives that hold one jaxpr, which runs once.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "call_jaxpr",
}


def invariant(fn: Callable[..., Any], rules: Sequence[Rule] | None = None) -> Callable[..., Any]:
    """`fn` with its contractions and sums in the order of the contract (`docs/drop-in.md`).

    Products of any dimensions, convolutions, sums, `psum` and `psum_scatter` over named axes take the tree; cumulative
    sums, pooling and scatters whose indices meet have one stated order; exp, log, logistic, powers, products and
    quotients are rounded by themselves, so that no fusion changes them. jit, scan, while, cond, remat, custom_jvp,
    custom_vjp and shard_map (which then runs with `check_vma=False`) are walked through. A product or a sum whose only
    use is a `psum` is one tree over all ranks, in fp32, rounded once. It works under `jax.jit`, which it should be
    under: otherwise every primitive is a call of its own.

    Kernels (Pallas, Triton, foreign functions) raise, unless a rule names them; this package's own stand as they are.

    Gradients: take `invariant(jax.grad(fn))`, which covers the backward pass. `jax.grad(invariant(fn))` raises
    `ValueError`: JAX would transpose broadcasts and gathers to sums in an order of its own.

    Args:
        fn: any function of pytrees of arrays and numbers; other arguments are static. Numbers and bools are traced:
            bind a flag that decides what is computed beforehand (`functools.partial`). What `fn` writes into an
            argument, as a Flax NNX module's statistics, is lost: return it.
        rules: the first that matches a primitive decides; one that matches nothing is warned of.

    Returns:
        The function. Its first call for some shapes traces `fn`.

    Raises:
        ValueError: (when called) primitives that hide a computation or have no covered order, with their source lines.
    """
    chosen = tuple(rules or ())

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        closed, leaves, tree = _trace(fn, args, kwargs)
        walk = _Walk(chosen)
        if any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in closed.out_avals):
            # Before anything else: a step that reads bits would pass for one that does not depend on its operand.
            leaves = [_refuse_gradient_of_floats(x) for x in leaves]
            closed = closed.replace(consts=[_refuse_gradient_of_floats(x) for x in closed.consts])
        out = walk.closed(closed, leaves)
        if walk.unused:
            warnings.warn(f"rules that match nothing: {walk.unused}", stacklevel=2)
        return jax.tree.unflatten(tree, out)

    return run


def report(fn: Callable[..., Any], *args: Any, rules: Sequence[Rule] | None = None, **kwargs: Any) -> Report:
    """What `invariant(fn, rules)` would do with `fn(*args, **kwargs)`; computes nothing, and does not raise.

    Args:
        fn: the function.
        *args: of the function; `jax.ShapeDtypeStruct`s serve.
        rules: as in `invariant`.
        **kwargs: of the function.
    """
    closed, leaves, _ = _trace(fn, args, kwargs)
    walk = _Walk(tuple(rules or ()), raising=False)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    jax.eval_shape(lambda *leaves: walk.closed(closed, leaves), *shapes)
    return Report(entries=tuple(walk.entries.values()), unused_rules=walk.unused)


def _trace(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Any], Any]:
    """The jaxpr of fn, its array arguments and the tree of its results."""
    flat, tree = jax.tree.flatten((args, kwargs))
    arrays = [
        isinstance(x, jax.Array | np.ndarray | np.generic | float | int | jax.ShapeDtypeStruct) for x in flat
    ]

    def of_arrays(*leaves: Any) -> Any:
        rest = iter(leaves)
        mixed = [next(rest) if array else x for x, array in zip(flat, arrays, strict=True)]
        some, named = jax.tree.unflatten(tree, mixed)
        return fn(*some, **named)

    leaves = [x for x, array in zip(flat, arrays, strict=True) if array]
    closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*leaves)
    return closed, leaves, jax.tree.structure(shape)


@jax.custom_jvp
def _refuse_gradient(x: jax.Array) -> jax.Array:
    return x


@_refuse_gradient.defjvp
def _raise(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise ValueError("jax.grad(invariant(fn)) leaves sums to JAX; take invariant(jax.grad(fn)) instead")


def _refuse_gradient_of_floats(x: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    if isinstance(x, jax.core.Tracer):
        # The result of an op: in `jax.jit` no NumPy array that `jax.vmap` maps goes through a custom derivative.
        x = lax.squeeze(lax.expand_dims(x, (0,)), (0,))
    return _refuse_gradient(x)


class _Walk:
    """One walk through a function's jaxpr."""

    def __init__(self, rules: tuple[Rule, ...], *, raising: bool = True) -> None:
        self.rules, self.raising = rules, raising
        self.used: set[Rule] = set()
        self.entries: dict[int, Entry] = {}
        self.callers: list[str] = []
        self.scopes: list[str] = []

    @property
    def unused(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule not in self.used)

    def closed(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        return self.jaxpr(closed.jaxpr, closed.consts, args)

    def jaxpr(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(
            zip(
                jaxpr.invars,
                (_array(x, v.aval) for x, v in zip(args, jaxpr.invars, strict=True)),
                strict=True,
            )
        )

        def read(v: Any) -> Any:
            return _array(v.val, v.aval) if isinstance(v, core.Literal) else values[v]

        for eqn in jaxpr.eqns:
            out = self.eqn(eqn, [read(v) for v in eqn.invars], psums.feeds(jaxpr, eqn))
            values.update(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def eqn(self, eqn: Any, args: list[Any], feeds_psum: bool) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            with self._scope(eqn):
                return self._call(eqn, args)
        structured = (
            getattr(self, f"_{name}", None) if name in ("scan", "while", "cond", "shard_map") else None
        )
        if structured is not None:
            with self._scope(eqn):
                return structured(params, args)
        if name in KERNELS:
            return self._kernel(eqn, args)
        if isinstance(args[0] if args else None, psums.Pending) and name not in psums.NAMES:
            self._note(eqn, "exact" if name in EXACT else "replaced")
            return [args[0].then(eqn)]
        rule = self._rule(eqn)
        # of integers too: which of several comes last
        ordered = name in ("scatter", "sort") or follows_the_batch(eqn)
        if name not in HIDDEN and not has_effects(eqn) and not has_floats(eqn) and not ordered:
            return self._exact(eqn, args)
        if is_exact(eqn) or (name in SILENT and not eqn.outvars):
            return self._exact(eqn, args)
        if rule is not None and (rule.exclude or name in CONTRACTIONS):
            self.used.add(rule)  # it has an effect here
        if rule is not None and rule.exclude:
            self._note(eqn, "excluded")
            return _bind(eqn, [psums.made(x) for x in args])
        reason = refusal(eqn)
        if reason is not None:
            return self._uncovered(eqn, [psums.made(x) for x in args], reason)
        leaves = LEAVES if rule is None or rule.leaves is None else rule.leaves
        if name in psums.NAMES:
            return self._psum(eqn, args)
        try:
            out = self._replacement(eqn, args, leaves, feeds_psum)
        except ValueError as error:  # dtypes, lengths or a precision that the contract does not cover
            return self._uncovered(eqn, [psums.made(x) for x in args], str(error), error)
        self._note(eqn, "replaced", psums.BY_RANKS if name == "reduce_scatter" else "")
        return out

    def _replacement(self, eqn: Any, args: list[Any], leaves: int, feeds_psum: bool) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in psums.MADE_THERE:
            pending = psums.Pending(name, eqn, tuple(args), leaves)
            return [pending if feeds_psum else pending.alone()]
        if name == "conv_general_dilated":
            return [windows.convolution(eqn, *args, leaves=leaves)]
        out = REPLACED[name](eqn, *args)
        return out if eqn.primitive.multiple_results else [out]

    def _psum(self, eqn: Any, args: list[Any]) -> Sequence[Any]:
        reasons = {
            x.condition(eqn.params["axes"]) if isinstance(x, psums.Pending) else psums.BY_RANKS for x in args
        }
        try:
            out = [psums.psum(x, eqn.params["axes"]) for x in args]
        except ValueError as error:  # ranks or lengths that form no tree
            return self._uncovered(eqn, [psums.made(x) for x in args], str(error), error)
        self._note(eqn, "replaced", "; ".join(sorted(reasons - {""})))
        return out

    def _kernel(self, eqn: Any, args: list[Any]) -> Sequence[Any]:
        """A kernel of this package, or one that a rule names, as it stands."""
        name = kernels.name_of(eqn)
        rule = next((r for r in self.rules if r.trust and fnmatch.fnmatchcase(name, r.pattern)), None)
        if rule is not None:
            self.used.add(rule)
        if rule is None and not kernels.of_this_package(eqn):
            reason = f"nobody can see into the kernel {name!r}; if you know that its bits do not depend on the batch, "
            return self._uncovered(eqn, args, reason + f"name it: Rule(pattern={name!r}, trust=True)")
        self._note(eqn, "trusted", name)
        return _bind(eqn, args)

    def _uncovered(
        self, eqn: Any, args: list[Any], reason: str, cause: Exception | None = None
    ) -> Sequence[Any]:
        if self.raising:
            remedy = "" if eqn.primitive.name in KERNELS else "; a Rule can exclude it"
            raise ValueError(f"{eqn.primitive.name} at {self._source(eqn)}: {reason}{remedy}") from cause
        self._note(eqn, "uncovered", reason)
        return _bind(eqn, args)

    def _exact(self, eqn: Any, args: list[Any]) -> Sequence[Any]:
        self._note(eqn, "exact")
        if eqn.primitive.name in ("pvary", "pbroadcast"):  # types of check_vma=True, which is off here
            return args
        if eqn.primitive.name == "psum_invariant":  # of integers
            return [lax.psum(x, eqn.params["axes"]) for x in args]
        return _bind(eqn, args)

    def _call(self, eqn: Any, args: list[Any]) -> list[Any]:
        inner = eqn.params[_CALLS[eqn.primitive.name]]
        if (
            eqn.primitive.name == "custom_vmap_call"
            and kernels.of_this_package(eqn)
            and kernels.within(inner)
        ):
            self._note(eqn, "trusted")  # with its rule for vmap, which the kernel itself has not
            return list(_bind(eqn, args))
        self.callers.append(self._source(eqn))
        try:
            return self._inlined(eqn, inner, args)
        finally:
            self.callers.pop()

    def _inlined(self, eqn: Any, inner: Any, args: list[Any]) -> list[Any]:
        if eqn.primitive.name == "remat2" and eqn.params["prevent_cse"] and args:
            args = list(lax.optimization_barrier(tuple(args)))  # computes again, as remat asks
        return self._either(inner, args)

    def _scan(self, params: Any, args: list[Any]) -> list[Any]:
        consts, carry, xs = (list(part) for part in params["ft_in"].update(args).unpack())

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            out = self._either(params["jaxpr"], [*consts, *carry, *xs])
            return out[: len(carry)], out[len(carry) :]

        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        final, ys = lax.scan(body, carry, xs, **options)
        return [*final, *ys]

    def _while(self, params: Any, args: list[Any]) -> list[Any]:
        of_cond, of_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

        def running(state: list[Any]) -> Any:
            return self._either(params["cond_jaxpr"], [*args[:of_cond], *state])[0]

        def body(state: list[Any]) -> list[Any]:
            new = self._either(params["body_jaxpr"], [*args[of_cond:of_body], *state])
            live = running(state)
            if not live.ndim:
                return new
            # Under vmap each row has its own end: a row that has ended stays as it is.
            rows = [live.reshape(*live.shape, *(1,) * (x.ndim - live.ndim)) for x in new]
            return [jnp.where(row, x, old) for row, x, old in zip(rows, new, state, strict=True)]

        return lax.while_loop(lambda state: jnp.any(running(state)), body, args[of_body:])

    def _cond(self, params: Any, args: list[Any]) -> list[Any]:
        branches = [lambda *a, b=branch: self._either(b, list(a)) for branch in params["branches"]]
        return lax.switch(args[0], branches, *args[1:])

    def _shard_map(self, params: Any, args: list[Any]) -> list[Any]:
        mapped = jax.shard_map(
            lambda *a: tuple(self._either(params["jaxpr"], list(a))),
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=tuple(params["out_specs"]),
            axis_names=set(params["newly_manual_axes"]),
            check_vma=False,  # the tree's permutes give every rank one value, which the checker cannot know
        )
        return list(mapped(*args))

    def _either(self, jaxpr: Any, args: list[Any]) -> list[Any]:
        return self.closed(jaxpr, args) if hasattr(jaxpr, "consts") else self.jaxpr(jaxpr, (), args)

    @contextlib.contextmanager
    def _scope(self, eqn: Any) -> Iterator[None]:
        """While an equation's jaxpr is walked, whose own name stacks begin there."""
        self.scopes.append(str(eqn.source_info.name_stack))
        try:
            yield
        finally:
            self.scopes.pop()

    def _rule(self, eqn: Any) -> Rule | None:
        scope = "/".join(filter(None, (*self.scopes, str(eqn.source_info.name_stack))))
        text = f"{scope} {eqn.primitive.name} {self._source(eqn)}"
        matching = (r for r in self.rules if not r.trust and fnmatch.fnmatchcase(text, f"*{r.pattern}*"))
        return next(matching, None)

    def _source(self, eqn: Any) -> str:
        """The user's line; inside a function that JAX traced once for all, the line that calls it."""
        return source_info_util.summarize(eqn.source_info) or next(filter(None, reversed(self.callers)), "?")

    def _note(self, eqn: Any, kind: Kind, reason: str = "") -> None:
        entry = Entry(primitive=eqn.primitive.name, kind=kind, source=self._source(eqn), reason=reason)
        self.entries.setdefault(id(eqn), entry)


def _array(x: Any, aval: Any) -> Any:
    plain = not isinstance(x, jax.Array) or (
        jnp.result_type(x) == aval.dtype and getattr(x, "weak_type", False)
    )
    return lax.convert_element_type(x, aval.dtype) if plain and not isinstance(x, psums.Pending) else x


def _bind(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    out = eqn.primitive.bind(*args, **eqn.params)
    return out if eqn.primitive.multiple_results else [out]
