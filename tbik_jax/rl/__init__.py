"""What reinforcement learning needs beside a training loop: group sampling, GRPO's loss, hand-over, divergence.

With invariant numerics the rollout's log-probabilities and the trainer's are the same bits, on whatever meshes the two
run, so that the importance ratio of a step's first update is 1 and the KL divergence 0: exactly, without a correction.
`divergence` measures it on every token, from the log-probabilities of the train step's own forward pass.
"""

from .loss import GrpoLoss, group_advantages
from .report import Divergence, DivergenceError, TokenPair, divergence
from .rollout import OffPolicyWarning, Rollout, sample_groups
from .weights import hand_over

__all__ = [
    "Divergence",
    "DivergenceError",
    "GrpoLoss",
    "OffPolicyWarning",
    "Rollout",
    "TokenPair",
    "divergence",
    "group_advantages",
    "hand_over",
    "sample_groups",
]
