"""Taps after every equation of a user's function, through the interpreter of `tbik_jax.invariant`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from ..bench.environment import environment
from ..transform.interpreter import _CALLS, Rule, _bind, _trace, _Walk, invariant
from .bits import bits_of
from .trace import Op, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a function.

    Attributes:
        fn: of pytrees of arrays; other arguments are static. Two calls may have functions that differ in their mesh.
        args: of the call.
        kwargs: of the call.
        numerics: "plain" for the function as it stands, "invariant" for `tbik_jax.invariant(fn, rules)`.
        rules: of `invariant`.
        batch: rows that the call works on, where it is to be compared with a call of another batch.
        rows: those of the batch to compare, in the order of the other call's; None for all.
        label: for messages; by default the function's name, numerics and batch.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numerics: Literal["plain", "invariant"] = "plain"
    rules: Sequence[Rule] | None = None
    batch: int | None = None
    rows: Sequence[int] | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.numerics not in ("plain", "invariant"):
            raise ValueError(f"numerics={self.numerics!r} of a function must be 'plain' or 'invariant'")
        if self.rows is not None and (self.batch is None or not all(0 <= i < self.batch for i in self.rows)):
            raise ValueError(f"rows={list(self.rows)} need a batch that has them; batch={self.batch}")


@dataclasses.dataclass(frozen=True)
class _Tap:
    """What is known of a tapped value while tracing.

    Attributes:
        path: place in the order of the equations; None stands for the iteration of a scan.
        primitive: its name.
        source: the user's line.
        dims: of the leading dimensions of its value: "scan", or "rank" for one of a mesh.
    """

    path: tuple[int | None, ...]
    primitive: str
    source: str
    dims: tuple[str, ...] = ()


def trace_call(call: Call, *, check: bool = True) -> Trace:
    """Runs a function under `jax.jit` and keeps what every equation gave.

    jit, custom_jvp, custom_vjp, remat, scan and shard_map are looked into; while and cond are one op each.

    Args:
        call: the function, and what to call it with.
        check: run it without taps as well and compare the results: `Trace.faithful`.

    Raises:
        ValueError: with numerics="invariant", primitives that the contract does not cover.
    """
    closed, leaves, _ = _trace(call.fn, call.args, dict(call.kwargs))
    taps: list[_Tap] = []

    def run(*leaves: Any) -> Any:
        walk = _TappingWalk(tuple(call.rules or ()), plain=call.numerics == "plain")
        out = walk.closed(closed, leaves)
        taps[:] = walk.taps
        return out, walk.values

    out, values = jax.device_get(jax.jit(run)(*leaves))
    faithful = None
    if check:
        fn = call.fn if call.numerics == "plain" else invariant(call.fn, call.rules)
        closed_fn, again, _ = _trace(fn, call.args, dict(call.kwargs))
        untapped = jax.device_get(jax.jit(jax.extend.core.jaxpr_as_fun(closed_fn))(*again))
        pairs = zip(out, untapped, strict=True)
        faithful = all(np.array_equal(bits_of(np.asarray(a)), bits_of(np.asarray(b))) for a, b in pairs)
    ops, kept = _expanded(taps, values)
    rows = call.rows if call.rows is not None or call.batch is None else range(call.batch)
    name = getattr(call.fn, "__name__", type(call.fn).__name__)
    batch = "" if call.batch is None else f", batch {call.batch}"
    return Trace(
        kind="function",
        label=call.label or f"{name}, {call.numerics}{batch}",
        numerics=call.numerics,
        environment=environment(),
        faithful=faithful,
        ops=tuple(ops),
        values=kept,
        batch=call.batch,
        rows=None if rows is None else tuple(int(i) for i in rows),
    )


class _TappingWalk(_Walk):
    """The interpreter, which keeps what each equation gives; with plain numerics it replaces nothing."""

    def __init__(self, rules: tuple[Rule, ...], *, plain: bool):
        super().__init__(rules)
        self._plain = plain
        self.taps: list[_Tap] = []
        self.values: list[Any] = []
        self._muted = False

    def eqn(self, eqn: Any, args: list[Any], feeds_psum: bool) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in _CALLS:
            return super().eqn(eqn, args, feeds_psum)
        if name in ("scan", "shard_map") and not self._muted:
            self.callers.append(self._source(eqn))
            try:
                return super().eqn(eqn, args, feeds_psum)
            finally:
                self.callers.pop()
        if self._plain:
            out = _plain(eqn, args)
        else:
            muted, self._muted = self._muted, self._muted or name in ("while", "cond")
            out = super().eqn(eqn, args, feeds_psum)
            self._muted = muted
        self._keep(eqn, out)
        return out

    def _keep(self, eqn: Any, out: Sequence[Any]) -> None:
        for value in () if self._muted else out:
            if isinstance(value, jax.Array) and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
                self.taps.append(_Tap((len(self.taps),), eqn.primitive.name, self._source(eqn)))
                self.values.append(value)

    def _inside(self, run: Callable[[], Any]) -> tuple[Any, list[_Tap], list[Any]]:
        """What `run` gives, and what is tapped in it."""
        outer = self.taps, self.values
        self.taps, self.values = [], []
        try:
            return run(), self.taps, self.values
        finally:
            self.taps, self.values = outer

    def _from(
        self, inside: list[_Tap], values: Sequence[Any], path: tuple[int | None, ...], *dims: str
    ) -> None:
        """Takes over taps of an inner jaxpr, whose values have got leading dimensions."""
        at = len(self.taps)
        for tap, value in zip(inside, values, strict=True):
            path_here = (at, *path, *tap.path)
            self.taps.append(dataclasses.replace(tap, path=path_here, dims=(*dims, *tap.dims)))
            self.values.append(value)

    def _scan(self, params: Any, args: list[Any]) -> list[Any]:
        if self._muted:
            return super()._scan(params, args)
        consts, carry, xs = (list(part) for part in params["ft_in"].update(args).unpack())
        taps: list[_Tap] = []

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            out, inside, values = self._inside(lambda: self._either(params["jaxpr"], [*consts, *carry, *xs]))
            taps[:] = inside
            return out[: len(carry)], (out[len(carry) :], values)

        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        final, (ys, values) = lax.scan(body, carry, xs, **options)
        if params["reverse"]:  # iterations in the order in which they ran
            values = [jnp.flip(value, axis=0) for value in values]
        self._from(taps, values, (None,), "scan")
        return [*final, *ys]

    def _shard_map(self, params: Any, args: list[Any]) -> list[Any]:
        if self._muted:
            return super()._shard_map(params, args)
        axes = tuple(name for name in params["mesh"].axis_names if name in params["newly_manual_axes"])
        taps: list[_Tap] = []

        def body(*args: Any) -> Any:
            out, inside, values = self._inside(lambda: self._either(params["jaxpr"], list(args)))
            taps[:] = inside
            return tuple(out), [lax.expand_dims(value, range(len(axes))) for value in values]

        out, values = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(tuple(params["out_specs"]), PartitionSpec(*axes)),
            axis_names=set(params["newly_manual_axes"]),
            check_vma=False,  # as in `invariant`; and every rank's own value is asked for
        )(*args)
        self._from(taps, values, (), *("rank" for _ in axes))
        return list(out)


def _plain(eqn: Any, args: list[Any]) -> Sequence[Any]:
    """The equation as it stands, without the types of check_vma=True, which is off here."""
    if eqn.primitive.name in ("pvary", "pbroadcast"):
        return args
    if eqn.primitive.name == "psum_invariant":
        return [lax.psum(x, eqn.params["axes"]) for x in args]
    return _bind(eqn, args)


def _expanded(taps: list[_Tap], values: list[np.ndarray]) -> tuple[list[Op], dict[str, np.ndarray]]:
    """One op an iteration, in the order in which they ran; ranks that hold the same are one."""
    found: list[tuple[tuple[int, ...], _Tap, tuple[int, ...], np.ndarray]] = []
    for tap, value in zip(taps, values, strict=True):
        scans = [i for i, dim in enumerate(tap.dims) if dim == "scan"]
        ordered = np.moveaxis(np.asarray(value), scans, range(len(scans)))
        for iteration in np.ndindex(*ordered.shape[: len(scans)]):
            left = iter(iteration)
            path = tuple(next(left) if step is None else step for step in tap.path)
            found.append((path, tap, iteration, ordered[iteration]))
    found.sort(key=lambda each: each[0])
    ops, kept = [], {}
    for number, (_, tap, iteration, value) in enumerate(found):
        ranks = tap.dims.count("rank")
        value, left_ranks = _without_replicas(value, ranks)
        iterations = "".join(f"[{i}]" for i in iteration)
        op = Op(
            name=f"{tap.primitive}{iterations} #{number}",
            op=tap.primitive,
            source=tap.source,
            dtype=value.dtype.name,
            shape=tuple(value.shape[len(left_ranks) :]),
            ranks=left_ranks,
        )
        ops.append(op)
        kept[op.name] = value
    return ops, kept


def _without_replicas(value: np.ndarray, ranks: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The value without those dimensions of ranks along which all bits are equal, and the sizes of the others."""
    for dim in range(ranks - 1, -1, -1):
        bits = bits_of(value)
        if (bits == np.take(bits, [0], axis=dim)).all():
            value, ranks = np.take(value, 0, axis=dim), ranks - 1
    return value, tuple(value.shape[:ranks])
