"""The parts of reinforcement learning: advantages, loss, sampling in groups, the report of what differs."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbik_jax
from tbik_jax import rl
from tbik_jax.rl import loss as rl_loss
from tbik_jax.rl import rollout as rl_rollout
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG, small_model


def test_advantages_are_distances_from_the_groups_mean():
    found = rl.group_advantages(np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0.1] * 4]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], [3**0.5, *[-(3**-0.5)] * 3], rtol=1e-5)
    np.testing.assert_allclose(found[1], [1, 1, -1, -1], rtol=1e-5)
    assert (found[2] == 0).all()  # although the mean of 0.1, 0.1, 0.1, 0.1 may be rounded
    np.testing.assert_allclose(
        rl.group_advantages(np.array([[1, 0, 0, 0]]), normalize=False), [[0.75, *[-0.25] * 3]]
    )


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (np.zeros(4), "rewards of shape (4,) must be [prompts, group_size]"),
        (np.zeros((4, 1)), "groups of at least 2"),
        (np.array([[0, 1], [np.nan, 0]]), "the reward of sample 0 of prompt 1 is nan"),
    ],
)
def test_rewards_that_make_no_advantages_are_refused(rewards, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rl.group_advantages(rewards)


def _loss(train, rollout, advantages, low=0.2, high=0.3):
    def losses(train):
        return rl_loss._clipped_loss(train, jnp.asarray(rollout), jnp.asarray(advantages), low, high)

    value, pullback = jax.vjp(losses, jnp.asarray(train))
    return np.asarray(value), np.asarray(pullback(jnp.ones_like(value))[0])


def test_the_loss_and_its_gradient_are_those_of_float64():
    rng = np.random.default_rng(0)
    rollout = -rng.exponential(1, (16, 15)).astype(np.float32)
    train = (rollout + rng.normal(0, 0.4, rollout.shape)).astype(np.float32)
    gain = rng.standard_normal(rollout.shape).astype(np.float32)
    value, slope = _loss(train, rollout, gain)
    ratio = np.exp(train.astype(np.float64) - rollout)
    free, clipped = ratio * gain, np.clip(ratio, 0.8, 1.3) * gain
    np.testing.assert_allclose(value, -np.minimum(free, clipped), rtol=1e-5)
    np.testing.assert_allclose(slope, np.where(free <= clipped, -free, 0), rtol=1e-5)
    assert 20 < (slope == 0).sum() < 200  # clipped on both sides


def test_on_policy_the_loss_is_the_advantage_exactly():
    logprobs = -np.random.default_rng(1).exponential(1, (8, 15)).astype(np.float32)
    gain = np.random.default_rng(2).standard_normal(logprobs.shape).astype(np.float32)
    value, slope = _loss(logprobs, logprobs, gain)
    assert_same_bits((value, slope), (-gain, -gain))


@pytest.mark.parametrize("options", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}], ids=str)
def test_clipping_needs_a_range(options):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        rl.GrpoLoss(**options)


# ---------------------------------------------------------------------------------------------------------------------


def _rollout(**changes):
    """Two prompts of 3 and 2 tokens, two samples each."""
    ids = [np.array(row, np.int32) for row in ([5, 6, 7], [5, 6, 7], [8, 9], [8, 9])]
    new = [np.array(row, np.int32) for row in ([1, 2], [3], [4, 4, 4], [2, 1])]
    logprobs = [-np.arange(1, len(row) + 1, dtype=np.float32) / (i + 3) for i, row in enumerate(new)]
    values = {"prompts": ids, "tokens": new, "logprobs": logprobs, "group_size": 2, "config": CONFIG}
    return rl.Rollout(**values | {"dtype": "bfloat16"} | changes)


ADVANTAGES = np.array([[1, -1], [0.5, -0.5]], np.float32)


def test_a_batch_holds_every_token_in_its_place():
    rollout = _rollout()
    batch = rollout.batch(small_model(), ADVANTAGES)
    assert batch["tokens"].shape == (4, 16) and batch["weights"].shape == (4, 15)
    assert batch["tokens"][0].tolist() == [5, 6, 7, 1, 2] + [0] * 11
    assert np.argwhere(batch["weights"][0]).ravel().tolist() == [2, 3]  # what predicts positions 3 and 4
    assert np.argwhere(batch["weights"][2]).ravel().tolist() == [1, 2, 3]
    for row, logprobs in zip(range(4), rollout.logprobs, strict=True):
        assert_same_bits(batch["rollout_logprobs"][row][batch["weights"][row] > 0], logprobs)
    assert batch["advantages"].tolist() == [1, -1, 0.5, -0.5]
    assert rollout.rewards(lambda prompt, tokens: prompt[0] + len(tokens)).tolist() == [[7, 6], [11, 10]]
    assert rollout.entropy == pytest.approx(-np.concatenate(rollout.logprobs).mean())


@pytest.mark.parametrize(
    ("rollout", "options", "message"),
    [
        (
            _rollout(dtype="float32"),
            {},
            "the rollout ran in float32 and the trainer's parameters are bfloat16",
        ),
        (
            _rollout(config=dataclasses.replace(CONFIG, rope_theta=1e4)),
            {},
            "the rollout's model and the trainer's differ in their config: rope_theta",
        ),
        (_rollout(), {"advantages": np.zeros(4, np.float32)}, "advantages of shape (4,) must be [2, 2]"),
        (_rollout(), {"width": 4}, "a sample of 5 tokens does not fit width=4; use 16"),
        (
            _rollout(),
            {"advantages": np.array([[1, -1], [np.nan, 0]], np.float32)},
            "the advantage of prompt 1, sample 0 is nan",
        ),
    ],
)
def test_what_cannot_be_trained_on_policy_is_refused(rollout, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rollout.batch(small_model(), **{"advantages": ADVANTAGES} | options)


@pytest.mark.parametrize(("longest", "width"), [(16, 16), (17, 32), (24, 32), (25, 32), (33, 48)])
def test_the_width_of_a_batch_cuts_into_leaves_for_eight_rows(longest, width):
    """24 is a bucket, and 8 rows of 24 tokens are no eight leaves of a multiple of 16."""
    tokens = [np.ones(longest - 3, np.int32), *_rollout().tokens[1:]]
    logprobs = [np.zeros(len(row), np.float32) for row in tokens]
    batch = _rollout(tokens=tokens, logprobs=logprobs).batch(small_model(), ADVANTAGES)
    assert batch["tokens"].shape == (4, width) and 8 * width % (8 * 16) == 0


@pytest.mark.parametrize("cause", ["the same", "prompt", "numerics", "kept mass"])
def test_what_breaks_the_guarantee_is_seen(cause):
    """Of the causes in docs/rl.md those that only the bits can show."""
    model, mesh = small_model(), tbik_jax.make_mesh(tp=4)
    prompts, new = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]], [[1, 2], [3], [4, 4, 4], [2, 1]]

    def logprobs(before=(), numerics="invariant"):
        rows = [[*before, *p, *t] for p, t in zip(prompts, new, strict=True)]
        found = tbik_jax.score(model, rows, mesh=mesh, numerics=numerics)
        return [row[-len(t) :] for row, t in zip(found, new, strict=True)]

    rollout = logprobs(
        before=(9,) if cause == "prompt" else (), numerics="plain" if cause == "numerics" else "invariant"
    )
    if cause == "kept mass":
        rollout = [row - np.float32(np.log(0.9)) for row in rollout]
    batch = _rollout(logprobs=rollout).batch(model, ADVANTAGES)
    train = np.zeros_like(batch["rollout_logprobs"])
    train[batch["weights"] > 0] = np.concatenate(logprobs())
    report = rl.divergence(batch, train)
    if cause == "the same":
        report.check()
        return
    with pytest.raises(rl.DivergenceError, match="sampled tokens have another log-probability"):
        report.check()


@pytest.fixture
def asked(monkeypatch):
    """The arguments of the `generate` that a call of `sample_groups` makes."""
    calls = []

    def generate(params, prompts, **options):
        calls.append({"prompts": prompts} | options)
        return tbik_jax.GenerateOutput(
            [np.zeros(1, np.int32)] * len(prompts), [np.zeros(1, np.float32)] * len(prompts)
        )

    monkeypatch.setattr(rl_rollout, "generate", generate)
    return calls


def test_what_generate_offers_for_speed_and_memory_reaches_it(asked):
    options = {"prefill_chunk": 64, "scan_layers": False, "overlap_prefill": True, "max_new_tokens": 3}
    rl.sample_groups(small_model(), [[1]], group_size=2, **options)
    rl.sample_groups(small_model(), [[1]], group_size=2)
    assert asked[0].items() >= options.items()
    assert not asked[1].items() & options.items()  # the twin: none is fixed


def test_every_sample_of_every_step_has_a_seed_of_its_own(asked):
    params = small_model()
    for seed, step in ((0, 0), (0, 1), (1, 0), (2**32, 0), (0, 0)):
        sampling = tbik_jax.SamplingParams(temperature=1.0, seed=seed)
        rl.sample_groups(params, [[1], [2], [3]], group_size=4, sampling=sampling, step=step)
    seeds = [[each.seed for each in call["sampling"]] for call in asked]
    assert seeds[0] == seeds[4]
    assert len({seed for each in seeds[:4] for seed in each}) == 4 * 12
    assert [prompt.tolist() for prompt in asked[0]["prompts"]] == [[1]] * 4 + [[2]] * 4 + [[3]] * 4


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}],
    ids=str,
)
def test_sampling_from_another_distribution_warns(asked, options):
    with pytest.warns(rl.OffPolicyWarning, match="the ratio stays 1 and the gradient is biased"):
        rl.sample_groups(small_model(), [[1]], group_size=2, sampling=tbik_jax.SamplingParams(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.sample_groups(small_model(), [[1]], group_size=2)
        everything = tbik_jax.SamplingParams(temperature=1.0, top_p=1.0)
        rl.sample_groups(small_model(), [[1]], group_size=2, sampling=everything)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size=1 must be at least 2"),
        (
            {"group_size": 2, "sampling": tbik_jax.SamplingParams()},
            "temperature=0 makes all samples of a group equal",
        ),
    ],
)
def test_groups_without_a_difference_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl.sample_groups(small_model(), [[1]], **options)


# ---------------------------------------------------------------------------------------------------------------------


def test_equal_bits_are_zeros_and_ones():
    batch = _rollout().batch(small_model(), ADVANTAGES)
    train = np.where(
        batch["weights"] > 0, batch["rollout_logprobs"], np.float32(-7)
    )  # prompts and padding do not count
    report = rl.divergence(batch, train)
    assert dataclasses.astuple(report) == (8, 0, 0.0, 1.0, 1.0, 0.0, None)
    report.check()


def test_one_bit_is_found_and_named():
    batch = _rollout().batch(small_model(), ADVANTAGES)
    train = batch["rollout_logprobs"].copy()
    train[2, 3] = np.nextafter(train[2, 3], np.float32(0))
    report = rl.divergence(batch, train)
    assert report.different == 1 and 0 < report.max_abs < 1e-6 and 1 < report.max_ratio < 1 + 1e-6
    assert 0 < report.kl < 1e-12 and report.min_ratio == 1
    values = f"rollout {float(batch['rollout_logprobs'][2, 3])!r}, trainer {float(train[2, 3])!r}"
    with pytest.raises(rl.DivergenceError, match=re.escape("sequence 2 at position 4 (token 4): " + values)):
        report.check()


@pytest.mark.parametrize("value", [-0.0, np.nan])
def test_bits_count_and_not_values(value):
    batch = _rollout().batch(small_model(), ADVANTAGES)
    batch["rollout_logprobs"][0, 2] = 0.0
    train = batch["rollout_logprobs"].copy()
    train[0, 2] = value
    with pytest.raises(rl.DivergenceError, match="1 of 8 sampled tokens"):
        rl.divergence(batch, train).check()


def test_the_divergence_is_the_estimate_of_the_kl():
    batch = _rollout().batch(small_model(), ADVANTAGES)
    shift = np.random.default_rng(0).normal(0, 0.1, batch["rollout_logprobs"].shape).astype(np.float32)
    report = rl.divergence(batch, batch["rollout_logprobs"] + shift)
    sampled = shift[batch["weights"] > 0].astype(np.float64)
    assert report.kl == pytest.approx((np.exp(sampled) - 1 - sampled).mean(), rel=1e-4)
    assert report.max_abs == pytest.approx(np.abs(sampled).max(), rel=1e-4)
    assert (report.min_ratio, report.max_ratio) == pytest.approx(
        tuple(np.exp([sampled.min(), sampled.max()])), rel=1e-4
    )


def test_only_comparable_arrays_are_compared():
    batch = _rollout().batch(small_model(), ADVANTAGES)
    with pytest.raises(
        ValueError, match=re.escape("train_logprobs are float32 (4, 16); they must be float32 (4, 15)")
    ):
        rl.divergence(batch, np.zeros((4, 16), np.float32))
    wide = dict(batch, rollout_logprobs=batch["rollout_logprobs"].astype(np.float64))
    with pytest.raises(ValueError, match="rollout_logprobs are float64"):
        rl.divergence(wide, batch["rollout_logprobs"])
    with pytest.raises(ValueError, match="no sampled token"):
        rl.divergence(dict(batch, weights=np.zeros((4, 15), np.float32)), batch["rollout_logprobs"])
