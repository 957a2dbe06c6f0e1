"""The reduction plan of a contraction: data, made by a pure function of global shapes, dtype and role."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Role = Literal["row", "column"]

#: Leaves of a contraction whose K a mesh axis may cut, and so the largest product of axes over one K.
LEAVES = 8
#: A leaf is a whole number of the tensor core's k16 steps.
LEAF_MULTIPLE = 16
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContractionPlan:
    """How one contraction over K is added up.

    Attributes:
        k: global length of the contraction.
        leaves: number of equal slices of K, each one fp32 accumulation in ascending k.
        leaf_size: k // leaves.
        order: "neighbours_first": leaves meet in a balanced binary tree, leaf 2i with leaf 2i + 1 first.
    """

    k: int
    leaves: int
    leaf_size: int
    order: Literal["neighbours_first"] = "neighbours_first"

    def local_leaves(self, ranks: int) -> int:
        """Leaves that each of `ranks` ranks holds: a complete subtree.

        Raises:
            ValueError: the ranks do not cut the leaves into equal complete subtrees.
        """
        if ranks < 1 or self.leaves % ranks:
            possible = ", ".join(str(t) for t in (1, 2, 4, 8) if self.leaves % t == 0)
            raise ValueError(
                f"{self.leaves} leaves of k={self.k} cannot be cut over {ranks} ranks; use {possible}"
            )
        return self.leaves // ranks


def plan_contraction(*, k: int, n: int, dtype: jax.typing.DTypeLike, role: Role) -> ContractionPlan:
    """The plan of `x [M, K] @ w [K, N]`, from global sizes alone: never from M, the batch, the mesh or the device.

    Args:
        k: global K.
        n: global N.
        dtype: of the operands: bfloat16, float16 or float32.
        role: "row" where a mesh axis may cut K (o_proj, down_proj): eight leaves. "column" where none does (qkv,
            gate_up, lm_head): one leaf.

    Raises:
        ValueError: K does not cut evenly into leaves of a multiple of 16, or the dtype or role is unknown.
    """
    if role not in ("row", "column"):
        raise ValueError(
            f"role={role!r} is unknown; use 'row' (K may be sharded) or 'column' (K is whole on each rank)"
        )
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(
            f"dtype {jnp.dtype(dtype).name} has no reduction plan; use one of {', '.join(_DTYPES)}"
        )
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    leaves = LEAVES if role == "row" else 1
    return ContractionPlan(k=k, leaves=leaves, leaf_size=check_leaves(k, leaves))


def check_leaves(k: int, leaves: int) -> int:
    """Returns the leaf size, or raises `ValueError` where k does not cut into `leaves` leaves of a multiple of 16."""
    if leaves not in (1, 2, 4, 8):
        raise ValueError(f"leaves={leaves} is not supported; use 1, 2, 4 or 8")
    if k < 1 or k % (leaves * LEAF_MULTIPLE):
        raise ValueError(
            f"k={k} cannot be cut into {leaves} leaves of a multiple of {LEAF_MULTIPLE}; "
            f"k must be a multiple of {leaves * LEAF_MULTIPLE} (the next is {_round_up(k, leaves * LEAF_MULTIPLE)})"
        )
    return k // leaves


def _round_up(value: int, multiple: int) -> int:
    return max(1, -(-value // multiple)) * multiple
