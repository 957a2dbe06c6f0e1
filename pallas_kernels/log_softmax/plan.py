"""Which leaves the Hopper kernel takes, and how it lays one out."""

import dataclasses

LANES = 128  # threads of a warpgroup, and elements of a row of the leaf's tree
COLUMNS = 16  # of the table as which TMA copies a leaf: 64 bytes, and a leaf is a multiple of it
SMEM_BYTES = 227 * 1024
_BOX = 256  # rows of a TMA box at most
_UNROLLED = 8  # rows of the tree that a loop over them leaves apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """The layout of a leaf of `size` elements in shared memory.

    The leaf, padded to a power of two p, is a table of p / 128 rows of 128. `tree_sum` first adds rows, each thread
    in its own column: row i and row i + p/256, and so on. `lows` rows are left when the high bits of the index are
    spent; a loop over these adds up `highs` rows each, of the up to `full_highs` that p would have.

    Attributes:
        size: elements.
    """

    size: int

    @property
    def rows(self) -> int:
        """Rows of the power of two."""
        return max(1, (1 << (self.size - 1).bit_length()) // LANES)

    @property
    def lows(self) -> int:
        return min(_UNROLLED, self.rows)

    @property
    def full_highs(self) -> int:
        return self.rows // self.lows

    @property
    def highs(self) -> int:
        """Rows of a low index that hold an element; the last of them may hold none."""
        return -(-self.size // (LANES * self.lows))

    @property
    def boxes(self) -> int:
        return -(-self.size // COLUMNS // _BOX)

    @property
    def box(self) -> int:
        """Rows of a TMA box; even, so that each begins at 128 bytes."""
        rows = -(-(self.size // COLUMNS) // self.boxes)
        return rows + rows % 2

    @property
    def smem_rows(self) -> int:
        """Rows of `COLUMNS` that are reserved: what is copied, and what the last rows of the tree read."""
        return max(self.boxes * self.box, self.highs * self.lows * LANES // COLUMNS)

    @property
    def smem_bytes(self) -> int:
        return (
            4 * COLUMNS * self.smem_rows + 4 * LANES * (self.lows + 2) + 2048
        )  # and barriers, scratch, alignment


def kernel_refusal(size: int) -> str | None:
    """Why the kernel does not take leaves of `size` elements, or None if it does."""
    if size < LANES or size % COLUMNS:
        return f"a leaf of {size} elements is not a multiple of {COLUMNS} of at least {LANES}"
    need = LeafPlan(size=size).smem_bytes
    if need > SMEM_BYTES:
        return f"a leaf of {size} elements needs {need} bytes of shared memory, and there are {SMEM_BYTES}"
    return None
