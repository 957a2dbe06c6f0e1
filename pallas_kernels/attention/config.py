"""Which variant of the GPU kernel runs, as data: shapes decide, and no bit depends on it."""

import dataclasses
from typing import Literal

ROWS = 64  # of a warpgroup's tile: (query, head of the group) pairs; what wgmma multiplies at a time
_RESIDENT_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}  # of 1, 2, 4 and 8 CTAs, one CTA an SM, on an H200
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
            the splits over the CTAs of a cluster.
        cluster: CTAs that share out the splits; 1, 2, 4 or 8.
        stages: blocks of keys, and of values, that are in shared memory.
        kv_group: KV heads (of all batch rows) whose tiles are next to each other in the launch order.
    """

    variant: Literal["tiles", "split"]
    cluster: int = 1
    stages: int = 2
    kv_group: int = 1

    def __post_init__(self) -> None:
        if self.variant not in ("tiles", "split") or self.cluster not in _RESIDENT_CLUSTERS:
            raise ValueError(
                f"variant={self.variant!r} must be 'tiles' or 'split', cluster={self.cluster} 1, 2, 4 or 8"
            )
        if self.variant == "tiles" and self.cluster > 1:
            raise ValueError(f"variant='tiles' shares out nothing; cluster={self.cluster} must be 1")
        if self.stages < 2 or self.kv_group < 1:
            raise ValueError(
                f"stages={self.stages} must be at least 2 and kv_group={self.kv_group} at least 1"
            )


def choose_config(shape: AttentionShape, splits: int) -> AttentionConfig:
    """The variant for a call whose cache holds `splits` splits: a function of the shape alone."""
    if shape.t * shape.group > ROWS:
        bytes_a_head = 4 * shape.s * shape.h
        together = max(1, min(shape.b * shape.kv_heads, _L2_BYTES // bytes_a_head))
        return AttentionConfig(variant="tiles", kv_group=together)
    rows = shape.b * shape.kv_heads
    fitting = [c for c, clusters in _RESIDENT_CLUSTERS.items() if rows <= clusters and c <= splits]
    return AttentionConfig(variant="split", cluster=max(fitting, default=1))
