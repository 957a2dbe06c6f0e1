"""The residual add for Hopper GPUs, in Pallas Mosaic GPU: elementwise, a piece of one row a CTA."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows


def residual_add_mosaic_gpu(
    x: jax.Array, y: jax.Array, *, chunks: int | None = None, interpret: bool = False
) -> jax.Array:
    """x + y on a Hopper GPU.

    Args:
        x: [M, D], bfloat16 or float16; D a multiple of 16.
        y: like x.
        chunks: that a CTA takes; bits do not depend on it.
        interpret: Run on the CPU, slowly.

    Returns:
        [M, D].
    """
    m, d = x.shape
    if missing := max(0, rows.THREADS - d):  # a row is shorter than a chunk
        x, y = (jnp.pad(part, ((0, 0), (0, missing))) for part in (x, y))
    return _run(x, y, rows.Tiles.choose(m, d + missing, chunks), interpret)[:, :d]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run(x: jax.Array, y: jax.Array, tiles: rows.Tiles, interpret: bool) -> jax.Array:
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiles),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] * tiles.per_row,),
        grid_names=("tile",),
        num_threads=1,
        thread_name="wg",
        kernel_name="residual_add",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True
        ),  # no thread reads what another writes
        interpret=rows.interpreted(interpret),
    )
    return kernel(x, y)


def _kernel(tiles: rows.Tiles, x_ref: rows.Ref, y_ref: rows.Ref, out_ref: rows.Ref) -> None:
    row, starts = tiles.mine()
    loaded = [[rows.load_chunk(ref.at[row], start, tiles.size) for ref in (x_ref, y_ref)] for start in starts]
    for start, (x, y) in zip(starts, loaded, strict=True):
        rows.store_chunk(out_ref.at[row], start, rows.add(x, y))
