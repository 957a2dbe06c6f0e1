"""The invariant numerics: every reduction has one order, whatever the mesh and the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_psum
from ..pallas_kernels import (
    add_rms_norm,
    attention,
    exp_sum,
    qk_norm_rope,
    residual_add,
    rms_norm,
    swiglu_joint,
    tree_matmul,
)
from ..pallas_kernels.common.rounding import log, round_to
from ..pallas_kernels.tree_matmul.plan import LEAVES, plan_contraction
from .base import TP


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantNumerics:
    """See `Numerics`.

    Attributes:
        backend: of `tree_matmul`, and of the row-wise ops where they have it, for bfloat16 and float16 operands;
            float32 takes the reference.
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
        return rms_norm(x, scale, eps=eps, backend=self._row_backend(x.dtype))

    def add_rms_norm(
        self, x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        return add_rms_norm(x, y, scale, eps=eps, backend=self._row_backend(x.dtype))

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
        return qk_norm_rope(*operands, eps=eps, backend=self._row_backend(qkv.dtype))

    def swiglu(self, gate_up: jax.Array) -> jax.Array:
        return swiglu_joint(gate_up, backend=self._row_backend(gate_up.dtype))

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return attention(q, k, v, positions)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return residual_add(x, y, backend=self._row_backend(x.dtype))

    def log_normaliser(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        ranks = lax.axis_size(TP)
        row_max = jnp.max(lax.all_gather(jnp.max(logits, axis=-1), TP), axis=0)  # exact in any order
        total = tree_psum(exp_sum(logits, row_max, leaves=LEAVES // ranks), TP)
        return row_max, log(total)

    def _backend(self, dtype: jax.typing.DTypeLike) -> str:
        return "reference" if jnp.dtype(dtype) == jnp.float32 else self.backend

    def _row_backend(self, dtype: jax.typing.DTypeLike) -> str:
        backend = self._backend(dtype)
        return "reference" if backend == "triton" else backend
