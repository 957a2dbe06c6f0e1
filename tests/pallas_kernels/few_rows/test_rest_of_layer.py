"""What is left of a layer in one launch: the bits of its ops, in the reference and in the interpreter, and refusals.

The interpreter runs one CTA, which waits for nobody; what CTAs leave for one another on a GPU is tested in `tests/gpu`.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import (
    LayerRest,
    add_rms_norm,
    gated_matmul,
    join_subtrees,
    rest_of_layer,
    tree_matmul,
)
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.few_rows.boards import MISSING, Boards
from tbik_jax.pallas_kernels.few_rows.config import FewRowsConfig, RestConfig, choose_rest_config
from tbik_jax.pallas_kernels.few_rows.rest_mosaic_gpu import rest_of_layer_mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul.config import SMEM_BYTES
from tests.helpers import DTYPES, assert_same_bits, differing, normal, wide

EPS = 1e-6
BF16 = jnp.bfloat16
#: Hidden size, K of o_proj and of down_proj, and columns of qkv, of every published size.
SIZES = {
    "0.6B": (1024, 2048, 3072, 4096),
    "1.7B": (2048, 2048, 6144, 4096),
    "4B": (2560, 4096, 9728, 6144),
    "8B": (4096, 4096, 12288, 6144),
    "14B": (5120, 5120, 17408, 7168),
    "32B": (5120, 8192, 25600, 10240),
}
ONE_LAUNCH = ("0.6B", "1.7B")


def operands(d, k, f, n, dtype=BF16, make=normal):
    """x, the rest of a layer, and the norm and product behind it."""
    rng = np.random.default_rng([d, k, f, n])
    x, heads = (make(rng, (1, size), dtype) for size in (d, k))
    scales = [(1 + normal(rng, (d,)) / 5).astype(dtype) for _ in range(2)]
    out_w, gate_up_w, down_w, next_w = (
        (normal(rng, shape) * fan_in**-0.5).astype(dtype)
        for shape, fan_in in (((k, d), k), ((2 * f, d), d), ((f, d), f), ((n, d), d))
    )
    rest = LayerRest(heads, out_w, scales[0], gate_up_w, down_w, EPS)
    return jax.tree.map(
        lambda a: a if isinstance(a, float) else jnp.asarray(a), (x, rest, (scales[1], next_w, EPS))
    )


def one_after_the_other(x, rest, next_norm):
    """The same by the ops that are fused."""
    attended = tree_matmul(rest.heads, rest.out_w, 8)
    x, normalised = add_rms_norm(x, attended, rest.scale, eps=EPS)
    down = tree_matmul(gated_matmul(normalised, rest.gate_up_w), rest.down_w, 8)
    if next_norm is None:
        return x, down
    x, normalised = add_rms_norm(x, down, next_norm[0], eps=EPS)
    return x, tree_matmul(normalised, next_norm[1], 1, transpose_rhs=True)


@pytest.mark.parametrize("name", DTYPES)
def test_the_reference_has_the_bits_of_the_ops(name):
    x, rest, next_norm = operands(64, 128, 256, 48, DTYPES[name], wide)
    total, out, boards = rest_of_layer(x, rest, next_norm)
    assert boards is None
    assert_same_bits((total, out), one_after_the_other(x, rest, next_norm))
    total, subtrees, _ = rest_of_layer(x, rest)
    assert_same_bits((total, join_subtrees(subtrees, x.dtype)), one_after_the_other(x, rest, None))
    # twin: another last bit of what attention gave
    nudged = rest._replace(heads=jnp.nextafter(rest.heads, jnp.full_like(rest.heads, jnp.inf)))
    assert differing(rest_of_layer(x, nudged, next_norm)[1], out)


def picked(rng, rows, columns, most=3):
    """One power of two a row: a product with it is exact in any order."""
    w = np.zeros((rows, columns))
    w[np.arange(rows), rng.integers(0, columns, rows)] = 2.0 ** rng.integers(-2, most, rows)
    return jnp.asarray(w, BF16)


@pytest.mark.parametrize("behind", [True, False])
def test_the_kernel_runs_all_products_with_one_ring(behind):
    d, k, f, n = 128, 256, 256, 48
    rng = np.random.default_rng(5)
    x, heads = (jnp.asarray(normal(rng, (1, size)), BF16) for size in (d, k))
    scales = [jnp.asarray(1 + normal(rng, (d,)) / 5, BF16) for _ in range(2)]
    rest = LayerRest(heads, picked(rng, d, k).T, scales[0], picked(rng, 2 * f, d), picked(rng, d, f).T, EPS)
    next_norm = (scales[1], picked(rng, n, d), EPS) if behind else None
    cut = {"stages": 3, "head": 2, "flying": 2, "ahead": 1}
    config = RestConfig(
        out=FewRowsConfig(columns=64, boxes=1, **cut),
        gate_up=FewRowsConfig(columns=32, boxes=1, **cut),
        down=FewRowsConfig(columns=64, boxes=1, **cut),
        next=FewRowsConfig(columns=16, boxes=2, **cut) if behind else None,
    )
    pair = Boards.create(config.words(d, f))
    total, out, after = rest_of_layer_mosaic_gpu(
        x,
        heads,
        *rest[1:5],
        next_norm and next_norm[:2],
        pair,
        leaves=2,
        eps=EPS,
        config=config,
        interpret=True,
    )
    assert (after.blank == MISSING).all() and (after.used != MISSING).any()
    expected = rest_of_layer(x, rest, next_norm, leaves=2)
    # The interpreter's exp is not the reference's: what is before SwiGLU is equal, what is behind it close.
    if not behind:
        assert_same_bits(total, expected[0])
    for a, b in zip((total, out), expected, strict=False):
        np.testing.assert_allclose(*(np.asarray(each, np.float32) for each in (a, b)), rtol=3e-2, atol=1e-2)
    # twin: a scale that is another's
    other = rest._replace(scale=scales[1])
    wrong = rest_of_layer(x, other, next_norm, leaves=2)[1]
    assert not np.allclose(*(np.asarray(each, np.float32) for each in (wrong, out)), rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_tilings_fit_and_lower_for_hopper(monkeypatch, size, columns):
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    d, k, f, n = SIZES[size]
    config = choose_rest_config(d, k, f, n if columns else None, 8)
    # 4B's and 32B's gates and 14B's columns of the sums do not come out even; 8B's ring would be four stages long
    assert (config is not None) == (size in ONE_LAUNCH)
    if config is None:
        return
    assert config.smem_bytes(d, k, f) <= SMEM_BYTES and config.copies_fit()
    assert config.out.stages >= 6 and config.out.stages * 24 * 1024 <= SMEM_BYTES
    assert choose_rest_config(d, k, f, None, 8).words(d, f) == config.words(d, f)  # the last layer's boards
    x, rest, next_norm = operands_shapes(d, k, f, n)

    def run(x, arrays, behind):
        return rest_of_layer(x, LayerRest(*arrays, EPS), behind and (*behind, EPS), backend="mosaic_gpu")

    lowered = jax.jit(run).trace(x, rest[:5], next_norm[:2] if columns else None)
    assert lowered.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def operands_shapes(d, k, f, n):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, BF16)

    rest = LayerRest(array(1, k), array(k, d), array(d), array(2 * f, d), array(f, d), EPS)
    return array(1, d), rest, (array(d), array(n, d), EPS)


def test_configs_whose_copies_do_not_come_out_even_are_seen():
    config = choose_rest_config(*SIZES["1.7B"], 8)
    assert config is not None and config.copies_fit()
    for columns, boxes in ((8, 4), (48, 3)):
        cut = dataclasses.replace(config.next, columns=columns, boxes=boxes)
        fits = dataclasses.replace(config, next=cut).copies_fit()
        assert fits == (boxes == 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (2, 2048)}, "not shapes [(1, 1024), (2, 2048)"),
        ({"scale": (64,)}, "scale [D]"),
        ({"down_w": (3072, 1040)}, "down_w [F, D]"),
    ],
)
def test_it_refuses_shapes(change, message):
    x, rest, next_norm = operands_shapes(1024, 2048, 3072, 4096)
    rest = rest._replace(**{name: jax.ShapeDtypeStruct(shape, BF16) for name, shape in change.items()})
    with pytest.raises(ValueError, match=re.escape(message)):
        rest_of_layer(x, rest, next_norm)


@pytest.mark.parametrize(
    ("rows", "sizes", "eps", "message"),
    [
        (2, (1024, 2048, 3072, 4096), EPS, "takes one row, not 2"),
        (1, (4096, 4096, 12288, 6144), EPS, "no tiling for D=4096"),
        (1, (1024, 2048, 3072, 4096), 1e-5, "norms of one eps"),
        (1, (1024, 2048, 3072, 4088), EPS, "multiple of 16 columns"),
    ],
)
def test_the_kernel_refuses_sizes(monkeypatch, rows, sizes, eps, message):
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    _, rest, next_norm = operands_shapes(*sizes)
    x = jax.ShapeDtypeStruct((rows, sizes[0]), BF16)
    rest = rest._replace(heads=jax.ShapeDtypeStruct((rows, sizes[1]), BF16))
    with pytest.raises(ValueError, match=re.escape(message)):
        rest_of_layer(x, rest, (*next_norm[:2], eps), backend="mosaic_gpu")
