"""Which variant of the GPU kernel runs, as data: shapes decide, and no bit depends on it."""

import dataclasses
from typing import Literal

ROWS = 64  # of a warpgroup's tile: (query, head of the group) pairs; what wgmma multiplies at a time
COLUMNS = 8  # (query, head) pairs of a tile where they are wgmma's columns, the fewest it has
_RESIDENT_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}  # of 1, 2, 4 and 8 CTAs, one CTA an SM, on an H200
_LEAST_SAVED = 256  # splits a CTA, times H, that a second launch must save
_L2_BYTES = 24_000_000  # of keys and values that CTAs which run at the same time may walk


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
            the splits over CTAs.
        parts: CTAs that share out the splits. 1, 2, 4 or 8 are a cluster, and join the splits themselves.
        second_launch: the parts are no cluster, and may be any number; another kernel joins the splits.
        stages: blocks of keys that are in shared memory.
        value_stages: blocks of values.
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
        sizes = range(2, 133) if self.second_launch else _RESIDENT_CLUSTERS
        if self.variant not in ("tiles", "split", "columns") or self.parts not in sizes:
            raise ValueError(
                f"variant={self.variant!r} must be 'tiles', 'split' or 'columns', parts={self.parts} 1, 2, 4 or 8, or 2 to 132 "
                "with second_launch"
            )
        if self.variant == "tiles" and self.parts > 1:
            raise ValueError(f"variant='tiles' shares out nothing; parts={self.parts} must be 1")
        if min(self.stages, self.value_stages) < 2 or self.kv_group < 1:
            raise ValueError(
                f"stages={self.stages} and value_stages={self.value_stages} must be at least 2 and "
                f"kv_group={self.kv_group} at least 1"
            )

    @property
    def in_cluster(self) -> bool:
        """Whether the parts are a cluster."""
        return not self.second_launch


def choose_config(shape: AttentionShape, splits: int) -> AttentionConfig:
    """The variant for a call whose cache holds `splits` splits: a function of the shape alone."""
    if shape.t * shape.group > ROWS:
        bytes_a_head = 4 * shape.s * shape.h
        together = max(1, min(shape.b * shape.kv_heads, _L2_BYTES // bytes_a_head))
        return AttentionConfig(variant="tiles", kv_group=together)
    rows = shape.b * shape.kv_heads
    fitting = [c for c, clusters in _RESIDENT_CLUSTERS.items() if rows <= clusters and c <= splits]
    cluster, most = max(fitting, default=1), min(splits, _RESIDENT_CLUSTERS[1] // rows)
    # Clusters leave SMs idle. A second launch costs some microseconds, as long as a CTA takes for half a split.
    turns_saved = -(-splits // cluster) - -(-splits // most) if most > cluster else 0
    second_launch = turns_saved * shape.h >= _LEAST_SAVED
    stages, value_stages = (2, 3) if shape.h == 128 else (4, 4)
    return AttentionConfig(
        variant="split",
        parts=most if second_launch else cluster,
        second_launch=second_launch,
        stages=stages,
        value_stages=value_stages,
    )
