"""Which variant of the GPU kernel runs, as data: shapes decide, and no bit depends on it."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp

from .plan import AttentionPlan

ROWS = 64  # of a warpgroup's tile: (query, head of the group) pairs; what wgmma multiplies at a time
COLUMNS = 8  # (query, head) pairs of a tile where they are wgmma's columns, the fewest it has
_RESIDENT_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}  # of 1, 2, 4 and 8 CTAs, one CTA an SM, on an H200
_SMS = _RESIDENT_CLUSTERS[1]
_LEAST_SAVED = 256  # splits a CTA, times H, that a second launch must save
_L2_BYTES = 24_000_000  # of keys and values that CTAs which run at the same time may walk
# Of "columns", in tiles of 64 keys, for H = 128: what fits an SM if one CTA has it alone, and if two share it.
_STAGES_ALONE, _STAGES_SHARED = 6, 3
_STAGES_HALVES = 8  # alone, with half of the values' columns
#: (parts, stages) of "columns" with a second launch that were compared on a GPU, most CTAs first.
_SECOND_LAUNCHES = ((64, 3), (32, 3), (16, 6), (8, 6), (8, 3), (4, 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of one call: q [b, t, kv_heads * group, h] over k and v [b, s, kv_heads, h]."""

    b: int
    t: int
    s: int
    kv_heads: int
    group: int
    h: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One variant of the kernel.

    Attributes:
        variant: "tiles" gives a warpgroup 64 queries of one head, two warpgroups a CTA, and walks all keys in the CTA.
            "split" gives one warpgroup all heads of a KV head and all queries, at most 64 rows together, and shares out
            the splits over CTAs. "columns" is "split" for at most 8 rows, which are the columns of the products.
        parts: CTAs that share out the splits. 1, 2, 4 or 8 are a cluster, and join the splits themselves.
        second_launch: the parts are no cluster, and may be any number; another kernel joins the splits.
        stages: blocks of keys that are in shared memory; for "columns", tiles of 64 keys, half a block.
        value_stages: the same for values.
        value_parts: "columns" only: CTAs, 1 or 2, that walk the same keys, each for its share of the values' columns.
        kv_group: KV heads (of all batch rows) whose tiles are next to each other in the launch order.
    """

    variant: Literal["tiles", "split", "columns"]
    parts: int = 1
    second_launch: bool = False
    stages: int = 2
    value_stages: int = 2
    value_parts: int = 1
    kv_group: int = 1

    def __post_init__(self) -> None:
        if self.variant not in ("tiles", "split", "columns"):
            raise ValueError(f"variant={self.variant!r} must be 'tiles', 'split' or 'columns'")
        if self.parts not in (range(2, _SMS + 1) if self.second_launch else _RESIDENT_CLUSTERS):
            raise ValueError(
                f"parts={self.parts} must be 1, 2, 4 or 8 as a cluster, or 2 to {_SMS} with second_launch=True"
            )
        if self.variant == "tiles" and self.parts > 1:
            raise ValueError(f"variant='tiles' shares out nothing; parts={self.parts} must be 1")
        if self.value_parts not in ((1, 2) if self.variant == "columns" else (1,)):
            raise ValueError(
                f"value_parts={self.value_parts} of variant={self.variant!r} must be 1; 'columns' takes 1 or 2"
            )
        if min(self.stages, self.value_stages) < 2 or self.kv_group < 1:
            raise ValueError(
                f"stages={self.stages} and value_stages={self.value_stages} must be at least 2 and "
                f"kv_group={self.kv_group} at least 1"
            )

    @property
    def in_cluster(self) -> bool:
        """Whether the parts are a cluster."""
        return not self.second_launch


def columns_compared(shape: AttentionShape, dtype: Any, plan: AttentionPlan) -> bool:
    """Whether the bits of "columns" have been compared with the other variants' on a GPU for such calls.

    `benchmarks/results/decode_variants_h200.json` and `check_attention_bits_h200.json` have bfloat16 and float16,
    head_dim 64 and 128, 1 to 8 rows (queries times heads a KV head), caches that end within a block, and the default
    plan; `decode_clusters_h200.json` has clusters with an idle CTA, and `tests/gpu/test_attention_bits.py` forces them
    at seams and with ragged lengths too. What a CTA does depends on its batch row and KV head
    alone, so their number does not matter.
    """
    rows = shape.t * shape.group <= COLUMNS and shape.h in (64, 128)
    return rows and plan == AttentionPlan() and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def choose_config(shape: AttentionShape, dtype: Any, plan: AttentionPlan) -> AttentionConfig:
    """The variant for a call: a function of its shape, dtype and plan alone.

    Args:
        shape: sizes of the call; s is the capacity of the cache.
        dtype: of q, k and v.
        plan: its splits are what CTAs share out.
    """
    if shape.t * shape.group > ROWS:
        bytes_a_head = 4 * shape.s * shape.h
        together = max(1, min(shape.b * shape.kv_heads, _L2_BYTES // bytes_a_head))
        return AttentionConfig(variant="tiles", kv_group=together)
    heads, splits = shape.b * shape.kv_heads, -(-shape.s // plan.split)
    if columns_compared(shape, dtype, plan):
        return _choose_columns(heads, splits, shape.h)
    return _choose_split(heads, splits, shape.h)


def _largest_cluster(heads: int, most: int) -> int:
    """CTAs, `most` at most, of the largest clusters that all run at once, one CTA an SM."""
    return max(
        (c for c, clusters in _RESIDENT_CLUSTERS.items() if heads <= clusters and c <= most), default=1
    )


def _choose_columns(heads: int, splits: int, h: int) -> AttentionConfig:
    columns = functools.partial(AttentionConfig, variant="columns")
    # Three splits are quicker in a cluster of four, one of whose CTAs is idle, than in one of two.
    cluster = _largest_cluster(heads, 1 << (splits - 1).bit_length())
    if heads * (cluster + 1) <= _SMS:  # clusters leave SMs idle
        for parts, stages in _SECOND_LAUNCHES:
            resident = _SMS if stages == _STAGES_ALONE else 2 * _SMS
            if heads * parts <= resident and _pays(splits, cluster, parts, h):
                return columns(parts=parts, second_launch=True, stages=stages, value_stages=stages)
    if h == 128 and cluster in (2, 4) and 2 * heads <= _RESIDENT_CLUSTERS[cluster]:
        return columns(parts=cluster, value_parts=2, stages=_STAGES_HALVES, value_stages=_STAGES_HALVES)
    stages = _STAGES_ALONE if heads * cluster <= _SMS else _STAGES_SHARED
    return columns(parts=cluster, stages=stages, value_stages=stages)


def _choose_split(heads: int, splits: int, h: int) -> AttentionConfig:
    cluster = _largest_cluster(heads, splits)
    most = min(splits, _SMS // heads)
    second_launch = most > cluster and _pays(splits, cluster, most, h)
    stages, value_stages = (2, 3) if h == 128 else (4, 4)
    return AttentionConfig(
        variant="split",
        parts=most if second_launch else cluster,
        second_launch=second_launch,
        stages=stages,
        value_stages=value_stages,
    )


def _pays(splits: int, cluster: int, parts: int, h: int) -> bool:
    """Whether `parts` CTAs and a second launch beat a cluster: it costs what a CTA takes for some half a split."""
    return parts <= splits and (-(-splits // cluster) - -(-splits // parts)) * h >= _LEAST_SAVED
