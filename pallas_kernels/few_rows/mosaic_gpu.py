"""Products of few rows for Hopper GPUs, in Pallas Mosaic GPU: as many bytes of w in flight as fit, from the start.

What a decoding step multiplies is a few rows, and what it takes is the time to read w. Between two products w waits for
a norm, for a launch, and for the sums of a cluster. Here it does not:

* The norm, with the residual add before it, is a prologue. Every CTA normalises all rows for itself, while the ring in
  shared memory fills with w. Rows stay in shared memory; only w streams.
* CTAs that take a part of the leaves of a tile do not wait for one another. Each stores the sum of its subtree, and
  who reads them, the next prologue, adds them up: the same tree.

Rows are normalised as `rms_norm` does, leaves multiplied as `tree_matmul`'s kernel does: by the same code.
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import mosaic_rows as rows
from ..tree_matmul.config import RESIDENT_CLUSTERS
from .config import FewRowsConfig
from .problem import Launch, Product
from .stages import multiply, prepare, store_to, stream

_INTERPRETED_CTAS = 2  # the threads of more could wait for each other forever: see `tree_matmul.mosaic_gpu`


def norm_matmul_mosaic_gpu(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    w: jax.Array,
    *,
    eps: float,
    gated: bool,
    config: FewRowsConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with y added, and the product of its norm and w, on a Hopper GPU.

    Args:
        x: [M, D], bfloat16 or float16, M up to 8, D a multiple of 128 up to 8192.
        y: like x, or the subtrees of a sum, float32 [P, M, D]; None for nothing.
        scale: [D].
        w: [N, D], N a multiple of 16.
        eps: of the norm.
        gated: Whether the result is the SwiGLU of gates and values, [M, N / 2].
        config: See `choose_norm_config`.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly.
    """
    product = Product(
        m=x.shape[0],
        n=w.shape[0],
        k=x.shape[1],
        leaves=1,
        dtype=x.dtype,
        out_dtype=x.dtype,
        transpose_rhs=True,
        gated=gated,
        eps=eps,
        adds=y is not None,
        config=config,
        ctas=_ctas(interpret),
        interpret=interpret,
    )
    out, *total = _run([x] if y is None else [x, y], [scale], w, product)
    return (x if y is None else total[0]), out[0]


def matmul_subtrees_mosaic_gpu(
    x: jax.Array, w: jax.Array, *, leaves: int, config: FewRowsConfig, interpret: bool = False
) -> jax.Array:
    """The sums of the subtrees of x @ w, float32 [config.parts, M, N], on a Hopper GPU.

    Args:
        x: [M, K], bfloat16 or float16, M up to 8.
        w: [K, N], N a multiple of 64.
        leaves: of K.
        config: See `choose_subtree_config`.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly.
    """
    product = Product(
        m=x.shape[0],
        n=w.shape[1],
        k=x.shape[1],
        leaves=leaves,
        dtype=x.dtype,
        out_dtype=jnp.dtype(jnp.float32),
        config=config,
        ctas=_ctas(interpret),
        interpret=interpret,
    )
    return _run([x], [], w, product)[0]


def _ctas(interpret: bool) -> int:
    return _INTERPRETED_CTAS if interpret else RESIDENT_CLUSTERS[1]


@functools.partial(jax.jit, static_argnums=3)
def _run(terms: list[jax.Array], scales: list[jax.Array], w: jax.Array, product: Product) -> list[jax.Array]:
    launch = Launch((product,))
    kernel = plgpu.kernel(
        functools.partial(_kernel, launch),
        out_type=[product.out, product.total] if product.adds else [product.out],
        scratch_types=launch.scratch(),
        grid=(launch.ctas,),
        grid_names=("cta",),
        num_threads=launch.preparers + 1,
        thread_name="wg",
        kernel_name="norm_matmul" if scales else "matmul_subtrees",
        # Where memory passes from one thread or proxy to another, the kernel says so itself.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=rows.interpreted(product.interpret),
    )
    out, *total = kernel(*terms, *scales, w)
    return [out[:, :, : product.columns], *total]


def _kernel(launch: Launch, *refs: rows.Ref, **scratch: rows.Ref) -> None:
    [product] = launch.products
    count = 1 + product.adds
    terms, rest = refs[:count], list(refs[count:])
    scale = None if product.eps is None else rest.pop(0)
    w, out, *total = rest
    smem = types.SimpleNamespace(**scratch)
    wg = lax.axis_index("wg")

    @pl.when(wg == launch.preparers)
    def _() -> None:
        stream(launch, [w], smem)

    @pl.when(wg < launch.preparers)
    def _() -> None:
        prepare(launch, terms, scale, total[0] if total else None, smem)
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.ready)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.barrier_wait(smem.ready)
            multiply(launch, 0, store_to(product, out), smem, lax.optimization_barrier(jnp.int32(0)))
