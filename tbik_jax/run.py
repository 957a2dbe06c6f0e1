"""One call's way through the compiled steps: its padded rows, its cache, and what it hands out on the way."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .memory import Need, check_call, least_free
from .mesh import BATCH_AXES
from .models.qwen3 import Qwen3Config
from .models.qwen3.modules import init_cache
from .pallas_kernels.rope.api import rope_tables
from .sampling import SamplingArrays
from .steps import Decoded, DecodeState, Engine

#: Called with a prompt's index, its new token ids (int32) and their log-probabilities (float32).
OnTokens = Callable[[int, np.ndarray, np.ndarray], None]

_STREAMED_STEPS = 8  # steps between two looks at what was generated


@dataclasses.dataclass(frozen=True)
class Padded:
    """Rows as one array. Padding rows have length 0; padding tokens are 0."""

    tokens: np.ndarray  # int32 [size, longest]
    lengths: np.ndarray  # int32 [size]

    @classmethod
    def of(cls, rows: list[np.ndarray], mesh: Mesh) -> "Padded":
        """The rows and as many empty ones as make the batch a multiple of the ranks that share it."""
        ranks = batch_ranks(mesh)
        size = -(-len(rows) // ranks) * ranks
        tokens = np.zeros((size, max(len(row) for row in rows)), np.int32)
        lengths = np.zeros((size,), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        return cls(tokens, lengths)

    @property
    def size(self) -> int:
        return len(self.lengths)

    def window(self, start: int, width: int) -> np.ndarray:
        """Tokens start .. start + width - 1, zeros past the end."""
        part = self.tokens[:, start : start + width]
        return np.pad(part, ((0, 0), (0, width - part.shape[1])))

    def last(self) -> np.ndarray:
        return self.tokens[np.arange(self.size), np.maximum(self.lengths - 1, 0)]


def batch_ranks(mesh: Mesh) -> int:
    """Ranks that share a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Run:
    """One call's arrays and its way through the steps.

    Programs are compiled for the shapes of the cache before it exists, so that a call that does not fit is refused
    before anything large is allocated: `prepare_...`, then `allocate`, then the steps.
    """

    def __init__(self, engine: Engine, batch: Padded, capacity: int, config: Qwen3Config):
        """Places what is small.

        Args:
            engine: parameters and steps.
            batch: the call's rows.
            capacity: positions of the cache.
            config: of the model.
        """
        self._engine, self._batch, self._capacity = engine, batch, capacity
        self._mesh = engine.steps.mesh
        self._shapes = engine.steps.cache_shapes(batch.size, capacity)
        self.cache: Any = None
        self._tables = self._replicate(rope_tables(capacity, config.head_dim, config.rope_theta))
        self._prepared: list[tuple[Any, tuple[Any, ...]]] = []

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, P(BATCH_AXES)))

    def _replicate(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, P()))

    def _prepare(self, program: Any, *rest: Any) -> None:
        """Begins to compile a step for the arguments behind parameters and cache."""
        args = (self._engine.parameters, self._shapes, *rest)
        program.start(*args)
        self._prepared.append((program, args))

    def wait_until_compiled(self) -> None:
        """Returns when every prepared step is compiled; raises what compiling raised."""
        for program, args in self._prepared:
            program.temporary_bytes(*args)

    def allocate(self, smaller: str | None = None) -> None:
        """Makes the cache.

        Args:
            smaller: what the caller may choose smaller if computing takes too much, for the message.

        Raises:
            ValueError: it does not fit beside what the prepared steps need; the message says what would.
        """
        devices = list(self._mesh.devices.flat)
        if least_free(devices) is not None:  # else there is nothing to compare with, and no reason to wait
            need = Need(
                cache=sum(_shard_bytes(each) for each in jax.tree.leaves(self._shapes)),
                temporary=max(program.temporary_bytes(*args) for program, args in self._prepared),
                rows=self._batch.size // batch_ranks(self._mesh),
                positions=self._capacity,
                smaller=smaller,
            )
            check_call(need, devices)
        self.cache = init_cache(self._shapes)

    def _prefill_arguments(self, start: int, width: int) -> tuple[Any, ...]:
        # every token but the last, which the decode loop takes
        tokens, lengths = self._put((self._batch.window(start, width), self._batch.lengths - 1))
        return tokens, lengths, self._replicate(np.int32(start)), self._tables

    def prepare_prefill(self, width: int) -> None:
        """Begins to compile prefill of `width` tokens a row."""
        self._prepare(self._engine.steps.prefill, *self._prefill_arguments(0, width))

    def prefill(self, start: int, width: int) -> None:
        """Takes `width` tokens of each row from `start` on into the cache."""
        arguments = self._prefill_arguments(start, width)
        self.cache = self._engine.steps.prefill(self._engine.parameters, self.cache, *arguments)

    def prepare_decode(self, room: int, sampling: SamplingArrays, filtered: bool, eos: np.ndarray) -> None:
        """Places what decoding needs, and begins to compile its loop.

        Args:
            room: tokens a row that the output can hold.
            sampling: one row a prompt.
            filtered: whether any row uses top_k or top_p.
            eos: int32 [E], end tokens.
        """
        state = DecodeState.start(self._batch.last(), self._batch.lengths, room)
        specs = self._engine.steps.state_spec
        self.state = jax.tree.map(
            lambda value, spec: jax.device_put(value, NamedSharding(self._mesh, spec)), state, specs
        )
        self._rest = (self._put(sampling), self._replicate(eos), self._tables)
        self._decode_step = self._engine.steps.decode[filtered]
        self._prepare(self._decode_step, self.state, self._replicate(np.int32(0)), *self._rest)

    def decode(self, limit: int, on_tokens: OnTokens | None, prompts: int) -> Decoded:
        """Generates up to `limit` tokens a row.

        Args:
            limit: at most the room that was prepared.
            on_tokens: receives tokens a few steps after they were generated; what it raises ends the call.
            prompts: rows that are no padding.
        """
        if on_tokens is None:
            self.advance(limit)
            return jax.device_get(self.state.out)
        told = 0
        while True:
            self.advance(min(limit, told + _STREAMED_STEPS))
            step, active, out = jax.device_get((self.state.step, self.state.active, self.state.out))
            _tell(on_tokens, out, told, int(step), prompts)
            told = int(step)
            if told >= limit or not active.any():
                return out

    def advance(self, limit: int) -> None:
        """Runs the decode loop until `limit` tokens a row are there, or all rows have ended; does not wait for it."""
        args = (self._engine.parameters, self.cache, self.state, self._replicate(np.int32(limit)))
        self.cache, self.state = self._decode_step(*args, *self._rest)

    def _score_arguments(self, start: int, width: int) -> tuple[Any, ...]:
        tokens, targets = self._batch.window(start, width), self._batch.window(start + 1, width)
        rows = self._put((tokens, targets, self._batch.lengths))
        return *rows, self._replicate(np.int32(start)), self._tables

    def prepare_score(self, width: int) -> None:
        """Begins to compile scoring of `width` tokens a row."""
        self._prepare(self._engine.steps.score, *self._score_arguments(0, width))

    def score(self, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of `width` targets of each row from `start` on, and whether the logits were finite."""
        arguments = self._score_arguments(start, width)
        self.cache, *out = self._engine.steps.score(self._engine.parameters, self.cache, *arguments)
        return jax.device_get(tuple(out))


def _tell(on_tokens: OnTokens, out: Decoded, first: int, last: int, prompts: int) -> None:
    """Hands out the tokens of steps first .. last - 1; a row that has ended holds -1 there."""
    for i in range(prompts):
        new = out.tokens[i, first:last] >= 0
        if new.any():
            on_tokens(i, np.array(out.tokens[i, first:last][new]), np.array(out.logprobs[i, first:last][new]))


def _shard_bytes(each: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(each.sharding.shard_shape(each.shape))) * each.dtype.itemsize
