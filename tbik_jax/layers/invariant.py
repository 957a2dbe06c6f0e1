"""The invariant numerics: every reduction has one order, whatever the mesh and the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_psum
from ..pallas_kernels import attention, leaf_statistics, rms_norm, rope, swiglu, tree_matmul
from ..pallas_kernels.common.backend import float32_backend
from ..pallas_kernels.common.rounding import log, round_to
from ..pallas_kernels.log_softmax.plan import kernel_refusal as leaf_refusal
from ..pallas_kernels.log_softmax.reference import join_totals
from ..pallas_kernels.sampling.mosaic_gpu import kernel_refusal as sampling_refusal
from ..pallas_kernels.tree_matmul.plan import LEAVES, plan_contraction
from .base import TP, VocabStatistics, draw_over_tp, gather_over_tp


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantNumerics:
    """See `Numerics`.

    Attributes:
        backend: of `tree_matmul` for bfloat16 and float16 operands; float32 takes the reference. With "mosaic_gpu" the
            logits take kernels too, if the vocabulary is one that these cover; the reference has the same bits.
    """

    backend: str = "reference"

    def column_parallel(
        self,
        x: jax.Array,
        w: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        columns = w.shape[0] * lax.axis_size(TP)
        plan = plan_contraction(k=x.shape[-1], n=columns, dtype=x.dtype, role="column")
        backend = self._backend(x.dtype)
        return tree_matmul(x, w, plan.leaves, out_dtype=out_dtype, transpose_rhs=True, backend=backend)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        ranks = lax.axis_size(TP)
        plan = plan_contraction(k=x.shape[-1] * ranks, n=w.shape[1], dtype=x.dtype, role="row")
        partial = tree_matmul(
            x, w, plan.local_leaves(ranks), out_dtype=jnp.float32, backend=self._backend(x.dtype)
        )
        return round_to(tree_psum(partial, TP), x.dtype)

    def rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
        return rms_norm(x, scale, eps=eps)

    def rope(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rope(x, cos, sin)

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return swiglu(gate, up)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return attention(q, k, v, positions)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return round_to(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)

    def vocab_statistics(self, logits: jax.Array) -> VocabStatistics:
        size = logits.shape[-1]
        leaves = LEAVES // lax.axis_size(TP)
        backend = float32_backend(self.backend, leaf_refusal(size // leaves))
        stats = leaf_statistics(logits, leaves=leaves, backend=backend)
        ids = stats.best + (size // leaves) * jnp.arange(leaves) + lax.axis_index(TP) * size
        parts = gather_over_tp(stats.maximum, stats.total, ids, stats.finite.astype(jnp.int32))
        # [tp, ..., leaves] -> [..., 8]: the leaves in order
        maximum, total, ids, finite = (
            lax.collapse(jnp.moveaxis(x, 0, -2), x.ndim - 2, x.ndim) for x in parts
        )
        row_max = jnp.max(maximum, axis=-1)  # exact in any order
        best = jnp.min(jnp.where(maximum == row_max[..., None], ids, ids[..., -1:]), axis=-1)
        log_total = log(join_totals(maximum, total, row_max))
        return VocabStatistics(row_max, log_total, best, jnp.all(finite != 0, axis=-1))

    def draw(
        self,
        logits: jax.Array,
        row_max: jax.Array,
        temperature: jax.Array,
        key: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        backend = float32_backend(self.backend, sampling_refusal(logits.shape[-1]))
        return draw_over_tp(logits, row_max, temperature, key, positions, backend=backend)

    def _backend(self, dtype: jax.typing.DTypeLike) -> str:
        return "reference" if jnp.dtype(dtype) == jnp.float32 else self.backend
