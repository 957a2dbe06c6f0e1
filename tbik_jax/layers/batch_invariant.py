"""The ablation between plain and invariant: ops that follow no batch, and sums over tp that follow the mesh.

A row-parallel product is one accumulation over the rank's own part of K, and ranks meet in `lax.psum` of the rounded
products: batch-invariant operators as they are published. On one device they have no fault; over tp the result changes.
(How XLA and NCCL order a sum over three ranks and more may also follow the array's size.)
"""

import dataclasses

import jax
from jax import lax

from ..pallas_kernels import tree_matmul
from .base import TP
from .invariant import InvariantNumerics
from .training import InvariantTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchInvariantNumerics(InvariantNumerics):
    """`InvariantNumerics` with `lax.psum` over tp in row-parallel layers."""

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(tree_matmul(x, w, 1, backend=self.matmul_backend(x.dtype)), TP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchInvariantTraining(InvariantTraining):
    """`InvariantTraining` with `lax.psum` over tp in row-parallel layers and in column-parallel ones' gradients."""

    @property
    def forward(self) -> BatchInvariantNumerics:
        return BatchInvariantNumerics(backend=self.backend)

    def input_gradient(self, dy: jax.Array, w: jax.Array) -> jax.Array:
        """dy [..., N/tp] @ w [N/tp, K], added over tp by `lax.psum`."""
        return self.forward.row_parallel(dy, w)
