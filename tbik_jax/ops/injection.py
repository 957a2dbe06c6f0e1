"""`TreeDotGeneral`: the `dot_general` that Flax layers take."""

import dataclasses
from typing import Any

import jax

from ..pallas_kernels.tree_matmul.plan import LEAVES
from .contraction import DimensionNumbers, contract, plan_product


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeDotGeneral:
    """A `lax.dot_general` in tree order, as a value: `nnx.Linear(..., dot_general=TreeDotGeneral())`.

    Equal ones are one key of jit's caches, so that layers with equal shapes share one trace. It serves `nnx.Linear` and
    `nnx.LinearGeneral`, Linen's `Dense` and `DenseGeneral`; `nnx.Einsum` takes `einsum_op=tbik_jax.einsum` instead.
    Only the contraction passes through it: a bias is one more add, which is elementwise, and its gradient is a sum over
    rows that JAX makes in an order of its own. `tbik_jax.matmul(x, w, bias)` has a gradient of the bias in tree order.

    With `axis`, inside `jax.shard_map(..., check_vma=False)`, each rank holds a consecutive part of K, which it cuts
    into `leaves` / ranks leaves; `tree_psum` adds up the ranks in fp32, and the sum is rounded once: the bits of one
    device. The cotangents are summed by `tree_psum` too, as `lax.psum`'s are under `check_vma=False`.

    Attributes:
        leaves: 1, 2, 4 or 8, as in `tbik_jax.dot_general`.
        axis: mesh axis, or axes, over which K is cut; None if K is whole.
    """

    leaves: int = LEAVES
    axis: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        plan_product(1, self.leaves)
        if self.axis is not None and not isinstance(self.axis, str):
            object.__setattr__(self, "axis", tuple(self.axis))

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: Any = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`tbik_jax.dot_general` with these leaves, and the sum over `axis`; arguments as there.

        Raises:
            ValueError: as there; with `axis`, ranks that do not divide `leaves`, or a K that does not cut into leaves
                of a multiple of 16.
        """
        return contract(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
            leaves=self.leaves,
            axis=self.axis,
        )
