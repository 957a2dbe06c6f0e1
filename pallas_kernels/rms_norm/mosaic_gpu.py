"""RMSNorm for Hopper GPUs, alone and with the residual add, in Pallas Mosaic GPU.

A warpgroup normalises one row, which it holds in registers: one read, one write. All rows of one length take the same
kernel, whatever their number, and its bits are those of `reference.py`: the sum halves the row as `tree_sum` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows

LARGEST = 8192  # a thread's part of a longer row does not fit in its registers


def rms_norm_mosaic_gpu(
    x: jax.Array, scale: jax.Array, *, eps: float, y: jax.Array | None = None, interpret: bool = False
) -> Any:
    """Normalises rows on a Hopper GPU.

    Args:
        x: [M, D], bfloat16 or float16; D a multiple of 16 up to 8192.
        scale: [D], of x's type.
        eps: added to the mean square.
        y: like x, or subtrees of a sum, float32 [P, M, D], which are joined and rounded; added to x first.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly.

    Returns:
        [M, D] normalised; with `y` the pair of x + y and that normalised.
    """
    d = x.shape[1]
    terms = [x] if y is None else [x, y]
    if missing := -d % rows.THREADS:  # zeros add nothing to the sum of squares
        terms = [jnp.pad(term, [(0, 0)] * (term.ndim - 1) + [(0, missing)]) for term in terms]
        scale = jnp.pad(scale, (0, missing))
    outs = _run(terms, scale, eps, d, interpret)
    if missing:
        outs = [out[:, :d] for out in outs]
    return outs[0] if y is None else tuple(outs)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(terms: list[jax.Array], scale: jax.Array, eps: float, d: int, interpret: bool) -> list[jax.Array]:
    m, width = terms[0].shape
    size = rows.THREADS * rows.vector_size(width)
    out = jax.ShapeDtypeStruct((m, width), terms[0].dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, len(terms), size, eps, d, interpret),
        out_type=[out] * len(terms),
        scratch_types={"scratch": plgpu.SMEM((size,), jnp.float32)},
        grid=(m,),
        grid_names=("row",),
        num_threads=1,
        thread_name="wg",
        kernel_name="rms_norm" if len(terms) == 1 else "add_rms_norm",
        # The sum has its own barrier, and a CTA takes one row.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(interpret),
    )
    return kernel(*terms, scale)


def _kernel(
    count: int, size: int, eps: float, d: int, interpret: bool, *refs: rows.Ref, scratch: rows.Ref
) -> None:
    row = lax.axis_index("row")
    *terms, scale_ref = refs[: count + 1]
    outs = [ref.at[row] for ref in refs[count + 1 :]]
    starts = range(0, scale_ref.shape[0], size)
    loaded = [[rows.load_term(ref, row, start, size, outs[0].dtype) for start in starts] for ref in terms]
    scales = [rows.load_chunk(scale_ref, start, size) for start in starts]
    x = loaded[0]
    if count == 2:
        x = [rows.add(a, b) for a, b in zip(*loaded, strict=True)]
        for start, chunk in zip(starts, x, strict=True):
            rows.store_chunk(outs[0], start, chunk)
    normalised = rows.normalise(x, scales, scratch, d=d, eps=eps, interpret=interpret)
    for start, chunk in zip(starts, normalised, strict=True):
        rows.store_chunk(outs[-1], start, chunk)
