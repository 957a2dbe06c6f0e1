"""The order of attention over the keys, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How the keys of a query are walked; the same for prefill, chunked prefill and decode.

    Attributes:
        block: keys a block, counted from absolute position 0; one online-softmax step.
        blocks_per_split: blocks a split; a split is one chain of online-softmax steps, splits meet in a binary tree.
    """

    block: int = 64
    blocks_per_split: int = 16

    def __post_init__(self) -> None:
        if self.block < 16 or self.block % 16 or self.blocks_per_split < 1:
            raise ValueError(
                f"block={self.block} must be a multiple of 16 and blocks_per_split={self.blocks_per_split} >= 1"
            )

    @property
    def split(self) -> int:
        """Keys a split."""
        return self.block * self.blocks_per_split
