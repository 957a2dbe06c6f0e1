"""Groups of samples, and the batch that they make for the trainer."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from ..buckets import bucket
from ..generation import NumericsName, TokenIds, generate
from ..models.qwen3 import Qwen3, Qwen3Config
from ..sampling import SamplingParams


class OffPolicyWarning(UserWarning):
    """Tokens are sampled from another distribution than the one whose log-probabilities are compared."""


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
            width: tokens T of a row; by default the longest sample's, rounded up to a bucket that is a multiple of 16.

        Returns:
            B = prompts * group_size rows: tokens int32 [B, T], padded with 0; weights float32 [B, T - 1], 1 where the
            next token was sampled; rollout_logprobs float32 [B, T - 1], 0 elsewhere; advantages float32 [B].

        Raises:
            ValueError: the trainer's dtype or config is not the rollout's; advantages of another shape, or not finite;
                a sample is longer than `width`.
        """
        _check_trainer(trainer, self)
        if np.shape(advantages) != (len(self.tokens) // self.group_size, self.group_size):
            groups = len(self.tokens) // self.group_size
            raise ValueError(
                f"advantages of shape {np.shape(advantages)} must be [{groups}, {self.group_size}], one a sample"
            )
        if not np.isfinite(advantages).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(advantages))[0])
            raise ValueError(
                f"the advantage of prompt {row}, sample {column} is {np.asarray(advantages)[row, column]}; it would "
                "make every parameter NaN: look at its reward"
            )
        longest = max(len(p) + len(t) for p, t in zip(self.prompts, self.tokens, strict=True))
        # so that eight rows, or ranks, cut into the leaves of a gradient
        fitting = -(-bucket(longest) // 16) * 16
        width = fitting if width is None else width
        if width < longest:
            raise ValueError(f"a sample of {longest} tokens does not fit width={width}; use {fitting}")
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
    prefill_chunk: int | None = None,
    scan_layers: bool | None = None,
    overlap_prefill: bool = False,
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
        prefill_chunk: as for `generate`, as are the next two; of an invariant rollout they change no bit.
        scan_layers: run the layers as a scan.
        overlap_prefill: let halves of a prefill take turns over tp.

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
        prefill_chunk=prefill_chunk,
        scan_layers=scan_layers,
        overlap_prefill=overlap_prefill,
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
