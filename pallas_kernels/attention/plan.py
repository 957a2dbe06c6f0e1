"""The order of attention over the keys, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How the keys of a query are walked; the same for prefill, chunked prefill and decode.

    The default is what the GPU kernel is built for: 128 keys are a tile that keeps Hopper's tensor cores busy, and 512
    make splits that are short enough to spread one sequence over a GPU and long enough that joining them is cheap.

    Attributes:
        block: keys a block, counted from absolute position 0; one online-softmax step.
        blocks_per_split: blocks a split; a split is one chain of online-softmax steps, and splits are joined one after
            the other, in ascending order.
    """

    block: int = 128
    blocks_per_split: int = 4

    def __post_init__(self) -> None:
        if self.block < 16 or self.block % 16 or self.blocks_per_split < 1:
            raise ValueError(
                f"block={self.block} must be a multiple of 16 and blocks_per_split={self.blocks_per_split} >= 1"
            )

    @property
    def split(self) -> int:
        """Keys a split."""
        return self.block * self.blocks_per_split
