"""What a decoding step of a few rows fuses: the norms go into the products behind them, and the sums' last adds too.

The kernels are those of `pallas_kernels.few_rows`. A step of few rows takes the time to read the weights, and between
two products none is read. Each op does the adds and the roundings of the ops that it fuses, so the bits are theirs.
Scoring and `tbik_jax.bisect` run the ops one by one.
"""

import dataclasses
import math

import jax
from jax import lax

from ..pallas_kernels import join_subtrees, matmul_subtrees, norm_matmul
from ..pallas_kernels.few_rows.api import matmul_subtrees_refusal, norm_matmul_refusal
from ..pallas_kernels.few_rows.config import MOST_NORMALISED
from ..pallas_kernels.tree_matmul.plan import plan_contraction
from .base import TP, Parallel, Stream, Turns
from .invariant import InvariantNumerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelOfFewRows(Parallel):
    """`Parallel` that fuses ops where a Hopper GPU has few rows of them, and else does not."""

    numerics: InvariantNumerics

    def row_parallel(self, x: jax.Array, w: jax.Array) -> Turns[jax.Array]:
        """See `Parallel.row_parallel`; on a whole K the subtrees, which the next norm adds up."""
        yield from ()
        if not self._fuses(x) or lax.axis_size(TP) > 1:
            return self.numerics.row_parallel(x, w)
        leaves = plan_contraction(k=x.shape[-1], n=w.shape[1], dtype=x.dtype, role="row").leaves
        if matmul_subtrees_refusal(x, w, leaves):
            return self.numerics.row_parallel(x, w)
        return matmul_subtrees(x, w, leaves, backend=self._backend(x))

    def total(self, stream: Stream) -> jax.Array:
        """See `Parallel.total`."""
        if stream.pending is not None and stream.pending.ndim > stream.x.ndim:
            joined = join_subtrees(stream.pending, stream.x.dtype, backend=self._backend(stream.x))
            stream = stream._replace(pending=joined)
        return super().total(stream)

    def norm_column_parallel(
        self, stream: Stream, scale: jax.Array, w: jax.Array, *, eps: float, gated: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """See `Parallel.norm_column_parallel`."""
        x, pending = stream
        rows = math.prod(x.shape[:-1])
        if not self._fuses(x) or rows > MOST_NORMALISED or norm_matmul_refusal(x, scale, w, gated):
            return super().norm_column_parallel(stream, scale, w, eps=eps, gated=gated)
        columns = w.shape[0] * lax.axis_size(TP)
        plan_contraction(k=w.shape[1], n=columns, dtype=w.dtype, role="column")  # one leaf, or an error
        return norm_matmul(x, pending, scale, w, eps=eps, gated=gated, backend=self._backend(x))

    def _fuses(self, x: jax.Array) -> bool:
        return self._backend(x) == "mosaic_gpu"

    def _backend(self, x: jax.Array) -> str:
        return self.numerics.matmul_backend(x.dtype)
