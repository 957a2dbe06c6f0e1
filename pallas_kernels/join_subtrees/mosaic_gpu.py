"""Adds up the subtrees of a sum on a Hopper GPU, in Pallas Mosaic GPU: elementwise, a piece of one row a CTA."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows


def join_subtrees_mosaic_gpu(
    subtrees: jax.Array, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """Joins subtrees, float32 [P, M, D] with D from 128 on, a multiple of 16, to [M, D] in `dtype`."""
    return _run(subtrees, jnp.dtype(dtype), interpret)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _run(subtrees: jax.Array, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    _, m, d = subtrees.shape
    tiles = rows.Tiles.choose(m, d, None)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiles),
        out_type=jax.ShapeDtypeStruct((m, d), dtype),
        grid=(m * tiles.per_row,),
        grid_names=("tile",),
        num_threads=1,
        thread_name="wg",
        kernel_name="join_subtrees",
        # no thread reads what another writes
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(interpret),
    )
    return kernel(subtrees)


def _kernel(tiles: rows.Tiles, subtrees: rows.Ref, out: rows.Ref) -> None:
    row, starts = tiles.mine()
    for start in starts:
        rows.store_chunk(out.at[row], start, rows.load_term(subtrees, row, start, tiles.size, out.dtype))
