"""The invariant numerics: every reduction has one order, whatever the mesh and the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_psum
from ..pallas_kernels import attention, exp_sum, rms_norm, rope, swiglu, tree_matmul
from ..pallas_kernels.attention.api import attention_backend
from ..pallas_kernels.common.rounding import log, round_to
from ..pallas_kernels.tree_matmul.plan import LEAVES, plan_contraction
from .base import TP


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantNumerics:
    """See `Numerics`.

    Attributes:
        backend: of `tree_matmul`, and of `attention` where it has that backend, for bfloat16 and float16 operands;
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
        return rms_norm(x, scale, eps=eps)

    def rope(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rope(x, cos, sin)

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return swiglu(gate, up)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        group = q.shape[2] // k.shape[2]
        backend = attention_backend(self._backend(q.dtype), head_dim=q.shape[3], group=group)
        return attention(q, k, v, positions, backend=backend)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return round_to(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)

    def log_normaliser(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        ranks = lax.axis_size(TP)
        row_max = jnp.max(lax.all_gather(jnp.max(logits, axis=-1), TP), axis=0)  # exact in any order
        total = tree_psum(exp_sum(logits, row_max, leaves=LEAVES // ranks), TP)
        return row_max, log(total)

    def _backend(self, dtype: jax.typing.DTypeLike) -> str:
        return "reference" if jnp.dtype(dtype) == jnp.float32 else self.backend
