"""The Hopper kernel on the CPU: its order and synchronisation in interpret mode, and that it lowers for CUDA.

Bits of a GPU need a GPU: `benchmarks/check_tree_matmul.py` compares those.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import MosaicConfig, choose_config, tree_matmul_mosaic_gpu

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SERIAL = MosaicConfig(split=1, consumers=2, tile_n=64, tile_k=64, stages=2)
SPLITK = dataclasses.replace(SERIAL, split=8, consumers=1)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def operands(m, n, k, dtype=BF16, *, transpose_rhs=False):
    """Normal x [m, k] and w."""
    rng = np.random.default_rng([m, n, k])
    x, w = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    return jnp.asarray(x, dtype), jnp.asarray(w.T if transpose_rhs else w, dtype)


def operands_with_exact_leaves(m, n, k, leaves, *, transpose_rhs=False):
    """x and w whose leaves are exact in fp32 in any order, while the adds between leaves round.

    The interpreter multiplies a stage with NumPy, whose order is its own. Here that cannot show, and what is left to
    show is the tree. Entries are small integers; those of x carry a power of two that is one for each leaf.
    """
    rng = np.random.default_rng([m, n, k, leaves])
    scale = np.exp2(rng.permutation(np.linspace(-12, 12, leaves).round())).repeat(k // leaves)
    x, w = rng.integers(-7, 8, (m, k)) * scale, rng.integers(-7, 8, (k, n))
    return jnp.asarray(x, BF16), jnp.asarray(w.T if transpose_rhs else w, BF16)


def interpreted(x, w, leaves, out_dtype=F32, **kwargs):
    return tree_matmul_mosaic_gpu(x, w, leaves=leaves, out_dtype=out_dtype, interpret=True, **kwargs)


def in_order(x, w, leaves):
    """The order written out: fp32 leaves in ascending k, then neighbours; x [m, k], w [k, n]."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    size = x.shape[1] // leaves
    level = []
    for leaf in range(leaves):
        acc = np.zeros((x.shape[0], w.shape[1]), np.float32)
        for k in range(leaf * size, (leaf + 1) * size):
            acc += x[:, k, None] * w[None, k]
        level.append(acc)
    while len(level) > 1:
        level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def bits(a):
    a = np.asarray(a)
    return a.view(f"uint{8 * a.dtype.itemsize}")


def assert_close(out, x, w, leaves):
    """Within twice what the plain fp32 product loses on these inputs, and one rounding to the output type."""
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    plain = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
    # The plain product is blocked as it likes; on few elements it may be exact, hence an ulp of the largest.
    lost = np.abs(plain - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()
    half_ulp = float(jnp.finfo(out.dtype).eps) / 2 if out.dtype != F32 else 0
    expected = in_order(x, w, leaves).astype(np.float64)
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert out.shape == exact.shape
    assert (error <= 2 * lost + 2 * half_ulp * np.abs(expected)).all(), (error.max(), lost)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("split", [False, True])
def test_multiplies_in_order(leaves, split, transpose_rhs):
    m, n, k = (17, 48, 64 * leaves) if split else (65, 16, 64 * leaves)
    x, w = operands_with_exact_leaves(m, n, k, leaves, transpose_rhs=transpose_rhs)
    config = dataclasses.replace(SPLITK if split else SERIAL, split=leaves if split else 1)
    out = interpreted(x, w, leaves, transpose_rhs=transpose_rhs, config=config)
    expected = in_order(x, w.T if transpose_rhs else w, leaves)
    np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize(
    ("m", "n", "k", "leaves", "dtype", "out_dtype", "transpose_rhs"),
    [
        (1, 16, 64, 1, BF16, BF16, False),
        (1, 144, 512, 8, BF16, BF16, False),
        (66, 144, 128, 2, F16, F16, False),
        (130, 80, 128, 4, BF16, BF16, True),
        (65, 272, 64, 2, F16, F32, True),
        (3, 64, 256, 8, BF16, F16, False),
    ],
)
def test_covers_ragged_shapes_and_every_type(m, n, k, leaves, dtype, out_dtype, transpose_rhs):
    x, w = operands(m, n, k, dtype, transpose_rhs=transpose_rhs)
    out = interpreted(x, w, leaves, out_dtype, transpose_rhs=transpose_rhs)
    assert out.dtype == out_dtype
    assert_close(out, x, w.T if transpose_rhs else w, leaves)


@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize(
    ("consumers", "tile_n", "tile_k", "stages"), [(1, 128, 16, 5), (2, 64, 32, 1), (3, 64, 16, 3)]
)
def test_tiles_stages_and_splits_never_show_in_the_bits(split, consumers, tile_n, tile_k, stages):
    x, w = operands_with_exact_leaves(20, 64, 256, 8)
    config = MosaicConfig(split=split, consumers=consumers, tile_n=tile_n, tile_k=tile_k, stages=stages)
    np.testing.assert_array_equal(bits(interpreted(x, w, 8, config=config)), bits(in_order(x, w, 8)))


@pytest.mark.parametrize("leaves", [2, 4, 8])
def test_ranks_that_hold_half_of_k_meet_in_the_whole_product(leaves):
    x, w = operands(20, 48, 256)
    left, right = (interpreted(x[:, s], w[s], leaves // 2) for s in (slice(0, 128), slice(128, 256)))
    np.testing.assert_array_equal(bits(left + right), bits(interpreted(x, w, leaves)))


def test_another_number_of_leaves_gives_other_bits():
    x, w = operands_with_exact_leaves(20, 48, 256, 8)
    assert (bits(interpreted(x, w, 4)) != bits(interpreted(x, w, 8))).any()


def test_a_row_keeps_its_bits_in_every_batch():
    x, w = operands(66, 48, 64)
    batch = interpreted(x, w, 4, BF16)
    np.testing.assert_array_equal(bits(interpreted(x[5:6], w, 4, BF16)), bits(batch[5:6]))
    np.testing.assert_array_equal(bits(interpreted(x[::-1], w, 4, BF16)), bits(batch[::-1]))


@pytest.mark.parametrize(
    ("m", "n", "k", "leaves"),
    [
        (1, 1024, 2048, 8),
        (64, 4096, 12288, 8),
        (257, 1024, 3072, 4),
        (4096, 4096, 4096, 8),
        (4096, 18992, 1024, 1),
    ],
)
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_lowers_for_hopper(monkeypatch, m, n, k, leaves, transpose_rhs):
    monkeypatch.setattr(mosaic_gpu, "_count_sms", lambda: 132)
    x = jax.ShapeDtypeStruct((m, k), BF16)
    w = jax.ShapeDtypeStruct((n, k) if transpose_rhs else (k, n), BF16)
    product = functools.partial(
        tree_matmul_mosaic_gpu, leaves=leaves, out_dtype=BF16, transpose_rhs=transpose_rhs
    )
    text = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "dot_general" not in text


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 64, 65, 128, 300, 1024, 4096])
def test_choose_config_spreads_the_leaves_where_tiles_are_few(m, leaves):
    config = choose_config(m, 4096, 4096, leaves)
    assert config.stages >= 4
    assert config.rows == (64 if m <= 64 else 128)
    if leaves == 1 or m >= 1024:
        assert config.kind == "serial"
    elif m <= 128:
        assert config.kind == "splitk"


def test_choose_config_narrows_the_tile_to_columns_that_do_not_divide():
    assert choose_config(4096, 18992, 1024, 1).tile_n == 64
    assert choose_config(4096, 18992, 1024, 1, transpose_rhs=True).tile_n == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": 3}, "leaves=3"),
        ({"leaves": 8, "k": 192}, "k=192"),
        ({"n": 40}, "n=40 a multiple of 16"),
        ({"w_k": 128}, "K=64 and w"),
        ({"dtype": F32}, "x is float32"),
        ({"out_dtype": jnp.int32}, "out_dtype=int32"),
        ({"config": dataclasses.replace(SERIAL, split=2)}, "split=2"),
        ({"config": dataclasses.replace(SERIAL, tile_k=48)}, "tile_k=48"),
        ({"config": dataclasses.replace(SERIAL, tile_n=24)}, "24 columns"),
        ({"config": dataclasses.replace(SERIAL, stages=40)}, "stages=40"),
        ({"n": 144, "config": SERIAL, "k": 32}, "tile_k=64"),
        ({"n": 144, "config": dataclasses.replace(SERIAL, tile_n=128)}, "use tile_n=64"),
    ],
)
def test_refuses_what_it_does_not_cover(change, message):
    case = {"m": 8, "n": 32, "k": 64, "leaves": 1, "dtype": BF16, "out_dtype": F32, "config": None} | change
    x = jnp.zeros((case["m"], case["k"]), case["dtype"])
    w = jnp.zeros((case.get("w_k", case["k"]), case["n"]), case["dtype"])
    with pytest.raises(ValueError, match=message):
        interpreted(x, w, case["leaves"], case["out_dtype"], config=case["config"])


def test_refuses_mixed_types_and_a_device_that_is_no_hopper():
    x, w = operands(8, 32, 64)
    with pytest.raises(ValueError, match="w is float16"):
        interpreted(x, w.astype(F16), 1)
    with pytest.raises(ValueError, match="Hopper"):
        tree_matmul_mosaic_gpu(x, w, leaves=1, out_dtype=F32)
