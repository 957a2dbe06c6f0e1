"""How the products of few rows are cut over the CTAs of a Hopper GPU, and which sizes are taken.

Nothing here can change a bit of a result, only its speed.
"""

import dataclasses

from ..common.mosaic_rows import THREADS, vector_size
from ..tree_matmul.config import RESIDENT_CLUSTERS, SMEM_BYTES

MOST_ROWS = 8  # of x: the fewest columns that the tensor cores multiply
#: Rows up to which a norm in every CTA costs less than one of its own: each reads all of what is to be normalised.
MOST_NORMALISED = 1
TILE_K = 64  # of a box: as wide as the widest swizzle
TILE_M = 64  # rows that the tensor cores multiply at least
SUBTREE_COLUMNS = 64  # of a tile of w [K, N]: likewise
_LINE = 2 * TILE_K  # bytes of a box's row
_ALIGNMENT = 1024
#: Of a ring, whichever is more: a deeper one is slower, as x waits for it and each barrier takes its time to set up.
_USUAL_STAGES, _ENOUGH_BYTES = 6, 96 * 1024
_MOST_STAGES = 24  # Mosaic makes up to 32 barriers of a kind
_LEAST_STAGES = 4  # fewer large ones run dry
_HEAD = 3  # stages, of 16 or 24 KiB, which keep the memory busy until x has been asked for
_STAGE_ROWS = 256  # of boxes in a stage: 32 KiB
_MOST_COLUMNS = 96  # of a tile
_LEAST_CTAS = 64  # which read as fast as all 132
#: Gated columns that all CTAs take in a tile each; several tiles a CTA have been compared on a GPU for others alone.
MOST_GATED = RESIDENT_CLUSTERS[1] * _MOST_COLUMNS
_LARGEST_ROW = 8192  # that is normalised: a thread's part of a longer one does not fit in its registers
_MOST_PREPARERS = 3
_MOST_CHUNKS = 64  # that a warpgroup prepares: each is code of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """How a product is cut.

    Attributes:
        columns: Of the result that a tile makes, a multiple of 8 up to 128; 64 where w is [K, N].
        boxes: Boxes of 64 k's in a stage.
        stages: Stages of w in flight.
        parts: Slices of K, each of them for CTAs of its own, whose sums the next op adds up.
        preparers: Warpgroups of a CTA that prepare rows of x, one of which multiplies.
        head: Stages of w that are asked for before x is: x would queue behind a whole ring, and all wait for x.
    """

    columns: int
    boxes: int
    stages: int
    parts: int = 1
    preparers: int = 1
    head: int = _HEAD

    def box_rows(self, *, gated: bool) -> int:
        """Rows of 64 elements of a box: columns of w [N, K], or k's of w [K, N], which are as many."""
        return self.columns * (1 + gated)

    def window(self, *, gated: bool) -> int:
        """Rows of a box, and of what lies behind it, that the tensor cores read."""
        return -(-self.box_rows(gated=gated) // TILE_M) * TILE_M

    def x_rows(self, k: int) -> int:
        """Rows of the boxes of x in shared memory."""
        return k // self.parts // TILE_K * MOST_ROWS

    def smem_bytes(self, k: int, *, gated: bool) -> int:
        """Shared memory of a CTA."""
        pitch, window = self.boxes * self.box_rows(gated=gated), self.window(gated=gated)
        sizes = (
            _LINE * self.x_rows(k),
            _LINE * (self.stages * pitch + window - self.box_rows(gated=gated)),
            4 * 2 * self.preparers * THREADS * vector_size(k // self.parts),
            4 * MOST_ROWS * (window + THREADS),
        )
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes) + 16 * self.stages + 64

    def deepest(self, k: int, leaf: int, *, gated: bool) -> "FewRowsConfig | None":
        """With boxes that divide the leaf, and as many stages as fit and help; None where fewer than two fit."""
        rows, found = self.box_rows(gated=gated), None
        for boxes in (4, 2, 1):
            if leaf % (boxes * TILE_K) or (boxes > 1 and boxes * rows > _STAGE_ROWS):
                continue
            enough = min(_MOST_STAGES, max(_USUAL_STAGES, -(-_ENOUGH_BYTES // (_LINE * boxes * rows))))
            for stages in range(enough, 1, -1):
                tried = dataclasses.replace(self, boxes=boxes, stages=stages)
                if tried.smem_bytes(k, gated=gated) <= SMEM_BYTES:
                    found = tried
                    break
            if found is not None and found.stages >= _LEAST_STAGES:
                break
        return found


def size_refusal(m: int, k: int, *, normalised: bool) -> str | None:
    """Why the kernel does not take m rows and k, or None if it does."""
    if not 1 <= m <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows, not {m}"
    if k % THREADS:
        return f"takes K of a multiple of {THREADS}, not {k}"
    if normalised and k > _LARGEST_ROW:
        return f"normalises rows of up to {_LARGEST_ROW}, not {k}"
    if normalised and _chunks(-(-m // _MOST_PREPARERS), k) > _MOST_CHUNKS:
        chunk = THREADS * vector_size(k)
        return f"prepares up to {_MOST_CHUNKS} chunks of {chunk} elements, which {m} rows of {k} exceed"
    return None


def _chunks(turns: int, k: int) -> int:
    """Chunks of rows that a warpgroup prepares one after the other."""
    return turns * (k // (THREADS * vector_size(k)))


def choose_norm_config(m: int, k: int, columns: int, *, gated: bool) -> FewRowsConfig:
    """For `columns` columns of a product whose K is whole, behind a norm: as many tiles as there are CTAs for."""
    ctas = RESIDENT_CLUSTERS[1]
    rounds = -(-columns // (ctas * _MOST_COLUMNS))
    width = -(-columns // (ctas * rounds * 8)) * 8
    found = FewRowsConfig(columns=width, boxes=1, stages=0, preparers=min(m, _MOST_PREPARERS)).deepest(
        k, k, gated=gated
    )
    assert found is not None  # at _LARGEST_ROW too
    return found


def choose_subtree_config(
    n: int, k: int, leaves: int, parts: int | None = None, *, m: int = 1
) -> FewRowsConfig | None:
    """For a product of m rows and `leaves` leaves: in `parts`, or in as few as occupy half of the GPU.

    So many CTAs read as fast as all, and the next op reads all parts once a CTA. None where no tiling fits, a tile a
    CTA, or, with `parts` None, none does that: `tree_matmul` runs then.
    """
    ctas = RESIDENT_CLUSTERS[1]
    for count in (2, 4, 8) if parts is None else (parts,):
        used = n // SUBTREE_COLUMNS * count
        occupied = used <= ctas and (parts is not None or used >= _LEAST_CTAS)
        whole = not (n % SUBTREE_COLUMNS or leaves % count or k // count % THREADS or k // leaves % TILE_K)
        if occupied and whole and n >= THREADS and _chunks(m, k // count) <= _MOST_CHUNKS:
            config = FewRowsConfig(columns=SUBTREE_COLUMNS, boxes=1, stages=0, parts=count)
            if found := config.deepest(k, k // leaves, gated=False):
                return found
    return None
