"""How far apart the outputs of one prompt are over several configurations."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from .fingerprint import fingerprint

#: Tokens (int32) and their log-probabilities (float32) of one prompt in one configuration.
Output = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the outputs of one prompt set came to over all configurations.

    Attributes:
        configurations: number of (mesh, batch) pairs.
        distinct: token sequences that differ, one number a prompt.
        divergence: largest difference between two configurations' probability of the same token after the same tokens.
        same_bits: all tokens and log-probabilities are equal bit for bit.
    """

    configurations: int
    distinct: list[int]
    divergence: float
    same_bits: bool


def judge(outputs: Sequence[Sequence[Output]]) -> Verdict:
    """Compares outputs[prompt][configuration] = (tokens, logprobs)."""
    distinct, divergence, same_bits = [], 0.0, True
    for each in outputs:
        distinct.append(len({tokens.tobytes() for tokens, _ in each}))
        same_bits &= len({fingerprint(list(pair)) for pair in each}) == 1
        divergence = max([divergence, *(_divergence(a, b) for a, b in itertools.combinations(each, 2))])
    return Verdict(len(outputs[0]), distinct, divergence, same_bits)


def _divergence(a: Output, b: Output) -> float:
    width = min(len(a[0]), len(b[0]))
    same = np.cumprod(a[0][:width] == b[0][:width]).astype(bool)  # up to the first token that differs
    difference = np.abs(np.exp(a[1][:width].astype(np.float64)) - np.exp(b[1][:width].astype(np.float64)))
    return float(difference[same].max(initial=0.0))
