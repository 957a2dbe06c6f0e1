"""What reinforcement learning needs beside a training loop: group sampling, GRPO's loss, hand-over, divergence.

With invariant numerics the rollout's log-probabilities and the trainer's are the same bits, on whatever meshes the two
run, so that the importance ratio of a step's first update is 1 and the KL divergence 0: exactly, without a correction.
`divergence` measures it on every token, from the log-probabilities of the train step's own forward pass.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from .buckets import bucket
from .generation import NumericsName, TokenIds, generate
from .loading import parameter_shardings
from .mesh import resolve_mesh
from .models.qwen3 import Qwen3, Qwen3Config
from .pallas_kernels.common.rounding import exp, mul
from .reshard import reshard
from .sampling import SamplingParams
from .training import Losses, TrainingModel


class OffPolicyWarning(UserWarning):
    """Tokens are sampled from another distribution than the one whose log-probabilities are compared."""


class DivergenceError(RuntimeError):
    """The trainer's log-probability of a sampled token has other bits than the rollout's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Groups of samples; sample i of prompt p is entry p * group_size + i of the lists.

    Attributes:
        prompts: int32 arrays, a sample's prompt.
        tokens: int32 arrays, a sample's new tokens, an end token included.
        logprobs: float32 arrays, their log-probabilities under the untempered, unfiltered distribution.
        group_size: samples of a prompt.
        config: of the model that they are from.
        dtype: of that model, by name.
    """

    prompts: list[np.ndarray]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    group_size: int
    config: Qwen3Config
    dtype: str

    @property
    def entropy(self) -> float:
        """An estimate of the policy's entropy a token, in nats: the mean of -log p over the sampled tokens."""
        return -float(np.concatenate(self.logprobs).astype(np.float64).mean())

    def rewards(self, reward: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
        """reward(prompt, new tokens) of every sample, float64 [prompts, group_size]."""
        each = [reward(prompt, tokens) for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]
        return np.asarray(each, np.float64).reshape(-1, self.group_size)

    def batch(
        self, trainer: Qwen3, advantages: np.ndarray, *, width: int | None = None
    ) -> dict[str, np.ndarray]:
        """The samples as a batch for `GrpoLoss`.

        Args:
            trainer: the model that will be trained on them.
            advantages: float32 [prompts, group_size].
            width: tokens T of a row; by default the longest sample's, rounded up to a bucket.

        Returns:
            B = prompts * group_size rows: tokens int32 [B, T], padded with 0; weights float32 [B, T - 1], 1 where the
            next token was sampled; rollout_logprobs float32 [B, T - 1], 0 elsewhere; advantages float32 [B].

        Raises:
            ValueError: the trainer's dtype or config is not the rollout's; advantages of another shape; a sample is
                longer than `width`.
        """
        _check_trainer(trainer, self)
        if np.shape(advantages) != (len(self.tokens) // self.group_size, self.group_size):
            groups = len(self.tokens) // self.group_size
            raise ValueError(
                f"advantages of shape {np.shape(advantages)} must be [{groups}, {self.group_size}], one a sample"
            )
        longest = max(len(p) + len(t) for p, t in zip(self.prompts, self.tokens, strict=True))
        width = bucket(longest) if width is None else width
        if width < longest:
            raise ValueError(
                f"a sample of {longest} tokens does not fit width={width}; use {bucket(longest)}"
            )
        rows = len(self.tokens)
        tokens = np.zeros((rows, width), np.int32)
        weights, logprobs = np.zeros((2, rows, width - 1), np.float32)
        for i, (prompt, new) in enumerate(zip(self.prompts, self.tokens, strict=True)):
            end = len(prompt) + len(new)
            tokens[i, :end] = np.concatenate([prompt, new])
            weights[i, len(prompt) - 1 : end - 1] = 1
            logprobs[i, len(prompt) - 1 : end - 1] = self.logprobs[i]
        return {
            "tokens": tokens,
            "weights": weights,
            "rollout_logprobs": logprobs,
            "advantages": np.asarray(advantages, np.float32).reshape(rows),
        }


def sample_groups(
    params: Qwen3,
    prompts: Sequence[TokenIds],
    *,
    group_size: int,
    sampling: SamplingParams | None = None,
    step: int = 0,
    mesh: Mesh | None = None,
    max_new_tokens: int = 64,
    eos_id: int | Sequence[int] | None = None,
    numerics: NumericsName = "invariant",
) -> Rollout:
    """Samples `group_size` continuations of every prompt, each with a seed of its own.

    The seed is a hash of (sampling.seed, step, prompt's index, sample's index), so a sample is a function of these, the
    parameters and its prompt: the same on any mesh, whatever else is in the batch.

    Args:
        params: a Qwen3; `hand_over` brings it to the mesh.
        prompts: token ids.
        group_size: samples of a prompt, at least 2.
        sampling: temperature 1 and seed 0 by default.
        step: of the training, so that every step has other noise.
        mesh: as for `generate`, as are the others.
        max_new_tokens: at most so many tokens a sample.
        eos_id: end token or tokens.
        numerics: "invariant", "plain" or "batch_invariant".

    Raises:
        ValueError: a group of fewer than 2, temperature 0 (all samples of a group would be equal), or as `generate`.

    Warns:
        OffPolicyWarning: a temperature other than 1, or top_k or top_p. Log-probabilities are of the untempered, whole
            distribution on both sides, so they still agree, but the samples are from another one.
    """
    sampling = SamplingParams(temperature=1.0) if sampling is None else sampling
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be at least 2; an advantage is relative to a group")
    if sampling.temperature == 0:
        raise ValueError(
            "temperature=0 makes all samples of a group equal and all advantages 0; use temperature=1"
        )
    if sampling.temperature != 1 or sampling.filters:
        warnings.warn(
            f"samples with temperature={sampling.temperature}, top_k={sampling.top_k}, top_p={sampling.top_p} are not "
            "from the distribution whose log-probabilities are compared, which is the untempered, whole one; the ratio "
            "stays 1 and the gradient is biased; use temperature=1, top_k=None, top_p=None",
            OffPolicyWarning,
            stacklevel=2,
        )
    choices = [
        dataclasses.replace(sampling, seed=_sample_seed(sampling.seed, step, p, i))
        for p in range(len(prompts))
        for i in range(group_size)
    ]
    repeated = [np.asarray(prompt) for prompt in prompts for _ in range(group_size)]
    out = generate(
        params,
        repeated,
        mesh=mesh,
        max_new_tokens=max_new_tokens,
        sampling=choices,
        eos_id=eos_id,
        numerics=numerics,
    )
    return Rollout(
        prompts=repeated,
        tokens=out.tokens,
        logprobs=out.logprobs,
        group_size=group_size,
        config=params.config,
        dtype=params.dtype.name,
    )


def _sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    sequence = np.random.SeedSequence(int(seed), spawn_key=(step, prompt, sample))
    return int(sequence.generate_state(1, np.uint64)[0])


def group_advantages(rewards: np.ndarray, *, normalize: bool = True) -> np.ndarray:
    """GRPO's advantages: a reward's distance from the mean of its group, in standard deviations of the group.

    Args:
        rewards: finite, [prompts, group_size].
        normalize: False leaves out the division, as Dr. GRPO (arXiv 2503.20783) does.

    Returns:
        float32 [prompts, group_size], exactly 0 in a group whose rewards are all equal. Computed on the host in
        float64.

    Raises:
        ValueError: another number of dimensions, a group of one, or a reward that is not finite.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.
    """
    wide = np.asarray(rewards, np.float64)
    if wide.ndim != 2 or wide.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {wide.shape} must be [prompts, group_size], with groups of at least 2"
        )
    if not np.isfinite(wide).all():
        prompt, sample = np.argwhere(~np.isfinite(wide))[0]
        raise ValueError(f"the reward of sample {sample} of prompt {prompt} is {wide[prompt, sample]}")
    centred = wide - wide.mean(axis=1, keepdims=True)
    centred = np.where(np.ptp(wide, axis=1, keepdims=True) == 0, 0, centred)  # the mean is rounded
    if normalize:
        centred = centred / (wide.std(axis=1, keepdims=True) + 1e-6)
    return centred.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """The clipped policy loss, as a loss function for `value_and_grad(..., has_aux=True)` and `train_step`.

    A token's loss is -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), r = exp(log p_train - log p_rollout). Its
    batches are `Rollout.batch`'s; aux is {"logprobs": the trainer's log-probabilities, float32 [B, T - 1]}, for
    `divergence`. Every token of the batch has the same weight (change `batch["weights"]` for another mean).

    Attributes:
        clip_low: below 1.
        clip_high: above 1.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(
                f"clip_low={self.clip_low} must be between 0 and 1, and clip_high={self.clip_high} positive"
            )

    def __call__(self, model: TrainingModel, batch: Any) -> tuple[Losses, dict[str, jax.Array]]:
        logprobs = model.logprobs(batch["tokens"])
        gain = jnp.broadcast_to(batch["advantages"][:, None], logprobs.shape)
        losses = _clipped_loss(logprobs, batch["rollout_logprobs"], gain, self.clip_low, self.clip_high)
        return (losses, batch["weights"]), {"logprobs": logprobs}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _clipped_loss(
    logprobs: jax.Array, rollout_logprobs: jax.Array, advantages: jax.Array, low: float, high: float
) -> jax.Array:
    """Losses float32 of the shape of all three. The gradient is written down, so XLA can contract no part of it."""
    return _clipped_loss_fwd(logprobs, rollout_logprobs, advantages, low, high)[0]


def _clipped_loss_fwd(
    logprobs: jax.Array, rollout_logprobs: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    ratio = exp(logprobs - rollout_logprobs)
    free = mul(ratio, advantages)
    clipped = mul(jnp.clip(ratio, np.float32(1 - low), np.float32(1 + high)), advantages)
    # the derivative of the ratio's logarithm is 1, so that of -free is -free
    return -jnp.minimum(free, clipped), jnp.where(free <= clipped, -free, np.float32(0))


def _clipped_loss_bwd(
    low: float, high: float, slope: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    return mul(ct, slope), None, None


_clipped_loss.defvjp(_clipped_loss_fwd, _clipped_loss_bwd)


def hand_over(model: Qwen3, mesh: Mesh | None = None) -> Qwen3:
    """A copy of the model on another mesh, as `generate` wants it there: from the trainer to the rollout.

    Parameters move from device to device; nothing passes through the host. The copy shares no buffer with the model, so
    a train step may donate those.

    Args:
        model: on any devices.
        mesh: of the rollout; None for the ambient mesh, else one device.

    Raises:
        ValueError: the model does not fit the mesh.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, reshard(state, parameter_shardings(state, resolve_mesh(mesh))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """One sampled token, as both sides see it.

    Attributes:
        sequence: row of the batch.
        position: of the token in its sequence, prompt included.
        token: its id.
        rollout: its log-probability there.
        train: its log-probability in the train step.
    """

    sequence: int
    position: int
    token: int
    rollout: float
    train: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far the trainer's log-probabilities are from the rollout's, over all sampled tokens.

    Attributes:
        tokens: that were compared.
        different: tokens whose log-probabilities have other bits.
        max_abs: the largest |log p_rollout - log p_train|; 0.0 exactly if no bit differs, as are the following.
        min_ratio: the smallest importance ratio p_train / p_rollout; 1.0 exactly.
        max_ratio: the largest one; 1.0 exactly.
        kl: an estimate of KL(rollout || trainer) a token, in nats: the mean of r - 1 - log r; 0.0 exactly.
        first: the first token that differs, or None.
    """

    tokens: int
    different: int
    max_abs: float
    min_ratio: float
    max_ratio: float
    kl: float
    first: TokenPair | None

    def check(self) -> None:
        """Raises `DivergenceError` if a bit differs; it names sequence, position and both values."""
        if self.first is None:
            return
        at = self.first
        raise DivergenceError(
            f"{self.different} of {self.tokens} sampled tokens have another log-probability in the trainer, first "
            f"sequence {at.sequence} at position {at.position} (token {at.token}): rollout {at.rollout!r}, trainer "
            f"{at.train!r}; look for weights that were not handed over, another dtype, plain numerics or another "
            "prompt on one side"
        )


def divergence(batch: dict[str, np.ndarray], train_logprobs: jax.typing.ArrayLike) -> Divergence:
    """Compares what the rollout and the train step say of the same tokens, bit for bit.

    Args:
        batch: from `Rollout.batch`.
        train_logprobs: float32 [B, T - 1], `aux["logprobs"]` of the train step.

    Raises:
        ValueError: log-probabilities of another shape or dtype, or a batch without a sampled token.
    """
    rollout, train = batch["rollout_logprobs"], np.asarray(train_logprobs)
    if train.shape != rollout.shape or train.dtype != np.float32:
        raise ValueError(
            f"train_logprobs are {train.dtype} {train.shape}; they must be float32 {rollout.shape}, as in the batch"
        )
    sampled = batch["weights"] > 0
    if not sampled.any():
        raise ValueError("the batch has no sampled token, so there is nothing to compare")
    unequal = sampled & (rollout.view(np.uint32) != train.view(np.uint32))
    log_ratio = (train.astype(np.float64) - rollout.astype(np.float64))[sampled]
    ratio = np.exp(log_ratio)
    first = None
    if unequal.any():
        row, column = (int(each) for each in np.argwhere(unequal)[0])
        first = TokenPair(
            sequence=row,
            position=column + 1,
            token=int(batch["tokens"][row, column + 1]),
            rollout=float(rollout[row, column]),
            train=float(train[row, column]),
        )
    return Divergence(
        tokens=int(sampled.sum()),
        different=int(unequal.sum()),
        max_abs=float(np.abs(log_ratio).max()),
        min_ratio=float(ratio.min()),
        max_ratio=float(ratio.max()),
        kl=float((np.expm1(log_ratio) - log_ratio).mean()),
        first=first,
    )


def _check_trainer(trainer: Qwen3, rollout: Rollout) -> None:
    if trainer.dtype.name != rollout.dtype:
        raise ValueError(
            f"the rollout ran in {rollout.dtype} and the trainer's parameters are {trainer.dtype.name}: their "
            f"log-probabilities cannot agree; make the trainer's model in {rollout.dtype} (float32 master weights: "
            "tbik_jax.optimizers.mixed_precision) or hand over the trainer's model as it is"
        )
    if trainer.config != rollout.config:
        names = [
            field.name
            for field in dataclasses.fields(Qwen3Config)
            if getattr(trainer.config, field.name) != getattr(rollout.config, field.name)
        ]
        raise ValueError(f"the rollout's model and the trainer's differ in their config: {', '.join(names)}")
