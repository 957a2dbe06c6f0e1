"""The invariant numerics with gradients: every sum of the backward pass is a tree that no mesh changes.

Each op is the forward op of `InvariantNumerics` with its own VJP. Two kinds of sums cross devices:

* over tp: the gradient of a column-parallel layer's input contracts over N, which tp cuts: eight leaves of N, of which
  a rank has a complete subtree, joined by `tree_psum`. A value that every tp rank holds has a cotangent that every rank
  holds too, not a part of it.
* over data and fsdp: a weight's gradient contracts over the tokens of the whole batch: eight token leaves, row-major.
  The ops return this rank's subtree in fp32, and `weight` joins the rest and rounds nothing.

Weights arrive as fp32 arrays that hold values of the activations' dtype, so that their gradients are fp32 all the way;
the ops round them back, which is exact, and XLA drops the pair of casts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..collectives import tree_all_gather, tree_psum, tree_psum_scatter
from ..pallas_kernels import swiglu_joint, tree_matmul
from ..pallas_kernels.attention.backward import attention_backward, attention_with_lse
from ..pallas_kernels.common.rounding import round_to
from ..pallas_kernels.common.tree import tree_join
from ..pallas_kernels.embedding.backward import embedding_backward
from ..pallas_kernels.log_softmax.backward import token_logprob_backward
from ..pallas_kernels.qk_norm_rope.backward import qk_norm_rope_backward
from ..pallas_kernels.rms_norm.backward import rms_norm_backward
from ..pallas_kernels.swiglu.backward import swiglu_backward
from ..pallas_kernels.tree_matmul.plan import plan_contraction
from .base import DATA, FSDP, TP, chosen_logprobs
from .invariant import InvariantNumerics

_op = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantTraining(InvariantNumerics):
    """`InvariantNumerics` that can be differentiated, for whole sequences without a cache.

    Attributes:
        token_leaves: leaves that this rank's tokens of one pass are cut into.
        dtype: of the activations, by name.
    """

    token_leaves: int = 1
    dtype: str = "bfloat16"

    def embedding(self, ids: jax.Array, table: jax.Array) -> jax.Array:
        return _embedding(self, ids, table)

    def column_parallel(
        self, x: jax.Array, w: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        if out_dtype is not None and jnp.dtype(out_dtype) != x.dtype:
            raise ValueError(f"column_parallel has a gradient in x's dtype {x.dtype} alone, not {out_dtype}")
        return _column_parallel(self, x, w)

    def gated_column_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return _gated_column_parallel(self, x, w)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return _row_parallel(self, x, w)

    def keep_rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        return _keep_rms_norm(self, x, scale, eps)

    def add_rms_norm(
        self, x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        return _add_rms_norm(self, x, y, scale, eps)

    def qk_norm_rope_cache(self, *operands: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _qk_norm_rope(self, *operands, eps)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return _attention(self, q, k, v, positions)

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return _add(self, x, y)

    def token_logprobs(self, hidden: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
        """Log-probabilities float32 [B, T] of targets [B, T], from hidden [B, T, D] and this rank's w [V/tp, D]."""
        return _token_logprobs(self, hidden, w, targets)

    def weight(self, value: jax.Array, fsdp_dim: int | None) -> jax.Array:
        return _weight(self.dtype, fsdp_dim, value)

    @property
    def forward(self) -> InvariantNumerics:
        """The same forward passes, without gradients."""
        return InvariantNumerics(backend=self.backend)

    def matmul(self, x: jax.Array, w: jax.Array, leaves: int, **options: Any) -> jax.Array:
        """`tree_matmul` on this backend."""
        return tree_matmul(x, w, leaves, backend=self.matmul_backend(x.dtype), **options)

    def weight_gradient(self, dy: jax.Array, x: jax.Array) -> jax.Array:
        """dy^T x over this rank's tokens, fp32 [N, K], from dy [..., N] and x [..., K]: its token leaves, joined."""
        rows, tokens = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        return self.matmul(rows, tokens, self.token_leaves, out_dtype=jnp.float32, transpose_lhs=True)

    def input_gradient(self, dy: jax.Array, w: jax.Array) -> jax.Array:
        """dy [..., N/tp] @ w [N/tp, K], joined over tp: eight leaves of N, whoever holds them."""
        ranks = lax.axis_size(TP)
        plan = plan_contraction(k=w.shape[0] * ranks, n=w.shape[1], dtype=dy.dtype, role="row")
        if ranks == 1:
            return self.matmul(dy, w, plan.leaves)
        part = self.matmul(dy, w, plan.local_leaves(ranks), out_dtype=jnp.float32)
        return tree_psum(part, TP, out_dtype=dy.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight(dtype: str, dim: int | None, value: jax.Array) -> jax.Array:
    rounded = round_to(value, dtype)
    if dim is not None:
        rounded = tree_all_gather(rounded, FSDP, axis=dim, tiled=True)
    return rounded.astype(jnp.float32)


def _weight_bwd(dtype: str, dim: int | None, _: None, ct: jax.Array) -> tuple[jax.Array]:
    if dim is None:
        ct = tree_psum(ct, FSDP)
    else:
        ct = tree_psum_scatter(ct, FSDP, scatter_dimension=dim, tiled=True)
    return (tree_psum(ct, DATA),)


_weight.defvjp(lambda dtype, dim, value: (_weight(dtype, dim, value), None), _weight_bwd)


@_op
def _embedding(ops: InvariantTraining, ids: jax.Array, table: jax.Array) -> jax.Array:
    return ops.forward.embedding(ids, table.astype(ops.dtype))


def _embedding_bwd(ops: InvariantTraining, saved: Any, dy: jax.Array) -> tuple[None, jax.Array]:
    ids, rows = saved
    offset = lax.axis_index(TP) * rows
    return None, embedding_backward(ids, dy, rows=rows, offset=offset, leaves=ops.token_leaves)


_embedding.defvjp(
    lambda ops, ids, table: (_embedding(ops, ids, table), (ids, table.shape[0])), _embedding_bwd
)


@_op
def _column_parallel(ops: InvariantTraining, x: jax.Array, w: jax.Array) -> jax.Array:
    return ops.forward.column_parallel(x, w.astype(x.dtype))


def _column_parallel_bwd(ops: InvariantTraining, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return ops.input_gradient(dy, w.astype(x.dtype)), ops.weight_gradient(dy, x)


_column_parallel.defvjp(lambda ops, x, w: (_column_parallel(ops, x, w), (x, w)), _column_parallel_bwd)


@_op
def _gated_column_parallel(ops: InvariantTraining, x: jax.Array, w: jax.Array) -> jax.Array:
    return ops.forward.gated_column_parallel(x, w.astype(x.dtype))


def _gated_fwd(ops: InvariantTraining, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    product = ops.forward.column_parallel(x, w.astype(x.dtype))
    return swiglu_joint(product), (x, w, product)


def _gated_bwd(ops: InvariantTraining, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, product = saved
    gate, up = jnp.split(product, 2, axis=-1)
    dgate, dup = swiglu_backward(gate, up, dy)
    # A leaf of dX is a slice of the gates and the same slice of the values, since tp cuts both alike. The rows of dW
    # are made in that order too, and put back: they are fewer than the tokens.
    plan = plan_contraction(k=w.shape[0] * lax.axis_size(TP), n=w.shape[1], dtype=x.dtype, role="row")
    leaves = plan.local_leaves(lax.axis_size(TP))
    f, d = w.shape[0] // 2, w.shape[1]
    pairs = jnp.stack(
        [part.reshape(*part.shape[:-1], leaves, f // leaves) for part in (dgate, dup)], axis=-2
    ).reshape(*dy.shape[:-1], 2 * f)
    rows = w.astype(x.dtype).reshape(2, leaves, f // leaves, d).swapaxes(0, 1).reshape(2 * f, d)
    dw = ops.weight_gradient(pairs, x).reshape(leaves, 2, f // leaves, d).swapaxes(0, 1).reshape(2 * f, d)
    return ops.input_gradient(pairs, rows), dw


_gated_column_parallel.defvjp(_gated_fwd, _gated_bwd)


@_op
def _row_parallel(ops: InvariantTraining, x: jax.Array, w: jax.Array) -> jax.Array:
    return ops.forward.row_parallel(x, w.astype(x.dtype))


def _row_parallel_bwd(ops: InvariantTraining, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    plan = plan_contraction(k=w.shape[1], n=w.shape[0] * lax.axis_size(TP), dtype=x.dtype, role="column")
    dx = ops.matmul(dy, w.astype(x.dtype), plan.leaves, transpose_rhs=True)
    return dx, ops.weight_gradient(x, dy)


_row_parallel.defvjp(lambda ops, x, w: (_row_parallel(ops, x, w), (x, w)), _row_parallel_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _keep_rms_norm(
    ops: InvariantTraining, x: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    return ops.forward.keep_rms_norm(x, scale.astype(x.dtype), eps=eps)


def _norm_bwd(ops: InvariantTraining, eps: float, saved: Any, cts: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient that comes along the residual stream is added before the one rounding."""
    total, scale = saved
    dtotal, dout = cts
    narrow = scale.astype(total.dtype)
    dx, dscale = rms_norm_backward(total, narrow, dout, eps=eps, leaves=ops.token_leaves, residual=dtotal)
    return dx, tree_join(list(dscale))


_keep_rms_norm.defvjp(lambda ops, x, scale, eps: (_keep_rms_norm(ops, x, scale, eps), (x, scale)), _norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _add_rms_norm(
    ops: InvariantTraining, x: jax.Array, y: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    return ops.forward.add_rms_norm(x, y, scale.astype(x.dtype), eps=eps)


def _add_rms_norm_fwd(
    ops: InvariantTraining, x: jax.Array, y: jax.Array, scale: jax.Array, eps: float
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    total, out = _add_rms_norm(ops, x, y, scale, eps)
    return (total, out), (total, scale)


def _add_rms_norm_bwd(ops: InvariantTraining, eps: float, saved: Any, cts: Any) -> tuple[jax.Array, ...]:
    dx, dscale = _norm_bwd(ops, eps, saved, cts)
    return dx, dx, dscale


_add_rms_norm.defvjp(_add_rms_norm_fwd, _add_rms_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 10))
def _qk_norm_rope(
    ops: InvariantTraining,
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    scales = q_scale.astype(qkv.dtype), k_scale.astype(qkv.dtype)
    rest = cos, sin, positions, lengths, k_cache, v_cache
    return ops.forward.qk_norm_rope_cache(qkv, *scales, *rest, eps=eps)


def _qk_norm_rope_fwd(ops: InvariantTraining, *operands: Any) -> tuple[Any, Any]:
    return _qk_norm_rope(ops, *operands), operands[:6]


def _qk_norm_rope_bwd(ops: InvariantTraining, eps: float, saved: Any, cts: Any) -> tuple[Any, ...]:
    qkv, q_scale, k_scale, *tables = saved
    narrow = q_scale.astype(qkv.dtype), k_scale.astype(qkv.dtype)
    dqkv, *dscales = qk_norm_rope_backward(qkv, *narrow, *tables, *cts, eps=eps, leaves=ops.token_leaves)
    joined = []
    for each in dscales:  # [leaves, K/tp, H]: KV heads first, which tp cuts, then tokens
        heads = tree_psum(tree_join([each[:, i] for i in range(each.shape[1])]), TP)
        joined.append(tree_join(list(heads)))
    return dqkv, *joined, None, None, None, None, None, None


_qk_norm_rope.defvjp(_qk_norm_rope_fwd, _qk_norm_rope_bwd)


@_op
def _attention(
    ops: InvariantTraining, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
) -> jax.Array:
    return ops.forward.attention(q, k, v, positions)


def _attention_fwd(
    ops: InvariantTraining, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Any]:
    out, lse = attention_with_lse(q, k, v, positions, backend=ops.attention_backend(q, k))
    return out, (q, k, v, out, lse)


def _attention_bwd(ops: InvariantTraining, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, out, lse = saved
    return *attention_backward(q, k, v, out, lse, dout, backend=ops.attention_backend(q, k)), None


_attention.defvjp(_attention_fwd, _attention_bwd)


@_op
def _add(ops: InvariantTraining, x: jax.Array, y: jax.Array) -> jax.Array:
    return ops.forward.add(x, y)


_add.defvjp(lambda ops, x, y: (_add(ops, x, y), None), lambda ops, _, ct: (ct, ct))


@_op
def _token_logprobs(ops: InvariantTraining, hidden: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    return _token_logprobs_fwd(ops, hidden, w, targets)[0]


def _token_logprobs_fwd(
    ops: InvariantTraining, hidden: jax.Array, w: jax.Array, targets: jax.Array
) -> tuple[jax.Array, Any]:
    logits = ops.forward.column_parallel(hidden, w.astype(hidden.dtype), out_dtype=jnp.float32)
    statistics = ops.vocab_statistics(logits)
    return chosen_logprobs(logits, targets, statistics), (hidden, w, targets, logits, statistics)


def _token_logprobs_bwd(ops: InvariantTraining, saved: Any, ct: jax.Array) -> tuple[Any, ...]:
    hidden, w, targets, logits, statistics = saved
    offset = lax.axis_index(TP) * w.shape[0]
    totals = statistics.row_max, statistics.log_total
    dlogits = token_logprob_backward(logits, targets, *totals, ct, offset=offset, out_dtype=hidden.dtype)
    return ops.input_gradient(dlogits, w.astype(hidden.dtype)), ops.weight_gradient(dlogits, hidden), None


_token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd)
