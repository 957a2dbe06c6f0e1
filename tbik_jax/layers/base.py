"""The operations a model calls, and where its ranks stand in the mesh."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_all_gather
from ..pallas_kernels.embedding.api import embedding
from ..pallas_kernels.few_rows.boards import Boards
from ..pallas_kernels.few_rows.rest import LayerRest
from ..pallas_kernels.sampling.api import Draw, sample_argmax

TP = "tp"
FSDP = "fsdp"
DATA = "data"


class VocabStatistics(NamedTuple):
    """What there is to know of a row of logits over the whole vocabulary, the same on every tp rank.

    Attributes:
        row_max: float32 [...], the largest logit.
        log_total: float32 [...], the logarithm of the sum of exp(logit - row_max).
        best: int32 [...], the lowest vocabulary id with the largest logit.
        finite: bool [...], whether no logit is NaN or infinite; the rest means nothing where one is.
    """

    row_max: jax.Array
    log_total: jax.Array
    best: jax.Array
    finite: jax.Array


class Numerics(Protocol):
    """Every float operation of a model's forward pass. Hashable, so that compiled steps are cached by it."""

    def embedding(self, ids: jax.Array, table: jax.Array) -> jax.Array:
        """Rows ids [...] of a table whose part on this rank is [V/tp, D]: [..., D]."""
        ...

    def column_parallel(
        self,
        x: jax.Array,
        w: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        """x [..., K] times this rank's rows of w, stored [N/tp, K]: [..., N/tp]; K is whole."""
        ...

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [..., K/tp] @ w [K/tp, N], added over the tp axis and rounded to x's dtype once."""
        ...

    def rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
        """RMSNorm over the last axis."""
        ...

    def keep_rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        """x, which goes on beside it, and RMSNorm of x: `add_rms_norm` with nothing to add."""
        ...

    def add_rms_norm(
        self, x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """The residual sum x + y, and RMSNorm of it."""
        ...

    def qk_norm_rope_cache(
        self,
        qkv: jax.Array,
        q_scale: jax.Array,
        k_scale: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        k_cache: jax.Array,
        v_cache: jax.Array,
        *,
        eps: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H] and the caches [B, S, K, H], from qkv [B, T, K, N/K + 2, H]: see `qk_norm_rope`."""
        ...

    def gated_column_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """SwiGLU of x [..., K] times this rank's gates and then its values, w [2F/tp, K]: [..., F/tp]."""
        ...

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        """Causal attention of q [B, T, N, H] over the cache k, v [B, S, K, H]."""
        ...

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The residual add, where no norm follows at once."""
        ...

    def vocab_statistics(self, logits: jax.Array) -> VocabStatistics:
        """Statistics of float32 logits [..., V/tp] over the whole vocabulary."""
        ...

    def draw(
        self,
        logits: jax.Array,
        row_max: jax.Array,
        temperature: jax.Array,
        key: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens int32 [B] sampled from float32 logits [B, V/tp] (see `sample_argmax`), and their logits."""
        ...


class Stream(NamedTuple):
    """A residual stream, and what is still to be added to it.

    Attributes:
        x: [B, T, D].
        pending: like x; or, where the ops behind take it (see `few_rows`), the subtrees of a sum, float32 [P, B, T, D],
            or a layer's ops that have yet to run.
        boards: what `rest_of_layer` hands on to its next call.
    """

    x: jax.Array
    pending: jax.Array | LayerRest | None = None
    boards: Boards | None = None


#: What yields, where others may take a turn, what its next turn takes and what this one computed; see `turns`.
type Turns[T] = Generator[tuple[Any, Any], Any, T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """What a model needs to know inside `shard_map`.

    Attributes:
        numerics: the operations.
        fsdp_dims: (parameter name, dimension) of the parameters that are cut over the fsdp axis.
    """

    numerics: Numerics
    fsdp_dims: tuple[tuple[str, int], ...] = ()

    def weight(self, name: str, value: jax.Array) -> jax.Array:
        """A parameter as this rank uses it: gathered over fsdp (which moves bits), still cut over tp."""
        for known, dim in self.fsdp_dims:
            if known == name:
                return tree_all_gather(value, FSDP, axis=dim, tiled=True)
        return value

    def row_parallel(self, x: jax.Array, w: jax.Array) -> Turns[jax.Array]:
        """`Numerics.row_parallel`, here in one turn."""
        yield from ()
        return self.numerics.row_parallel(x, w)

    def put_off(self, stream: Stream, rest: Callable[[], LayerRest]) -> Stream | None:
        """A layer's output with the ops behind its attention pending, or None: then the layer runs them."""
        return None

    def total(self, stream: Stream) -> jax.Array:
        """The residual stream [B, T, D], with what is still to be added to it."""
        assert not isinstance(stream.pending, LayerRest)
        return stream.x if stream.pending is None else self.numerics.add(stream.x, stream.pending)

    def norm(self, stream: Stream, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        """`total`, and RMSNorm of it."""
        assert not isinstance(stream.pending, LayerRest)
        if stream.pending is None:
            return self.numerics.keep_rms_norm(stream.x, scale, eps=eps)
        return self.numerics.add_rms_norm(stream.x, stream.pending, scale, eps=eps)

    def norm_column_parallel(
        self, stream: Stream, scale: jax.Array, w: jax.Array, *, eps: float, gated: bool = False
    ) -> tuple[Stream, jax.Array]:
        """`total`, nothing pending, and `Numerics.column_parallel`, or `gated_column_parallel`, of RMSNorm of it."""
        x, normalised = self.norm(stream, scale, eps=eps)
        ops = self.numerics
        stream = stream._replace(x=x, pending=None)
        return stream, ops.gated_column_parallel(normalised, w) if gated else ops.column_parallel(
            normalised, w
        )


class TrainingNumerics(Numerics, Protocol):
    """`Numerics` whose operations have gradients, for whole sequences without a cache."""

    def weight(self, value: jax.Array, fsdp_dim: int | None) -> jax.Array:
        """This rank's part of a parameter, fp32, as its matmuls take it: values of the activations' dtype, as fp32.

        Its gradient is fp32 and added up over data and fsdp.
        """
        ...

    def token_logprobs(self, hidden: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
        """Log-probabilities float32 [B, T] of targets [B, T], from hidden [B, T, D] and this rank's w [V/tp, D]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingParallel(Parallel):
    """`Parallel` whose weights have gradients."""

    numerics: TrainingNumerics

    def weight(self, name: str, value: jax.Array) -> jax.Array:
        """See `TrainingNumerics.weight`."""
        dim = next((dim for known, dim in self.fsdp_dims if known == name), None)
        return self.numerics.weight(value, dim)


def vocab_embedding(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of a table [V/tp, D] cut over tp; exact.

    Each id lies on one rank. The others contribute zero bits, and the sum is one of integers: a float sum would turn
    -0.0 into +0.0 on a mesh with tp > 1.
    """
    rows = embedding(ids, table, offset=lax.axis_index(TP) * table.shape[0])
    return select_over_tp(rows)


def select_over_tp(x: jax.Array) -> jax.Array:
    """The bits of the one rank whose `x` is not zero bits; an integer sum over tp.

    Args:
        x: of 32 bits an element; or of 16, of which two make a word where the last dimension is even.
    """
    if lax.axis_size(TP) == 1:
        return x
    if x.dtype.itemsize == 2 and x.ndim and x.shape[-1] % 2 == 0:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        words = lax.psum(lax.bitcast_convert_type(pairs, jnp.uint32), TP)
        return lax.bitcast_convert_type(words, x.dtype).reshape(x.shape)
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return lax.bitcast_convert_type(lax.psum(bits, TP).astype(unsigned), x.dtype)


def chosen_logprobs(logits: jax.Array, targets: jax.Array, statistics: VocabStatistics) -> jax.Array:
    """Log-probabilities float32 [...] of targets [...], from this rank's logits [..., V/tp]."""
    local = targets - lax.axis_index(TP) * logits.shape[-1]
    inside = (local >= 0) & (local < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(inside, local, 0)[..., None], axis=-1)[..., 0]
    chosen = select_over_tp(jnp.where(inside, chosen, 0))
    return (chosen - statistics.row_max) - statistics.log_total


def gather_over_tp(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of one shape and of 32 bits an element, [tp, ...] from all ranks in one collective, which moves bits."""
    if lax.axis_size(TP) == 1:
        return tuple(x[None] for x in arrays)
    words = lax.all_gather(jnp.stack([lax.bitcast_convert_type(x, jnp.int32) for x in arrays]), TP, axis=1)
    return tuple(lax.bitcast_convert_type(w, x.dtype) for w, x in zip(words, arrays, strict=True))


def draw_over_tp(
    logits: jax.Array,
    row_max: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    *,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] and their logits from logits [B, V/tp]: each rank draws from its part, and the best part wins.

    The comparison is exact; of equal ones the lowest rank, whose ids are the lowest, as in the whole vocabulary.
    """
    offset = lax.axis_index(TP) * logits.shape[-1]
    drawn = sample_argmax(logits, row_max, temperature, key, positions, offset=offset, backend=backend)
    parts = Draw(*gather_over_tp(*drawn))
    if len(parts.value) == 1:
        return parts.token[0], parts.logit[0]
    rank = jnp.argmax(parts.value, axis=0)[None]
    token, logit = (jnp.take_along_axis(x, rank, axis=0)[0] for x in (parts.token, parts.logit))
    return token, logit
