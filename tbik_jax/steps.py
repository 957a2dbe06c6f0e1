"""The compiled steps of inference: prefill of a chunk, the decode loop, teacher-forced scoring.

Each is one `shard_map` under `jit`, so that every collective is written down in this package. The cache is donated. All
are cached by (model structure, mesh, numerics), and by shape inside `jit`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from .layers import InvariantNumerics, Numerics, Parallel, PlainNumerics, VocabStatistics
from .layers.base import FSDP, TP, chosen_logprobs
from .layers.batch_invariant import BatchInvariantNumerics
from .layers.few_rows import ParallelOfFewRows
from .layers.turns import ParallelInTurns
from .loading import parameter_path, parameter_shardings
from .memory import check_parameters
from .mesh import BATCH_AXES
from .models.qwen3 import Qwen3, Qwen3Config
from .models.qwen3.modules import Batch, Cache, cache_shapes, cache_spec
from .pallas_kernels.common.backend import device_backend
from .pallas_kernels.few_rows.rest import runs_all_ctas
from .pallas_kernels.tree_matmul.plan import LEAVES, plan_contraction
from .program import Program
from .sampling import SamplingArrays, sample

NUMERICS = ("invariant", "plain", "batch_invariant")

#: How all programs are compiled. XLA's CPU backend may else run two loops of a program at once, and a device that is in
#: the one meets a device that is in the other in a collective.
ORDERED_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
#: How invariant programs are compiled. XLA may otherwise drop bfloat16 roundings inside fusions; where a loop over
#: layers slices a stack of caches, it may hand a kernel that writes its cache in place two places instead of one; and
#: it may choose by timing which of two code generators makes a kernel.
INVARIANT_OPTIONS = {
    "xla_allow_excess_precision": False,
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_experimental_enable_fusion_autotuner": False,
    **ORDERED_OPTIONS,
}


#: Tokens of a pass of prefill, from which on two halves that take turns are quicker than one after the other.
OVERLAPPED_TOKENS = 2048

#: How prefill in turns is compiled besides: an all-to-all within a host takes copy engines, which leave the
#: multiprocessors to the matmuls that run meanwhile.
OVERLAP_OPTIONS = {"xla_gpu_use_memcpy_local_p2p": True}


_LEAST_ROOM = 64  # tokens from which on the host looks behind several steps only
#: Bytes of weights on a device up to which it looks behind so many steps: the larger, the longer a step takes.
_STEPS_A_LOOK = ((4 << 30, 8), (24 << 30, 4), (math.inf, 2))


class Decoded(NamedTuple):
    """Result of the decode loop.

    Attributes:
        tokens: int32 [B, steps]; -1 where nothing was generated.
        logprobs: float32 [B, steps].
        bad_step: int32 [B], the step whose logits held NaN or infinity; `steps` where there was none.
    """

    tokens: Any
    logprobs: Any
    bad_step: Any

    @classmethod
    def empty(cls, rows: int, steps: int) -> "Decoded":
        """Nothing generated yet; host arrays."""
        tokens = np.full((rows, steps), -1, np.int32)
        return cls(tokens, np.zeros((rows, steps), np.float32), np.full((rows,), steps, np.int32))


class DecodeState(NamedTuple):
    """Where the decode loop stands, beside its cache.

    Attributes:
        step: int32, tokens generated so far.
        token: int32 [B], the last token of each row, which the next step takes.
        position: int32 [B], its position.
        active: bool [B], whether a row goes on.
        out: what was generated.
    """

    step: Any
    token: Any
    position: Any
    active: Any
    out: Decoded

    @classmethod
    def start(cls, last: np.ndarray, lengths: np.ndarray, steps: int) -> "DecodeState":
        """Before the first step, as host arrays.

        Args:
            last: int32 [B], each prompt's last token.
            lengths: int32 [B]; rows with length 0 are padding.
            steps: room for so many tokens.
        """
        position = np.maximum(lengths - 1, 0).astype(np.int32)
        return cls(np.int32(0), last, position, lengths > 0, Decoded.empty(len(last), steps))


def steps_a_look(weights: int, room: int) -> int:
    """Decoding steps behind which the host learns whether any row goes on.

    The GPU waits while it asks, some 0.17 ms. Where all rows have ended or the limit is reached, the last steps are run
    for nothing: of those that take long there are few.

    Args:
        weights: bytes on a device.
        room: for so many tokens.
    """
    return 1 if room < _LEAST_ROOM else next(steps for most, steps in _STEPS_A_LOOK if weights <= most)


def make_numerics(name: str, mesh: Mesh) -> Numerics:
    """The numerics of that name on the mesh's devices.

    Raises:
        ValueError: an unknown name.
    """
    if name == "invariant":
        return InvariantNumerics(backend=device_backend(mesh.devices.flat[0]))
    if name == "batch_invariant":
        return BatchInvariantNumerics(backend=device_backend(mesh.devices.flat[0]))
    if name == "plain":
        return PlainNumerics(cudnn=mesh.devices.flat[0].platform == "gpu")
    raise ValueError(f"numerics={name!r} is unknown; use one of {', '.join(NUMERICS)}")


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model on a mesh: its parameters in place, and the steps that run it.

    Attributes:
        steps: the compiled steps.
        parameters: flat list of arrays, sharded for the steps' mesh.
    """

    steps: "Steps"
    parameters: list[jax.Array]

    @classmethod
    def create(
        cls,
        model: Qwen3,
        mesh: Mesh,
        numerics: str,
        scan_layers: bool | None = None,
        overlap_prefill: bool = False,
    ) -> "Engine":
        """Puts the parameters on `mesh` (nothing moves if they are there) and finds or builds the steps.

        Args:
            model: its parameters, on any devices.
            mesh: with all of the axes.
            numerics: one of `NUMERICS`.
            scan_layers: run the layers as a scan over one compiled layer; None does so on the CPU.
            overlap_prefill: let halves of a pass take turns, where they can: see `Qwen3.prefill_in_turns`.

        Raises:
            ValueError: the model does not fit the mesh or its memory, or the numerics are unknown.
        """
        if numerics != "plain":
            check_plans(model.config, model.dtype)
        graphdef, state = nnx.split(model)
        shardings = parameter_shardings(state, mesh)
        check_parameters(_bytes_to_move(state, shardings), list(mesh.devices.flat))
        leaves, treedef = jax.tree.flatten(jax.device_put(state, shardings))
        specs = tuple(s.spec for s in jax.tree.leaves(shardings))
        parallel = Parallel(
            numerics=make_numerics(numerics, mesh), fsdp_dims=fsdp_dimensions(state, shardings, mesh)
        )
        if scan_layers is None:
            scan_layers = mesh.devices.flat[0].platform == "cpu"
        steps = _steps(
            graphdef, treedef, specs, model.config, model.dtype, mesh, parallel, scan_layers, overlap_prefill
        )
        return cls(steps, leaves)


def fsdp_dimensions(state: Any, shardings: Any, mesh: Mesh) -> tuple[tuple[str, int], ...]:
    """(parameter name, dimension) of the parameters that the mesh cuts over fsdp.

    Args:
        state: the parameters, as `nnx.split` gives them.
        shardings: theirs on the mesh.
        mesh: with all of the axes.
    """
    names = [str(parameter_path(path)[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    found = {
        (name, dim)
        for name, sharding in zip(names, jax.tree.leaves(shardings), strict=True)
        for dim, axis in enumerate(sharding.spec)
        # XLA transposes what it gathers along another dimension than the first, even from a single rank
        if axis == FSDP and mesh.shape[FSDP] > 1
    }
    return tuple(sorted(found))


def _bytes_to_move(state: Any, shardings: Any) -> int:
    """Bytes of parameters that a device has to receive."""
    total = 0
    for value, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        if not (isinstance(value, jax.Array) and value.sharding.is_equivalent_to(wanted, value.ndim)):
            total += math.prod(wanted.shard_shape(value.shape)) * value.dtype.itemsize
    return total


def check_plans(config: Qwen3Config, dtype: jax.typing.DTypeLike) -> None:
    """Raises `ValueError` if a contraction or the vocabulary of the model does not cut into equal leaves."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    for name, k, n, role in (
        ("hidden_size", d, f, "column"),
        ("num_attention_heads * head_dim", heads, d, "row"),
        ("intermediate_size", f, d, "row"),
    ):
        try:
            plan_contraction(k=k, n=n, dtype=dtype, role=role)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"config field {name}: {error}") from None
    if config.vocab_size % LEAVES:
        fitting = -(-config.vocab_size // LEAVES) * LEAVES
        raise ValueError(
            f"config field vocab_size={config.vocab_size} cannot be cut into {LEAVES} equal leaves; "
            f"resize the embedding to {fitting}"
        )


def _parallel_in_turns(parallel: Parallel, mesh: Mesh, scan_layers: bool) -> ParallelInTurns | None:
    """With what halves of a prefill take turns, where they can and sums over tp cost time."""
    numerics = parallel.numerics
    if type(numerics) is not InvariantNumerics:  # not those derived from it, which add up otherwise
        return None
    # Over fsdp each half would gather the weights.
    if mesh.shape[TP] == 1 or scan_layers or parallel.fsdp_dims:
        return None
    return ParallelInTurns(numerics=numerics)


def _parallel_of_few_rows(parallel: Parallel, mesh: Mesh) -> Parallel:
    """With what a decoding step runs: the same ops, fused where the batch is small."""
    numerics = parallel.numerics
    if type(numerics) is not InvariantNumerics:  # not those derived from it, which add up otherwise
        return parallel
    return ParallelOfFewRows(
        numerics=numerics, fsdp_dims=parallel.fsdp_dims, whole_gpu=all(map(runs_all_ctas, mesh.devices.flat))
    )


@functools.lru_cache(maxsize=64)
def _steps(*args: Any) -> "Steps":
    return Steps(*args)


class Steps:
    """The programs for one model structure, mesh and numerics."""

    def __init__(
        self,
        graphdef: Any,
        treedef: Any,
        specs: tuple[P, ...],
        config: Any,
        dtype: jnp.dtype,
        mesh: Mesh,
        parallel: Parallel,
        scan_layers: bool,
        overlap_prefill: bool = False,
    ):
        self._graphdef, self._treedef, self._specs = graphdef, treedef, specs
        self.config, self._dtype, self.mesh, self._parallel = config, dtype, mesh, parallel
        self.scan_layers = scan_layers
        self._few_rows = _parallel_of_few_rows(parallel, mesh)
        self._in_turns = _parallel_in_turns(parallel, mesh, scan_layers) if overlap_prefill else None
        caches = cache_spec(config, stacked=self.scan_layers)
        rows: Any = P(BATCH_AXES)  # specs stand where arrays will
        scalar, tables = P(), (P(), P())
        prefill_in = (caches, rows, rows, scalar, tables)
        more_options = OVERLAP_OPTIONS if self._in_turns else {}
        self.prefill = self._jit(self._prefill, prefill_in, caches, donate=(1,), **more_options)
        sampling = SamplingArrays(temperature=rows, top_k=rows, top_p=rows, key=rows)
        state = self.state_spec = DecodeState(scalar, rows, rows, rows, Decoded(rows, rows, rows))
        # Whether the vocabulary is sorted is compiled in.
        self.decode = {
            filtered: self._jit(
                functools.partial(self._decode, filtered=filtered),
                (caches, state, scalar, sampling, P(), tables),
                (caches, state),
                donate=(1, 2),
            )
            for filtered in (False, True)
        }
        score_in = (caches, rows, rows, rows, scalar, tables)
        self.score = self._jit(self._score, score_in, (caches, rows, rows), donate=(1,))
        self.hidden_states = self._jit(
            self._hidden_states, (caches, rows, rows, tables), (rows, P(BATCH_AXES, None, TP))
        )

    def tapped_score(self, tap: Callable[[Numerics], Any]) -> Program:
        """`score`, which returns what its ops gave too, for `tbik_jax.bisect`.

        Args:
            tap: makes, of the numerics, numerics that keep what they give; `tapped()` of it then is a pytree of
                arrays [1, B, T, ...], and gets a leading dimension of tp in the result.
        """

        def body(*args: Any) -> Any:
            numerics = tap(self._parallel.numerics)
            out = self._score(*args, parallel=dataclasses.replace(self._parallel, numerics=numerics))
            return *out, numerics.tapped()

        caches = cache_spec(self.config, stacked=self.scan_layers)
        rows: Any = P(BATCH_AXES)
        in_specs = (caches, rows, rows, rows, P(), (P(), P()))
        return self._jit(body, in_specs, (caches, rows, rows, P(TP, BATCH_AXES)), donate=(1,))

    def _jit(
        self,
        body: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        donate: tuple[int, ...] = (),
        **more_options: bool,
    ) -> Program:
        # The butterfly ends replicated over tp, which shard_map's check cannot infer from ppermute.
        mapped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(list(self._specs), *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )
        invariant = isinstance(self._parallel.numerics, InvariantNumerics)
        options = (INVARIANT_OPTIONS if invariant else ORDERED_OPTIONS) | more_options
        return Program(jax.jit(mapped, donate_argnums=donate, compiler_options=options))

    def cache_shapes(self, batch: int, capacity: int) -> Cache:
        """Shapes of a cache for `batch` rows (all ranks together) of `capacity` positions; `init_cache` makes it."""
        return cache_shapes(self.config, batch, capacity, self._dtype, self.mesh, stacked=self.scan_layers)

    def _model(
        self, parameters: list[jax.Array], parallel: Parallel | None = None
    ) -> tuple[Qwen3, Callable[..., tuple[jax.Array, Cache]]]:
        """The module, and its forward pass."""
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, parameters))
        stacked = model.stacked_layers() if self.scan_layers else None
        return model, functools.partial(model, parallel=parallel or self._parallel, stacked=stacked)

    def _prefill(
        self,
        parameters: list[jax.Array],
        cache: Cache,
        tokens: jax.Array,
        lengths: jax.Array,
        start: jax.Array,
        tables: Any,
    ) -> Cache:
        """Writes the positions start .. start + T - 1 of tokens [B, T] to the cache."""
        batch = _batch(tokens, start + jnp.arange(tokens.shape[1]), lengths, tables)
        model, forward = self._model(parameters)
        rows, width = tokens.shape
        if self._in_turns is None or width % 2 or rows * width < OVERLAPPED_TOKENS:
            return forward(batch, cache)[1]
        assert isinstance(cache, tuple)
        return model.prefill_in_turns(batch, cache, self._in_turns)

    def _decode(
        self,
        parameters: list[jax.Array],
        cache: Cache,
        state: DecodeState,
        limit: jax.Array,
        sampling: SamplingArrays,
        eos_ids: jax.Array,
        tables: Any,
        *,
        filtered: bool,
    ) -> tuple[Cache, DecodeState]:
        """Generates until `limit` tokens a row are there, from where `state` stands.

        The loop runs the last prompt token's forward pass itself, so the program holds one copy of the model and
        prefill needs no logits. It ends early when every row on every rank has met an end token.
        """
        (model, forward), parallel = self._model(parameters, self._few_rows), self._parallel

        def running(carry: tuple[Cache, DecodeState]) -> jax.Array:
            _, state = carry
            return (state.step < limit) & (lax.psum(jnp.sum(state.active, dtype=jnp.int32), BATCH_AXES) > 0)

        def body(carry: tuple[Cache, DecodeState]) -> tuple[Cache, DecodeState]:
            cache, (step, token, position, active, out) = carry
            batch = _batch(token[:, None], position[:, None], position + 1, tables)
            hidden, cache = forward(batch, cache)
            token, logprob, good = _next_token(
                model.logits(hidden[:, 0], parallel), position + 1, sampling, parallel, filtered
            )
            out = Decoded(
                _with_column(out.tokens, step, jnp.where(active & good, token, -1)),
                _with_column(out.logprobs, step, jnp.where(active & good, logprob, 0)),
                jnp.where(active & ~good, step, out.bad_step),
            )
            active = active & good & ~jnp.any(token[:, None] == eos_ids, axis=1)
            return cache, DecodeState(step + 1, token, position + 1, active, out)

        def limited(_: jax.Array, carry: tuple[Cache, DecodeState]) -> tuple[Cache, DecodeState]:
            """Past the limit a step changes nothing: the cache gets what the next step will write there."""
            cache, new = body(carry)
            goes_on = carry[1].step < limit
            return cache, jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), new, carry[1])

        def several(carry: tuple[Cache, DecodeState]) -> tuple[Cache, DecodeState]:
            return lax.fori_loop(0, a_look, limited, carry)

        weights = sum(each.size * each.dtype.itemsize for each in parameters)
        a_look = steps_a_look(weights, state.out.tokens.shape[1])
        return lax.while_loop(running, body if a_look == 1 else several, (cache, state))

    def _score(
        self,
        parameters: list[jax.Array],
        cache: Cache,
        tokens: jax.Array,
        targets: jax.Array,
        lengths: jax.Array,
        start: jax.Array,
        tables: Any,
        *,
        parallel: Parallel | None = None,
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Log-probabilities float32 [B, T] of targets [B, T], and whether their logits were finite (bool [B, T])."""
        parallel = parallel or self._parallel
        model, forward = self._model(parameters, parallel)
        batch = _batch(tokens, start + jnp.arange(tokens.shape[1]), lengths, tables)
        hidden, cache = forward(batch, cache)
        logits = model.logits(hidden, parallel)
        statistics = parallel.numerics.vocab_statistics(logits)
        return cache, chosen_logprobs(logits, targets, statistics), statistics.finite

    def _hidden_states(
        self, parameters: list[jax.Array], cache: Cache, tokens: jax.Array, lengths: jax.Array, tables: Any
    ) -> tuple[list[jax.Array], jax.Array]:
        """Hidden states after the embedding, each layer and the final norm, [B, T, D] each, and logits [B, T, V]."""
        model, forward = self._model(parameters)
        taps: list[jax.Array] = []
        batch = _batch(tokens, jnp.arange(tokens.shape[1]), lengths, tables)
        hidden, _ = forward(batch, cache, taps=taps)
        return [*taps, hidden], model.logits(hidden, self._parallel)


def _with_column(out: jax.Array, step: jax.Array, value: jax.Array) -> jax.Array:
    """`out` [B, steps] with `value` [B] at `step`. A scatter would take one more kernel, to see if step is inside."""
    return lax.dynamic_update_slice(out, value[:, None], (0, step))


def _batch(tokens: jax.Array, positions: jax.Array, lengths: jax.Array, tables: Any) -> Batch:
    positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
    return Batch(tokens=tokens, positions=positions, lengths=lengths, cos=tables[0], sin=tables[1])


def _next_token(
    logits: jax.Array, positions: jax.Array, sampling: SamplingArrays, parallel: Parallel, filtered: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token, log-probability and whether the logits were finite, each [B], from logits [B, V/tp].

    Each tp rank draws from its part of the vocabulary. Only for rows that use top_k or top_p the logits of the whole
    one are gathered (which moves bits), and every rank samples the same token. Rows that do not use them take the same
    path whoever stands beside them.
    """
    statistics = parallel.numerics.vocab_statistics(logits)
    hot = sampling.temperature > 0
    drawn, drawn_logit = parallel.numerics.draw(
        logits, statistics.row_max, sampling.temperature, sampling.key, positions
    )
    token = jnp.where(hot, drawn, statistics.best)
    chosen = jnp.where(hot, drawn_logit, statistics.row_max)
    if filtered:
        whole = lax.all_gather(logits, TP, axis=1, tiled=True)
        narrow = sampling.narrow(whole.shape[1])
        kept = sample(jnp.where(statistics.finite[:, None], whole, 0), positions, sampling, filtered=True)
        token = jnp.where(narrow, kept, token)
        kept_logit = jnp.take_along_axis(whole, kept[:, None], axis=-1)[:, 0]
        chosen = jnp.where(narrow, kept_logit, chosen)
    return token, _logprob(chosen, statistics), statistics.finite


def _logprob(chosen: jax.Array, statistics: VocabStatistics) -> jax.Array:
    return (chosen - statistics.row_max) - statistics.log_total
