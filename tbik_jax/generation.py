"""`generate` and `score`: the same bits on any mesh, in any batch, with any chunking."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .mesh import BATCH_AXES, resolve_mesh
from .models.qwen3 import Qwen3, Qwen3Config
from .pallas_kernels.rope.api import rope_tables
from .sampling import SamplingArrays, SamplingParams, sampling_arrays
from .steps import Decoded, Engine

NumericsName = Literal["invariant", "plain"]
TokenIds = Sequence[int] | np.ndarray

_BUCKET = 64  # capacities are multiples of this, so that few programs are compiled
_SCORE_LOGITS = 1 << 26  # elements of logits that a score step may make on a device


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns, one entry a prompt.

    Attributes:
        tokens: int32 arrays, the new token ids; an end token is included.
        logprobs: float32 arrays of the same lengths, the log-probabilities of those tokens under the untempered,
            unfiltered distribution.
    """

    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]


def generate(
    params: Qwen3,
    prompts: Sequence[TokenIds],
    *,
    mesh: Mesh | None = None,
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    eos_id: int | Sequence[int] | None = None,
    numerics: NumericsName = "invariant",
    prefill_chunk: int = 512,
    scan_layers: bool | None = None,
) -> GenerateOutput:
    """Continues prompts.

    With invariant numerics the tokens and log-probabilities of a prompt are a function of the parameters, the prompt
    and its sampling parameters: bit for bit the same on any mesh, in any batch and row, with any `prefill_chunk`.

    Args:
        params: a Qwen3, from `load`, freshly made, trained or restored; moved to `mesh` if it lies elsewhere.
        prompts: token ids, at least one prompt and one token each; lengths may differ.
        mesh: axes data, fsdp (both cut the batch, which is padded inside) and tp (1, 2, 4 or 8); None for the ambient
            mesh, else one device.
        max_new_tokens: at most so many tokens a prompt.
        sampling: for all prompts, or one a prompt; greedy by default.
        eos_id: end token or tokens, which stop their row; None for no stop.
        numerics: "invariant", or "plain" for `jnp.dot`, `lax.psum` and ordinary softmax.
        prefill_chunk: prompt tokens that one forward pass takes; memory grows with it, bits do not change.
        scan_layers: run the layers as a scan over one compiled layer: compiles in seconds, but holds a second copy of
            the weights. None does so on the CPU. Bits do not change.

    Returns:
        Tokens and log-probabilities a prompt.

    Raises:
        ValueError: an argument that cannot work; the message says which and what would.
        FloatingPointError: NaN or infinity in the logits of a prompt; nothing is sampled from them.
    """
    mesh = resolve_mesh(mesh)
    rows = _token_rows(prompts, params.config, "prompt")
    max_new_tokens = _whole("max_new_tokens", max_new_tokens)
    chunk = _whole("prefill_chunk", prefill_chunk)
    _check_lengths(rows, max_new_tokens, params.config)
    eos = _token_set(eos_id, params.config)
    choices = _sampling_rows(sampling, len(rows))
    engine = Engine.create(params, mesh, numerics, scan_layers)
    batch = _padded(rows, mesh)
    longest = max(len(row) for row in rows)
    chunk = min(chunk, _bucket(longest - 1)) if longest > 1 else 1
    starts = range(0, longest - 1, chunk)
    capacity = _round_up(max(longest + max_new_tokens, len(starts) * chunk), _BUCKET)
    arrays = sampling_arrays(
        choices + [SamplingParams()] * (batch.size - len(rows)), params.config.vocab_size
    )
    run = _Run(engine, batch, capacity, params.config)
    decode = run.decode(max_new_tokens, arrays, any(choice.filters for choice in choices), eos)
    for start in starts:  # every token but the last, which the decode loop takes
        run.prefill(start, chunk, batch.lengths - 1)
    return _output(decode(), rows)


def score(
    params: Qwen3,
    sequences: Sequence[TokenIds],
    *,
    mesh: Mesh | None = None,
    numerics: NumericsName = "invariant",
    chunk: int | None = None,
    scan_layers: bool | None = None,
) -> list[np.ndarray]:
    """Teacher-forced log-probabilities, bit-equal to those that `generate` reports for the same tokens.

    Args:
        params: a Qwen3.
        sequences: token ids, prompt and continuation in one, at least one token each.
        mesh: as for `generate`.
        numerics: as for `generate`.
        chunk: tokens that one forward pass takes; by default as many as keep its logits small. Bits do not change.
        scan_layers: as for `generate`.

    Returns:
        A float32 array of length n - 1 a sequence of n tokens: entry i is the log-probability of token i + 1 given
        tokens 0 .. i. After `out = generate(params, [p])`, `score(params, [p + out])[0][len(p) - 1:]` is its logprobs.

    Raises:
        ValueError: an argument that cannot work.
        FloatingPointError: NaN or infinity in the logits of a sequence.
    """
    mesh = resolve_mesh(mesh)
    rows = _token_rows(sequences, params.config, "sequence")
    _check_lengths(rows, 0, params.config)
    engine = Engine.create(params, mesh, numerics, scan_layers)
    batch = _padded(rows, mesh)
    longest = max(len(row) for row in rows)
    if chunk is not None:
        _whole("chunk", chunk)
    if longest == 1:
        return [np.zeros((0,), np.float32) for _ in rows]
    if chunk is None:
        per_token = batch.size // _batch_ranks(mesh) * params.config.vocab_size // mesh.shape["tp"]
        chunk = max(1, min(512, _SCORE_LOGITS // per_token))
    chunk = min(_whole("chunk", chunk), _bucket(longest - 1))
    starts = range(0, longest - 1, chunk)
    run = _Run(engine, batch, _round_up(len(starts) * chunk, _BUCKET), params.config)
    parts = [run.score(start, chunk) for start in starts]
    logprobs = np.concatenate([part[0] for part in parts], axis=1)
    finite = np.concatenate([part[1] for part in parts], axis=1)
    for i, row in enumerate(rows):
        if not finite[i, : len(row) - 1].all():
            position = int(np.argmin(finite[i, : len(row) - 1]))
            raise FloatingPointError(_non_finite(f"sequence {i}", position + 1))
    return [logprobs[i, : len(row) - 1] for i, row in enumerate(rows)]


@dataclasses.dataclass(frozen=True)
class _Padded:
    """Rows as one array. Padding rows have length 0; padding tokens are 0."""

    tokens: np.ndarray  # int32 [size, longest]
    lengths: np.ndarray  # int32 [size]

    @property
    def size(self) -> int:
        return len(self.lengths)

    def window(self, start: int, width: int) -> np.ndarray:
        """Tokens start .. start + width - 1, zeros past the end."""
        part = self.tokens[:, start : start + width]
        return np.pad(part, ((0, 0), (0, width - part.shape[1])))

    def last(self) -> np.ndarray:
        return self.tokens[np.arange(self.size), np.maximum(self.lengths - 1, 0)]


class _Run:
    """One call's cache and its way through the steps."""

    def __init__(self, engine: Engine, batch: _Padded, capacity: int, config: Qwen3Config):
        self._engine, self._batch = engine, batch
        self._rows = NamedSharding(engine.steps.mesh, P(BATCH_AXES))
        self._everywhere = NamedSharding(engine.steps.mesh, P())
        self._cache = engine.steps.init_cache(batch.size, capacity)
        self._tables = self._replicate(rope_tables(capacity, config.head_dim, config.rope_theta))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._rows)

    def _replicate(self, tree: Any) -> Any:
        return jax.device_put(tree, self._everywhere)

    def prefill(self, start: int, width: int, lengths: np.ndarray) -> None:
        """Takes `width` tokens of each row from `start` on into the cache."""
        tokens, lengths = self._put((self._batch.window(start, width), lengths))
        at = self._replicate(np.int32(start))
        self._cache = self._engine.steps.prefill(
            self._engine.parameters, self._cache, tokens, lengths, at, self._tables
        )

    def decode(
        self, limit: int, sampling: SamplingArrays, filtered: bool, eos: np.ndarray
    ) -> Callable[[], Decoded]:
        """Begins to compile the decode loop; the call that is returned runs it, after prefill."""
        step = self._engine.steps.decode(_bucket(limit), filtered)
        rows = self._put((self._batch.last(), self._batch.lengths))
        count, ends = self._replicate((np.int32(limit), eos))
        rest = (*rows, count, self._put(sampling), ends, self._tables)
        step.start(self._engine.parameters, self._cache, *rest)

        def run() -> Decoded:
            self._cache, out = step(self._engine.parameters, self._cache, *rest)
            return jax.device_get(out)

        return run

    def score(self, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of `width` targets of each row from `start` on, and whether the logits were finite."""
        tokens, targets = self._batch.window(start, width), self._batch.window(start + 1, width)
        rows = self._put((tokens, targets, self._batch.lengths))
        at = self._replicate(np.int32(start))
        self._cache, *out = self._engine.steps.score(
            self._engine.parameters, self._cache, *rows, at, self._tables
        )
        return jax.device_get(tuple(out))


def _output(decoded: Decoded, rows: list[np.ndarray]) -> GenerateOutput:
    tokens, logprobs = [], []
    for i, row in enumerate(rows):
        if decoded.bad_step[i] < decoded.tokens.shape[1]:
            raise FloatingPointError(_non_finite(f"prompt {i}", len(row) + int(decoded.bad_step[i])))
        count = int((decoded.tokens[i] >= 0).sum())
        tokens.append(np.array(decoded.tokens[i, :count]))
        logprobs.append(np.array(decoded.logprobs[i, :count]))
    return GenerateOutput(tokens, logprobs)


def _non_finite(what: str, position: int) -> str:
    return (
        f"the logits of {what} for position {position} hold NaN or infinity; look for NaN in the parameters"
    )


def _token_rows(sequences: Sequence[TokenIds], config: Qwen3Config, what: str) -> list[np.ndarray]:
    if isinstance(sequences, str) or (
        isinstance(sequences, Sequence) and any(isinstance(s, str) for s in sequences)
    ):
        raise ValueError(f"{what}s are sequences of token ids, not text; tokenize them first")
    if not isinstance(sequences, Iterable):
        raise ValueError(f"{what}s must be a sequence of token-id sequences, not {type(sequences).__name__}")
    rows = [_token_row(sequence, f"{what} {i}", config) for i, sequence in enumerate(sequences)]
    if not rows:
        raise ValueError(f"no {what}s were given; pass at least one")
    return rows


def _token_row(sequence: TokenIds, what: str, config: Qwen3Config) -> np.ndarray:
    try:
        row = np.asarray(sequence)
    except ValueError:
        raise ValueError(f"{what} must be a flat sequence of whole numbers; it is nested unevenly") from None
    if row.size == 0:
        raise ValueError(f"{what} is empty; give it at least one token")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"{what} must be a flat sequence of whole numbers, not {row.dtype} of shape {row.shape}"
        )
    wrong = row[(row < 0) | (row >= config.vocab_size)]
    if wrong.size:
        raise ValueError(f"{what} holds token id {wrong[0]}; the vocabulary is 0 .. {config.vocab_size - 1}")
    return row.astype(np.int32)


def _check_lengths(rows: list[np.ndarray], new: int, config: Qwen3Config) -> None:
    limit = config.max_position_embeddings
    for i, row in enumerate(rows):
        if len(row) + new > limit:
            raise ValueError(
                f"prompt {i} of {len(row)} tokens and max_new_tokens={new} exceed max_position_embeddings={limit}; "
                f"shorten it by {len(row) + new - limit} tokens"
                if new
                else f"sequence {i} of {len(row)} tokens exceeds max_position_embeddings={limit}; "
                f"shorten it by {len(row) - limit} tokens"
            )


def _token_set(eos_id: int | Sequence[int] | None, config: Qwen3Config) -> np.ndarray:
    ids = [] if eos_id is None else np.atleast_1d(np.asarray(eos_id)).tolist()
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_id={token} is no token id; the vocabulary is 0 .. {config.vocab_size - 1}")
    return np.asarray(ids or [-1], np.int32)  # -1 matches no token


def _sampling_rows(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if sampling is None:
        sampling = SamplingParams()
    rows = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
    if len(rows) != count or not all(isinstance(row, SamplingParams) for row in rows):
        raise ValueError(
            f"sampling must be a SamplingParams, or one for each of the {count} prompts; got {len(rows)}"
        )
    return rows


def _whole(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value} must be a whole number of at least 1")
    return number


def _padded(rows: list[np.ndarray], mesh: Mesh) -> _Padded:
    """The rows and as many empty ones as make the batch a multiple of the ranks that share it."""
    size = _round_up(len(rows), _batch_ranks(mesh))
    tokens = np.zeros((size, max(len(row) for row in rows)), np.int32)
    lengths = np.zeros((size,), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return _Padded(tokens, lengths)


def _batch_ranks(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _bucket(value: int) -> int:
    """The next power of two from 16 on: the widths that get compiled."""
    return max(16, 1 << (value - 1).bit_length())
