"""`generate` and `score`: the same bits on any mesh, in any batch, with any chunking."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from .buckets import bucket, capacity_bucket
from .mesh import resolve_mesh
from .models.qwen3 import Qwen3, Qwen3Config
from .run import OnTokens, Padded, Run, batch_ranks
from .sampling import SamplingParams, sampling_arrays
from .steps import Decoded, Engine

NumericsName = Literal["invariant", "plain", "batch_invariant"]
TokenIds = Sequence[int] | np.ndarray

_PASS_TOKENS = 8192  # of all rows of a device in one pass of prefill: enough to keep the tensor cores busy
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
    prefill_chunk: int | None = None,
    scan_layers: bool | None = None,
    overlap_prefill: bool = False,
    on_tokens: OnTokens | None = None,
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
        numerics: "invariant"; "plain" for `jnp.dot`, `lax.psum` and ordinary softmax; or "batch_invariant" for the
            invariant ops with `lax.psum` over tp: the same bits in any batch, others for another tp.
        prefill_chunk: tokens of a prompt that one forward pass takes; memory grows with it, bits do not change. By
            default as many as make some thousand tokens a device, all prompts together.
        scan_layers: run the layers as a scan over one compiled layer: compiles in seconds, but holds a second copy of
            the weights. None does so on the CPU. Bits do not change.
        overlap_prefill: over tp, let two halves of a pass of 2048 tokens or more take turns, so that sums over ranks
            are under way while matmuls run. Quicker prefill on GPUs of one host; experimental, see
            `docs/inference.md`. With tp=1, fsdp > 1, layers as a scan or other numerics it does nothing. Bits do not
            change.
        on_tokens: called with (prompt index, new token ids, their log-probabilities) every few steps while the rest is
            being generated; all calls together are the result. What it raises ends the generation.

    Returns:
        Tokens and log-probabilities a prompt.

    Raises:
        ValueError: an argument that cannot work, or a call that the devices' memory does not hold, before anything is
            allocated; the message says which and what would.
        FloatingPointError: NaN or infinity in the logits of a prompt; nothing is sampled from them.
    """
    mesh = resolve_mesh(mesh)
    rows = _token_rows(prompts, params.config, "prompt")
    max_new_tokens = _whole("max_new_tokens", max_new_tokens)
    if prefill_chunk is not None:
        _whole("prefill_chunk", prefill_chunk)
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(f"on_tokens={on_tokens!r} must be callable as on_tokens(index, tokens, logprobs)")
    _check_lengths(rows, max_new_tokens, params.config)
    eos = _token_set(eos_id, params.config)
    choices = _sampling_rows(sampling, len(rows))
    engine = Engine.create(params, mesh, numerics, scan_layers, overlap_prefill)
    batch = Padded.of(rows, mesh)
    longest = max(len(row) for row in rows)
    chunk = _chunk(prefill_chunk, longest - 1, batch.size // batch_ranks(mesh))
    starts = range(0, longest - 1, chunk)
    capacity = capacity_bucket(max(longest + max_new_tokens, len(starts) * chunk))
    arrays = sampling_arrays(
        choices + [SamplingParams()] * (batch.size - len(rows)), params.config.vocab_size
    )
    run = Run(engine, batch, capacity, params.config)
    run.prepare_decode(bucket(max_new_tokens), arrays, any(choice.filters for choice in choices), eos)
    if starts:
        run.prepare_prefill(chunk)
    run.allocate(f"prefill_chunk below {chunk}")
    for start in starts:
        run.prefill(start, chunk)
    return _output(run.decode(max_new_tokens, on_tokens, len(rows)), rows)


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
    batch = Padded.of(rows, mesh)
    longest = max(len(row) for row in rows)
    if chunk is not None:
        _whole("chunk", chunk)
    if longest == 1:
        return [np.zeros((0,), np.float32) for _ in rows]
    per_rank = batch.size // batch_ranks(mesh)
    if chunk is None:
        chunk = max(1, min(512, _SCORE_LOGITS // (per_rank * params.config.vocab_size // mesh.shape["tp"])))
    chunk = _chunk(chunk, longest - 1, per_rank)
    starts = range(0, longest - 1, chunk)
    run = Run(engine, batch, capacity_bucket(len(starts) * chunk), params.config)
    run.prepare_score(chunk)
    run.allocate(f"chunk below {chunk}")
    parts = [run.score(start, chunk) for start in starts]
    logprobs = np.concatenate([part[0] for part in parts], axis=1)
    finite = np.concatenate([part[1] for part in parts], axis=1)
    for i, row in enumerate(rows):
        if not finite[i, : len(row) - 1].all():
            position = int(np.argmin(finite[i, : len(row) - 1]))
            raise FloatingPointError(_non_finite(f"sequence {i}", position + 1))
    return [logprobs[i, : len(row) - 1] for i, row in enumerate(rows)]


def _chunk(asked: int | None, tokens: int, rows: int) -> int:
    """Tokens of a row that one forward pass takes: what was asked, or some `_PASS_TOKENS` with all rows.

    Not more than the bucket of the longest row.
    """
    if asked is None:
        asked = max(64, _PASS_TOKENS // rows)
        passes = max(1, -(-tokens // asked))
        return bucket(max(1, -(-tokens // passes)))  # all passes alike, so that the last is not nearly empty
    return min(asked, bucket(max(1, tokens)))


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
    rows: list[Any] = [sampling] * count if isinstance(sampling, SamplingParams) else [sampling]
    if isinstance(sampling, Iterable):
        rows = list(sampling)
    if not all(isinstance(row, SamplingParams) for row in rows):
        raise ValueError(f"sampling must be a SamplingParams, or one for each prompt, not {sampling!r}")
    if len(rows) != count:
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
