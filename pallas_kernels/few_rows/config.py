"""How the products of few rows are cut over the CTAs of a Hopper GPU, and which sizes are taken.

Nothing here can change a bit of a result, only its speed.
"""

import dataclasses
import itertools

from ..common.mosaic_rows import THREADS, vector_size
from ..tree_matmul.config import RESIDENT_CLUSTERS, SMEM_BYTES

MOST_ROWS = 8  # of a core matrix of the tensor cores
#: Rows up to which a norm in every CTA costs less than one of its own: each reads all of what is to be normalised.
MOST_NORMALISED = 1
TILE_K = 64  # of a box: as wide as the widest swizzle
TILE_M = 64  # rows that the tensor cores multiply at least
_ALIGNMENT = 1024
_MOST_STAGES = 12
_LEAST_BUSY = 0.75  # of the CTAs that run at once
_LARGEST_ROW = 8192  # that is normalised: a thread's part of a longer one does not fit in its registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """How a product is cut.

    Attributes:
        tile_n: Columns of a tile, of both halves where it is gated.
        boxes: Boxes of 64 k's in a stage.
        stages: Stages of w in flight.
        parts: Slices of K, each of them for CTAs of its own, whose sums the next op adds up.
        preparers: Warpgroups of a CTA that prepare rows of x, one of which multiplies.
    """

    tile_n: int
    boxes: int
    stages: int
    parts: int = 1
    preparers: int = 1

    def x_rows(self, k: int) -> int:
        """Rows of boxes of the x in shared memory; see `mosaic_gpu._x_window`."""
        return k // self.parts // TILE_K * MOST_ROWS + TILE_M - MOST_ROWS

    def smem_bytes(self, k: int) -> int:
        x = 2 * TILE_K * self.x_rows(k)
        w = 2 * TILE_K * self.tile_n * self.boxes * self.stages
        scratch = 2 * self.preparers * 4 * THREADS * vector_size(k // self.parts)
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (x, w, scratch)) + 16 * self.stages + 64

    def with_stages(self, k: int) -> "FewRowsConfig":
        """This configuration with as many stages as fit."""
        empty = dataclasses.replace(self, stages=0)
        stage = 2 * TILE_K * self.tile_n * self.boxes
        return dataclasses.replace(
            self, stages=min(_MOST_STAGES, (SMEM_BYTES - empty.smem_bytes(k)) // stage)
        )


def size_refusal(m: int, k: int, *, normalised: bool) -> str | None:
    """Why the kernel does not take m rows and k, or None if it does."""
    if not 1 <= m <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows, not {m}"
    if k % THREADS:
        return f"takes K of a multiple of {THREADS}, not {k}"
    if normalised and k > _LARGEST_ROW:
        return f"normalises rows of up to {_LARGEST_ROW}, not {k}"
    return None


def choose_norm_config(m: int, k: int) -> FewRowsConfig:
    """For a product whose K is whole, behind a norm."""
    return _deepest(FewRowsConfig(tile_n=32, boxes=4, stages=0, preparers=min(m, 3)), k, k)


def choose_subtree_config(n: int, k: int, leaves: int, parts: int | None = None) -> FewRowsConfig | None:
    """For a product of `leaves` leaves, in `parts` or as many as there are CTAs for.

    None where no tiling fits or, with `parts` None, where too many CTAs would have nothing to do: `tree_matmul` is
    quicker then.
    """
    if k // leaves % TILE_K:
        return None
    ctas, found = RESIDENT_CLUSTERS[1], []
    for tile_n, count in itertools.product((64, 128), (1, 2, 4, 8) if parts is None else (parts,)):
        used = n // tile_n * count
        if n % tile_n or n < THREADS or leaves % count or k // count % THREADS or used > ctas:
            continue
        config = _deepest(FewRowsConfig(tile_n=tile_n, boxes=4, stages=0, parts=count), k, k // leaves)
        if config.stages >= 2 and (parts is not None or used >= _LEAST_BUSY * ctas):
            found.append((used, -tile_n, config))
    return max(found, key=lambda each: each[:2])[2] if found else None


def _deepest(config: FewRowsConfig, k: int, leaf: int) -> FewRowsConfig:
    """With stages as deep as divide the leaf."""
    boxes = next(boxes for boxes in (config.boxes, 2, 1) if leaf % (boxes * TILE_K) == 0)
    return dataclasses.replace(config, boxes=boxes).with_stages(k)
