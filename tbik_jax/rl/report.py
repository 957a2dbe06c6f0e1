"""How far apart rollout and trainer are, measured on every sampled token."""

import dataclasses

import jax
import numpy as np


class DivergenceError(RuntimeError):
    """The trainer's log-probability of a sampled token has other bits than the rollout's."""


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
        ValueError: log-probabilities of another shape or dtype on either side, or a batch without a sampled token.
    """
    rollout, train = batch["rollout_logprobs"], np.asarray(train_logprobs)
    if rollout.dtype != np.float32:
        raise ValueError(
            f"rollout_logprobs are {rollout.dtype}; bits are compared, so they must be the rollout's own float32"
        )
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
