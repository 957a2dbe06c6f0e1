"""SwiGLU for Hopper GPUs, in Pallas Mosaic GPU: elementwise, a piece of one row a CTA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows
from ..common.activation import silu as fast_silu
from ..common.rounding import exp


def swiglu_mosaic_gpu(
    gate: jax.Array,
    up: jax.Array | None = None,
    *,
    chunks: int | None = None,
    exact: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """silu(gate) * up on a Hopper GPU.

    Args:
        gate: [M, F], bfloat16 or float16; without `up` [M, 2F], gates first. F a multiple of 16.
        up: [M, F].
        chunks: that a CTA takes; bits do not depend on it.
        exact: the steps of `reference.py` and its bits, at twice the arithmetic.
        interpret: Run on the CPU, slowly.

    Returns:
        [M, F].
    """
    f = gate.shape[1] if up is not None else gate.shape[1] // 2
    if missing := max(0, rows.THREADS - f):  # a row is shorter than a chunk
        gate, up = (gate, up) if up is not None else (gate[:, :f], gate[:, f:])
        gate, up = (jnp.pad(part, ((0, 0), (0, missing))) for part in (gate, up))
    tiles = rows.Tiles.choose(gate.shape[0], f + missing, chunks)
    return _run([gate] if up is None else [gate, up], tiles, exact, interpret)[:, :f]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(operands: list[jax.Array], tiles: rows.Tiles, exact: bool, interpret: bool) -> jax.Array:
    m = operands[0].shape[0]
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiles, exact, interpret),
        out_type=jax.ShapeDtypeStruct((m, tiles.n), operands[0].dtype),
        grid=(m * tiles.per_row,),
        grid_names=("tile",),
        num_threads=1,
        thread_name="wg",
        kernel_name="swiglu",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True
        ),  # no thread reads what another writes
        interpret=rows.interpreted(interpret),
    )
    return kernel(*operands)


def _kernel(tiles: rows.Tiles, exact: bool, interpret: bool, *refs: rows.Ref) -> None:
    row, starts = tiles.mine()
    gate_ref, up_ref, out_ref = refs[0].at[row], refs[-2].at[row], refs[-1].at[row]
    up_start = 0 if len(refs) == 3 else tiles.n
    loaded = [
        (rows.load_chunk(gate_ref, start, tiles.size), rows.load_chunk(up_ref, start + up_start, tiles.size))
        for start in starts
    ]
    for start, (gate, up) in zip(starts, loaded, strict=True):
        wide, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        silu = _exact_silu(wide, interpret) if exact else fast_silu(wide)
        rows.store_chunk(out_ref, start, (silu * up).astype(gate.dtype))


def _exact_silu(x: jax.Array, interpret: bool) -> jax.Array:
    layout = rows.chunk_layout(x.shape[0])
    multiply = functools.partial(rows.multiply, layout=layout, interpret=interpret)
    return rows.divide(x, np.float32(1) + exp(-x, multiply=multiply), layout, interpret)
