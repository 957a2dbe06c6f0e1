"""How the Hopper kernel tiles a product: the configurations, what they need, and which one runs.

Nothing here can change a bit of a result, only its speed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.extend.backend

from . import tuned

SMEM_BYTES = 227 * 1024 - 1024  # of a Hopper CTA, less room for barriers
#: Clusters of 1, 2, 4 and 8 CTAs that an H200 was seen to run at once: a cluster lies within one GPC's SMs.
RESIDENT_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
_BLOCK_BYTES = 128  # width of a staged block of the output: the widest swizzle
_ALIGNMENT = 1024  # of every buffer in shared memory
#: Rows from which an x [K, M] is read as it lies: of a tile whose consumers each have 64 columns of it.
_LEAST_ROWS_TRANSPOSED = 128
_DEEPEST = 64  # k's of a box: as wide as the widest swizzle
_MAX_STAGES = 32  # phases of a ring's barriers share one register


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """How the product is tiled.

    Attributes:
        split: Parts that the leaves of an output tile are cut into: 1, 2, 4 or 8. Each is a CTA of one cluster, which
            exchange their sums through L2.
        last_split: Parts, 1 or 2, that the leaves of the tiles of the last round alone are cut into, if that round has
            no more tiles than clusters. Before it each of the two CTAs of a cluster has tiles of its own.
        multicast: CTAs of one cluster, 1 or 2, that take output tiles above one another and share their tiles of w.
        consumers: Warpgroups that multiply. The CTA's tile has consumers * tile_m rows.
        tile_m: Rows of one consumer, a multiple of 64.
        tile_n: Columns of the tile, a multiple of 16.
        tile_k: Depth of one box that TMA copies: 64, 32 or 16.
        boxes: Boxes in one stage; boxes * tile_k divides the leaf, or else boxes is 1 and tile_k 64.
        stages: Stages in flight.
        group: Leaves that are added up in registers: 1, 2, 4 or 8. Two of them need as many accumulators, four need
            three, eight need four.
        overlap: Whether a group's sum moves on while the next group is multiplied, in registers of its own. Where a
            part has more leaves than a group, it has to.
        shared: Blocks of sums of groups that wait in shared memory, the lowest tree level first (see `block`); the rest
            waits in global memory.
        snake: Width of the snake in which the CTAs walk the output tiles, for hits in L2.
        snake_rows: Whether the snake is as wide in rows of tiles instead of columns.
        gated: Whether a tile's columns are half gates and half values, which the epilogue joins (see `mosaic_gpu`).
    """

    split: int = 1
    last_split: int = 1
    multicast: int = 1
    consumers: int
    tile_m: int = 64
    tile_n: int
    tile_k: int
    boxes: int = 1
    stages: int
    group: int = 1
    overlap: bool = True
    shared: int = 0
    snake: int = 8
    snake_rows: bool = False
    gated: bool = False

    @property
    def kind(self) -> Literal["serial", "cluster"]:
        return "serial" if self.split == 1 else "cluster"

    @property
    def rows(self) -> int:
        return self.consumers * self.tile_m

    @property
    def depth(self) -> int:
        """k's of one stage."""
        return self.boxes * self.tile_k

    @property
    def cluster(self) -> int:
        return self.split * self.last_split * self.multicast

    @property
    def block(self) -> int:
        """Columns of a saved subtree that are kept together."""
        return next(w for w in (64, 32, 16) if self.half % w == 0)

    @property
    def half(self) -> int:
        """Columns of the product that a tile makes."""
        return self.tile_n // 2 if self.gated else self.tile_n

    @property
    def out_columns(self) -> int:
        """Columns of the tile that one CTA stores, of a tile whose leaves are cut."""
        return self.half // (self.split * self.last_split)

    def whole_tiles(self, tiles: int, clusters: int) -> int:
        """How many of the tiles, the first ones, are not of the last round that `last_split` cuts."""
        rest = tiles % (self.last_split * clusters)
        return tiles - rest if self.last_split > 1 and rest <= clusters else tiles

    def saved_blocks(self, leaves: int) -> int:
        """Blocks that wait for their siblings at a time: a tile for each tree level above the groups."""
        part = leaves // self.split
        return ((part // min(self.group, part)).bit_length() - 1) * (self.tile_n // self.block)

    def shared_blocks(self, leaves: int) -> int:
        return min(self.shared, self.saved_blocks(leaves))

    def global_blocks(self, leaves: int) -> int:
        return self.saved_blocks(leaves) - self.shared_blocks(leaves)

    def x_rows(self, m: int) -> int:
        """Rows of x that are copied for a tile: not more than there are, in eights."""
        return min(self.rows, -(-m // 8) * 8)

    def shares(self, leaves: int) -> bool:
        """Whether the staged output uses the memory of saved subtrees: none waits any more when the output is stored.

        With a split a consumer's share of the memory would not be the same for both.
        """
        return self.split == 1 and self.shared_blocks(leaves) > 0

    def staged(self, leaves: int, itemsize: int) -> tuple[int, int]:
        """Slots a consumer and columns of the staged blocks of the output."""
        whole = (w for w in (64, 32, 16) if self.out_columns % w == 0 and self.block % w == 0)
        width = next((w for w in whole if w * itemsize <= _BLOCK_BYTES), 16)
        if self.shares(
            leaves
        ):  # as many as make up a saved block: every consumer's share begins at the same place
            return self.block * 4 // (width * itemsize), width
        return min(2, self.half // self.split // width), width

    def stage_bytes(self, m: int) -> int:
        return 2 * self.depth * (self.x_rows(m) + self.tile_n)

    def smem_bytes(self, m: int, leaves: int, itemsize: int = 4) -> int:
        """Shared memory of a CTA: the stages, the staged output, and subtrees that wait."""
        slots, width = self.staged(leaves, itemsize)
        staged = slots * width * self.rows * itemsize
        saved = self.shared_blocks(leaves) * self.rows * self.block * 4
        aside = [max(staged, saved)] if self.shares(leaves) else [staged, saved]
        x = 2 * self.tile_k * (self.stages * self.boxes * self.x_rows(m) + self.rows - self.x_rows(m))
        w = 2 * self.tile_k * self.stages * self.boxes * self.tile_n
        barriers = 8 * (2 * self.stages + 2 * self.consumers)
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in (x, w, *aside)) + barriers

    def with_stages(self, m: int, leaves: int, most: int = 12) -> "MosaicConfig":
        """This configuration with as many stages as fit for every output type, and not more than the loop has."""
        empty = dataclasses.replace(self, stages=0)
        fitting = (
            SMEM_BYTES - max(empty.smem_bytes(m, leaves, size) for size in (2, 4))
        ) // self.stage_bytes(m)
        return dataclasses.replace(self, stages=min(most, fitting))


def tiles_evenly(n: int, width: int) -> bool:
    """Whether Pallas can tile rows of n contiguous elements by `width` (see `mosaic_problem.Ring`)."""
    return n % width == 0 or n < width


def check_config(
    config: MosaicConfig,
    *,
    m: int,
    n: int,
    k: int,
    leaves: int,
    transpose_rhs: bool,
    itemsize: int,
    transpose_lhs: bool = False,
) -> None:
    """Says what is wrong with a configuration; `candidate_configs`' pass.

    Raises:
        ValueError: with the numbers and what would do.
    """
    leaf = k // leaves
    if config.split not in (1, 2, 4, 8) or leaves % config.split:
        raise ValueError(f"split={config.split} does not cut {leaves} leaves evenly")
    if config.consumers not in (1, 2, 3) or config.tile_m < 64:
        raise ValueError(
            f"consumers={config.consumers} with tile_m={config.tile_m}; use 1, 2 or 3, and a positive multiple of 64: "
            "the registers of a CTA serve no more"
        )
    if config.shared < 0 or not 1 <= config.snake <= 1024:
        raise ValueError(f"shared={config.shared} must not be negative, and snake={config.snake} 1 to 1024")
    if config.group not in (1, 2, 4, 8):
        raise ValueError(f"group={config.group} must be 1, 2, 4 or 8")
    if not config.overlap and leaves // config.split > config.group:
        raise ValueError(
            f"overlap=False needs a group of {leaves // config.split} leaves, not {config.group}"
        )
    if config.last_split not in (1, 2) or (
        config.last_split > 1 and (config.split > 1 or config.multicast > 1 or config.gated)
    ):
        raise ValueError(
            f"last_split={config.last_split} with split={config.split}, multicast={config.multicast} and "
            f"gated={config.gated}; use 1, or 2 without the others"
        )
    if config.last_split > 1 and (leaves == 1 or config.group < leaves // 2):
        raise ValueError(
            f"last_split={config.last_split} needs two leaves or more and a group of half of them, not "
            f"leaves={leaves} and group={config.group}"
        )
    if config.multicast not in (1, 2) or config.cluster > 8:
        raise ValueError(
            f"multicast={config.multicast} with split={config.split}; use 1 or 2, and a cluster of at most 8"
        )
    ragged = config.boxes == 1 and config.tile_k == _DEEPEST < leaf
    if config.tile_k not in (16, 32, 64) or config.boxes < 1 or (leaf % config.depth and not ragged):
        raise ValueError(
            f"{config.boxes} boxes of tile_k={config.tile_k} must be of 16, 32 or 64 and divide the leaf of {leaf}, "
            f"or be one of {_DEEPEST}"
        )
    if transpose_lhs and (config.tile_k != _DEEPEST or config.tile_m != 64 or m < config.rows):
        raise ValueError(
            f"x as [K, M] needs tile_k={_DEEPEST}, tile_m=64 and as many rows as a tile has, {config.rows}, not "
            f"tile_k={config.tile_k}, tile_m={config.tile_m} and m={m}"
        )
    if config.tile_m % 64 or config.rows not in range(64, 257) or config.tile_n not in range(16, 257, 16):
        raise ValueError(
            f"a tile of {config.consumers} * {config.tile_m} rows and {config.tile_n} columns is not possible; "
            "use a multiple of 64 rows a consumer and of 16 columns, at most 256 of each in all"
        )
    for name, parts in (("split", config.split), ("last_split", config.last_split)):
        if parts > 1 and (config.out_columns % 16 or config.tile_n % parts):
            raise ValueError(
                f"{name}={parts} leaves {config.out_columns} columns of tile_n={config.tile_n} to each part; "
                f"use a multiple of {16 * parts}"
            )
    if config.gated and (leaves > 1 or not transpose_rhs or config.tile_n % 32):
        raise ValueError(
            f"gated=True needs one leaf, w as [N, K] and a tile_n that is a multiple of 32, not leaves={leaves}, "
            f"transpose_rhs={transpose_rhs} and tile_n={config.tile_n}"
        )
    even = config.tile_n % config.tile_k == 0 and tiles_evenly(n, config.tile_k)
    if not (transpose_rhs or even or config.tile_n == config.tile_k):
        raise ValueError(
            f"n={n} columns of w [K, N] do not divide into tile_n={config.tile_n} at "
            f"tile_k={config.tile_k}; use tile_n={config.tile_k}"
        )
    used = config.smem_bytes(m, leaves, itemsize)
    fitting = min(config.stages + (SMEM_BYTES - used) // config.stage_bytes(m), _MAX_STAGES)
    if not 2 <= config.stages <= fitting:  # a stage is freed when the next one is being multiplied
        raise ValueError(
            f"stages={config.stages} need {used} bytes of shared memory of {SMEM_BYTES}; use 2 to "
            f"{fitting}, or smaller tiles"
        )


def choose_config(
    m: int,
    n: int,
    k: int,
    leaves: int,
    *,
    transpose_rhs: bool = False,
    transpose_lhs: bool = False,
    batch: int = 1,
    device_kind: str | None = None,
) -> MosaicConfig:
    """The configuration for x [m, k] @ w: the one measured fastest, or the one estimated fastest.

    Args:
        m: Rows of x.
        n: Columns of the product.
        k: Length of the contraction.
        leaves: Leaves that k is cut into.
        transpose_rhs: Whether w is [n, k].
        transpose_lhs: Whether x is [k, m]. It was not tuned for: the table's choice runs where it can.
        batch: Such products in one launch. More than one was not tuned for: the estimate chooses.
        device_kind: As JAX names it; the default device's by default.
    """
    if device_kind is None:
        device_kind = jax.extend.backend.get_default_device().device_kind
    fields = tuned.lookup(device_kind, m, n, k, leaves, transpose_rhs) if batch == 1 else None
    if fields is not None:
        config = MosaicConfig(**fields)
        possible = not transpose_lhs or (
            config.tile_k == _DEEPEST and config.tile_m == 64 and config.rows <= m
        )
        if possible and fits(config, m, leaves):
            return config
    stored = {"transpose_rhs": transpose_rhs, "transpose_lhs": transpose_lhs}
    return candidate_configs(m, n, k, leaves, **stored, batch=batch)[0]


def gate_config(config: MosaicConfig, m: int) -> MosaicConfig:
    """The configuration for the gated product of m rows with the same weights as `config`'s product."""
    gated = dataclasses.replace(config, gated=True, tile_n=max(32, config.tile_n // 32 * 32))
    return gated.with_stages(m, 1, most=config.stages)  # a wider tile may leave room for fewer


def fits(config: MosaicConfig, m: int, leaves: int) -> bool:
    """Whether a configuration that was measured with fewer rows has the shared memory for m rows of any type.

    The last entry of a table serves all larger m, and more rows of x need more shared memory.
    """
    return max(config.smem_bytes(m, leaves, itemsize) for itemsize in (2, 4)) <= SMEM_BYTES


@functools.cache
def candidate_configs(
    m: int,
    n: int,
    k: int,
    leaves: int,
    *,
    transpose_rhs: bool = False,
    transpose_lhs: bool = False,
    batch: int = 1,
) -> tuple[MosaicConfig, ...]:
    """The configurations worth trying for x [m, k] @ w, the best guess first.

    The best guess of every split, last split and width comes before any second guess, so that the first few differ. A
    cut last round comes second at best.

    Args:
        m: Rows of x.
        n: Columns of the product.
        k: Length of the contraction.
        leaves: Leaves that k is cut into.
        transpose_rhs: Whether w is [n, k].
        transpose_lhs: Whether x is [k, m].
        batch: Such products in one launch.

    Raises:
        ValueError: there is none, as for an x [k, m] of few rows or short leaves.
    """
    found = []
    stored = {"transpose_rhs": transpose_rhs, "transpose_lhs": transpose_lhs}
    for config in _family(m, n, k, leaves, transpose_rhs, batch):
        try:
            for itemsize in (2, 4):
                check_config(config, m=m, n=n, k=k, leaves=leaves, itemsize=itemsize, **stored)
        except ValueError:
            continue
        found.append((_estimate(config, m, n, k, leaves, transpose_rhs, batch), config))
    if any(k // leaves % config.depth for _, config in found):
        # Zeros behind a leaf may give a sum of underflows another sign: they are there for any m, or for none.
        found = [pair for pair in found if k // leaves % pair[1].depth]
    found.sort(key=lambda pair: pair[0])
    guesses: dict[tuple[int, int, int], int] = {}
    ranked = []
    for seconds, config in found:
        kind = config.split, config.last_split, config.tile_n
        guesses[kind] = guesses.get(kind, 0) + 1
        # The estimate was not fitted to clusters with so many rows: they are for the tuner.
        ranked.append((guesses[kind], config.split > 1 and m > _SPLIT_ROWS, seconds, config))
    ranked.sort(key=lambda entry: entry[:3])
    configs = [entry[-1] for entry in ranked]
    if not configs:
        raise ValueError(
            f"no tiling serves x [k={k}, m={m}] with n={n} and leaves={leaves}; give it as [m, k]"
        )
    # The estimate was fitted without a cut last round, which may cost more than it saves: it is for the tuner.
    first = next(i for i, config in enumerate(configs) if config.last_split == 1)
    configs.insert(0, configs.pop(first))
    if m >= 1024:
        configs += [dataclasses.replace(configs[0], snake=snake) for snake in (4, 16)]
    return tuple(configs)


def _family(m: int, n: int, k: int, leaves: int, transpose_rhs: bool, batch: int) -> Iterator[MosaicConfig]:
    """Every combination that may pay, those that do not fit included."""
    for box in _boxes(k // leaves):
        yield from _family_of(box, m, n, k, leaves, transpose_rhs, batch)


def reads_transposed(m: int, n: int, k: int, leaves: int, *, transpose_rhs: bool) -> bool:
    """Whether some tiling reads an x [k, m] as it lies, beside w [k, n] or, with `transpose_rhs`, [n, k]."""
    wide = transpose_rhs or n >= _DEEPEST  # narrower boxes of w are shallower too
    return m % 16 == 0 and m >= _LEAST_ROWS_TRANSPOSED and _boxes(k // leaves)[0] == _DEEPEST and wide


def _boxes(leaf: int) -> list[int]:
    """Depths of a box: the most that divides the leaf, and one that its last step does not fill."""
    box = next(t for t in (64, 32, 16) if leaf % t == 0)
    return [box] if box == _DEEPEST or leaf < 2 * _DEEPEST else [_DEEPEST, box]


def _family_of(
    box: int, m: int, n: int, k: int, leaves: int, transpose_rhs: bool, batch: int
) -> Iterator[MosaicConfig]:
    """Those of `_family` with boxes of one depth."""
    leaf = k // leaves
    for width, split in itertools.product(_widths(m, n, leaves, box, transpose_rhs), (1, 2, 4, 8)):
        part = leaves // split
        most_rows = {1: m, 2: 2 * _SPLIT_ROWS}.get(split, _SPLIT_ROWS)
        # Shares of 192 columns make narrow blocks.
        if split > leaves or m > most_rows or (split > 1 and width == 192):
            continue
        tile_k = box if transpose_rhs else next(t for t in (64, 32, 16) if t <= box and width % t == 0)
        if leaf % box and tile_k < box:
            continue
        depths = {tile_k, box} | ({d for d in (128, 256) if leaf % d == 0} if m <= 256 else set())
        for depth, group in itertools.product(sorted(depths), _groups(part, width, few=m <= 512)):
            config = MosaicConfig(
                split=split,
                consumers=1 if m <= 64 else 2,
                tile_n=width,
                tile_k=tile_k,
                boxes=depth // tile_k,
                stages=0,
                group=group,
                overlap=part > group,
            )
            saved = config.saved_blocks(leaves)
            if width == 160 and saved:  # shared memory is scarce
                yield config.with_stages(m, leaves)
            config = dataclasses.replace(config, shared=min(width // config.block, saved))
            config = config.with_stages(m, leaves)
            yield config
            if m > 256 and width == 256:
                yield dataclasses.replace(config, multicast=2)
            if m > 1024:
                yield dataclasses.replace(config, snake_rows=True)
            if m <= 256 or split > 1:
                continue
            cut = dataclasses.replace(config, last_split=2).with_stages(m, leaves)
            whole, tiles = _rounds(cut, m, n, batch)
            if 0 < whole < tiles:
                yield cut
                if m > 1024:
                    yield dataclasses.replace(cut, snake_rows=True)


def _widths(m: int, n: int, leaves: int, box: int, transpose_rhs: bool) -> list[int]:
    """Widths of a tile, columns."""
    if not transpose_rhs and not tiles_evenly(n, box):
        return [box]
    least = 16 if m <= 128 else 64 if m <= 1024 else 128
    # Beside the sums of leaves, registers hold no accumulator of 192 columns.
    most = 256 if m <= 128 or leaves == 1 else 160
    # 160 is for few rounds of tiles: with more of them its fewer stages cost more than its fewer tiles save.
    widths = (
        [16, 32, 64, 128, 192, 256]
        if m <= 256
        else [64, 128, 192, 256]
        if m > 512
        else [64, 128, 160, 192, 256]
    )
    return [w for w in widths if min(n, least) <= w <= most and w <= max(16, n)] or [16]


def _groups(part: int, width: int, few: bool) -> list[int]:
    """Leaves that can be added up in registers: a thread has 240 of them, and needs some 40 for other things."""
    fitting = [g for g, count in _ACCUMULATORS.items() if g <= part and count * width // 2 <= 192]
    fitting = [g for g in fitting if g == part or width <= 192]  # beside a group's sum the next accumulator
    # With few rows a CTA runs its code once or twice, and fetching more of it costs more than it saves.
    return [g for g in fitting if g >= min(2, part)] if few else fitting[-1:]


def _rounds(config: MosaicConfig, m: int, n: int, batch: int) -> tuple[int, int]:
    """Tiles of the products that are not of a round that `last_split` cuts on an H200, and all tiles."""
    tiles = -(-m // (config.rows * config.multicast)) * -(-n // config.tile_n) * batch
    return config.whole_tiles(tiles, RESIDENT_CLUSTERS[config.cluster]), tiles


#: Rows up to which the estimate chooses among clusters.
_SPLIT_ROWS = 512
#: Accumulators that a group of leaves takes: one that is being added to, and one for each level at which one waits.
_ACCUMULATORS = {1: 1, 2: 2, 4: 3, 8: 4}
_TWO_STEPS = 1.8  # times as long do leaves of two stages take, four of them in registers
_HERTZ, _BANDWIDTH = 1.75e9, 4.1e12  # of an H200 at work


def _estimate(
    config: MosaicConfig, m: int, n: int, k: int, leaves: int, transpose_rhs: bool, batch: int
) -> float:
    """Seconds that the products take, roughly; fitted to measurements of one on an H200."""
    whole, tiles = _rounds(config, m, n, batch)
    rounds = -(-whole // (RESIDENT_CLUSTERS[config.cluster] * config.last_split))
    part = leaves // config.split
    width, x_rows = config.tile_n, config.x_rows(m)
    # Cycles for 64 k's: of the tensor cores, of shared memory, of the way there, and of the warps that order copies.
    multiply = 4 * max(width // 2, 16) * config.consumers
    through_smem = (config.consumers * (64 + width) + x_rows + width) * (0.9 if config.consumers > 1 else 0.7)
    copy = (x_rows + width) * 128 / 60
    order = 90 * 64 / config.tile_k
    wait = (3840 if config.consumers == 1 else 640) / config.depth
    step = max(multiply, through_smem, copy, order) + wait
    group = min(config.group, part)
    merges = 150 * part + 4 * (part // group - 1) * (500 if config.shared else 1000)
    if rounds <= 2:
        merges += (500 if config.consumers == 1 else 200) * group  # its code comes from memory
    epilogue = 900 + 10 * width
    parts = config.split * config.last_split
    exchange = 0.0 if parts == 1 else 1200 + 300 * parts
    if parts > 1 and m > 128:
        exchange += config.rows * width / 3
    cycles = rounds * (k / config.split / 64 * step + merges + epilogue + exchange * (config.split > 1))
    if batch > 1 and group >= 4 and width >= 128 and k // leaves == 2 * config.depth:
        cycles *= _TWO_STEPS  # measured, not understood; one product alone was not fitted for it
    if whole < tiles:
        cycles += k / parts / 64 * step + 150 * leaves / parts + epilogue + exchange
    # Short rows of w cost DRAM bandwidth.
    rate = _BANDWIDTH * (1.0 if transpose_rhs else min(1.0, 0.5 + width / 128))
    streaming = 2 * k * n * batch / rate + (exchange + epilogue) / _HERTZ
    # A ring of a few large stages runs dry more easily.
    return (max(cycles / _HERTZ, streaming) + 1e-3 * cycles / _HERTZ) * (
        1 + 0.03 * max(0, 6 - config.stages)
    ) + 2e-6
