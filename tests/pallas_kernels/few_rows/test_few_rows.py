"""Products of few rows: the bits of the ops that they fuse, in the reference and in the interpreter, and refusals.

The interpreter adds a leaf up in NumPy's order, so products in it are exact here; the bits of a GPU are in `tests/gpu`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.pallas_kernels import (
    add_rms_norm,
    gated_matmul,
    join_subtrees,
    matmul_subtrees,
    norm_matmul,
    residual_add,
    rms_norm,
    tree_matmul,
)
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.few_rows.config import (
    FewRowsConfig,
    choose_norm_config,
    choose_subtree_config,
)
from tbik_jax.pallas_kernels.few_rows.mosaic_gpu import matmul_subtrees_mosaic_gpu, norm_matmul_mosaic_gpu
from tbik_jax.pallas_kernels.join_subtrees.mosaic_gpu import join_subtrees_mosaic_gpu
from tbik_jax.pallas_kernels.rms_norm.mosaic_gpu import rms_norm_mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul.config import SMEM_BYTES
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, cancelling_parts, differing, mixed, normal, wide

EPS = 1e-6
BF16 = jnp.bfloat16
#: Hidden size, and the K of o_proj and down_proj, of every published size.
SIZES = {
    "0.6B": (1024, 2048, 3072),
    "1.7B": (2048, 2048, 6144),
    "4B": (2560, 4096, 9728),
    "8B": (4096, 4096, 12288),
    "14B": (5120, 5120, 17408),
    "32B": (5120, 8192, 25600),
}


def operands(m, d, n, subtrees, dtype=BF16):
    """x, y or subtrees of it, scale, w."""
    rng = np.random.default_rng([m, d, n])
    y = {None: None, 0: normal(rng, (m, d), dtype)}.get(subtrees)
    if subtrees:
        y = cancelling_parts(rng, (subtrees, m, d))
    scale = (1 + normal(rng, (d,)) / 5).astype(dtype)
    w = normal(rng, (n, d)) * d**-0.5
    return jax.tree.map(jnp.asarray, (mixed(rng, (m, d), dtype), y, scale, w.astype(dtype)))


def one_after_the_other(x, y, scale, w, gated):
    """The same by the ops that are fused."""
    if y is not None and y.ndim > x.ndim:
        y = jnp.asarray(orders.round_to(orders.tree_join(list(np.asarray(y))), x.dtype))
    x, normalised = (x, rms_norm(x, scale, eps=EPS)) if y is None else add_rms_norm(x, y, scale, eps=EPS)
    product = gated_matmul(normalised, w) if gated else tree_matmul(normalised, w, 1, transpose_rhs=True)
    return x, product


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("subtrees", "gated"), [(None, False), (0, True), (2, False), (8, True)])
def test_the_norm_and_the_product_have_the_bits_of_both(name, subtrees, gated):
    x, y, scale, w = operands(3, 48, 64, subtrees, DTYPES[name])
    fused = norm_matmul(x, y, scale, w, eps=EPS, gated=gated)
    assert_same_bits(fused, one_after_the_other(x, y, scale, w, gated))
    if subtrees == 8 and name == "float32":  # twin: subtrees that meet in another order
        other = norm_matmul(x, y[jnp.asarray([0, 2, 1, 3, 4, 5, 6, 7])], scale, w, eps=EPS, gated=gated)
        assert differing(other[0], fused[0])


@settings(max_examples=15, deadline=None)
@given(
    parts=st.sampled_from((1, 2, 4, 8)),
    leaf=st.sampled_from((16, 32)),
    m=st.integers(1, 9),
    name=st.sampled_from(sorted(DTYPES)),
)
def test_subtrees_join_to_the_whole_product(parts, leaf, m, name):
    rng = np.random.default_rng([parts, leaf, m])
    x, w = (jnp.asarray(wide(rng, s, DTYPES[name])) for s in ((m, 8 * leaf), (8 * leaf, 16)))
    subtrees = matmul_subtrees(x, w, 8, parts=parts)
    assert subtrees.shape == (parts, m, 16)
    assert_same_bits(join_subtrees(subtrees, x.dtype), tree_matmul(x, w, 8))
    assert_same_bits(
        add_rms_norm(x[:, :16], subtrees, x[0, :16], eps=EPS)[0],
        residual_add(x[:, :16], tree_matmul(x, w, 8)),
    )


def test_subtrees_that_meet_in_another_order_show():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(wide(rng, s)) for s in ((3, 256), (256, 16)))
    subtrees = matmul_subtrees(x, w, 8, parts=8)
    assert differing(join_subtrees(subtrees[::-1].at[0].set(subtrees[0]), jnp.float32), tree_matmul(x, w, 8))
    assert differing(
        join_subtrees(subtrees[jnp.asarray([0, 2, 1, 3, 4, 5, 6, 7])], jnp.float32), tree_matmul(x, w, 8)
    )


@pytest.mark.parametrize(
    ("m", "d", "n", "gated", "subtrees", "config"),
    [
        (1, 256, 64, False, None, FewRowsConfig(columns=32, boxes=2, stages=2, head=1)),
        (
            1,
            640,
            96,
            True,
            4,
            FewRowsConfig(columns=16, boxes=1, stages=3, head=2),
        ),  # three tiles of two CTAs
        (
            5,
            384,
            80,
            False,
            0,
            FewRowsConfig(columns=72, boxes=2, stages=2, preparers=3),
        ),  # a tile over the edge
        (8, 128, 32, True, 2, FewRowsConfig(columns=8, boxes=2, stages=2, preparers=2)),
    ],
)
def test_the_kernel_normalises_while_w_comes(m, d, n, gated, subtrees, config):
    x, y, scale, _ = operands(m, d, n, subtrees)
    # 0 or one power of two in a row of w: the product is exact in any order, and its rounding is the norm's
    rng = np.random.default_rng(n)
    w = np.zeros((n, d))
    w[np.arange(n), rng.permutation(d)[:n] if n <= d else rng.integers(0, d, n)] = 2.0 ** rng.integers(
        -2, 3, n
    )
    w = jnp.asarray(w, BF16)
    found = norm_matmul_mosaic_gpu(x, y, scale, w, eps=EPS, gated=gated, config=config, interpret=True)
    expected = one_after_the_other(x, y, scale, w, gated)
    assert_same_bits(found[0], expected[0])
    if gated:  # the interpreter's exp is not the reference's
        np.testing.assert_allclose(
            *(np.asarray(each[1], np.float32) for each in (found, expected)), rtol=2e-2
        )
    else:
        assert_same_bits(found[1], expected[1])


@pytest.mark.parametrize(
    ("m", "leaf", "leaves", "n", "config"),
    [
        (1, 128, 2, 64, FewRowsConfig(columns=64, boxes=1, stages=2, parts=2)),
        (3, 64, 8, 128, FewRowsConfig(columns=64, boxes=1, stages=3, parts=2)),
        (8, 128, 4, 128, FewRowsConfig(columns=64, boxes=2, stages=2, parts=4, preparers=2, head=1)),
        (1, 128, 2, 64, FewRowsConfig(columns=64, boxes=1, stages=2, preparers=2)),  # one has no row
        (2, 128, 4, 192, FewRowsConfig(columns=64, boxes=2, stages=2)),  # three tiles of two CTAs
    ],
)
def test_the_kernel_gives_the_subtrees(m, leaf, leaves, n, config):
    rng = np.random.default_rng([m, leaf, n])
    k = leaf * leaves
    # Integers of 7 bits are exact in a leaf in any order; powers of two that part the leaves show the tree.
    scale = np.exp2(rng.permutation(np.linspace(-24, -4, leaves).round())).repeat(leaf)
    x = jnp.asarray(rng.integers(-127, 128, (m, k)) * scale, BF16)
    w = jnp.asarray(rng.integers(-127, 128, (k, n)), BF16)
    found = matmul_subtrees_mosaic_gpu(x, w, leaves=leaves, config=config, interpret=True)
    expected = matmul_subtrees(x, w, leaves, parts=config.parts)
    assert_same_bits(found, expected)
    if leaves > config.parts:  # twin: one leaf a part
        assert differing(matmul_subtrees(x, w, config.parts, parts=config.parts), found)


@pytest.mark.parametrize(("d", "subtrees"), [(128, 2), (1536, 4), (640, 8)])
def test_the_norm_s_kernel_and_the_join_s_add_subtrees_up(d, subtrees):
    x, y, scale, _ = operands(3, d, 16, subtrees)
    joined = jnp.asarray(orders.round_to(orders.tree_join(list(np.asarray(y))), x.dtype))
    assert_same_bits(join_subtrees_mosaic_gpu(y, BF16, interpret=True), joined)
    found = rms_norm_mosaic_gpu(x, scale, eps=EPS, y=y, interpret=True)
    assert_same_bits(found, add_rms_norm(x, joined, scale, eps=EPS))
    assert_same_bits(
        join_subtrees_mosaic_gpu(y, jnp.float32, interpret=True), orders.tree_join(list(np.asarray(y)))
    )
    if subtrees > 2:  # twin: other neighbours
        other = y[jnp.asarray([0, 2, 1, *range(3, subtrees)])]
        assert differing(join_subtrees_mosaic_gpu(other, BF16, interpret=True), joined)


def gated(x, scale, w, **options):
    return norm_matmul(x, None, scale, w, eps=EPS, gated=True, **options)


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("m", [8, 9])
def test_more_rows_than_the_kernels_take_get_the_kernels_of_the_single_ops(monkeypatch, m):
    """On a Hopper GPU, where the reference's sums have other bits than the tensor cores'."""
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "_resident_clusters", lambda size: 132 // size)

    def run(x, scale, column, row):
        norm = norm_matmul(x, None, scale, column, eps=EPS, gated=True)[1]
        return norm, norm_matmul(x, x, scale, column, eps=EPS)[1], matmul_subtrees(x, row)

    shapes = ((m, 1024), (1024,), (256, 1024), (1024, 1024))
    text = str(jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(shape, BF16) for shape in shapes)))
    names = "norm_matmul|matmul_subtrees|tree_matmul|rms_norm|add_rms_norm"
    single = ["rms_norm", "tree_matmul", "add_rms_norm", "tree_matmul", "tree_matmul"]
    fused = ["norm_matmul", "norm_matmul", "matmul_subtrees"]
    assert re.findall(rf"\bname=({names})\b", text) == (fused if m == 8 else single)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_tilings_fit_and_lower_for_hopper(monkeypatch, size, m):
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    d, *contractions = SIZES[size]
    config = choose_norm_config(m, d, 3 * d, gated=True)
    assert config.stages >= 4 and config.smem_bytes(d, gated=True) <= SMEM_BYTES
    for k in contractions:
        config = choose_subtree_config(d, k, 8, m=m)
        # 14B and 32B have 80 tiles, of which 160 are too many; 8 rows of 9728 are too many chunks
        assert (config is not None) == (size not in ("14B", "32B") and (k, m) != (9728, 8))
        if config is not None:
            assert config.stages >= 3 and config.smem_bytes(k, gated=False) <= SMEM_BYTES
            assert 64 <= d // 64 * config.parts <= 132
    x, w, scale = (jax.ShapeDtypeStruct(s, BF16) for s in ((m, d), (256, d), (d,)))
    pending = jax.ShapeDtypeStruct((2, m, d), jnp.float32)
    norm = functools.partial(norm_matmul, eps=EPS, backend="mosaic_gpu", gated=True)
    assert lowered(norm, x, pending, scale, w).count("@mosaic_gpu_v2") == 1
    if choose_subtree_config(d, contractions[-1], 8, m=m):
        x, w = (jax.ShapeDtypeStruct(s, BF16) for s in ((m, contractions[-1]), (contractions[-1], d)))
        text = lowered(functools.partial(matmul_subtrees, backend="mosaic_gpu"), x, w)
        assert text.count("@mosaic_gpu_v2") == 1


def test_a_ring_that_would_run_dry_gives_way_to_more_parts():
    long = choose_subtree_config(2048, 24576, 8)
    assert long.parts == 4 and long.stages >= 4
    assert choose_subtree_config(2048, 6144, 8).parts == 2
    assert choose_subtree_config(2048, 24576, 8, 2).stages < 4  # where none other was asked for


@pytest.mark.parametrize(("m", "n", "d"), [(3, 208, 640), (1, 16, 128), (8, 4832, 2560)])
def test_narrow_products_lower_for_hopper(monkeypatch, m, n, d):
    """Their stages are small, and many of them would need more barriers than Mosaic makes."""
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    x, w, scale = (jax.ShapeDtypeStruct(s, BF16) for s in ((m, d), (n, d), (d,)))
    norm = functools.partial(norm_matmul, eps=EPS, backend="mosaic_gpu")
    assert lowered(norm, x, x, scale, w).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: norm_matmul(z(9, 128), None, z(128), z(16, 128), eps=EPS, backend="mosaic_gpu"), "8 rows, not 9"),
        (lambda z: norm_matmul(z(1, 144), None, z(144), z(16, 144), eps=EPS, backend="mosaic_gpu"), "multiple of 128"),
        (lambda z: norm_matmul(z(1, 128), None, z(128), z(24, 128), eps=EPS, backend="mosaic_gpu"), "columns, not 24"),
        (lambda z: norm_matmul(z(1, 128), None, z(128), z(16, 128), eps=EPS, backend="triton"), "no backend 'triton'"),
        (lambda z: norm_matmul(z(1, 128), z(2, 128), z(128), z(16, 128), eps=EPS), "must be alike"),
        (lambda z: norm_matmul(z(1, 128), z(2, 1, 128), z(128), z(16, 128), eps=EPS), "must be alike"),
        (
            lambda z: norm_matmul(z(1, 128), jnp.zeros((3, 1, 128)), z(128), z(16, 128), eps=EPS),
            "a power of two",
        ),
        (lambda z: norm_matmul(z(1, 128), None, z(64), z(16, 128), eps=EPS), "scale [D]"),
        (lambda z: norm_matmul(z(1, 128), None, z(128), z(15, 128), eps=EPS, gated=True), "N even if gated"),
        (lambda z: norm_matmul(z(1, 128), None, z(128), z(16, 128), eps=0.0), "eps=0.0 must be positive"),
        (lambda z: norm_matmul(z(1, 120), None, z(120), z(16, 120), eps=EPS), "k=120 cannot be cut"),
        (lambda z: norm_matmul(z(1, 128), None, z(128), z(16, 128).astype(jnp.float32), eps=EPS), "must be the same"),
        (lambda z: matmul_subtrees(z(1, 128), z(64, 16)), "x [..., K] and w [K, N]"),
        (lambda z: matmul_subtrees(z(1, 128), z(128, 16), 4, parts=8), "parts=8 does not cut 4 leaves"),
        (lambda z: matmul_subtrees(z(1, 1024), z(1024, 48), backend="mosaic_gpu"), "for 1 rows, K=1024, N=48"),
        (lambda z: gated(z(8, 8064), z(8064), z(32, 8064), backend="mosaic_gpu"), "64 chunks of 128"),
        (lambda z: gated(z(1, 128), z(128), z(34816, 128), backend="mosaic_gpu"), "up to 12672 gated columns"),
        (lambda z: matmul_subtrees(z(1, 6144), z(6144, 4096), parts=8, backend="mosaic_gpu"), "no tiling for 1 rows"),
        (lambda z: matmul_subtrees(z(8, 9728), z(9728, 2560), backend="mosaic_gpu"), "no tiling for 8 rows, K=9728"),
        (lambda z: matmul_subtrees(z(9, 1024), z(1024, 128), backend="mosaic_gpu"), "1 to 8 rows, not 9"),
        (lambda z: join_subtrees(z(2, 1, 128), BF16), "takes float32"),
        (lambda z: join_subtrees(jnp.zeros((3, 1, 128)), BF16), "a power of two"),
        (lambda z: join_subtrees(jnp.zeros((2, 1, 64)), BF16, backend="mosaic_gpu"), "from 128 on"),
        (lambda z: add_rms_norm(z(1, 128), jnp.zeros((3, 1, 128)), z(128), eps=EPS), "a power of two"),
    ],
)  # fmt: skip
def test_it_refuses(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(lambda *shape: jnp.zeros(shape, BF16))
