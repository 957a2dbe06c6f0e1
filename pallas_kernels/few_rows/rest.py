"""`rest_of_layer`: what is left of a decoder layer behind its attention, in one launch where a Hopper GPU can."""

import math
import os
from typing import NamedTuple

import jax

from ..common.backend import resolve_row_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..tree_matmul.config import RESIDENT_CLUSTERS
from ..tree_matmul.plan import check_leaves
from .api import matmul_subtrees, norm_matmul
from .boards import Boards
from .config import choose_rest_config


class LayerRest(NamedTuple):
    """What is left to be done of a decoder layer behind its attention.

    Attributes:
        heads: [..., K], what attention gave.
        out_w: [K, D], of o_proj.
        scale: [D], of the norm before the MLP.
        gate_up_w: [2F, D], gates first.
        down_w: [F, D].
        eps: of the norm.
    """

    heads: jax.Array
    out_w: jax.Array
    scale: jax.Array
    gate_up_w: jax.Array
    down_w: jax.Array
    eps: float


def rest_of_layer(
    x: jax.Array,
    rest: LayerRest,
    next_norm: tuple[jax.Array, jax.Array, float] | None = None,
    boards: Boards | None = None,
    *,
    leaves: int = 8,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, Boards | None]:
    """`matmul_subtrees`, `norm_matmul` gated, `matmul_subtrees`, and `norm_matmul` again, in one launch.

    That is o_proj, the MLP and, across the border of two layers, qkv: the memory never rests between them. The bits are
    those of the four ops.

    Args:
        x: [..., D], the residual stream before o_proj; bfloat16, float16 or float32.
        rest: of the layer, all of x's dtype.
        next_norm: scale [D], weights [N, D] and eps of the norm and the product behind down_proj, if they run too.
        boards: what the last call returned, or None; the kernel alone uses them, and keeps them blank in turns.
        leaves: of K and of F.
        backend: `reference` or `mosaic_gpu`, which takes one row, and one eps; None runs the kernel where it takes the
            sizes, and else the four ops.

    Returns:
        The residual stream, [..., D]: with down_proj added if next_norm is given, else with o_proj alone. Then the
        product, [..., N], or the subtrees of down_proj, float32 [P, ..., D]. At last the boards for the next call.

    Raises:
        ValueError: the shapes do not fit, another dtype, or the backend does not cover them.
    """
    heads, out_w, scale, gate_up_w, down_w, eps = rest
    refusal = rest_of_layer_refusal(x, rest, next_norm, leaves)
    if resolve_row_backend("rest_of_layer", backend, x.dtype, refusal) != "mosaic_gpu":
        sums = matmul_subtrees(heads, out_w, leaves, backend=backend)
        x, hidden = norm_matmul(x, sums, scale, gate_up_w, eps=eps, gated=True, backend=backend)
        sums = matmul_subtrees(hidden, down_w, leaves, backend=backend)
        if next_norm is None:
            return x, sums, boards
        return *norm_matmul(x, sums, *next_norm[:2], eps=next_norm[2], backend=backend), boards
    from .rest_mosaic_gpu import rest_of_layer_mosaic_gpu  # imports the GPU lowering only where it is used

    (f, d), k = down_w.shape, len(out_w)
    columns = None if next_norm is None else len(next_norm[1])
    config = choose_rest_config(d, k, f, columns, leaves)
    assert config is not None
    words = config.words(d, f)
    if boards is None or boards.blank.shape != (words,):
        boards = Boards.create(words)
    total, out, boards = rest_of_layer_mosaic_gpu(
        x.reshape(1, d),
        heads.reshape(1, k),
        out_w,
        scale,
        gate_up_w,
        down_w,
        None if next_norm is None else next_norm[:2],
        boards,
        leaves=leaves,
        eps=eps,
        config=config,
    )
    ahead = x.shape[:-1] if next_norm is not None else (len(out), *x.shape[:-1])
    total, out = total.reshape(x.shape), out.reshape(*ahead, out.shape[-1])
    return inference_only(total, "rest_of_layer"), inference_only(out, "rest_of_layer"), boards


def runs_all_ctas(device: jax.Device) -> bool:
    """Whether a GPU has the multiprocessors for all CTAs of `rest_of_layer` at once: they wait for one another.

    An H100 of 114 multiprocessors has not, nor has a part of an H200 (MIG). Where processes share a GPU through MPS,
    two such launches could each hold what the other one waits for.
    """
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return getattr(device, "core_count", 0) >= RESIDENT_CLUSTERS[1] and not os.path.exists(pipes)


def rest_of_layer_refusal(
    x: jax.Array,
    rest: LayerRest,
    next_norm: tuple[jax.Array, jax.Array, float] | None = None,
    leaves: int = 8,
) -> str | None:
    """Why the Hopper kernel of `rest_of_layer` does not take the operands, or None if it does.

    Raises:
        ValueError: the shapes do not fit one another, or their dtypes.
    """
    heads, out_w, scale, gate_up_w, down_w, eps = rest
    each = {"x": x, "heads": heads, "out_w": out_w, "scale": scale, "gate_up_w": gate_up_w, "down_w": down_w}
    if next_norm is not None:
        each |= {"next scale": next_norm[0], "next w": next_norm[1]}
    check_floats("rest_of_layer", **each)
    if len({one.dtype for one in each.values()}) > 1:
        raise ValueError(
            f"rest_of_layer takes operands of one dtype, not { {name: str(one.dtype) for name, one in each.items()} }"
        )
    d = x.shape[-1] if x.ndim else 0
    k, f = heads.shape[-1] if heads.ndim else 0, down_w.shape[0] if down_w.ndim else 0
    shapes = [(k, d), (d,), (2 * f, d), (f, d)]
    given = [one.shape for one in (out_w, scale, gate_up_w, down_w)]
    if next_norm is not None:
        shapes += [(d,), (*next_norm[1].shape[:1], d)]
        given += [next_norm[0].shape, next_norm[1].shape]
    if heads.shape[:-1] != x.shape[:-1] or shapes != given:
        raise ValueError(
            f"rest_of_layer takes x [..., D], heads [..., K], out_w [K, D], scale [D], gate_up_w [2F, D], down_w "
            f"[F, D] and, if any, a next scale [D] and w [N, D], not shapes {[one.shape for one in each.values()]}"
        )
    check_leaves(k, leaves)
    check_leaves(f, leaves)
    rows = math.prod(x.shape[:-1])
    if rows != 1:
        return f"takes one row, not {rows}"
    if next_norm is not None and next_norm[2] != eps:
        return f"takes norms of one eps, not {eps} and {next_norm[2]}"
    columns = None if next_norm is None else len(next_norm[1])
    if columns is not None and columns % 16:
        return f"takes a multiple of 16 columns, not {columns}"
    if choose_rest_config(d, k, f, columns, leaves) is None:
        return f"has no tiling for D={d}, K={k}, F={f}, N={columns} and leaves={leaves}"
    return None
