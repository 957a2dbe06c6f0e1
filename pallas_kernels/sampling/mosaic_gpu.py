"""Gumbel-max sampling for Hopper GPUs, in Pallas Mosaic GPU: noise that is never in memory.

The CTAs of a row take a run of tiles each. A thread keeps the best of what it has seen; the threads of a CTA, and
then the CTAs, compare theirs. Maxima are exact, so how the row is cut up does not show. A row of temperature 0 is not
read.

The last tile of a row ends with the row and overlaps the one before: a token seen twice is the same token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.kernel_math import LANES, LAYOUT, KernelMath, vector
from .plan import kernel_refusal
from .reference import Draw

_Ref = Any  # Pallas has no public type for what its refs become inside a kernel

_TILE_VECTORS = 4  # of LANES tokens: a thread works at so many at a time
_CTAS = 132 * 8  # as many as keep an H200 busy
_PARITY = np.int32(0x1BD11BDA)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def sample_argmax_mosaic_gpu(
    logits: jax.Array,
    row_max: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    offset: jax.Array,
    *,
    parts: int | None = None,
    interpret: bool = False,
) -> Draw:
    """`sample_argmax_reference` on a Hopper GPU.

    Args:
        logits, row_max, temperature, key, positions, offset: As in the API.
        parts: CTAs that share a row; as many as keep the GPU busy by default.
        interpret: Run on the CPU, slowly.

    Raises:
        ValueError: If there are less than 128 columns.
    """
    rows, size = logits.shape
    refusal = kernel_refusal(size)
    if refusal:
        raise ValueError(f"mosaic_gpu: {refusal}; use backend='reference'")
    tile = LANES * (_TILE_VECTORS if size >= LANES * _TILE_VECTORS else 1)
    tiles = pl.cdiv(size, tile)
    parts = min(parts or pl.cdiv(_CTAS, rows), tiles)
    signed = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)
    drawn = _run(
        logits, row_max, temperature, signed(key), positions, offset.reshape(1), (tile, parts), interpret
    )
    if parts == 1:
        return Draw(*(part[:, 0] for part in drawn))
    best = jnp.argmax(drawn[0], axis=1)[:, None]  # the lowest part of equal ones: it has the lowest ids
    return Draw(*(jnp.take_along_axis(part, best, axis=1)[:, 0] for part in drawn))


@functools.partial(jax.jit, static_argnums=(6, 7))
def _run(
    logits: jax.Array,
    row_max: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    offset: jax.Array,
    cut: tuple[int, int],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Value, token and logit [B, parts] of the best token of each part of a row."""
    rows, _ = logits.shape
    tile, parts = cut
    number, whole = (jax.ShapeDtypeStruct((rows, parts), dtype) for dtype in (jnp.float32, jnp.int32))
    kernel = plgpu.kernel(
        functools.partial(_kernel, tile, parts, KernelMath(interpret)),
        out_type=(number, whole, number),
        grid=(rows, parts),
        grid_names=("row", "part"),
        kernel_name="sample_argmax",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if interpret else None,
    )
    return kernel(logits, row_max, temperature, key, positions, offset)


def _kernel(
    tile: int,
    parts: int,
    math: KernelMath,
    logits: _Ref,
    row_max: _Ref,
    temperatures: _Ref,
    keys: _Ref,
    positions: _Ref,
    offset: _Ref,
    values: _Ref,
    tokens: _Ref,
    chosen: _Ref,
) -> None:
    row, part = lax.axis_index("row"), lax.axis_index("part")
    size = logits.shape[1]
    tiles = pl.cdiv(size, tile)
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)
    first_tile, last_tile = part * tiles // parts, (part + 1) * tiles // parts
    temperature = temperatures[row]

    def draw() -> None:
        largest, divisor = vector(row_max[row]), vector(temperature)
        # A scalar is a register of each thread, so the fold of the position is done in vectors of equal elements.
        seed = vector(keys[row, 0], jnp.int32), vector(keys[row, 1], jnp.int32)
        at_position = _fold_in(seed, vector(positions[row], jnp.int32))
        first_id = offset[0]

        def step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            value, column = carry
            start = jnp.minimum(index * tile, size - tile)
            for i in range(tile // LANES):
                columns = start + i * LANES + lane
                x = logits[row, pl.ds(start + i * LANES, LANES)]
                noise = _gumbel(math, at_position, columns + first_id)
                noisy = math.div(x - largest, divisor) + noise
                better = noisy > value  # the earlier of equal ones stays: it has the lower id
                value = jnp.where(better, noisy, value)
                column = jnp.where(better, columns, column)
            return value, column

        start = vector(-np.inf), jnp.minimum(first_tile * tile, size - tile) + lane
        value, column = lax.fori_loop(first_tile, last_tile, step, start)
        best = jnp.max(value)
        winner = jnp.min(jnp.where(value == best, column, size - 1))
        values[row, part] = best
        tokens[row, part] = winner + first_id
        chosen[row, part] = logits[row, winner]

    def skip() -> None:
        values[row, part] = jnp.float32(-np.inf)
        tokens[row, part] = offset[0]
        chosen[row, part] = logits[row, 0]

    lax.cond(temperature > 0, draw, skip)


def _gumbel(math: KernelMath, key: tuple[jax.Array, jax.Array], ids: jax.Array) -> jax.Array:
    """The noise of `ids`."""
    word, _ = _fold_in(key, ids)
    # 1 + b / 2**23 from the upper 23 bits b; the difference (b + 0.5) / 2**23 is exact
    one_and_more = lax.bitcast_convert_type(
        lax.shift_right_logical(word, vector(9, jnp.int32)) | np.int32(0x3F800000), jnp.float32
    )
    uniform = one_and_more - np.float32(1 - 2.0**-24)
    return -math.log_of_normal(-math.log_of_normal(uniform))


def _fold_in(key: tuple[jax.Array, jax.Array], data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of the counter (0, data), 20 rounds; int32 words, whose adds wrap around."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = schedule[0], data + schedule[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = _rotate(y, turn) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.int32(group + 1)
    return x, y


def _rotate(x: jax.Array, turn: int) -> jax.Array:
    right = lax.shift_right_logical(x, vector(32 - turn, jnp.int32))
    return (x << turn) | right
