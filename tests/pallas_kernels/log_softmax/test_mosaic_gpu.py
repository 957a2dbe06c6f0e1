"""The Hopper kernel of the leaves' statistics on the CPU: interpreted, it has the bits of the reference.

That holds because its arithmetic is the reference's, operation by operation. Bits of a GPU need a GPU:
`tests/gpu/test_tail_bits.py` and `benchmarks/check_tail.py` compare those.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.common.backend import float32_backend, resolve_float32_backend
from tbik_jax.pallas_kernels.log_softmax.api import leaf_statistics
from tbik_jax.pallas_kernels.log_softmax.mosaic_gpu import leaf_statistics_mosaic_gpu
from tbik_jax.pallas_kernels.log_softmax.plan import LANES, SMEM_BYTES, LeafPlan, kernel_refusal
from tbik_jax.pallas_kernels.log_softmax.reference import leaf_statistics_reference
from tests import orders
from tests.helpers import assert_same_bits, differing, mixed, normal

F32 = np.float32
interpreted = functools.partial(leaf_statistics_mosaic_gpu, interpret=True)
reference = jax.jit(leaf_statistics_reference, static_argnames="leaves")


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def logits(rows: int, vocab: int, width: float = 20) -> np.ndarray:
    x = mixed(np.random.default_rng([rows, vocab]), (rows, vocab))
    return x / np.abs(x).max(-1, keepdims=True) * F32(width)


@pytest.mark.parametrize(
    ("rows", "vocab", "leaves"),
    [
        (3, 128, 1),  # one row, nothing to loop over
        (3, 2 * 176, 2),  # a row that ends early
        (1, 8 * 512, 8),  # a power of two
        (2, 2 * 1040, 2),  # the last rows of the table are empty
        (1, 18992, 1),  # Qwen3's leaf: five boxes, and a part of a row
    ],
)
def test_it_has_the_bits_of_the_reference(rows: int, vocab: int, leaves: int) -> None:
    x = logits(rows, vocab)
    out = interpreted(jnp.asarray(x), leaves=leaves)
    assert_same_bits(out, reference(x, leaves=leaves))
    maxima, sums = orders.leaf_sums(x, leaves)
    assert_same_bits((out.maximum, out.total), (maxima, sums))
    assert_same_bits(out.best, x.reshape(rows, leaves, -1).argmax(-1).astype(np.int32))
    assert np.asarray(out.finite).all()


def test_twin_another_order_has_other_bits() -> None:
    x = logits(3, 2 * 400, width=1)
    total = interpreted(jnp.asarray(x), leaves=2).total
    parts = x.reshape(3, 2, -1)
    plain = jax.jit(lambda p: jnp.sum(jnp.exp(p - p.max(-1, keepdims=True)), axis=-1))(parts)
    assert differing(total, plain)
    # Not rolled or reversed: those pair nearly the same elements.
    shuffled = np.random.default_rng(0).permuted(parts, axis=-1)
    assert differing(total, interpreted(jnp.asarray(shuffled.reshape(x.shape)), leaves=2).total)


def test_a_row_alone_and_a_rank_alone_have_the_bits_of_the_whole() -> None:
    x = jnp.asarray(logits(2, 4 * 144))
    whole = interpreted(x, leaves=4)
    assert_same_bits(interpreted(x[1:], leaves=4), tuple(part[1:] for part in whole))
    half = interpreted(x[:, 2 * 144 :].reshape(1, 2, -1), leaves=2)
    assert_same_bits(half, tuple(part[:, 2:].reshape(1, 2, 2) for part in whole))


def test_ties_infinities_and_nans() -> None:
    x = np.array(logits(6, 2 * 144))
    x[0, [7, 140, 143]] = 50  # the lowest index of equal ones
    x[1, 3], x[2, 3], x[3, 200], x[4, 20] = np.inf, -np.inf, np.nan, np.nan
    x[5, :144] = -np.inf  # a leaf of nothing
    out = interpreted(jnp.asarray(x), leaves=2)
    expected = reference(x, leaves=2)
    assert int(out.best[0, 0]) == 7
    assert np.asarray(out.finite).tolist() == [
        [True] * 2,
        *[[False, True]] * 2,
        [True, False],
        *[[False, True]] * 2,
    ]
    assert np.asarray(out.total[5, 0]) == 0
    for row in (0, 2, 5):
        assert_same_bits(tuple(part[row] for part in out), tuple(part[row] for part in expected))
    np.testing.assert_array_equal(out.total, expected.total)  # where there is NaN there is NaN
    np.testing.assert_array_equal(out.maximum, expected.maximum)
    assert_same_bits((out.best, out.finite), (expected.best, expected.finite))


@pytest.mark.parametrize("scale", [0.01, 30, 100])
def test_numerics(scale: float) -> None:
    """Values far below the maximum, whose exponentials are subnormal or nothing, too."""
    x = normal(np.random.default_rng(1), (2, 2 * 528)) * F32(scale)
    parts = x.astype(np.float64).reshape(2, 2, -1)
    exact = np.exp(parts - parts.max(-1, keepdims=True)).sum(-1)
    np.testing.assert_allclose(interpreted(jnp.asarray(x), leaves=2).total, exact, rtol=5e-7)


def test_it_lowers_for_cuda() -> None:
    run = jax.jit(functools.partial(leaf_statistics_mosaic_gpu, leaves=8))
    shape = jax.ShapeDtypeStruct((2, 3, 151936), jnp.float32)
    text = run.trace(shape).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("size", [128, 176, 1024, 1040, 4000, 16032, 18992, 32768])
def test_the_plan_covers_the_leaf(size: int) -> None:
    plan = LeafPlan(size=size)
    assert plan.rows * LANES >= size and plan.lows * plan.full_highs == plan.rows
    assert plan.boxes * plan.box * 16 >= size and plan.box <= 256 and plan.box % 2 == 0
    assert plan.lows * plan.highs * LANES >= size > plan.lows * (plan.highs - 1) * LANES
    assert plan.smem_rows * 16 >= plan.highs * plan.lows * LANES
    assert plan.smem_bytes <= SMEM_BYTES and kernel_refusal(size) is None


@pytest.mark.parametrize(
    ("size", "message"),
    [(127, "at least 128"), (136, "not a multiple of 16"), (65536, "bytes of shared memory")],
)
def test_it_refuses_other_leaves(size: int, message: str) -> None:
    assert message in str(kernel_refusal(size))
    with pytest.raises(ValueError, match=message):
        leaf_statistics(jnp.zeros((1, size)), leaves=1, backend="mosaic_gpu")
    with pytest.raises(ValueError, match=message):
        interpreted(jnp.zeros((1, size)), leaves=1)


def test_the_choice_of_a_backend() -> None:
    assert float32_backend("mosaic_gpu", None) == "mosaic_gpu"
    assert {float32_backend("mosaic_gpu", "why"), float32_backend("triton", None)} == {"reference"}
    assert resolve_float32_backend("op", None, None) == "reference"  # on a CPU
    with pytest.raises(ValueError, match="'triton' is not one of"):
        leaf_statistics(jnp.zeros((1, 128)), leaves=1, backend="triton")
