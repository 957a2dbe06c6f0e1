"""The Hopper sampling kernel on the CPU: interpreted, it draws what the reference draws, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels.sampling.api import sample_argmax
from tbik_jax.pallas_kernels.sampling.mosaic_gpu import sample_argmax_mosaic_gpu
from tbik_jax.pallas_kernels.sampling.reference import sample_argmax_reference
from tests.helpers import assert_same_bits, normal

F32 = np.float32
ROWS = 4
reference = jax.jit(sample_argmax_reference)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def operands(vocab: int, *, width: float = 2, seed: int = 0):
    """Logits, their maxima, temperatures (one row is greedy), keys and positions of `ROWS` rows."""
    rng = np.random.default_rng([vocab, seed])
    logits = normal(rng, (ROWS, vocab)) * F32(width)
    key = rng.integers(0, 2**32, (ROWS, 2), dtype=np.uint32)
    temperature = np.asarray([1, 0, 0.7, 30], F32)
    positions = np.asarray([0, 5, 4095, 2**31 - 1], np.int32)
    arrays = (logits, logits.max(-1), temperature, key, positions)
    return tuple(jnp.asarray(x) for x in arrays)


def interpreted(*arrays, offset=0, **kwargs):
    return sample_argmax_mosaic_gpu(*arrays, jnp.int32(offset), interpret=True, **kwargs)


@pytest.mark.parametrize(
    ("vocab", "parts", "offset"),
    [(128, 1, 0), (300, 2, 0), (512, 3, 151000), (1000, 2, 7), (5000, 4, 0)],
)
def test_it_draws_what_the_reference_draws(vocab: int, parts: int, offset: int) -> None:
    for seed in range(3):
        arrays = operands(vocab, seed=seed)
        drawn = interpreted(*arrays, offset=offset, parts=parts)
        assert_same_bits(drawn, reference(*arrays, jnp.int32(offset)))
        assert int(drawn.token[1]) == offset and drawn.value[1] == -np.inf  # not drawn


def test_how_the_row_is_cut_up_does_not_show() -> None:
    arrays = operands(3000)
    whole = interpreted(*arrays, parts=1)
    for parts in (2, 6):
        assert_same_bits(interpreted(*arrays, parts=parts), whole)
    # twin: other noise, other tokens
    other = interpreted(*arrays[:4], arrays[4] - 1, parts=1)
    assert (np.asarray(other.token)[[2, 3]] != np.asarray(whole.token)[[2, 3]]).all()


def test_ranks_combine_to_the_whole() -> None:
    logits, row_max, *rest = operands(1200, width=0.5)
    whole = interpreted(logits, row_max, *rest)
    parts = [
        interpreted(logits[:, start : start + 300], row_max, *rest, offset=start)
        for start in range(0, 1200, 300)
    ]
    values = np.stack([part.value for part in parts])
    for row in (0, 2, 3):
        best = parts[values[:, row].argmax()]
        assert_same_bits(tuple(x[row] for x in best), tuple(x[row] for x in whole))


def test_ties_go_to_the_lowest_id() -> None:
    """At a tiny temperature the noise is lost beside the distance, but not for equal logits: make noise equal too."""
    logits, _, temperature, key, positions = operands(1000)
    logits = logits.at[:].set(-1e30).at[:, 300].set(0).at[:, 700].set(0)
    drawn = interpreted(logits, logits.max(-1), temperature, key, positions, parts=2)
    expected = reference(logits, logits.max(-1), temperature, key, positions, jnp.int32(0))
    assert_same_bits(drawn, expected)
    assert set(np.asarray(drawn.token)[[0, 2, 3]]) <= {300, 700}


def test_greedy_rows_that_hold_nan_are_no_error_and_hot_ones_give_a_token_of_the_vocabulary() -> None:
    logits, _, temperature, key, positions = operands(300)
    logits = logits.at[0, 5].set(jnp.nan)
    row_max = logits.max(-1)
    drawn = interpreted(logits, row_max, temperature, key, positions)
    tokens = np.asarray(drawn.token)
    assert ((tokens >= 0) & (tokens < 300)).all()
    clean = reference(logits, row_max, temperature, key, positions, jnp.int32(0))
    assert_same_bits(tuple(x[1:] for x in drawn), tuple(x[1:] for x in clean))


def test_it_lowers_for_cuda() -> None:
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((8, 75968), jnp.float32),
            ((8,), jnp.float32),
            ((8,), jnp.float32),
            ((8, 2), jnp.uint32),
            ((8,), jnp.int32),
            ((), jnp.int32),
        )
    ]
    text = jax.jit(sample_argmax_mosaic_gpu).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_it_refuses() -> None:
    arrays = operands(64)
    with pytest.raises(ValueError, match="64 columns of logits are less than 128"):
        sample_argmax(*arrays, backend="mosaic_gpu")
    with pytest.raises(ValueError, match=r"row_max is float32 \(3,\)"):
        sample_argmax(arrays[0], arrays[1][:3], *arrays[2:])
    with pytest.raises(ValueError, match="key is int32"):
        sample_argmax(*arrays[:3], arrays[3].astype(jnp.int32), arrays[4])


def test_a_gradient_is_refused() -> None:
    logits, *rest = operands(64)
    with pytest.raises(ValueError, match="sample_argmax has no gradient"):
        jax.grad(lambda x: sample_argmax(x, *rest).value.sum())(logits)


def test_the_api_takes_the_reference_on_a_cpu() -> None:
    arrays = operands(200)
    run = jax.jit(functools.partial(sample_argmax, offset=3))
    assert_same_bits(run(*arrays), reference(*arrays, jnp.int32(3)))
