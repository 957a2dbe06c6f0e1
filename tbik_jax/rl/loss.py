"""GRPO: advantages relative to a group, and the clipped policy loss."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.common.rounding import exp, mul
from ..training import Losses, TrainingModel


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
