"""What every op of one run gave, with where it ran: in memory, or in a file that another machine compares."""

import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .bits import bits_of, row_fingerprints

_FORMAT = 1
_HEADER = "tbik_jax.bisect"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One op of a trace.

    Attributes:
        name: unique in the trace, e.g. "layer 3/o_proj".
        op: e.g. "o_proj", or a JAX primitive.
        layer: its decoder layer, if it has one.
        source: line of a user's function.
        dtype: of its result.
        shape: of its result. Of a model: that of one token.
        ranks: leading dimensions of the array that count ranks whose results differ; of a function only.
        ranks_agree: whether ranks that should hold the same bits do.
    """

    name: str
    op: str
    layer: int | None = None
    source: str | None = None
    dtype: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    ranks_agree: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A run, op by op.

    Attributes:
        kind: "model", whose arrays have one row a token, [tokens of all sequences, ...], or "function".
        label: of the configuration, e.g. "plain, tp=4, batch 8".
        numerics: of the run.
        tp: tensor-parallel ranks of a model's run.
        environment: devices and versions.
        faithful: whether the run with taps ended in the bits of the run without; None if that was not tried.
        ops: in the order in which they ran.
        values: results by op name, of the ops that were kept whole.
        prints: uint32 [tokens, 2] by op name: fingerprints of the rows of the others; of a model only.
        sequences: token ids of each sequence of a model; a sequence of n tokens has n - 1 rows.
        batch: size of a function's batch, if it has one.
        rows: of a function's batch, those to compare.
    """

    kind: Literal["model", "function"]
    label: str
    numerics: str
    tp: int = 1
    environment: dict[str, Any]
    faithful: bool | None
    ops: tuple[Op, ...]
    values: Mapping[str, np.ndarray]
    prints: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sequences: tuple[tuple[int, ...], ...] = ()
    batch: int | None = None
    rows: tuple[int, ...] | None = None

    def fingerprints(self, name: str) -> np.ndarray:
        """uint32 [rows, 2] of an op's rows, as kept or from its values."""
        return self.prints[name] if name in self.prints else row_fingerprints(self.values[name])

    def save(self, file: str | Path) -> None:
        """Writes the trace to a safetensors file, whole or not at all.

        Args:
            file: its name; one that exists is replaced.
        """
        target = Path(file)
        header = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("values", "prints", "ops")
        }
        header |= {"format": _FORMAT, "ops": [dataclasses.asdict(op) for op in self.ops]}
        tensors = {}
        for i, op in enumerate(self.ops):  # bits, since numpy's own formats know no bfloat16
            if op.name in self.values:
                tensors[f"values/{i}"] = np.ascontiguousarray(bits_of(self.values[op.name]))
            else:
                tensors[f"prints/{i}"] = np.ascontiguousarray(self.prints[op.name])
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def load_trace(file: str | Path) -> Trace:
    """A trace that `Trace.save` wrote, on this or another machine; arrays are read when they are needed.

    Raises:
        ValueError: the file is no trace, or one of another format.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a trace: {error}") from None
    if header is None or header.get("format") != _FORMAT:
        found = "no trace" if header is None else f"a trace of format {header.get('format')}"
        raise ValueError(f"{file} is {found}; Trace.save of this version writes format {_FORMAT}")
    del header["format"]
    for name in ("sequences", "rows"):
        if header[name] is not None:
            header[name] = tuple(tuple(each) if isinstance(each, list) else each for each in header[name])
    ops = [Op(**{**op, "shape": tuple(op["shape"]), "ranks": tuple(op["ranks"])}) for op in header.pop("ops")]
    return Trace(
        **header,
        ops=tuple(ops),
        values=_Stored(Path(file), "values", ops),
        prints=_Stored(Path(file), "prints", ops),
    )


class _Stored(Mapping[str, np.ndarray]):
    """Arrays of a file, each read when it is asked for and not kept."""

    def __init__(self, file: Path, part: str, ops: list[Op]):
        self._file = file
        with safe_open(file, framework="numpy") as opened:
            names = set(opened.keys())
        self._known = {op.name: (f"{part}/{i}", op) for i, op in enumerate(ops) if f"{part}/{i}" in names}
        self._part = part

    def __getitem__(self, name: str) -> np.ndarray:
        tensor, op = self._known[name]
        with safe_open(self._file, framework="numpy") as opened:
            stored = opened.get_tensor(tensor)
        return stored.view(jnp.dtype(op.dtype)) if self._part == "values" else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
