"""Sampling: greedy is the argmax, noise is a function of (seed, position, id), filters keep what they say."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax.sampling import SamplingArrays, SamplingParams, gumbel_noise, sample, sampling_arrays
from tests import orders
from tests.helpers import assert_same_bits, normal

F32 = np.float32
VOCAB = 64
ROWS = 100  # of most calls, so that they share a compiled program
run = jax.jit(sample, static_argnames="filtered")
noise_of = jax.jit(gumbel_noise, static_argnums=2)


def arrays(params: list[SamplingParams], vocab: int = VOCAB) -> SamplingArrays:
    return sampling_arrays(params, vocab)


def keys(seeds: list[int]) -> np.ndarray:
    return arrays([SamplingParams(seed=seed) for seed in seeds]).key


def draw(
    logits: np.ndarray, positions: Any, params: list[SamplingParams], filtered: bool | None = None
) -> np.ndarray:
    filtered = any(p.filters for p in params) if filtered is None else filtered
    chosen = run(logits, np.asarray(positions, np.int32), arrays(params, logits.shape[1]), filtered=filtered)
    assert chosen.dtype == np.int32
    return np.asarray(chosen)


def some_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return normal(np.random.default_rng(seed), (rows, vocab)) * F32(2)


# --- the noise, restated -----------------------------------------------------------------------------------


def threefry(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011): words [..., 2] of key and counter -> words [..., 2]."""
    key, counter = np.broadcast_arrays(key.astype(np.uint32), counter.astype(np.uint32))
    schedule = [key[..., 0], key[..., 1], key[..., 0] ^ key[..., 1] ^ np.uint32(0x1BD11BDA)]
    x, y = counter[..., 0] + schedule[0], counter[..., 1] + schedule[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return np.stack([x, y], axis=-1)


def fold(key: np.ndarray, data: np.ndarray) -> np.ndarray:
    """A key with an integer folded in: the encryption of (0, integer)."""
    with np.errstate(over="ignore"):  # scalars warn where arrays wrap around
        return threefry(key, np.stack([np.zeros_like(data), data], axis=-1))


def stated_noise(seed: int, position: int, vocab: int) -> np.ndarray:
    key = np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    words = fold(fold(key, np.uint32(position)), np.arange(vocab, dtype=np.uint32))[:, 0]
    uniform = ((words >> np.uint32(9)).astype(F32) + F32(0.5)) * F32(2.0**-23)
    return -orders.log(-orders.log(uniform))


def test_threefry_has_the_published_test_vector() -> None:
    ones = np.full(2, 0xFFFFFFFF, np.uint32)
    assert [hex(word) for word in threefry(ones[None], ones)[0]] == ["0x1cb996fc", "0xbb002be7"]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
def test_noise_is_threefry_of_seed_position_and_id(seed: int) -> None:
    positions = [0, 1, 4095, 2**31 - 1]
    noise = noise_of(keys([seed] * 4), np.asarray(positions, np.int32), VOCAB)
    assert_same_bits(noise, np.stack([stated_noise(seed, position, VOCAB) for position in positions]))


def test_noise_does_not_depend_on_the_batch_or_the_vocabulary() -> None:
    seeds, positions = list(range(10, 17)), np.arange(7, dtype=np.int32) * 100
    whole = np.asarray(noise_of(keys(seeds), positions, VOCAB))
    order = np.asarray([5, 2, 0, 6, 1, 4, 3])
    assert_same_bits(noise_of(keys([seeds[i] for i in order]), positions[order], VOCAB), whole[order])
    for rows in (slice(1), slice(3, 5), slice(6, 7)):
        assert_same_bits(noise_of(keys(seeds[rows]), positions[rows], VOCAB), whole[rows])
    assert_same_bits(noise_of(keys(seeds), positions, 37), whole[:, :37])
    assert_same_bits(gumbel_noise(keys(seeds), positions, VOCAB), whole)


def test_noise_of_another_seed_position_or_id_is_other_noise() -> None:
    base = [(5, 7), (6, 7), (5, 8), (7, 5), (5 + 2**32, 7)]
    noise = np.asarray(
        noise_of(keys([s for s, _ in base]), np.asarray([p for _, p in base], np.int32), VOCAB)
    )
    assert len(np.unique(noise)) == noise.size


def test_noise_is_gumbel_distributed_and_finite() -> None:
    noise = np.sort(noise_of(keys([0] * 500), np.arange(500, dtype=np.int32), VOCAB).ravel())
    assert np.isfinite(noise).all() and noise[0] > -3 and noise[-1] < 17
    expected = np.exp(-np.exp(-noise.astype(np.float64)))
    observed = (np.arange(noise.size) + 0.5) / noise.size
    assert np.abs(observed - expected).max() < 1.63 / np.sqrt(noise.size)  # Kolmogorov-Smirnov, 1 %


# --- greedy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [False, True])
def test_greedy_is_the_argmax(filtered: bool) -> None:
    logits = some_logits(ROWS)
    params = [SamplingParams(seed=i, top_k=1 + i % 3) for i in range(ROWS)]
    assert not any(p.filters for p in params)  # nothing to filter at temperature 0
    assert_same_bits(draw(logits, range(ROWS), params, filtered), logits.argmax(-1).astype(np.int32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties_go_to_the_lowest_id(temperature: float) -> None:
    logits = np.zeros((ROWS, VOCAB), F32)
    logits[1, [7, 50]] = 3
    logits[2, :] = -0.0
    logits[2, 40:] = 0.0  # zeros of both signs tie
    params = [SamplingParams(temperature=temperature, top_k=1)] * ROWS
    assert draw(logits, range(ROWS), params, filtered=True).tolist() == [0, 7] + [0] * (ROWS - 2)


# --- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_near_ties_are_decided_by_two_rounded_steps(temperature: float, filtered: bool) -> None:
    """All tokens end up within two ulps, so another rounding of the quotient or the sum chooses others."""
    rows, divisor = ROWS, F32(temperature)
    noise = np.stack([stated_noise(3, position, VOCAB) for position in range(rows)])
    spread = np.random.default_rng(0).uniform(-1, 1, noise.shape) * np.spacing(F32(20))
    logits = ((20 - noise.astype(np.float64) + spread) * temperature).astype(F32)
    chosen = draw(logits, range(rows), [SamplingParams(temperature=temperature, seed=3)] * rows, filtered)
    relative = logits - logits.max(-1, keepdims=True)
    assert_same_bits(chosen, (relative / divisor + noise).argmax(-1).astype(np.int32))

    fused = (relative / np.float64(divisor) + noise).astype(F32)
    product = relative * (F32(1) / divisor) + noise
    assert (chosen != fused.argmax(-1)).any() and (chosen != product.argmax(-1)).any()  # so the test can fail


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, positions = some_logits(9), np.arange(9) * 11
    params = [
        SamplingParams(temperature=t, seed=i, top_k=k, top_p=p)
        for i, (t, k, p) in enumerate(
            zip([0, 0.5, 2] * 3, [None] * 6 + [5] * 3, [None] * 3 + [0.8] * 6, strict=True)
        )
    ]
    whole = draw(logits, positions, params)
    order = np.random.default_rng(0).permutation(9)
    assert_same_bits(draw(logits[order], positions[order], [params[i] for i in order]), whole[order])
    for i in range(9):
        assert draw(logits[i : i + 1], positions[i : i + 1], [params[i]]).tolist() == [whole[i]]
        assert draw(logits[i : i + 1], positions[i : i + 1], [params[i]], filtered=True).tolist() == [
            whole[i]
        ]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float, vary: str) -> None:
    logits = np.asarray([1.5, 0.0, -1.0, 0.7, 2.0, -0.3, 0.2, 1.0], F32)
    count = 4000
    positions = np.arange(count) if vary == "position" else np.full(count, 9)
    seeds = np.full(count, 1) if vary == "position" else np.arange(count)
    params = [SamplingParams(temperature=temperature, seed=int(seed)) for seed in seeds]
    chosen = draw(np.tile(logits, (count, 1)), positions, params)
    weights = np.exp(logits.astype(np.float64) / temperature)
    statistic = chi_square(np.bincount(chosen, minlength=8), weights / weights.sum())
    assert statistic < 24.3  # 7 degrees of freedom, 0.1 %
    other = np.exp(logits.astype(np.float64) / temperature * 1.3)
    assert chi_square(np.bincount(chosen, minlength=8), other / other.sum()) > 24.3  # so the test can fail


# --- filters -----------------------------------------------------------------------------------------------


def stated_kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ids that top_k and then top_p keep, in float64."""
    order = np.argsort(-logits, kind="stable")[: params.top_k]
    weights = np.exp(logits[order].astype(np.float64) / params.temperature)
    before = np.cumsum(weights) - weights
    return order[before < (params.top_p or 2) * weights.sum()]


FILTERS = [(None, 0.5), (None, 0.95), (5, None), (1, None), (10, 0.7), (VOCAB, 0.3), (10**9, None), (20, 1.0)]


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filters_keep_what_they_say(top_k: int | None, top_p: float | None) -> None:
    """The choice is the noisiest of the kept tokens, at many positions."""
    logits = some_logits(ROWS)
    params = [SamplingParams(temperature=1.3, top_k=top_k, top_p=top_p, seed=i) for i in range(ROWS)]
    expected = []
    for i, row in enumerate(logits):
        kept = np.sort(stated_kept(row, params[i]))
        noisy = row / F32(1.3) + stated_noise(i, i, VOCAB)
        expected.append(kept[noisy[kept].argmax()])
    assert draw(logits, range(ROWS), params).tolist() == expected


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_filtered_choice_is_a_kept_token(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    """A little more probability than asked, since float32 and float64 may disagree at the edge."""
    logits = some_logits(ROWS, seed=seed % 1000)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    slack = SamplingParams(temperature=temperature, top_k=top_k, top_p=min(1, (top_p or 1) + 1e-5))
    chosen = draw(logits, range(ROWS), [params] * ROWS, filtered=True)
    assert all(token in stated_kept(row, slack) for token, row in zip(chosen, logits, strict=True))


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    logits = some_logits(ROWS)
    greedy = logits.argmax(-1).astype(np.int32)
    for change in ({"top_k": 1}, {"top_p": 1e-30}, {"top_p": 1e-60}, {"top_k": 1, "top_p": 0.5}):
        params = [SamplingParams(temperature=3.0, seed=i, **change) for i in range(ROWS)]
        assert_same_bits(draw(logits, range(ROWS), params), greedy)


def test_top_k_ranks_equal_logits_by_id() -> None:
    logits = np.zeros((ROWS, VOCAB), F32)
    params = [SamplingParams(temperature=1.0, top_k=3, seed=i) for i in range(ROWS)]
    assert set(draw(logits, range(ROWS), params)) == {0, 1, 2}


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = np.full((ROWS, VOCAB), -1e30, F32)
    logits[:, :4] = np.log(np.asarray([0.5, 0.25, 0.125, 0.125], F32))
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        params = [SamplingParams(temperature=1.0, top_p=top_p, seed=i) for i in range(ROWS)]
        assert set(draw(logits, range(ROWS), params)) == kept


def test_filters_that_keep_all_change_nothing() -> None:
    logits = some_logits(ROWS)
    plain = [SamplingParams(temperature=1.0, seed=i) for i in range(ROWS)]
    for change in ({"top_k": VOCAB}, {"top_k": 10**6, "top_p": 1.0}):
        assert SamplingParams(temperature=1.0, **change).filters  # the twin: the sort runs
        params = [SamplingParams(temperature=1.0, seed=i, **change) for i in range(ROWS)]
        assert_same_bits(draw(logits, range(ROWS), params), draw(logits, range(ROWS), plain))


@pytest.mark.parametrize("temperature", [1e-20, 1e-6, 1e20])
def test_extreme_temperatures(temperature: float) -> None:
    logits = some_logits(ROWS) * F32(1e4)
    params = [SamplingParams(temperature=temperature, seed=i) for i in range(ROWS)]
    chosen = draw(logits, range(ROWS), params)
    if temperature < 1:
        assert_same_bits(chosen, logits.argmax(-1).astype(np.int32))
    else:
        assert len(set(chosen)) > 10


# --- parameters --------------------------------------------------------------------------------------------


def test_arrays_hold_one_row_a_prompt() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=np.float32(0.5), top_k=7, top_p=0.5, seed=2**64 - 1),
    ]
    rows = arrays(params, 1000)
    assert_same_bits(rows.temperature, np.asarray([0, 0.5], F32))
    assert_same_bits(rows.top_k, np.asarray([1000, 7], np.int32))
    assert_same_bits(rows.top_p, np.asarray([2, 0.5], F32))
    assert_same_bits(rows.key, np.asarray([[0, 0], [0xFFFFFFFF, 0xFFFFFFFF]], np.uint32))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rows))
    assert jax.tree.structure(jax.tree.map(jnp.asarray, rows)) == jax.tree.structure(rows)


@pytest.mark.parametrize(
    ("params", "filters"),
    [
        ({}, False),
        ({"temperature": 1.0}, False),
        ({"top_k": 3}, False),
        ({"temperature": 1.0, "top_k": 3}, True),
        ({"temperature": 1.0, "top_p": 0.5}, True),
        ({"temperature": 1.0, "top_p": 1.0}, False),
    ],
)
def test_only_sampling_filters(params: dict[str, Any], filters: bool) -> None:
    assert SamplingParams(**params).filters == filters


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf"), 1e-30, 1e300, "1", None, True])
def test_other_temperatures_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"temperature={value} must be 0 (greedy) or from")):
        SamplingParams(temperature=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "3", True])
def test_other_top_k_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"top_k={value} must be a whole number of at least 1, or None"):
        SamplingParams(top_k=value)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), "0.5", True])
def test_other_top_p_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"top_p={value} must be in \(0, 1\], or None"):
        SamplingParams(top_p=value)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "7", None, True])
def test_other_seeds_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"seed={value} must be a whole number in 0 .. 2\*\*64 - 1"):
        SamplingParams(seed=value)


def test_numbers_of_numpy_and_unknown_names() -> None:
    assert SamplingParams(
        temperature=np.int64(1), top_k=np.int32(3), top_p=np.float64(0.5), seed=np.uint64(2**63)
    )
    with pytest.raises(TypeError):
        SamplingParams(topk=3)
    with pytest.raises(TypeError):
        SamplingParams(0.5)


def test_a_tiny_temperature_on_huge_logits_takes_the_largest() -> None:
    logits = np.random.default_rng(4).standard_normal((ROWS, VOCAB)).astype(F32) * F32(1e20)
    for top_k in (None, 3):
        params = [SamplingParams(temperature=1e-20, top_k=top_k, seed=1)] * ROWS
        assert_same_bits(
            draw(logits, range(ROWS), params, top_k is not None), logits.argmax(-1).astype(np.int32)
        )
