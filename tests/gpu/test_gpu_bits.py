"""Bits on real GPUs: `pytest -m gpu` on one Hopper GPU, `pytest -m multi_gpu` on two or more.

`pytest -m gpu -k triton` is for Ampere and Ada GPUs as well; what needs `mosaic_gpu` to compare with is skipped there.

`benchmarks/check_tree_matmul.py`, `check_model.py` and `matrix.py` check the same at real sizes and keep the results.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tbik_jax
from tbik_jax import SamplingParams, generate, make_mesh, synthetic, tree_matmul
from tbik_jax.mesh import resolve_mesh
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.pallas_kernels import gated_matmul, swiglu_joint, tree_join
from tbik_jax.pallas_kernels.common.backend import device_backend
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import (
    MosaicConfig,
    candidate_configs,
    tree_matmul_mosaic_gpu,
)
from tbik_jax.pallas_kernels.tree_matmul.triton import TritonConfig, choose_config, tree_matmul_triton
from tbik_jax.run import Padded, Run
from tbik_jax.steps import Engine
from tests.helpers import assert_same_bits, cancelling, differing, normal, wide

K, N = 1024, 272
ROWS = (1, 2, 3, 63, 64, 65, 128, 129, 300)


@pytest.fixture(scope="module")
def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        pytest.skip("no GPU here")


@pytest.fixture(scope="module")
def hopper(gpus):
    if device_backend(gpus[0]) != "mosaic_gpu":
        pytest.skip("no Hopper GPU here")


@pytest.fixture(scope="module")
def two_gpus(gpus):
    if len(gpus) < 2:
        pytest.skip("one GPU here")
    return gpus


def _inputs(make, dtype):
    rng = np.random.default_rng(3)
    return jnp.asarray(make(rng, (max(ROWS), K), dtype)), jnp.asarray(normal(rng, (K, N), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_do_not_depend_on_the_batch(gpus, make, dtype):
    if dtype == jnp.float16 and make is wide:
        pytest.skip("2**24 of spread is more than float16 has")
    x, w = _inputs(make, dtype)
    whole = tree_matmul(x, w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
    for m in ROWS:
        part = tree_matmul(x[:m], w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
        assert_same_bits(part, whole[:m])
    stored_nk = tree_matmul(x, w.T, 8, out_dtype=jnp.float32, transpose_rhs=True, backend="mosaic_gpu")
    assert_same_bits(stored_nk, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_joined_give_the_whole_product(gpus, ranks):
    x, w = _inputs(wide, jnp.bfloat16)
    k = K // ranks
    parts = [
        tree_matmul(x[:, i * k : (i + 1) * k], w[i * k : (i + 1) * k], 8 // ranks, out_dtype=jnp.float32)
        for i in range(ranks)
    ]
    whole = tree_matmul(x, w, 8, out_dtype=jnp.float32)
    assert_same_bits(tree_join(parts), whole)
    # twin: another number of leaves is another order
    assert differing(tree_matmul(x, w, 1, out_dtype=jnp.float32), whole) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("tile_n", [64, 128, 160, 192, 256])
@pytest.mark.parametrize("leaves", [1, 2])
def test_many_tiles_a_cta_and_little_depth(hopper, tile_n, leaves):
    """The output stage of one tile must be free before the next one is written: odd numbers of blocks, short loops."""
    rng = np.random.default_rng([5, tile_n])
    x = jnp.asarray(normal(rng, (4100, 128), jnp.bfloat16))
    w = jnp.asarray(normal(rng, (3840, 128), jnp.bfloat16))
    product = functools.partial(tree_matmul_mosaic_gpu, leaves=leaves, transpose_rhs=True)
    config = MosaicConfig(consumers=2, tile_n=tile_n, tile_k=64, stages=2, group=leaves, overlap=False)
    reference = MosaicConfig(consumers=1, tile_n=16, tile_k=16, stages=2)
    for out_dtype in (jnp.float32, jnp.bfloat16):
        expected = product(x, w, out_dtype=out_dtype, config=reference)
        for _ in range(3):  # a race need not show at once
            assert_same_bits(product(x, w, out_dtype=out_dtype, config=config), expected)


#: Rows, columns, depth, leaves and the configuration: the last round has at most a tile for every cluster of two CTAs.
LAST_ROUNDS = (
    (1000, 5120, 4096, 8, MosaicConfig(consumers=2, tile_n=128, tile_k=64, stages=5, group=4, shared=2)),
    (1024, 5104, 1024, 8, MosaicConfig(consumers=2, tile_n=128, tile_k=16, stages=4, group=4)),
    (1000, 5120, 2048, 4, MosaicConfig(consumers=2, tile_n=128, tile_k=64, stages=6, group=4, overlap=False)),
    (500, 5120, 256, 2, MosaicConfig(consumers=2, tile_n=128, tile_k=32, stages=6, group=1, shared=2)),
    (
        300,
        5392,
        256,
        2,
        MosaicConfig(consumers=1, tile_n=64, tile_k=16, boxes=2, stages=3, group=2, overlap=False),
    ),
    (4100, 2624, 1024, 8, MosaicConfig(consumers=2, tile_n=64, tile_k=64, stages=2, group=8, overlap=False)),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "leaves", "config"), LAST_ROUNDS)
@pytest.mark.parametrize("make", [normal, wide, cancelling])
def test_a_last_round_that_is_cut_over_clusters(hopper, make, m, n, k, leaves, config):
    config = dataclasses.replace(config, last_split=2)
    tiles = -(-m // config.rows) * -(-n // config.tile_n)
    assert 0 < config.whole_tiles(tiles, mosaic_gpu._resident_clusters(2)) < tiles
    rng = np.random.default_rng([7, m, n])
    x, w = jnp.asarray(make(rng, (m, k), jnp.bfloat16)), jnp.asarray(normal(rng, (n, k), jnp.bfloat16))
    product = functools.partial(tree_matmul_mosaic_gpu, x, w, transpose_rhs=True)
    reference = MosaicConfig(consumers=1, tile_n=16, tile_k=16, stages=2)
    for out_dtype in (jnp.float32, jnp.bfloat16):
        expected = product(leaves=leaves, out_dtype=out_dtype, config=reference)
        for _ in range(3):  # a race need not show at once
            assert_same_bits(product(leaves=leaves, out_dtype=out_dtype, config=config), expected)
    # twin: half of the leaves are another order
    assert differing(product(leaves=leaves // 2, out_dtype=out_dtype, config=reference), expected) > 0


#: Rows, columns, length of a leaf and leaves of a product whose boxes of 64 end behind their leaf.
RAGGED = ((300, 272, 1008, 8), (4100, 2048, 144, 8), (17, 512, 976, 4), (520, 1024, 18992, 1))


def underflowing(rng, shape, dtype):
    """Products with numbers of size 1 are subnormal in float32, or zeros of either sign."""
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-149, -120, shape).astype(np.float64))).astype(
        dtype
    )


def not_all_finite(rng, shape, dtype):
    x = rng.standard_normal(shape, np.float32)
    x[rng.random(shape) < 1e-4] = np.inf
    x[rng.random(shape) < 1e-4] = -np.inf
    x[rng.random(shape) < 1e-4] = np.nan
    return x.astype(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "leaf", "leaves"), RAGGED)
@pytest.mark.parametrize("make", [normal, wide, underflowing, not_all_finite])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_boxes_that_end_behind_their_leaf(hopper, make, m, n, leaf, leaves, transpose_rhs):
    rng = np.random.default_rng([11, m, n])
    x = jnp.asarray(make(rng, (m, leaf * leaves), jnp.bfloat16))
    w = jnp.asarray(normal(rng, (n, leaf * leaves), jnp.bfloat16))
    product = functools.partial(
        tree_matmul_mosaic_gpu, x, w if transpose_rhs else w.T, leaves=leaves, transpose_rhs=transpose_rhs
    )
    reference = MosaicConfig(consumers=1, tile_n=16, tile_k=16, stages=2)
    expected = product(out_dtype=jnp.float32, config=reference)
    configs = candidate_configs(m, n, leaf * leaves, leaves, transpose_rhs=transpose_rhs)
    ragged = [config for config in configs if leaf % config.depth][:6]
    assert ragged
    for config in ragged:
        for _ in range(3):  # a race need not show at once
            assert_same_bits(product(out_dtype=jnp.float32, config=config), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "leaves"),
    [(4096, 2048, 2048, 8), (144, 272, 1152, 8), (2064, 512, 4096, 1), (528, 96, 1440, 2)],
)
@pytest.mark.parametrize("make", [normal, wide])
def test_x_as_it_lies_transposed(hopper, make, m, n, k, leaves):
    rng = np.random.default_rng([12, m, n])
    x = jnp.asarray(make(rng, (m, k), jnp.bfloat16))
    w = jnp.asarray(normal(rng, (k, n), jnp.bfloat16))
    product = functools.partial(tree_matmul_mosaic_gpu, leaves=leaves, out_dtype=jnp.float32)
    expected = product(x, w)
    configs = candidate_configs(m, n, k, leaves, transpose_lhs=True)
    for config in configs[:8]:
        for _ in range(3):
            assert_same_bits(product(x.T, w, transpose_lhs=True, config=config), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "m", "n", "k", "leaves"),
    [
        (6, 1000, 512, 128, 8),
        (40, 257, 128, 1024, 8),
        (5, 1, 272, 512, 8),
        (3, 130, 640, 640, 8),
        (9, 65, 48, 96, 2),
        (70, 300, 256, 64, 1),
    ],
)
@pytest.mark.parametrize("make", [normal, wide])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_products_in_one_launch(hopper, make, batch, m, n, k, leaves, transpose_rhs):
    """Each has the bits of the one alone, in any tiling."""
    rng = np.random.default_rng([13, batch, m])
    x = jnp.asarray(make(rng, (batch, m, k), jnp.bfloat16))
    w = jnp.asarray(normal(rng, (batch, n, k), jnp.bfloat16))
    w = w if transpose_rhs else jnp.swapaxes(w, 1, 2)
    product = functools.partial(
        tree_matmul_mosaic_gpu, leaves=leaves, out_dtype=jnp.float32, transpose_rhs=transpose_rhs
    )
    expected = jnp.stack([product(x[i], w[i]) for i in range(batch)])
    configs = candidate_configs(m, n, k, leaves, transpose_rhs=transpose_rhs, batch=batch)
    for config in configs[:5]:
        for _ in range(3):
            assert_same_bits(product(x, w, config=config), expected)
    assert differing(product(x[::-1], w), expected) > expected.size // 2


@pytest.mark.gpu
def test_numerics(gpus):
    x, w = _inputs(normal, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    plain = np.abs(np.asarray(jnp.dot(x, w, preferred_element_type=jnp.float32), np.float64) - exact).max()
    ours = np.abs(np.asarray(tree_matmul(x, w, 8, out_dtype=jnp.float32), np.float64) - exact).max()
    assert ours <= 4 * plain


#: (block_m, block_n, block_k, warps, stages) that the choice takes, and others: both MMA instructions of Hopper
TRITON_TILES = (
    (16, 64, 64, 4, 4),
    (32, 64, 32, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 64, 32, 8, 4),
    (128, 128, 64, 8, 3),
    (64, 128, 16, 4, 1),
    (16, 16, 128, 1, 2),
)


@functools.cache
def _triton_configs(leaves, leaf):
    return [
        TritonConfig(split=split, block_m=m, block_n=n, block_k=k, warps=warps, stages=stages)
        for m, n, k, warps, stages in TRITON_TILES
        for split in (1, 2, 4, 8)
        if split <= leaves and leaf % k == 0
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
def test_triton_has_one_set_of_bits(gpus, make, transpose_rhs, leaves):
    x, w = _inputs(make, jnp.bfloat16)
    w = w.T if transpose_rhs else w
    triton = functools.partial(
        tree_matmul_triton, leaves=leaves, out_dtype=jnp.float32, transpose_rhs=transpose_rhs
    )
    whole = triton(x, w)
    for m in ROWS:
        assert_same_bits(triton(x[:m], w), whole[:m])
    for config in _triton_configs(leaves, K // leaves):
        assert_same_bits(triton(x, w, config=config), whole)
    # twin: another number of leaves is another order
    other = triton(x, w, leaves=1 if leaves == 8 else 8)
    assert differing(other, whole) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("m", "n", "k", "leaves", "transpose_rhs"),
    [
        (1, 16, 128, 8, False),  # leaves of one step
        (17, 48, 64, 4, True),
        (5, 4096, 4096, 8, False),
        (64, 2048, 1536, 2, True),
        (300, 272, 1024, 8, False),
        (2048, 4096, 1024, 8, False),
        (1000, 4096, 1024, 4, True),
        (2100, 2064, 512, 2, False),
        (1024, 3072, 2048, 1, True),
    ],
)
def test_triton_has_the_bits_of_mosaic_gpu(hopper, m, n, k, leaves, transpose_rhs, dtype, out_dtype):
    rng = np.random.default_rng([m, n, k])
    w = jnp.asarray(normal(rng, (n, k) if transpose_rhs else (k, n), dtype))
    for make in (normal, cancelling) if dtype == jnp.float16 else (normal, wide, cancelling):
        x = jnp.asarray(make(rng, (m, k), dtype))
        triton, mosaic = (
            tree_matmul(x, w, leaves, out_dtype=out_dtype, transpose_rhs=transpose_rhs, backend=backend)
            for backend in ("triton", "mosaic_gpu")
        )
        assert_same_bits(triton, mosaic)


@pytest.mark.gpu
def test_triton_has_the_bits_of_mosaic_gpu_at_the_edges(hopper):
    """Infinities, NaNs, subnormal operands, products and sums, and sums of nothing but -0.0."""
    rng = np.random.default_rng(7)
    x, w = normal(rng, (130, 256)), normal(rng, (256, 128))
    x[0, 3], x[1, 200], x[2, :2], x[3] = np.inf, np.nan, (np.inf, -np.inf), -0.0
    x[4], x[5], x[6] = x[4] * 2.0**-130, x[5] * 2.0**-100, 2.0**127
    w[:, 0], w[:, 1] = np.abs(w[:, 0]), w[:, 1] * 2.0**-40
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    expected = tree_matmul(x, w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
    assert jnp.isnan(expected).any() and jnp.isinf(expected).any()
    for config in [choose_config(130, 128, 256, 8), *_triton_configs(8, 32)]:
        assert_same_bits(tree_matmul_triton(x, w, leaves=8, out_dtype=jnp.float32, config=config), expected)


@pytest.mark.multi_gpu
def test_generate_on_one_and_two_gpus(two_gpus, tmp_path):
    model = tbik_jax.load(synthetic.write_checkpoint(tmp_path / "model", synthetic.small_config()))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 1024, n) for n in (5, 1, 12)]
    sampling = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9),
    ]
    outs = [
        generate(model, prompts, mesh=make_mesh(**m), max_new_tokens=16, sampling=sampling)
        for m in ({"tp": 1}, {"tp": 2}, {"data": 2}, {"fsdp": 2})
    ]
    for out in outs[1:]:
        assert_same_bits((out.tokens, out.logprobs), (outs[0].tokens, outs[0].logprobs))


@pytest.mark.multi_gpu
def test_halves_in_turns_have_the_bits_of_one_gpu_and_sum_beside_matmuls(two_gpus):
    config = Qwen3Config.from_dict(synthetic.qwen3_config("0.6B") | {"num_hidden_layers": 3})
    model = Qwen3(config, rngs=nnx.Rngs(0))
    rows = [np.random.default_rng(n).integers(0, config.vocab_size, n) for n in (1025, 800)]
    caches = []
    for tp in (1, 2):
        mesh = resolve_mesh(make_mesh(tp=tp))
        run = Run(
            Engine.create(model, mesh, "invariant", overlap_prefill=True), Padded.of(rows, mesh), 1024, config
        )
        run.prepare_prefill(1024)
        run.allocate()
        run.prefill(0, 1024)
        caches.append(run.cache)
        args = (run._engine.parameters, run._shapes, *run._prefill_arguments(0, 1024))
        hlo = run._engine.steps.prefill.lower(*args).compile().as_text()
    assert_same_bits(*caches)
    events = re.findall(r"all-to-all-(start|done)\(|/tree_matmul/", hlo[hlo.index("ENTRY") :])
    assert events.count("start") == events.count("done") == 16
    # Behind a start the other half's product comes before the end is waited for; two at the end have none left.
    assert " ".join(event or "product" for event in events).count("start done") <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("m", "f", "k"), [(1, 1536, 2048), (40, 384, 1024), (300, 3072, 512), (2100, 1040, 256)]
)
def test_the_gated_product_has_the_bits_of_its_parts(hopper, m, f, k, dtype):
    rng = np.random.default_rng([m, f, k])
    x, w = (jnp.asarray(normal(rng, shape, dtype)) for shape in ((m, k), (2 * f, k)))
    two = swiglu_joint(tree_matmul(x, w, 1, transpose_rhs=True))
    assert_same_bits(gated_matmul(x, w), two)
    for rows in (1, 17):
        assert_same_bits(gated_matmul(x[:rows], w), two[:rows])
    assert differing(gated_matmul(x, jnp.roll(w, f, axis=0)), two) > 0  # twin: gates and values exchanged
