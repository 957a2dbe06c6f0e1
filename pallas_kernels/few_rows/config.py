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
_HEAD = 3  # stages, of 24 KiB and the like, which keep the memory busy until x has been asked for
_STAGE_ROWS = 256  # of boxes in a stage: 32 KiB
_MOST_COLUMNS = 96  # of a tile
_LEAST_CTAS = 64  # which read as fast as all 132
#: Gated columns that all CTAs take in a tile each; several tiles a CTA have been compared on a GPU for others alone.
MOST_GATED = RESIDENT_CLUSTERS[1] * _MOST_COLUMNS
_LARGEST_ROW = 8192  # that is normalised: a thread's part of a longer one does not fit in its registers
_COPIED_ROWS = 8  # of a box, at least: what the swizzle exchanges
_WORD_ELEMENTS = 2  # of 16 bits: who waits for results of other CTAs waits for words
_REST_STAGE_ROWS = 192  # of boxes in a stage of `rest_of_layer`: 24 KiB
_LEAST_REST_STAGES = 6  # four, for 8B, were as fast as launches of their own
#: Stages of `rest_of_layer` under way at once: so many keep the memory busy, and x waits behind no more.
_FLYING, _AHEAD = 3, 2
_MOST_AWAITED = 8192  # elements of subtrees: 64 registers a thread
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
        flying: Stages that are under way at once, where a product before this one or behind it is in the same launch;
            None for as many as the ring has.
        ahead: The same of the ring's first round, in which this product's x comes from other CTAs.
    """

    columns: int
    boxes: int
    stages: int
    parts: int = 1
    preparers: int = 1
    head: int = _HEAD
    flying: int | None = None
    ahead: int | None = None

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
    short = None  # a ring that runs dry: where no other fits
    for count in (2, 4, 8) if parts is None else (parts,):
        used = n // SUBTREE_COLUMNS * count
        occupied = used <= ctas and (parts is not None or used >= _LEAST_CTAS)
        whole = not (n % SUBTREE_COLUMNS or leaves % count or k // count % THREADS or k // leaves % TILE_K)
        if occupied and whole and n >= THREADS and _chunks(m, k // count) <= _MOST_CHUNKS:
            config = FewRowsConfig(columns=SUBTREE_COLUMNS, boxes=1, stages=0, parts=count)
            found = config.deepest(k, k // leaves, gated=False)
            short = short or found
            if found and found.stages >= _LEAST_STAGES:
                return found
    return short


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestConfig:
    """How the products of `rest_of_layer` are cut: all into stages that take turns in one ring.

    Attributes:
        out: of o_proj.
        gate_up: of gate and up.
        down: of down_proj.
        next: of the product behind it; None without one.
        ctas: that run at once.
    """

    out: FewRowsConfig
    gate_up: FewRowsConfig
    down: FewRowsConfig
    next: FewRowsConfig | None = None
    ctas: int = RESIDENT_CLUSTERS[1]

    def words(self, d: int, f: int) -> int:
        """Of the board on which CTAs leave for one another what o_proj, gate and up, and down_proj give, for a row."""
        return (self.out.parts + self.down.parts) * d + f // 2

    def smem_bytes(self, d: int, k: int, f: int) -> int:
        """Shared memory of a CTA."""
        each = [
            (one, length, one.box_rows(gated=gated), one.window(gated=gated))
            for (one, gated), length in zip(self._each, (k, d, f, d), strict=False)
        ]
        pitch = max(one.boxes * box_rows for one, _, box_rows, _ in each)
        beyond = max(window - box_rows for *_, box_rows, window in each)
        sizes = (
            _LINE * max(one.x_rows(length) for one, length, *_ in each),
            _LINE * (self.out.stages * pitch + beyond),
            4 * 2 * THREADS * max(vector_size(length // one.parts) for one, length, *_ in each),
            4 * MOST_ROWS * (max(window for *_, window in each) + THREADS),
        )
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes) + 16 * self.out.stages + 64

    def copies_fit(self) -> bool:
        """Whether a stage of every product cuts into as many copies: the ring's barriers count them."""
        counts = [one.boxes * (1 + gated) for one, gated in self._each]
        return all(
            max(counts) % count == 0 and one.columns % (_COPIED_ROWS * (max(counts) // count)) == 0
            for count, (one, _) in zip(counts, self._each, strict=True)
        )

    def in_stages(self, stages: int) -> "RestConfig":
        """With a ring of so many."""

        def cut(one: FewRowsConfig) -> FewRowsConfig:
            return dataclasses.replace(one, stages=stages)

        return RestConfig(
            out=cut(self.out),
            gate_up=cut(self.gate_up),
            down=cut(self.down),
            next=None if self.next is None else cut(self.next),
            ctas=self.ctas,
        )

    @property
    def _each(self) -> list[tuple[FewRowsConfig, bool]]:
        """The products in order, and which is gated."""
        behind = [] if self.next is None else [(self.next, False)]
        return [(self.out, False), (self.gate_up, True), (self.down, False), *behind]


def choose_rest_config(d: int, k: int, f: int, n: int | None, leaves: int) -> RestConfig | None:
    """For one row of `rest_of_layer`, with n columns of the product behind it, or without that.

    Returns:
        None where tiles do not come out even, or the ring is so short that launches of their own are as fast.
    """
    ctas = RESIDENT_CLUSTERS[1]
    gates, columns = (-(-size // (ctas * 8)) * 8 for size in (f, n or 0))
    out = _most_parts(d, k, leaves, THREADS)
    down = _most_parts(d, f, leaves, _WORD_ELEMENTS * THREADS)
    if out is None or down is None or f % gates or max(gates, columns) > _MOST_COLUMNS:
        return None
    if size_refusal(1, d, normalised=True) or max(out, down) * d > _MOST_AWAITED:
        return None

    def cut(columns: int, leaf: int, *, parts: int = 1, gated: bool = False) -> FewRowsConfig:
        rows = columns * (1 + gated)
        boxes = next(b for b in (4, 2, 1) if b * rows <= _REST_STAGE_ROWS and leaf % (b * TILE_K) == 0)
        return FewRowsConfig(
            columns=columns, boxes=boxes, stages=0, parts=parts, flying=_FLYING, ahead=_AHEAD
        )

    config = RestConfig(
        out=cut(SUBTREE_COLUMNS, k // leaves, parts=out),
        gate_up=cut(gates, d, gated=True),
        down=cut(SUBTREE_COLUMNS, f // leaves, parts=down),
        next=cut(columns, d) if n else None,
    )
    if not config.copies_fit():
        return None
    for stages in range(_MOST_STAGES, _LEAST_REST_STAGES - 1, -1):
        found = config.in_stages(stages)
        if found.smem_bytes(d, k, f) <= SMEM_BYTES:
            return found
    return None


def _most_parts(n: int, k: int, leaves: int, multiple: int) -> int | None:
    """The most parts of K, a multiple of `multiple` each, for CTAs of their own; None where none comes out even."""
    if n % SUBTREE_COLUMNS or n < THREADS or k % (leaves * TILE_K):
        return None
    for count in (8, 4, 2, 1):
        fits = n // SUBTREE_COLUMNS * count <= RESIDENT_CLUSTERS[1]
        if fits and leaves % count == 0 and k % (count * multiple) == 0:
            return count
    return None
