"""What a decoding step of a few rows fuses: the norms go into the products behind them, and the sums' last adds too.

The kernels are those of `pallas_kernels.few_rows`. A step of few rows takes the time to read the weights, and between
two products none is read. Each op does the adds and the roundings of the ops that it fuses, so the bits are theirs.
Scoring and `tbik_jax.bisect` run the ops one by one.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax import lax

from ..pallas_kernels import LayerRest, join_subtrees, matmul_subtrees, norm_matmul, rest_of_layer
from ..pallas_kernels.few_rows.api import matmul_subtrees_refusal, norm_matmul_refusal
from ..pallas_kernels.few_rows.config import MOST_NORMALISED
from ..pallas_kernels.few_rows.rest import rest_of_layer_refusal
from ..pallas_kernels.tree_matmul.plan import plan_contraction
from .base import TP, Parallel, Stream, Turns
from .invariant import InvariantNumerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelOfFewRows(Parallel):
    """`Parallel` that fuses ops where a Hopper GPU has few rows of them, and else does not.

    Attributes:
        numerics: the operations.
        whole_gpu: whether a launch's CTAs may wait for one another: see `rest_of_layer`.
    """

    numerics: InvariantNumerics
    whole_gpu: bool = False

    def put_off(self, stream: Stream, rest: Callable[[], LayerRest]) -> Stream | None:
        """See `Parallel.put_off`: where one launch takes them, together with the next norm's product."""
        if not (self.whole_gpu and self._fuses(stream.x) and lax.axis_size(TP) == 1 and not self.fsdp_dims):
            return None
        todo = rest()
        for w in (todo.out_w, todo.down_w):
            _leaves(w)  # eight, or an error
        if rest_of_layer_refusal(stream.x, todo):
            return None
        return stream._replace(pending=todo)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> Turns[jax.Array]:
        """See `Parallel.row_parallel`; on a whole K the subtrees, which the next norm adds up."""
        yield from ()
        if not self._fuses(x) or lax.axis_size(TP) > 1:
            return self.numerics.row_parallel(x, w)
        leaves = _leaves(w)
        if matmul_subtrees_refusal(x, w, leaves):
            return self.numerics.row_parallel(x, w)
        return matmul_subtrees(x, w, leaves, backend=self._backend(x))

    def total(self, stream: Stream) -> jax.Array:
        """See `Parallel.total`."""
        stream = self._caught_up(stream)
        if isinstance(stream.pending, jax.Array) and stream.pending.ndim > stream.x.ndim:
            joined = join_subtrees(stream.pending, stream.x.dtype, backend=self._backend(stream.x))
            stream = stream._replace(pending=joined)
        return super().total(stream)

    def norm(self, stream: Stream, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        """See `Parallel.norm`."""
        return super().norm(self._caught_up(stream), scale, eps=eps)

    def norm_column_parallel(
        self, stream: Stream, scale: jax.Array, w: jax.Array, *, eps: float, gated: bool = False
    ) -> tuple[Stream, jax.Array]:
        """See `Parallel.norm_column_parallel`."""
        if isinstance(stream.pending, LayerRest):
            if not gated and not rest_of_layer_refusal(stream.x, stream.pending, (scale, w, eps)):
                _check_column(w)
                backend = self._backend(stream.x)
                x, product, boards = rest_of_layer(
                    stream.x, stream.pending, (scale, w, eps), stream.boards, backend=backend
                )
                return Stream(x, None, boards), product
            stream = self._caught_up(stream)
        x, pending, boards = stream
        assert not isinstance(pending, LayerRest)
        rows = math.prod(x.shape[:-1])
        if not self._fuses(x) or rows > MOST_NORMALISED or norm_matmul_refusal(x, scale, w, gated):
            return super().norm_column_parallel(stream, scale, w, eps=eps, gated=gated)
        _check_column(w)
        x, product = norm_matmul(x, pending, scale, w, eps=eps, gated=gated, backend=self._backend(x))
        return Stream(x, None, boards), product

    def _caught_up(self, stream: Stream) -> Stream:
        """With the ops run that were put off, but for down_proj's last adds."""
        if not isinstance(stream.pending, LayerRest):
            return stream
        backend = self._backend(stream.x)
        x, subtrees, boards = rest_of_layer(stream.x, stream.pending, None, stream.boards, backend=backend)
        return Stream(x, subtrees, boards)

    def _fuses(self, x: jax.Array) -> bool:
        return self._backend(x) == "mosaic_gpu"

    def _backend(self, x: jax.Array) -> str:
        return self.numerics.matmul_backend(x.dtype)


def _leaves(w: jax.Array) -> int:
    """Of a row-parallel product on one rank."""
    return plan_contraction(k=w.shape[0], n=w.shape[1], dtype=w.dtype, role="row").leaves


def _check_column(w: jax.Array) -> None:
    """Raises `ValueError` if a column-parallel product has not one leaf."""
    columns = w.shape[0] * lax.axis_size(TP)
    plan_contraction(k=w.shape[1], n=columns, dtype=w.dtype, role="column")
