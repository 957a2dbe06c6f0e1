"""Losses and gradients whose bits do not depend on the mesh.

The batch is cut over data and fsdp, weights over fsdp and tp, and every sum is a tree of eight leaves: the eight equal
runs of the batch's tokens, row by row. A rank, and a micro-batch, holds a complete subtree of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from .collectives import tree_psum
from .layers.base import TrainingParallel
from .layers.batch_invariant import BatchInvariantTraining
from .layers.plain_training import PlainTraining
from .layers.training import InvariantTraining
from .loading import parameter_path, parameter_shardings
from .mesh import BATCH_AXES, entered, resolve_mesh
from .microbatches import tree_scan
from .models.qwen3 import Qwen3
from .models.qwen3.modules import Batch
from .pallas_kernels.common.backend import device_backend
from .pallas_kernels.common.rounding import div, mul
from .pallas_kernels.common.tree import tree_join, tree_sum
from .pallas_kernels.rope.api import rope_tables
from .pallas_kernels.tree_matmul.plan import LEAF_MULTIPLE, LEAVES
from .steps import INVARIANT_OPTIONS, NUMERICS, ORDERED_OPTIONS, check_plans, fsdp_dimensions
from .training_checks import (
    check_aux,
    check_batch,
    check_gradient_plans,
    check_losses,
    check_placed,
    check_result,
)

#: For a `jax.jit` of one's own around `value_and_grad`.
COMPILER_OPTIONS = INVARIANT_OPTIONS

#: What a loss function returns: float32 losses and their weights, arrays of one shape [B, T] or [B, T - 1].
Losses = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingModel:
    """The model as a loss function sees it: this rank's rows, and operations that have gradients.

    Attributes:
        module: the model, whose parameters are this rank's parts in fp32.
        head: the weights [V/tp, D] before the logits; with tied embeddings another name of theirs.
        parallel: numerics and mesh.
        scan_layers: whether the layers run as a scan.
        remat: whether a layer's values are computed again in the backward pass.
        rows: of this rank in this pass.
        tokens_multiple: what a call's number of tokens must be a multiple of.
        calls: shapes of the tokens that `logprobs` was called with.
    """

    module: Qwen3
    head: tuple[str, jax.Array]
    parallel: TrainingParallel
    scan_layers: bool
    remat: bool
    rows: int
    tokens_multiple: int
    calls: list[tuple[int, ...]]

    def logprobs(self, tokens: jax.Array) -> jax.Array:
        """Log-probabilities float32 [B, T - 1] of tokens [B, T] from the second on, given those before.

        The bits are `score`'s. Rows shorter than T are padded with any token: what stands behind a position changes
        nothing there, and padding's losses get weight 0.

        Args:
            tokens: integers [B, T], an array of the batch: this rank's rows, in their order.

        Raises:
            ValueError: another number of rows, as where two arrays of the batch were put behind one another, whose
                order would follow the mesh; or too few tokens for leaves.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.shape[0] != self.rows:
            raise ValueError(
                f"logprobs takes integer tokens [{self.rows}, T], this rank's rows of the batch in their order, not "
                f"{tokens.dtype} {tokens.shape}; call it once for each of several arrays"
            )
        b, t = tokens.shape
        if b * t % self.tokens_multiple:
            raise ValueError(
                f"{b} rows of {t} tokens, which a rank has in a pass, do not cut into token leaves of a multiple of "
                f"{LEAF_MULTIPLE}; their product must be a multiple of {self.tokens_multiple}"
            )
        self.calls.append(tokens.shape)
        config = self.module.config
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        cos, sin = rope_tables(t, config.head_dim, config.rope_theta)
        batch = Batch(
            tokens=tokens,
            positions=positions,
            lengths=jnp.full((b,), t, jnp.int32),
            cos=jnp.asarray(cos),
            sin=jnp.asarray(sin),
        )
        stacked = self.module.stacked_layers() if self.scan_layers else None
        hidden = self.module.hidden(batch, self.parallel, stacked=stacked, remat=self.remat)
        # The last position predicts nothing; it stays, so that rows keep their length in the sums over tokens.
        targets = jnp.roll(tokens, -1, axis=1)
        return self.parallel.numerics.token_logprobs(hidden, self.parallel.weight(*self.head), targets)[
            :, :-1
        ]


#: With `has_aux`, the result is (losses, anything that is an array [B, ...] in all its leaves).
LossFunction = Callable[[TrainingModel, Any], Any]


def value_and_grad(
    loss_fn: LossFunction,
    *,
    mesh: Mesh | None = None,
    numerics: str = "invariant",
    microbatches: int = 1,
    remat: bool = True,
    scan_layers: bool | None = None,
    has_aux: bool = False,
) -> Callable[[Qwen3, Any], tuple[Any, nnx.State]]:
    """A function of (model, batch) that returns the mean loss and its gradients, the same bits on every mesh.

    `loss_fn(model, batch)` gets a `TrainingModel` and this rank's rows of the batch, and returns each token's loss and
    its weight. The mean is sum(loss * weight) / sum(weight) over the whole batch; weights are constants to the
    gradient. What `loss_fn` computes itself from the log-probabilities must be elementwise, or along a row.

    Args:
        loss_fn: the losses of some rows. It is traced; the same function object is compiled once.
        mesh: with any of the axes data, fsdp and tp, of powers of two, data * fsdp at most 8; None for the mesh that is
            ambient now, else one device.
        numerics: "invariant"; "plain" for XLA's own reductions; or "batch_invariant" for the invariant ones but for
            sums over tp, which are `lax.psum`'s.
        microbatches: passes that the batch is cut into, to save memory: runs of consecutive rows. The gradients of all
            are added up before the result, as the upper part of the tree, so no bit changes.
        remat: compute each layer's values again in the backward pass instead of keeping them. No bit changes.
        scan_layers: run the layers as a scan over one compiled layer; None does so on the CPU.
        has_aux: `loss_fn` returns ((losses, weights), aux), aux a pytree of arrays with a leading entry for each of its
            rows, such as the log-probabilities that the loss was made of. They come back for the whole batch in the
            order of its rows, cut over data and fsdp.

    Returns:
        A function of a Flax NNX model and a batch (a pytree of arrays with B leading rows). It gives the loss,
        float32 [] (with `has_aux` the pair of it and aux), and an `nnx.State` like `nnx.state(model, nnx.Param)`,
        float32, sharded like the parameters. It can be called under a `jax.jit` of one's own, with
        `compiler_options=tbik_jax.training.COMPILER_OPTIONS`.

    Raises:
        ValueError: (from the result) ranks, micro-batches or token numbers that cut no complete subtrees; see the
            message.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is unknown; use one of {', '.join(NUMERICS)}")
    if microbatches not in (1, 2, 4, 8):
        raise ValueError(
            f"microbatches={microbatches} must be 1, 2, 4 or 8, to be part of a tree of 8 leaves"
        )

    where = resolve_mesh(mesh)

    def run(model: Qwen3, batch: Any) -> tuple[Any, nnx.State]:
        graphdef, state = nnx.split(model, nnx.Param)
        shardings = parameter_shardings(state, where)
        plan = _Plan(
            loss_fn=loss_fn,
            mesh=where,
            graphdef=graphdef,
            treedef=jax.tree.structure(state),
            specs=tuple(each.spec for each in jax.tree.leaves(shardings)),
            names=tuple(
                str(parameter_path(path)[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state)
            ),
            fsdp_dims=fsdp_dimensions(state, shardings, where),
            numerics=numerics,
            microbatches=microbatches,
            remat=remat,
            scan_layers=where.devices.flat[0].platform == "cpu" if scan_layers is None else scan_layers,
            dtype=jnp.dtype(model.dtype).name,
            has_aux=has_aux,
        )
        if numerics != "plain":
            check_plans(model.config, model.dtype)
            check_gradient_plans(model.config)
        check_batch(batch, where, microbatches)
        values = jax.tree.leaves(state)
        with entered(where, (values, batch)):
            if any(isinstance(x, jax.core.Tracer) for x in (*values, *jax.tree.leaves(batch))):
                loss, aux, gradients = _mapped(plan)(values, batch)
            else:
                values = jax.device_put(values, jax.tree.leaves(shardings))
                loss, aux, gradients = _jitted(plan)(values, _placed(batch, where))
        return (loss, aux) if has_aux else loss, jax.tree.unflatten(plan.treedef, gradients)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that a compiled gradient depends on but shapes."""

    loss_fn: LossFunction
    mesh: Mesh
    graphdef: Any
    treedef: Any
    specs: tuple[P, ...]
    names: tuple[str, ...]
    fsdp_dims: tuple[tuple[str, int], ...]
    numerics: str
    microbatches: int
    remat: bool
    scan_layers: bool
    dtype: str
    has_aux: bool

    @property
    def ranks(self) -> int:
        """That cut the batch."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def head(self) -> int:
        """Index of the weights before the logits."""
        known = "lm_head_weight_vd" if "lm_head_weight_vd" in self.names else "embedding_vd"
        return self.names.index(known)

    @property
    def token_leaves(self) -> int:
        """Of one rank in one pass."""
        return LEAVES // (self.ranks * self.microbatches)

    def parallel(self) -> TrainingParallel:
        device = self.mesh.devices.flat[0]
        if self.numerics == "plain":
            plain = PlainTraining(cudnn=device.platform == "gpu", dtype=self.dtype)
            return TrainingParallel(numerics=plain, fsdp_dims=self.fsdp_dims)
        kind = InvariantTraining if self.numerics == "invariant" else BatchInvariantTraining
        ops = kind(backend=device_backend(device), token_leaves=self.token_leaves, dtype=self.dtype)
        return TrainingParallel(numerics=ops, fsdp_dims=self.fsdp_dims)


def _placed(batch: Any, mesh: Mesh) -> Any:
    """The batch's rows on the ranks that take them, wherever they lay."""
    return jax.device_put(batch, jax.NamedSharding(mesh, P(BATCH_AXES)))


@functools.lru_cache(maxsize=64)
def _jitted(plan: _Plan) -> Any:
    options = ORDERED_OPTIONS if plan.numerics == "plain" else INVARIANT_OPTIONS
    return jax.jit(_mapped(plan), compiler_options=options)


def _mapped(plan: _Plan) -> Callable[[list[jax.Array], Any], tuple[jax.Array, Any, list[jax.Array]]]:
    """The gradient as one `shard_map` over whole arrays."""

    def call(values: list[jax.Array], batch: Any) -> tuple[jax.Array, Any, list[jax.Array]]:
        # Rows of a pass lie together in the batch, so that the passes are the upper levels of the tree.
        cut = jax.tree.map(lambda x: x.reshape(plan.microbatches, -1, *x.shape[1:]), batch)
        mapped = jax.shard_map(
            functools.partial(_body, plan),
            mesh=plan.mesh,
            in_specs=(list(plan.specs), P(None, BATCH_AXES)),
            out_specs=(P(), P(None, BATCH_AXES), list(plan.specs)),
            check_vma=False,  # as in steps.py: the butterfly ends replicated, which cannot be inferred
        )
        loss, aux, gradients = mapped(values, cut)
        return loss, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux), gradients

    return call


def _body(plan: _Plan, values: list[jax.Array], batches: Any) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Loss, aux [microbatches, B, ...] and gradients, from this rank's parameters and rows [microbatches, B, ...]."""
    wide = [value.astype(jnp.float32) for value in values]

    def one(batch: Any) -> tuple[Any, Any]:
        """(sum of losses, sum of weights, gradients, that of the head) of one pass, joined over all ranks; aux."""

        def losses(parameters: list[jax.Array], head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            module = nnx.merge(plan.graphdef, jax.tree.unflatten(plan.treedef, parameters))
            model = TrainingModel(
                module=module,
                head=(plan.names[plan.head], head),
                parallel=plan.parallel(),
                scan_layers=plan.scan_layers,
                remat=plan.remat,
                rows=jax.tree.leaves(batch)[0].shape[0],
                tokens_multiple=1 if plan.numerics == "plain" else plan.token_leaves * LEAF_MULTIPLE,
                calls=[],
            )
            result = plan.loss_fn(model, batch)
            check_result(result, plan.has_aux)
            (loss, weights), aux = result if plan.has_aux else (result, None)
            if len(model.calls) > 1 and plan.microbatches > 1:
                raise ValueError(
                    f"the loss function calls logprobs {len(model.calls)} times, and with microbatches="
                    f"{plan.microbatches} their gradients would be added pass by pass, in another order than without; "
                    "use microbatches=1, or a call"
                )
            check_losses(loss, weights)
            check_aux(aux, jax.tree.leaves(batch)[0].shape[0])
            return loss, (weights, aux)

        loss, pullback, (weights, aux) = jax.vjp(losses, wide, wide[plan.head], has_aux=True)
        weights = lax.stop_gradient(weights).astype(jnp.float32)
        sums = _token_sum(plan, mul(loss, weights)), _token_sum(plan, weights)
        return (*sums, *pullback(weights)), aux

    if plan.microbatches == 1:
        sums, aux = one(jax.tree.map(lambda x: x[0], batches))
        aux = jax.tree.map(lambda x: x[None], aux)
    else:
        sums, aux = tree_scan(one, batches, plan.microbatches)
    total, weight, gradients, head = sums
    # The weights before the logits have a gradient of their own. Where they are the embedding's too, both are added
    # here, whole, and not pass by pass: each is a tree.
    gradients[plan.head] = gradients[plan.head] + head
    # Without weights there is no mean; the gradients are zeros then, and the loss too.
    weight = jnp.where(weight != 0, weight, jnp.float32(jnp.inf))
    return total / weight, aux, [div(each, weight) for each in gradients]


def _token_sum(plan: _Plan, x: jax.Array) -> jax.Array:
    """The sum of this pass' fp32 x [B, T] over all ranks: rows in halves, runs of rows in halves, runs in a tree."""
    if plan.numerics == "plain":
        return lax.psum(jnp.sum(x), BATCH_AXES)
    rows = x.shape[0] * plan.ranks * plan.microbatches
    runs = min(LEAVES, rows & -rows) // (plan.ranks * plan.microbatches)  # of this rank in this pass
    return tree_psum(tree_join(list(tree_sum(tree_sum(x).reshape(runs, -1)))), BATCH_AXES)


def train_step(
    loss_fn: LossFunction,
    *,
    mesh: Mesh | None = None,
    numerics: str = "invariant",
    microbatches: int = 1,
    remat: bool = True,
    scan_layers: bool | None = None,
    has_aux: bool = False,
) -> Callable[[Qwen3, nnx.Optimizer, Any], Any]:
    """A compiled step of (model, optimizer, batch): gradients and update in one program, in place.

    The arguments are `value_and_grad`'s. The model lies on the mesh (`shard_model`) and the optimiser was made from it
    there. Parameters and optimiser state keep their shardings. Their old buffers are reused: other references to them,
    as in `nnx.clone(model)` or the model before `shard_model`, are deleted with the first step; copy what shall stay.

    Returns:
        A function that updates the model and the optimiser and returns the loss before the update, float32 [], or
        (loss, aux) with `has_aux`.
    """
    where = resolve_mesh(mesh)
    gradient = value_and_grad(
        loss_fn,
        mesh=where,
        numerics=numerics,
        microbatches=microbatches,
        remat=remat,
        scan_layers=scan_layers,
        has_aux=has_aux,
    )

    @functools.lru_cache(maxsize=8)
    def compiled(graphdef: Any, treedef: Any, shardings: tuple[Any, ...]) -> Any:
        def run(leaves: list[jax.Array], batch: Any) -> tuple[list[jax.Array], Any]:
            model, optimizer = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            loss, gradients = gradient(model, batch)
            optimizer.update(model, gradients)
            return jax.tree.leaves(nnx.state((model, optimizer))), loss

        options = ORDERED_OPTIONS if numerics == "plain" else INVARIANT_OPTIONS
        return jax.jit(run, donate_argnums=0, out_shardings=(list(shardings), None), compiler_options=options)

    def step(model: Qwen3, optimizer: nnx.Optimizer, batch: Any) -> Any:
        check_placed(model, where)
        graphdef, state = nnx.split((model, optimizer))
        leaves, treedef = jax.tree.flatten(state)
        everywhere = jax.NamedSharding(where, P())
        shardings = tuple(
            x.sharding if x.sharding.device_set == everywhere.device_set else everywhere for x in leaves
        )
        leaves = jax.device_put(leaves, list(shardings))
        with entered(where, leaves):
            leaves, loss = compiled(graphdef, treedef, shardings)(leaves, _placed(batch, where))
        nnx.update((model, optimizer), jax.tree.unflatten(treedef, leaves))
        return loss

    return step


def shard_model(model: Qwen3, mesh: Mesh | None = None) -> Qwen3:
    """The model with its parameters on the mesh, as training and inference cut them; nothing moves that is there."""
    where = resolve_mesh(mesh)
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, parameter_shardings(state, where)))
