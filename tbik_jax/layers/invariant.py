"""The invariant numerics: every reduction has one order, whatever the mesh and the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_psum
from ..pallas_kernels import (
    add_rms_norm,
    attention,
    gated_matmul,
    leaf_statistics,
    qk_norm_rope,
    residual_add,
    rms_norm,
    tree_matmul,
)
from ..pallas_kernels.attention.api import attention_backend
from ..pallas_kernels.common.backend import float32_backend
from ..pallas_kernels.common.rounding import log
from ..pallas_kernels.log_softmax.plan import kernel_refusal as leaf_refusal
from ..pallas_kernels.log_softmax.reference import join_totals
from ..pallas_kernels.qk_norm_rope.api import kernel_refusal as heads_refusal
from ..pallas_kernels.residual_add.api import kernel_refusal as add_refusal
from ..pallas_kernels.rms_norm.api import kernel_refusal as norm_refusal
from ..pallas_kernels.sampling.plan import kernel_refusal as sampling_refusal
from ..pallas_kernels.tree_matmul.plan import LEAVES, plan_contraction
from .base import TP, VocabStatistics, draw_over_tp, gather_over_tp, vocab_embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantNumerics:
    """See `Numerics`.

    Attributes:
        backend: of the matmuls: "reference", "mosaic_gpu" or "triton"; float32 takes the reference. With "mosaic_gpu"
            the other ops take their kernels too, where these cover the sizes.
    """

    backend: str = "reference"

    def embedding(self, ids: jax.Array, table: jax.Array) -> jax.Array:
        return vocab_embedding(ids, table)

    def column_parallel(
        self,
        x: jax.Array,
        w: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        columns = w.shape[0] * lax.axis_size(TP)
        plan = plan_contraction(k=x.shape[-1], n=columns, dtype=x.dtype, role="column")
        backend = self.matmul_backend(x.dtype)
        return tree_matmul(x, w, plan.leaves, out_dtype=out_dtype, transpose_rhs=True, backend=backend)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        if lax.axis_size(TP) == 1:  # the whole tree is here, and its one rounding too
            return self._row_product(x, w, x.dtype)
        return tree_psum(self.row_partial_sum(x, w), TP, out_dtype=x.dtype)

    def row_partial_sum(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """This rank's partial sum of `row_parallel`, float32: its part of the tree."""
        return self._row_product(x, w, jnp.float32)

    def _row_product(self, x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
        ranks = lax.axis_size(TP)
        plan = plan_contraction(k=x.shape[-1] * ranks, n=w.shape[1], dtype=x.dtype, role="row")
        backend = self.matmul_backend(x.dtype)
        return tree_matmul(x, w, plan.local_leaves(ranks), out_dtype=out_dtype, backend=backend)

    def rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
        return rms_norm(x, scale, eps=eps, backend=self._row_backend(x.dtype, norm_refusal(x, scale)))

    def keep_rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        return x, self.rms_norm(x, scale, eps=eps)

    def add_rms_norm(
        self, x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        return add_rms_norm(x, y, scale, eps=eps, backend=self._row_backend(x.dtype, norm_refusal(x, scale)))

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
        operands = (qkv, q_scale, k_scale, cos, sin, positions, lengths, k_cache, v_cache)
        return qk_norm_rope(
            *operands, eps=eps, backend=self._row_backend(qkv.dtype, heads_refusal(qkv.shape[-1]))
        )

    def gated_column_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        columns = w.shape[0] * lax.axis_size(TP)
        plan_contraction(k=x.shape[-1], n=columns, dtype=x.dtype, role="column")  # one leaf, or an error
        return gated_matmul(x, w, backend=self.matmul_backend(x.dtype))

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return attention(q, k, v, positions, backend=self.attention_backend(q, k))

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return residual_add(x, y, backend=self._row_backend(x.dtype, add_refusal(x)))

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
        # By the smallest part that any mesh gives a rank: kernel and reference may differ in a value's last place.
        smallest = logits.shape[-1] * lax.axis_size(TP) // LEAVES
        backend = float32_backend(self.backend, sampling_refusal(smallest))
        return draw_over_tp(logits, row_max, temperature, key, positions, backend=backend)

    def attention_backend(self, q: jax.Array, k: jax.Array) -> str:
        """The backend of attention of q [B, T, N, H] and k [B, S, K, H], which no mesh changes."""
        return attention_backend(
            self.matmul_backend(q.dtype), head_dim=q.shape[3], group=q.shape[2] // k.shape[2]
        )

    def matmul_backend(self, dtype: jax.typing.DTypeLike) -> str:
        """The backend of products of `dtype`."""
        return "reference" if jnp.dtype(dtype) == jnp.float32 else self.backend

    def _row_backend(self, dtype: jax.typing.DTypeLike, refusal: str | None) -> str:
        """Where the kernel does not take a model's sizes, which no mesh changes, the reference runs."""
        return "mosaic_gpu" if self.matmul_backend(dtype) == "mosaic_gpu" and refusal is None else "reference"
