"""Tree-ordered matmul in Triton, through `jax_triton`: the portable kernel, for Ampere and Ada GPUs, and Hopper too.

The product is the one `reference.py` specifies. A program of the kernel runs consecutive leaves of a tile of the output
one after the other, each in a fresh accumulator, and merges them with a binary counter: a finished subtree is added to
the complete one on its left, or waits in registers for its right sibling. `TritonConfig.split` says how many parts the
leaves of a tile are cut into:

* 1, "serial": one program has all leaves of its tile, rounds the total and stores it.
* more, "splitk": a part is a program of its own, so that few tiles still fill the GPU. Parts go to memory as fp32
  partials [split, M, N], which a second step adds in the same tree.

Every split does the same adds on the same leaves, so it shows in the bits as little as the tile does. Ragged shapes
need no padding in memory: masked loads read zeros outside of an array, and masked stores write nothing there.

Importing this module takes `triton`; `jax_triton` is imported by the first call.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.experimental import pallas as pl

from ..common.rounding import round_to
from ..common.tree import tree_join
from .operands import check_operands

_FLOAT32 = jnp.dtype(jnp.float32)

_PROGRAMS = 128  # that fill a GPU: about the number of SMs of the large ones
_SMEM_BYTES = 96 * 1024  # of a block for stages: what every GPU of compute capability 8.x and 9.x has
_GROUP = 8  # tiles of this many rows of tiles are walked column by column, for hits in L2
_LARGEST = 2**24  # of N and K: offsets within a tile of up to 128 rows stay below 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
    """How the product is tiled. No field can change a bit of the result.

    Attributes:
        split: Parts that the leaves of a tile are cut into, each a program of its own: 1, 2, 4 or 8.
        block_m: Rows of the tile: 16, 32, 64 or 128.
        block_n: Columns of the tile, likewise.
        block_k: Depth of a step, 16, 32, 64 or 128; it divides the leaf.
        warps: Warps of a program: 1, 2, 4 or 8.
        stages: Tiles of x and w in flight.
    """

    split: int
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def kind(self) -> Literal["serial", "splitk"]:
        return "serial" if self.split == 1 else "splitk"


def choose_config(m: int, n: int, k: int, leaves: int) -> TritonConfig:
    """Picks the tiling for x [m, k] @ w. It decides the speed and nothing else.

    A thread holds the accumulator and one more of its size for each tree level of a part: 64 registers each in the
    largest tile, and at most 32 in the others. With shallow steps for the deep trees, ptxas spills next to nothing (8
    bytes of a thread at most, for compute capabilities 8.0, 8.9 and 9.0).

    Args:
        m: Rows of x.
        n: Columns of the product.
        k: Length of the contraction.
        leaves: Leaves that k is cut into.
    """
    if pl.cdiv(m, 128) * pl.cdiv(n, 128) >= _PROGRAMS:
        split, block_m, block_n, warps = 1, 128, 128 if leaves <= 2 else 64, 8
    else:
        block_m, block_n, warps = next((b for b in (16, 32) if m <= b), 64), 64, 4
        tiles = pl.cdiv(m, block_m) * pl.cdiv(n, block_n)
        split = next((s for s in (1, 2, 4, 8) if s == leaves or tiles * s >= _PROGRAMS), leaves)
    depths = (64, 32, 16) if leaves // split <= 2 else (32, 16)
    block_k = next(b for b in depths if k // leaves % b == 0)
    config = TritonConfig(
        split=split, block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=1
    )
    return dataclasses.replace(config, stages=min(4, _SMEM_BYTES // _smem_bytes(config)))


def tree_matmul_triton(
    x: jax.Array,
    w: jax.Array,
    *,
    leaves: int,
    out_dtype: jax.typing.DTypeLike,
    transpose_rhs: bool = False,
    config: TritonConfig | None = None,
) -> jax.Array:
    """Multiplies x and w in tree order on an NVIDIA GPU of compute capability 8.x or 9.x.

    Args:
        x: [M, K], bfloat16 or float16, any M >= 1.
        w: [K, N], or [N, K] with `transpose_rhs`, of x's type; N a multiple of 16.
        leaves: 1, 2, 4 or 8 equal slices of K, each a multiple of 16 long.
        out_dtype: bfloat16, float16 or float32; the total is rounded to it once.
        transpose_rhs: Whether w is [N, K]. It is read as it lies, not transposed in memory.
        config: The tiling; `choose_config`'s by default.

    Returns:
        [M, N] in `out_dtype`.

    Raises:
        ValueError: If a shape, a type, `leaves`, `config`, the device or the installed jax_triton is not covered.
    """
    out_dtype = jnp.dtype(out_dtype)
    m, n, k = check_operands(x, w, leaves, out_dtype, transpose_rhs)
    if max(n, k) >= _LARGEST:
        raise ValueError(f"n={n} and k={k} must be below {_LARGEST}; cut w into narrower pieces")
    config = config or choose_config(m, n, k, leaves)
    _check_config(config, k, leaves)
    return _run(x, w, leaves, out_dtype, transpose_rhs, config, _compute_capability())


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _run(
    x: jax.Array,
    w: jax.Array,
    leaves: int,
    out_dtype: Any,
    transpose_rhs: bool,
    config: TritonConfig,
    capability: int,
) -> jax.Array:
    (m, k), n = x.shape, w.shape[0 if transpose_rhs else 1]
    shape = (m, n) if config.split == 1 else (config.split, m, n)
    out = _import_jax_triton().triton_call(
        x,
        w,
        m,
        k // leaves,
        kernel=tree_matmul_kernel,
        out_shape=jax.ShapeDtypeStruct(shape, out_dtype if config.split == 1 else _FLOAT32),
        grid=(pl.cdiv(m, config.block_m) * pl.cdiv(n, config.block_n), config.split),
        name="tree_matmul",
        num_warps=config.warps,
        num_stages=config.stages,
        compute_capability=capability,
        enable_fp_fusion=False,  # there is no product to fuse with an add; this says that there shall be none
        **_constants(n, k, leaves, transpose_rhs, config),
    )
    # XLA neither reorders fp32 adds nor moves the rounding in `round_to`, so the last step may fuse with what follows.
    return out if config.split == 1 else round_to(tree_join(list(out)), out_dtype)


def _constants(n: int, k: int, leaves: int, transpose_rhs: bool, config: TritonConfig) -> dict[str, int]:
    """The compile-time parameters of the kernel. M is none: a kernel serves every number of rows."""
    return {
        "N": n,
        "K": k,
        "SPLIT": config.split,
        "LEAVES": leaves // config.split,
        "W_STRIDE_K": 1 if transpose_rhs else n,
        "W_STRIDE_N": k if transpose_rhs else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": _GROUP,
    }


@triton.jit
def tree_matmul_kernel(
    x_ptr: tl.tensor,  # [m, K]
    w_ptr: tl.tensor,  # [K, N] or [N, K], as the strides say
    m: tl.tensor,
    leaf: tl.tensor,  # its length; see `_leaf`
    out_ptr: tl.tensor,  # [m, N], or fp32 partials [SPLIT, m, N]
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAVES: tl.constexpr,  # of a part
    W_STRIDE_K: tl.constexpr,
    W_STRIDE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Computes one part of one tile. Axis 0 of the grid counts tiles, axis 1 parts."""
    tile, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group_tiles = GROUP * ((N + BLOCK_N - 1) // BLOCK_N)
    first = tile // group_tiles * GROUP
    height = min((m + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    # Where a tile starts may take 64 bits; offsets within it do not.
    row = (first + tile % group_tiles % height).to(tl.int64) * BLOCK_M
    column = (tile % group_tiles // height).to(tl.int64) * BLOCK_N
    k = part * (K // SPLIT)

    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    row_mask = row + rows < m
    column_mask = column + columns < N
    x_ptrs = x_ptr + (row * K + k) + (rows * K + tl.arange(0, BLOCK_K)[None, :])
    w_ptrs = w_ptr + (column * W_STRIDE_N + k * W_STRIDE_K)
    w_ptrs += columns * W_STRIDE_N + tl.arange(0, BLOCK_K)[:, None] * W_STRIDE_K

    LEAF: tl.constexpr = K // SPLIT // LEAVES
    total = _leaf(x_ptrs, w_ptrs, row_mask, column_mask, leaf, BLOCK_M, BLOCK_N, BLOCK_K, W_STRIDE_K)
    ones = total  # where a subtree of 1, 2 or 4 leaves waits for its sibling
    twos = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    fours = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for i in range(1, LEAVES):
        x_ptrs += LEAF
        w_ptrs += LEAF * W_STRIDE_K
        total = _leaf(x_ptrs, w_ptrs, row_mask, column_mask, leaf, BLOCK_M, BLOCK_N, BLOCK_K, W_STRIDE_K)
        if i % 2 == 0:
            ones = total
        else:
            total = ones + total
            if i % 4 == 1:
                twos = total
            else:
                total = twos + total
                if LEAVES == 8:
                    if i == 3:
                        fours = total
                    else:
                        total = fours + total

    out_ptrs = out_ptr + (part * m * N + row * N + column) + (rows * N + columns)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def _leaf(
    x_ptrs: tl.tensor,
    w_ptrs: tl.tensor,
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    leaf: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W_STRIDE_K: tl.constexpr,
) -> tl.tensor:
    """Returns the product over one leaf, fp32 [BLOCK_M, BLOCK_N], added up in ascending k from zero.

    The compiler must not know the length of a leaf. It would unroll a loop of one step, and turn `ones + dot(x, w, 0)`
    into `dot(x, w, ones)`: the leaf would start from its sibling's sum.
    """
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for _ in range(0, leaf, BLOCK_K):
        x = tl.load(x_ptrs, mask=row_mask, other=0.0)
        w = tl.load(w_ptrs, mask=column_mask, other=0.0)
        total = tl.dot(x, w, total)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * W_STRIDE_K
    return total


def _smem_bytes(config: TritonConfig) -> int:
    return 2 * config.stages * config.block_k * (config.block_m + config.block_n)


def _check_config(config: TritonConfig, k: int, leaves: int) -> None:
    """Says what is wrong with a tiling given by hand; `choose_config`'s pass."""
    if config.split not in (1, 2, 4, 8) or leaves % config.split:
        raise ValueError(f"split={config.split} does not cut {leaves} leaves evenly")
    sizes = (16, 32, 64, 128)
    if config.block_k not in sizes or k // leaves % config.block_k:
        raise ValueError(
            f"block_k={config.block_k} must be 16, 32, 64 or 128 and divide the leaf of {k // leaves}"
        )
    if config.block_m not in sizes or config.block_n not in sizes or config.warps not in (1, 2, 4, 8):
        raise ValueError(
            f"a tile of {config.block_m} x {config.block_n} for {config.warps} warps is not possible; "
            "use 16, 32, 64 or 128 rows and columns, and 1, 2, 4 or 8 warps"
        )
    fitting = _SMEM_BYTES // _smem_bytes(dataclasses.replace(config, stages=1))
    if not 0 < config.stages <= fitting:
        raise ValueError(f"stages={config.stages} do not fit into {_SMEM_BYTES} bytes; use 1 to {fitting}")


def _compute_capability() -> int:
    """Ten times the compute capability of the default device, which must be 8.x or 9.x.

    Blackwell is left out. On data-centre parts (10.x) Triton takes another MMA for large tiles than for small ones, and
    on neither kind has anybody compared the bits of the tilings.
    """
    device = jax.extend.backend.get_default_device()
    capability = str(getattr(device, "compute_capability", "none"))
    if device.platform != "gpu" or not capability.startswith(("8.", "9.")):
        raise ValueError(
            f"triton needs an NVIDIA GPU of compute capability 8.x or 9.x and the default device is {device} "
            f"({capability}); use backend='reference' there"
        )
    return int(capability.replace(".", ""))


def _import_jax_triton() -> ModuleType:
    try:
        import jax_triton
    except Exception as error:  # it reaches into jax: a jax that it does not know may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"jax-triton does not load with jax {jax.__version__} ({type(error).__name__}: {reason}); "
            "jax-triton==0.3.1 does with jax[cuda13]==0.11.2 and triton==3.6.0; or use backend='reference'"
        ) from error
    return jax_triton
