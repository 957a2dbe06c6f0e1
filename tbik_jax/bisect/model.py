"""Taps after every op of a model: numerics that keep what they give, in the program that `score` runs."""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ..bench.environment import environment
from ..buckets import bucket, capacity_bucket
from ..generation import NumericsName, TokenIds, _check_lengths, _token_rows
from ..layers import Numerics
from ..layers.base import TP
from ..mesh import mesh_label, resolve_mesh
from ..models.qwen3 import Qwen3
from ..program import Program
from ..run import Padded, Run
from ..steps import Engine
from .bits import bits_of, partial_fingerprints
from .trace import Op, Trace

#: What of a trace is kept whole: everything, fingerprints alone, or the ops whose names match a pattern of `fnmatch`.
Keep = Literal["all", "fingerprints"] | str

# Ops of a decoder layer and of the ends, as (method of `Numerics`, names of what it gives; "" is not kept).
_FIRST = (("embedding", ("embedding",)),)
_LAYER = (
    ("add_rms_norm", ("residual_in", "input_norm")),
    ("column_parallel", ("qkv",)),
    ("qk_norm_rope_cache", ("q", "k", "v")),
    ("attention", ("attention",)),
    ("row_parallel", ("o_proj",)),
    ("add_rms_norm", ("residual_mid", "post_attention_norm")),
    ("gated_column_parallel", ("gate_up",)),
    ("row_parallel", ("down_proj",)),
)
_LAST = (
    ("add_rms_norm", ("residual_out", "final_norm")),
    ("column_parallel", ("logits",)),
    ("vocab_statistics", ("row_max", "log_total", "best", "")),
)
#: Cut over tp along their first dimension behind [B, T]; the others are the same on every rank.
_CUT = frozenset(("qkv", "q", "k", "v", "attention", "gate_up", "logits"))
_LOGPROB = "logprob"

#: Names of the ops of a layer, in order; of the ends, which have no layer.
LAYER_OPS = tuple(name for _, names in _LAYER for name in names)
END_OPS = ("embedding", "residual_out", "final_norm", "logits", "row_max", "log_total", "best", _LOGPROB)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run a model.

    Attributes:
        mesh: axes data, fsdp, tp; None for the ambient mesh, else one device.
        numerics: "invariant", "plain" or "batch_invariant".
        batch_size: rows that run together; None for all sequences in one batch. Sequences are split over batches, and
            places that are left get random company.
        chunk: tokens of a row that a pass takes, 1 being what decoding does; None for all at once.
    """

    mesh: Mesh | None = None
    numerics: NumericsName = "invariant"
    batch_size: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or None")

    @property
    def label(self) -> str:
        """Such as "plain, tp=4, batch 8, chunk 1"."""
        parts = [self.numerics, mesh_label(resolve_mesh(self.mesh))]
        parts += [] if self.batch_size is None else [f"batch {self.batch_size}"]
        return ", ".join(parts if self.chunk is None else [*parts, f"chunk {self.chunk}"])


def trace_model(
    model: Qwen3,
    sequences: Sequence[TokenIds],
    configuration: Configuration,
    *,
    keep: Keep = "all",
    check: bool = True,
) -> Trace:
    """Runs a model over whole sequences, teacher-forced, and keeps what every op gave for every token.

    The layers are compiled one by one, as on a GPU by default.

    Args:
        model: a Qwen3; moved to the mesh if it lies elsewhere.
        sequences: token ids, at least two tokens each.
        configuration: how to run it.
        keep: "all" results, "fingerprints" of each token's row, or a pattern of `fnmatch` such as "layer 1[0-2]/*" of
            ops to keep whole, with fingerprints of the rest. 8B with 512 tokens in all is some 2 GB whole.
        check: run the program without taps as well and compare the log-probabilities: `Trace.faithful`.

    Raises:
        ValueError: an argument that cannot work, or memory that does not suffice.
        FloatingPointError: NaN or infinity in the logits of a sequence.
    """
    mesh = resolve_mesh(configuration.mesh)
    rows = _token_rows(sequences, model.config, "sequence")
    _check_lengths(rows, 0, model.config)
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"sequence {i} has 1 token and nothing to predict; give it at least 2")
    engine = Engine.create(model, mesh, configuration.numerics, scan_layers=False)
    size = len(rows) if configuration.batch_size is None else int(configuration.batch_size)
    longest = max(len(row) for row in rows)
    width = bucket(longest - 1) if configuration.chunk is None else min(int(configuration.chunk), longest - 1)
    collected = _Collected(whole=_whole(keep), layers=model.config.num_hidden_layers, tp=mesh.shape[TP])
    program = engine.steps.tapped_score(lambda numerics: _Taps(numerics, collected))
    same: bool | None = None
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        padded = Padded.of([*own, *_company(size - len(own), longest, model.config.vocab_size)], mesh)
        run = _TappedRun(engine, padded, longest, width)
        logprobs = run.tapped(program, len(own), collected)
        if check:
            untapped = run.untapped(len(own))
            equal = all(
                np.array_equal(bits_of(a), bits_of(b)) for a, b in zip(logprobs, untapped, strict=True)
            )
            same = equal if same is None else same and equal
    return Trace(
        kind="model",
        label=dataclasses.replace(configuration, mesh=mesh, batch_size=size).label,
        numerics=configuration.numerics,
        tp=mesh.shape[TP],
        environment=environment(),
        faithful=same,
        ops=tuple(collected.ops.values()),
        values={name: np.concatenate(parts) for name, parts in collected.values.items()},
        prints={name: np.concatenate(parts) for name, parts in collected.prints.items()},
        sequences=tuple(tuple(int(token) for token in row) for row in rows),
    )


def _whole(keep: Keep) -> Callable[[str], bool]:
    """Whether an op is kept whole; its few log-probabilities always are."""
    pattern = {"all": "*", "fingerprints": _LOGPROB}.get(keep, keep)
    return lambda name: name == _LOGPROB or fnmatch.fnmatchcase(name, pattern)


def _company(count: int, longest: int, vocabulary: int) -> list[np.ndarray]:
    """Random sequences for the rows that none of the caller's takes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest + 1, count)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


class _Taps:
    """Numerics that keep what they give, by name: as values or as fingerprints of the part that is here."""

    def __init__(self, numerics: Numerics, collected: "_Collected"):
        self._numerics, self._collected = numerics, collected
        self._calls = _calls(collected.layers)
        self._kept: dict[str, jax.Array] = {}

    def __getattr__(self, method: str) -> Any:
        inner = getattr(self._numerics, method)

        def call(*args: Any, **keywords: Any) -> Any:
            out = inner(*args, **keywords)
            expected, names = self._calls.pop(0)
            if method not in (expected, expected.replace("add_", "keep_")):
                raise ValueError(
                    f"the model calls {method} where {expected} was expected; its ops have no names here"
                )
            for name, value in zip(names, out if isinstance(out, tuple) else (out,), strict=True):
                if not name.endswith("/"):
                    self._keep(name, _written(name, value, *args))
            return out

        return call

    def _keep(self, name: str, value: jax.Array) -> None:
        self._collected.note(name, value)
        if not self._collected.whole(name):
            offset: Any = 0
            if _short(name) in _CUT:
                offset = lax.axis_index(TP) * int(np.prod(value.shape[2:]))
            value = partial_fingerprints(value, offset)
        self._kept[name] = value[None]

    def tapped(self) -> dict[str, jax.Array]:
        """All that was kept."""
        if self._calls:
            raise ValueError(f"the model did not call {self._calls[0][0]}; its ops have no names here")
        return self._kept


def _calls(layers: int) -> list[tuple[str, tuple[str, ...]]]:
    """The calls of a model in order, with the names of what each gives; one that ends in "/" is not kept."""
    calls: list[tuple[str, tuple[str, ...]]] = [*_FIRST]
    for i in range(layers):
        calls += [(method, tuple(f"layer {i}/{name}" for name in names)) for method, names in _LAYER]
    return [*calls, *((method, tuple(name or "/" for name in names)) for method, names in _LAST)]


def _written(name: str, value: jax.Array, *args: jax.Array) -> jax.Array:
    """Of a cache, what this pass has written to it."""
    if _short(name) not in ("k", "v"):
        return value
    positions = args[5]
    return lax.dynamic_slice_in_dim(value, positions[0, 0], positions.shape[1], axis=1)


def _short(name: str) -> str:
    return name.rpartition("/")[2]


@dataclasses.dataclass(kw_only=True)
class _Collected:
    """Rows of the caller's sequences, in their order.

    Attributes:
        whole: whether the op of that name is kept whole.
        layers: of the model.
        tp: ranks.
        ops: by name, in order.
        values: of ops that are kept whole, one array a batch.
        prints: of the others.
    """

    whole: Callable[[str], bool]
    layers: int
    tp: int
    ops: dict[str, Op] = dataclasses.field(default_factory=dict)
    values: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    prints: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)

    def note(self, name: str, value: jax.Array | np.ndarray) -> None:
        """That an op gives [B, T, ...] on a rank."""
        shape = value.shape[2:]
        if _short(name) in _CUT:
            shape = (shape[0] * self.tp, *shape[1:])
        layer = int(name.split("/")[0].removeprefix("layer ")) if "/" in name else None
        op = Op(name=name, op=_short(name), layer=layer, dtype=value.dtype.name, shape=shape)
        self.ops.setdefault(name, op)

    def add(self, name: str, passes: list[np.ndarray], lengths: Sequence[int]) -> None:
        """An op's results of one batch.

        Args:
            name: of the op.
            passes: of each pass the parts of all tp ranks, [tp, B, T, ...]; or fingerprints uint32 [tp, B, T, 2].
            lengths: tokens of the caller's rows, which come first.
        """
        parts = np.concatenate(passes, axis=2)
        flat = np.concatenate([parts[:, i, : length - 1] for i, length in enumerate(lengths)], axis=1)
        if _short(name) not in _CUT:
            joined = flat[0]
            if not (bits_of(flat) == bits_of(joined)[None]).all():
                self.ops[name] = dataclasses.replace(self.ops[name], ranks_agree=False)
        elif self.whole(name):
            joined = np.concatenate(list(flat), axis=1)
        else:
            joined = flat.sum(axis=0, dtype=np.uint32)
        (self.values if self.whole(name) else self.prints).setdefault(name, []).append(joined)


class _TappedRun(Run):
    """One batch, with taps and without."""

    def __init__(self, engine: Engine, batch: Padded, longest: int, width: int):
        starts = range(0, longest - 1, width)
        super().__init__(engine, batch, capacity_bucket(len(starts) * width), engine.steps.config)
        self._starts, self._width = starts, width

    def tapped(self, program: Program, rows: int, collected: _Collected) -> list[np.ndarray]:
        """Log-probabilities of the first `rows` rows, and what all ops gave for them."""
        self._prepare(program, *self._score_arguments(0, self._width))
        self.allocate(f"chunk below {self._width}, or keep='fingerprints'")
        logprobs: list[np.ndarray] = []
        finite: list[np.ndarray] = []
        taps: list[dict[str, np.ndarray]] = []
        for start in self._starts:
            arguments = self._score_arguments(start, self._width)
            self.cache, *out = program(self._engine.parameters, self.cache, *arguments)
            for kept, value in zip((logprobs, finite, taps), jax.device_get(out), strict=True):
                kept.append(value)  # type: ignore[attr-defined]
        lengths = [int(length) for length in self._batch.lengths[:rows]]
        for i, length in enumerate(lengths):
            good = np.concatenate(finite, axis=1)[i, : length - 1]
            if not good.all():
                raise FloatingPointError(
                    f"the logits of a sequence hold NaN or infinity after position {int(np.argmin(good))}; look for "
                    "NaN in the parameters"
                )
        for name in taps[0]:
            collected.add(name, [each[name] for each in taps], lengths)
        collected.note(_LOGPROB, logprobs[0])
        collected.add(_LOGPROB, [each[None] for each in logprobs], lengths)
        return self._own(logprobs, lengths)

    def untapped(self, rows: int) -> list[np.ndarray]:
        """Log-probabilities of the program that has no taps."""
        self.prepare_score(self._width)
        self.allocate(f"chunk below {self._width}")
        parts = [self.score(start, self._width)[0] for start in self._starts]
        return self._own(parts, [int(length) for length in self._batch.lengths[:rows]])

    def _own(self, parts: list[np.ndarray], lengths: list[int]) -> list[np.ndarray]:
        joined = np.concatenate(parts, axis=1)
        return [joined[i, : length - 1] for i, length in enumerate(lengths)]
