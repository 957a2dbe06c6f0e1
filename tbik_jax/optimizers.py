"""What optax lacks for bits that no mesh changes: a global norm in one order, fp32 state for bfloat16 parameters.

optax's elementwise optimisers (adamw, sgd, lion, rmsprop, ...) serve as they are. What adds up over a parameter does
not, since XLA adds it up by shards: optax's global norm, and optimisers with sums of their own (adafactor, muon, lamb,
lars).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from .collectives import tree_psum
from .layers.base import FSDP, TP
from .loading import parameter_shardings
from .mesh import entered, resolve_mesh
from .pallas_kernels.common.rounding import mul, pin
from .pallas_kernels.common.tree import tree_join
from .pallas_kernels.tree_matmul.plan import LEAVES

#: Levels of a long sum that one kernel may do. XLA puts the sums over all layers of a stack into one kernel, and with
#: four levels ptxas of CUDA 13.0 and 13.1 takes minutes for it at Qwen3-1.7B's size. No bit depends on it.
_FUSED_LEVELS = 2


def global_norm(tree: Any, *, mesh: Mesh | None = None) -> jax.Array:
    """The Euclidean norm of all gradients together, float32 [], the same bits on every mesh.

    Each dimension that tp or fsdp may cut is cut into eight equal blocks (or four, two, one, where it does not divide).
    The squares of a block meet in halves; blocks along fsdp in a tree, then those along tp; the arrays in the order of
    `jax.tree.leaves`, the same way.

    Args:
        tree: gradients as `value_and_grad` returns them: an `nnx.State` like a model's parameters.
        mesh: the parameters' mesh; None for the ambient mesh, else one device. Under `jax.jit` it has to be named.
    """
    where = resolve_mesh(mesh)
    specs = [each.spec for each in jax.tree.leaves(parameter_shardings(tree, where))]
    cuts = [each.spec for each in jax.tree.leaves(parameter_shardings(tree, _any_mesh(where)))]

    def body(values: list[jax.Array]) -> jax.Array:
        sums = [
            _sum_of_squares(x.astype(jnp.float32), tuple(spec), tuple(cut), where)
            for x, spec, cut in zip(values, specs, cuts, strict=True)
        ]
        return jnp.sqrt(_halves(jnp.stack(sums)))

    # check_vma: as in steps.py, the butterfly ends replicated, which cannot be inferred
    mapped = jax.shard_map(body, mesh=where, in_specs=(specs,), out_specs=jax.P(), check_vma=False)
    with entered(where, tree):
        return mapped(jax.tree.leaves(tree))


def clip_by_global_norm(max_norm: float, *, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with `global_norm`: gradients are scaled by max_norm / norm where the norm is larger.

    Args:
        max_norm: positive.
        mesh: the parameters' mesh; None for the mesh that is ambient now, else one device.

    Raises:
        ValueError: max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")
    where = resolve_mesh(mesh)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates, mesh=where)
        # a norm that is NaN is not below: then every gradient becomes NaN, as in optax, and nobody takes it for a step
        factor = jnp.where(norm <= max_norm, jnp.float32(1), jnp.float32(max_norm) / norm)
        return jax.tree.map(lambda x: mul(x.astype(jnp.float32), factor).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class MixedPrecisionState(NamedTuple):
    """State of `mixed_precision`.

    Attributes:
        inner: of the optimiser, float32.
        master: parameters, float32, or None.
    """

    inner: Any
    master: Any


def mixed_precision(
    tx: optax.GradientTransformation, *, master: bool = False
) -> optax.GradientTransformation:
    """Runs an optimiser in float32 beside parameters of a narrower dtype.

    Args:
        tx: the optimiser; it sees float32 gradients and float32 parameters, and its state is float32.
        master: keep float32 parameters beside the narrow ones, which then are these, rounded. Without them small
            updates are lost in the rounding.

    Returns:
        An optimiser whose updates bring `optax.apply_updates` and `nnx.Optimizer` to the rounded parameters.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> MixedPrecisionState:
        wide = widen(params)
        # a copy: float32 parameters would else share it with their master, and a donated buffer is given once
        return MixedPrecisionState(tx.init(wide), jax.tree.map(jnp.copy, wide) if master else None)

    def update(
        updates: Any, state: MixedPrecisionState, params: Any = None
    ) -> tuple[Any, MixedPrecisionState]:
        if params is None:
            raise ValueError("mixed_precision needs the parameters; pass them to update")
        wide = widen(params) if state.master is None else state.master
        changes, inner = tx.update(widen(updates), state.inner, wide)
        moved = jax.tree.map(lambda p, u: p + pin(u), wide, changes)
        # What takes the narrow parameters to the rounded new ones: exact in float32, where it is added.
        steps = jax.tree.map(
            lambda new, p: new.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32), moved, params
        )
        return steps, MixedPrecisionState(inner, None if state.master is None else moved)

    return optax.GradientTransformation(init, update)


@functools.cache
def _any_mesh(mesh: Mesh) -> Mesh:
    """A mesh of one device with the same axes: its specs name every dimension that could be cut."""
    return Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * len(mesh.axis_names)), mesh.axis_names)


def _sum_of_squares(x: jax.Array, spec: tuple[Any, ...], cut: tuple[Any, ...], mesh: Mesh) -> jax.Array:
    """Of an array of which this rank has the part that `spec` says; `cut` names the dimensions of all meshes."""
    squares = mul(x, x)
    front: list[tuple[str, int]] = []
    for axis in (TP, FSDP):
        if axis not in cut:
            continue
        dim = cut.index(axis)
        ranks = mesh.shape[axis] if dim < len(spec) and spec[dim] == axis else 1
        size = squares.shape[len(front) + dim] * ranks
        blocks = min(LEAVES, size & -size) // ranks
        at = len(front) + dim
        shape = squares.shape
        squares = squares.reshape(*shape[:at], blocks, shape[at] // blocks, *shape[at + 1 :])
        squares = jnp.moveaxis(squares, at, len(front))
        front.append((axis, ranks))
    total = _halves(squares.reshape(*squares.shape[: len(front)], -1))
    for axis, ranks in reversed(front):  # fsdp first, the last of the leading dimensions
        total = tree_join([total[..., i] for i in range(total.shape[-1])])
        if ranks > 1:
            total = tree_psum(total, axis)
    return total


def _halves(x: jax.Array) -> jax.Array:
    """`tree_sum` of a long last axis, cut into programs that a GPU runs in parallel."""
    n = x.shape[-1]
    width = 1 << (n - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - n)])
    level = 0
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
        level += 1
        if level % _FUSED_LEVELS == 0:
            x = lax.optimization_barrier(x)
    return x[..., 0]
