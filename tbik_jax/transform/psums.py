"""Sums over mesh axes: products and sums whose only use is a `psum` become one tree over all ranks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_psum
from ..ops import steps
from ..ops.contraction import contract
from ..pallas_kernels.common import rounding
from ..pallas_kernels.common.dtypes import FLOATS
from ..pallas_kernels.common.tree import tree_join, tree_sum
from ..pallas_kernels.tree_matmul.plan import LEAVES

NAMES = ("psum", "psum_invariant")
BY_RANKS = "other bits for another number of ranks"
#: What is made where it is summed over ranks.
MADE_THERE = ("dot_general", "reduce_sum")
#: What may stand between: it moves elements, or is a rounding that is left out, or a type of check_vma=True.
_MOVES = ("transpose", "reshape", "squeeze")
_BETWEEN = (*_MOVES, "convert_element_type", "pvary", "pbroadcast")

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A product or a sum whose only use is a `psum`.

    Attributes:
        name: of its primitive.
        eqn: its equation.
        args: operands.
        leaves: of the contraction.
        between: equations up to the `psum`.
    """

    name: str
    eqn: Any
    args: tuple[Any, ...]
    leaves: int
    between: tuple[Any, ...] = ()

    def then(self, eqn: Any) -> "Pending":
        return dataclasses.replace(self, between=(*self.between, eqn))

    def alone(self) -> jax.Array:
        """What this rank has."""
        if self.name == "dot_general":
            return self._contraction(None, self._dtype)
        x, axes = self.args[0], tuple(sorted(self.eqn.params["axes"]))
        return rounding.round_to(steps.total(x.astype(jnp.float32), axes), x.dtype)

    def cuts(self, axes: Axes) -> bool:
        """Whether the leaves can be cut over the ranks, so that their number does not enter."""
        if self.name == "dot_general":
            return True  # or `contract` raises
        length = math.prod(self.args[0].shape[a] for a in self.eqn.params["axes"])
        ranks = math.prod(lax.axis_size(a) for a in axes)
        return ranks <= LEAVES and LEAVES % ranks == 0 and length > 0 and length * ranks % LEAVES == 0

    def condition(self, axes: Axes) -> str:
        """Under which condition the bits are those of one rank that has it all; "" where nothing else is possible.

        Where the parts of the ranks lie in the whole is for the caller's shardings to say, which are not seen here.
        """
        if not self.cuts(axes):
            return BY_RANKS
        reduced = (
            self.eqn.params["dimension_numbers"][0][0]
            if self.name == "dot_general"
            else self.eqn.params["axes"]
        )
        if len(axes) == 1 and len(reduced) == 1:
            return ""
        return f"as on one device if the first of the dimensions summed is cut over {axes} in this order, and no other"

    def over(self, axes: Axes) -> jax.Array:
        """The sum over all ranks: of a product over K, of a sum over the ranks' rows end to end, in eight leaves."""
        dtype = self.between[-1].outvars[0].aval.dtype if self.between else self._dtype
        if self.name == "dot_general":
            out = self._contraction(axes, dtype)
        elif self.cuts(axes):
            out = tree_psum(self._leaves(axes), axes, out_dtype=dtype)
        else:
            part = steps.total(self.args[0].astype(jnp.float32), tuple(sorted(self.eqn.params["axes"])))
            out = tree_psum(part, axes, out_dtype=dtype)
        for eqn in self.between:
            if eqn.primitive.name in _MOVES:
                out = eqn.primitive.bind(out, **eqn.params)
        return out

    @property
    def _dtype(self) -> Any:
        return self.eqn.outvars[0].aval.dtype

    def _contraction(self, axes: Axes | None, dtype: Any) -> jax.Array:
        p = self.eqn.params
        lhs, rhs = self.args
        options = {"out_sharding": p["out_sharding"], "leaves": self.leaves, "axis": axes}
        return contract(lhs, rhs, p["dimension_numbers"], p["precision"], dtype, **options)

    def _leaves(self, axes: Axes) -> jax.Array:
        """This rank's leaves of the row that all ranks hold, joined in fp32."""
        x = self.args[0].astype(jnp.float32)
        reduced = sorted(self.eqn.params["axes"])
        kept = [i for i in range(x.ndim) if i not in reduced]
        count = LEAVES // math.prod(lax.axis_size(a) for a in axes)
        row = jnp.transpose(x, (*kept, *reduced)).reshape(*(x.shape[i] for i in kept), count, -1)
        sums = tree_sum(row)
        return tree_join([sums[..., i] for i in range(count)])


def psum(x: Any, axes: Axes) -> jax.Array:
    """The sum over ranks of what a rank has, or of a `Pending` in one tree with it."""
    return x.over(axes) if isinstance(x, Pending) else tree_psum(x, axes)


def made(x: Any) -> Any:
    """`x`, or what a `Pending` is on this rank alone."""
    if not isinstance(x, Pending):
        return x
    out = x.alone()
    for eqn in x.between:
        if eqn.primitive.name in _MOVES:
            out = eqn.primitive.bind(out, **eqn.params)
        elif eqn.primitive.name == "convert_element_type":
            out = rounding.round_to(out.astype(jnp.float32), eqn.params["new_dtype"])
    return out


def feeds(jaxpr: Any, eqn: Any) -> bool:
    """Whether all that becomes of a product or a sum, in the same jaxpr, is a psum over named axes."""
    if eqn.primitive.name not in MADE_THERE or eqn.outvars[0].aval.dtype.name not in FLOATS:
        return False
    out = eqn.outvars[0]
    while True:
        uses = [e for e in jaxpr.eqns for v in e.invars if v is out]
        if len(uses) != 1 or any(out is v for v in jaxpr.outvars):
            return False
        use = uses[0]
        if use.primitive.name in NAMES:
            axes = use.params["axes"]
            return all(isinstance(a, str) for a in axes) and use.params.get("axis_index_groups") is None
        if use.primitive.name not in _BETWEEN or use.outvars[0].aval.dtype.name not in FLOATS:
            return False
        out = use.outvars[0]
