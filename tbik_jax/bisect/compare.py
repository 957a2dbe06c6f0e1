"""Two traces, op by op and bit by bit: which op is the first that differs."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .bits import bits_of, is_float, largest_ulp
from .trace import Op, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpDifference:
    """How one op's results differ between two runs.

    Attributes:
        name: of the op, unique in the runs.
        op: e.g. "o_proj", or a JAX primitive.
        layer: its decoder layer, if it has one.
        source: line of a user's function.
        elements: that were compared.
        differing: elements with other bits; None where only fingerprints were kept.
        rows: that were compared: tokens of a model, entries of the first dimension of a function's values.
        differing_rows: rows with other bits.
        max_ulp: largest distance of a pair in steps of the dtype, pairs with a NaN left out; None if there is none.
        max_abs: largest finite difference of a pair; None if there is none.
        nans: pairs with other bits of which one is a NaN.
        at: (sequence, position) of the first token that differs; of a function the row.
    """

    name: str
    op: str
    layer: int | None
    source: str | None
    elements: int
    differing: int | None
    rows: int
    differing_rows: int
    max_ulp: int | None = None
    max_abs: float | None = None
    nans: int = 0
    at: tuple[int, ...] | None = None

    @property
    def differs(self) -> bool:
        """Whether any bit does."""
        return self.differing_rows > 0

    def __str__(self) -> str:
        place = f" at {self.source}" if self.source else ""
        if not self.differs:
            return f"{self.name}{place}: {self.elements} elements, all the same bits"
        count = (
            f"{self.differing_rows} of {self.rows} rows (by fingerprint)"
            if self.differing is None
            else f"{self.differing} of {self.elements} elements in {self.differing_rows} of {self.rows} rows"
        )
        parts = [f"{self.name}{place}: {count} differ"]
        if self.max_ulp is not None:
            parts.append(
                f"by at most {self.max_ulp} ulp" + ("" if self.max_abs is None else f" ({self.max_abs:.3g})")
            )
        if self.nans:
            parts.append(f"{self.nans} of them NaN on one side")
        if self.at is not None and len(self.at) == 2:
            parts.append(f"first in sequence {self.at[0]}, position {self.at[1]}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """What two runs came to.

    Attributes:
        left: label of a run.
        right: label of the other.
        ops: those of both, in the order in which they ran.
        passed_over: names of ops that could not be compared, with the reason.
        promised: whether these two runs are promised the same bits.
        notes: what a reader should know, e.g. that taps changed the bits of a run.
    """

    left: str
    right: str
    ops: tuple[OpDifference, ...]
    passed_over: tuple[tuple[str, str], ...]
    promised: bool
    notes: tuple[str, ...]

    @property
    def first(self) -> OpDifference | None:
        """The first op that differs, or None."""
        return next((op for op in self.ops if op.differs), None)

    @property
    def same_bits(self) -> bool:
        """Whether no op differs."""
        return self.first is None

    @property
    def broken(self) -> bool:
        """Whether the two differ although the same bits are promised."""
        return self.promised and not self.same_bits

    def __str__(self) -> str:
        differing = sum(op.differs for op in self.ops)
        lines = [f"{self.left}  against  {self.right}"]
        if self.first is None:
            lines.append(f"all {len(self.ops)} ops have the same bits")
        else:
            lines += [f"first op that differs: {self.first}", f"{differing} of {len(self.ops)} ops differ"]
        if self.broken:
            lines.append("these runs are promised the same bits: this is a fault")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return dataclasses.asdict(self) | {
            "same_bits": self.same_bits,
            "broken": self.broken,
            "first": None if self.first is None else dataclasses.asdict(self.first),
        }


def compare(left: Trace, right: Trace) -> Bisection:
    """Compares what the ops of two runs gave, as integers: -0.0 and NaN count.

    The rows of a model are matched by their sequences, wherever these stood in a batch; sequences that only one trace
    has are left out. Values of a function whose batch sizes differ are matched by `Call.rows`.

    Args:
        left: a run.
        right: another of the same model or function, from this machine or another one.

    Raises:
        ValueError: the traces have nothing to compare.
    """
    if left.kind != right.kind:
        raise ValueError(f"a trace of a {left.kind} has nothing to compare with one of a {right.kind}")
    compared: list[OpDifference] = []
    passed_over: list[tuple[str, str]] = []
    for found in _model(left, right) if left.kind == "model" else _functions(left, right):
        if isinstance(found, OpDifference):
            compared.append(found)
        else:
            passed_over.append(found)
    if not compared:
        raise ValueError(f"no op of {left.label} can be compared with one of {right.label}")
    return Bisection(
        left=left.label,
        right=right.label,
        ops=tuple(compared),
        passed_over=tuple(passed_over),
        promised=_promised(left, right),
        notes=tuple(_notes(left, right, passed_over)),
    )


def _promised(left: Trace, right: Trace) -> bool:
    """Whether the contract says that the two have the same bits."""
    if left.numerics != right.numerics or _machine(left) != _machine(right):
        return False
    return left.numerics == "invariant" or (left.numerics == "batch_invariant" and left.tp == right.tp)


def _machine(trace: Trace) -> tuple[Any, ...]:
    versions = trace.environment["versions"]
    return trace.environment["device"], versions["jax"], versions["jaxlib"]


def _notes(left: Trace, right: Trace, passed_over: list[tuple[str, str]]) -> Iterator[str]:
    for trace in (left, right):
        if trace.faithful is False:
            yield f"with taps, {trace.label} ends in other bits than without: XLA fuses it differently"
        split = [op.name for op in trace.ops if not op.ranks_agree]
        if split:
            yield f"of {trace.label}, ranks that should agree differ from {split[0]} on"
    if _machine(left) != _machine(right):
        yield f"other machines or versions: {' '.join(_machine(left))}, {' '.join(_machine(right))}"
    if passed_over:
        name, reason = passed_over[0]
        yield f"{len(passed_over)} ops were not compared, the first being {name}: {reason}"


# --- models ------------------------------------------------------------------------------------------------------


def _model(left: Trace, right: Trace) -> Iterator[OpDifference | tuple[str, str]]:
    names = [op.name for op in left.ops]
    if names != [op.name for op in right.ops]:
        raise ValueError(
            f"{left.label} has {len(names)} ops and {right.label} {len(right.ops)}: other models"
        )
    pairs = _pairs(left, right)
    if not pairs:
        raise ValueError(f"{left.label} and {right.label} have no sequence in common")
    rows = [
        np.concatenate([_rows_of(trace, pair[side]) for pair in pairs])
        for side, trace in enumerate((left, right))
    ]
    where = [(i, t) for i, _ in pairs for t in range(len(left.sequences[i]) - 1)]
    for a, b in zip(left.ops, right.ops, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise ValueError(
                f"{a.name} is {a.dtype} {a.shape} in one trace and {b.dtype} {b.shape} in the other"
            )
        if a.name in left.values and a.name in right.values:
            found = _difference(a, left.values[a.name][rows[0]], right.values[a.name][rows[1]])
        else:
            prints = left.fingerprints(a.name)[rows[0]], right.fingerprints(a.name)[rows[1]]
            differing = np.flatnonzero((prints[0] != prints[1]).any(axis=1))
            found = OpDifference(
                **_named(a),
                elements=len(where) * int(np.prod(a.shape)),
                differing=0 if not differing.size else None,
                rows=len(where),
                differing_rows=differing.size,
                at=(int(differing[0]),) if differing.size else None,
            )
        yield found if found.at is None else dataclasses.replace(found, at=where[found.at[0]])


def _pairs(left: Trace, right: Trace) -> list[tuple[int, int]]:
    """The same sequences in both: of one that stands there several times, the first with the first and so on."""
    places: dict[tuple[int, ...], list[int]] = {}
    for j, sequence in enumerate(right.sequences):
        places.setdefault(sequence, []).append(j)
    return [(i, places[each].pop(0)) for i, each in enumerate(left.sequences) if places.get(each)]


def _rows_of(trace: Trace, sequence: int) -> np.ndarray:
    """Rows of a sequence in the arrays of a trace."""
    begins = np.cumsum([0, *(len(each) - 1 for each in trace.sequences)])
    return np.arange(begins[sequence], begins[sequence + 1])


def _named(op: Op) -> dict[str, Any]:
    return {"name": op.name, "op": op.op, "layer": op.layer, "source": op.source}


def _difference(op: Op, a: np.ndarray, b: np.ndarray) -> OpDifference:
    """Of two arrays of one shape and dtype, whose first dimension counts rows."""
    a, b = (x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1) for x in (a, b))
    other = bits_of(a) != bits_of(b)
    found = OpDifference(
        **_named(op),
        elements=other.size,
        differing=int(other.sum()),
        rows=len(other),
        differing_rows=int(other.any(axis=1).sum()),
    )
    if not found.differs:
        return found
    x, y = a[other], b[other]
    with np.errstate(invalid="ignore"):
        wide = np.abs(x.astype(np.float64) - y.astype(np.float64))
    finite = wide[np.isfinite(wide)]
    nans = (
        int((np.isnan(x.astype(np.float64)) | np.isnan(y.astype(np.float64))).sum())
        if is_float(x.dtype)
        else 0
    )
    return dataclasses.replace(
        found,
        max_ulp=largest_ulp(x, y),
        max_abs=float(finite.max()) if finite.size else None,
        nans=nans,
        at=(int(np.flatnonzero(other.any(axis=1))[0]),),
    )


# --- functions ---------------------------------------------------------------------------------------------------


def _functions(left: Trace, right: Trace) -> Iterator[OpDifference | tuple[str, str]]:
    if left.batch == right.batch and left.rows != right.rows:
        raise ValueError(
            f"batches of one size, {left.batch}, with other rows: which dimension is the batch cannot be told; "
            "compare each with a batch of another size"
        )
    if left.rows is not None and right.rows is not None and len(left.rows) != len(right.rows):
        raise ValueError(
            f"{len(left.rows)} rows of {left.label} have no counterparts in {len(right.rows)} rows of {right.label}; "
            "name them with Call.rows"
        )
    matcher = difflib.SequenceMatcher(
        None, [_key(op) for op in left.ops], [_key(op) for op in right.ops], False
    )
    for tag, i, until_i, j, until_j in matcher.get_opcodes():
        if tag != "equal":
            for trace, ops in ((left, left.ops[i:until_i]), (right, right.ops[j:until_j])):
                yield from ((op.name, f"only {trace.label} has it") for op in ops)
            continue
        for a, b in zip(left.ops[i:until_i], right.ops[j:until_j], strict=True):
            yield _compared(left, a, right, b)


def _key(op: Op) -> tuple[str, str | None]:
    """An op of a function: its primitive, line and iterations, without the folder of the file."""
    iterations = "".join(re.findall(r"\[\d+\]", op.name.split(" ")[0]))
    return op.op + iterations, op.source and re.sub(r"^.*[/\\]", "", op.source)


def _compared(left: Trace, a: Op, right: Trace, b: Op) -> OpDifference | tuple[str, str]:
    """What an op's values differ in; or the op's name, and why they cannot be compared.

    Shapes can allow several ways to put values of ranks together, and to find a row in a batch: squares, for one.
    Values that agree in the first of them are the same. Those that agree in another alone cannot be told from a
    permutation, and are not compared; of those that agree in none the nearest are reported.
    """
    if a.dtype != b.dtype:
        return a.name, f"it is {a.dtype} in one run and {b.dtype} in the other"
    nearest: OpDifference | None = None
    for way, (x, y) in enumerate(_ways(left, a, right, b)):
        found = _difference(a, x, y)
        if way > 0 and not found.differs:
            return (
                a.name,
                f"its shapes {_shown(a)} and {_shown(b)} fit in several ways, and it agrees in one alone",
            )
        if nearest is None or (found.differing or 0) < (nearest.differing or 0):
            nearest = found
        if not nearest.differs:
            break
    if nearest is None:
        reason = (
            f"its shapes {_shown(a)} and {_shown(b)} have no common whole (partial sums, or another batch)"
        )
        return a.name, reason
    return nearest


def _ways(left: Trace, a: Op, right: Trace, b: Op) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values of an op in both runs, of one shape, in each way that their shapes allow."""
    x, y = left.values[a.name], right.values[b.name]
    if a.ranks == b.ranks and a.shape == b.shape:  # on one mesh each rank has its counterpart
        yield x, y
        return
    for shape_x, shape_y in itertools.product(_joined_shapes(a), _joined_shapes(b)):
        for rows in _alignments(shape_x[1], shape_y[1], left, right):
            joined = _join(x, len(a.ranks), shape_x[0]), _join(y, len(b.ranks), shape_y[0])
            yield _selected(joined[0], rows, 0), _selected(joined[1], rows, 1)


def _shown(op: Op) -> str:
    return f"{op.shape}" + (f" on {op.ranks} ranks" if op.ranks else "")


def _joined_shapes(op: Op) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Dimensions along which each dimension of ranks may be joined, and the shape of the whole."""
    for dims in itertools.product(range(len(op.shape)), repeat=len(op.ranks)):
        shape = list(op.shape)
        for dim, ranks in zip(dims, op.ranks, strict=True):
            shape[dim] *= ranks
        yield dims, tuple(shape)


def _join(x: np.ndarray, ranks: int, dims: Sequence[int]) -> np.ndarray:
    """The whole of [ranks..., local shape], each dimension of ranks joined along a dimension of the local shape."""
    for left in range(ranks, 0, -1):  # the last dimension of ranks changes fastest
        x = np.concatenate(np.split(x, x.shape[left - 1], axis=left - 1), axis=left + dims[left - 1])
        x = np.squeeze(x, axis=left - 1)
    return x


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How the rows of two batches correspond.

    Attributes:
        axis: the one that holds the rows; None where values correspond as they are.
        batches: sizes.
        rows: of each batch, those that correspond.
        fastest: whether the batch is the fastest of what is folded into that axis, and not the slowest.
    """

    axis: int | None
    batches: tuple[int, int] = (1, 1)
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    fastest: bool = False


def _alignments(a: tuple[int, ...], b: tuple[int, ...], left: Trace, right: Trace) -> Iterator[_Rows]:
    """How values of these shapes may correspond: as they are, or along the one axis that has the batches' sizes."""
    if a == b:  # the batches are equal, or the value knows no batch
        yield _Rows(None)
        return
    if (
        left.batch is None
        or right.batch is None
        or left.rows is None
        or right.rows is None
        or len(a) != len(b)
    ):
        return
    axes = [i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
    if len(axes) > 1 or a[axes[0]] * right.batch != b[axes[0]] * left.batch or a[axes[0]] % left.batch:
        return
    for fastest in (False, True) if a[axes[0]] > left.batch else (False,):
        yield _Rows(axes[0], (left.batch, right.batch), (left.rows, right.rows), fastest)


def _selected(x: np.ndarray, rows: _Rows, side: int) -> np.ndarray:
    """The rows that are compared, first."""
    if rows.axis is None:
        return x
    x = np.moveaxis(x, rows.axis, 0)
    if rows.fastest:
        x = np.swapaxes(x.reshape(-1, rows.batches[side], *x.shape[1:]), 0, 1)
    else:
        x = x.reshape(rows.batches[side], -1, *x.shape[1:])
    return x[list(rows.rows[side])]
