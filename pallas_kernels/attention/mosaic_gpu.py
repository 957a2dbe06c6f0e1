"""Causal attention for Hopper GPUs, in Pallas Mosaic GPU: prefill, chunks of it and decode with one set of bits.

A consumer warpgroup owns 64 rows, each a query of one head. It walks blocks of keys: scores by wgmma, softmax step in
registers, values by a wgmma whose left operand, the weights, never leaves the registers. The scores of the next block
are multiplied beside the values of this one. A split of the keys has an accumulator of its own, and splits are joined
in ascending order (`merge`).

* "tiles" (prefill): two consumers a CTA with 64 queries of one head each. They walk all keys and join the splits as
  they come; the joined ones wait in shared memory.
* "split" (decode, short chunks): one consumer, whose rows are the queries and the heads of one KV head. `parts` CTAs
  take every parts-th split and leave it in global memory. Then, if they are a cluster, each joins all splits of some
  of the rows, else a second launch does. One part alone joins them in shared memory like "tiles".
* "columns" (decode): like "split" for at most 8 rows, with the two products transposed (`columns.py`).

A row's bits do not depend on its place among the 64, nor on the rows beside it, and blocks and splits that a row does
not see change nothing in it: so all variants, every tile and every number of CTAs give a query the same bits. What is
multiplied, rounded and added in which order stands once, in `arithmetic.py`.
"""

import math
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp

from .columns import run_columns
from .config import COLUMNS, ROWS, AttentionConfig, AttentionShape, choose_config
from .plan import AttentionPlan
from .problem import Problem
from .split import run_split
from .tiles import run_tiles

__all__ = ["attention_mosaic_gpu"]


def attention_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    plan: AttentionPlan,
    scale: float,
    config: AttentionConfig | None = None,
    with_lse: bool = False,
    interpret: bool = False,
) -> Any:
    """Causal grouped-query attention on a Hopper GPU.

    Args:
        q: [B, T, N, H], bfloat16 or float16; H is 64 or 128.
        k: [B, S, K, H] of the same type, key s at absolute position s; N is a multiple of K, at most 64 times K. S is
            at least `plan.block` and a multiple of 8.
        v: like k. Values past a query's position may hold anything finite.
        positions: integers [B, T], the absolute position of each query, below S. Only positions[b, 0] is read: the
            others follow one by one.
        plan: blocks of 128 keys; any number of them a split.
        scale: multiplies the scores; positive.
        config: The variant; `choose_config`'s by default.
        with_lse: Return the log-sum-exp of each query's scaled scores too, float32 [B, T, N]; takes "tiles" whatever T.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly. Shows order and synchronisation, not
            the bits of a GPU.

    Returns:
        [B, T, N, H] in q's dtype; with `with_lse` the pair of that and the log-sum-exp.

    Raises:
        ValueError: If a shape, a type, `scale`, `plan`, `config` or the device is not covered.
    """
    shape = _check_operands(q, k, v, positions, plan, scale)
    config = config or choose_config(shape, q.dtype, plan)
    if with_lse and config.variant != "tiles":  # no bit depends on it
        config = AttentionConfig(variant="tiles")
    if config.variant == "split" and shape.t * shape.group > ROWS:
        raise ValueError(
            f"variant='split' takes up to {ROWS} rows, not T={shape.t} times N/K={shape.group}; use 'tiles'"
        )
    if config.variant == "columns" and shape.t * shape.group > COLUMNS:
        raise ValueError(
            f"variant='columns' takes up to {COLUMNS} rows, not T={shape.t} times N/K={shape.group}; use 'split'"
        )
    if config.value_parts * 64 > shape.h:
        raise ValueError(
            f"value_parts={config.value_parts} leaves a CTA less than 64 of head_dim={shape.h}; use value_parts=1"
        )
    if not interpret:
        _check_device()
    problem = Problem(
        shape=shape,
        dtype=q.dtype,
        plan=plan,
        scale=scale,
        config=config,
        with_lse=with_lse,
        interpret=interpret,
    )
    run = {"tiles": run_tiles, "split": run_split, "columns": run_columns}[config.variant]
    return run(q, k, v, positions.astype(jnp.int32), problem)


def _check_operands(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, plan: AttentionPlan, scale: float
) -> AttentionShape:
    (b, t, n, h), (s, kv_heads) = q.shape, k.shape[1:3]
    if k.shape != (b, s, kv_heads, h) or v.shape != k.shape or positions.shape != (b, t) or n % kv_heads:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} and positions {positions.shape} do not fit together"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; all must be bfloat16, or all float16; use "
            "backend='reference' for float32"
        )
    if h not in (64, 128):
        raise ValueError(f"head_dim={h} must be 64 or 128; use backend='reference'")
    if plan.block != 128:
        raise ValueError(
            f"the GPU kernel walks blocks of 128 keys, not {plan.block}; use backend='reference'"
        )
    if n // kv_heads > ROWS:
        raise ValueError(
            f"{n // kv_heads} query heads a KV head are more than {ROWS}; use backend='reference'"
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale} must be positive; negate q, or use backend='reference'")
    if t < 1 or b < 1 or s < plan.block or s % 8:
        raise ValueError(
            f"B={b} and T={t} must be at least 1 and S={s} at least {plan.block} and a multiple of 8; pad the cache"
        )
    return AttentionShape(b=b, t=t, s=s, kv_heads=kv_heads, group=n // kv_heads, h=h)


def _check_device() -> None:
    device = jax.extend.backend.get_default_device()
    capability = str(getattr(device, "compute_capability", "none"))
    if not capability.startswith("9."):
        raise ValueError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.x) and the default device is {device} "
            f"({capability}); use backend='reference' there"
        )
