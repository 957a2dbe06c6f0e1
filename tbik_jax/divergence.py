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
        first_token: the least index, from 0, of a token that two configurations chose differently; None where none is.
    """

    configurations: int
    distinct: list[int]
    divergence: float
    same_bits: bool
    first_token: int | None = None


def judge(outputs: Sequence[Sequence[Output]]) -> Verdict:
    """Compares outputs[prompt][configuration] = (tokens, logprobs)."""
    distinct, divergence, same_bits = [], 0.0, True
    parted: list[int] = []
    for each in outputs:
        distinct.append(len({tokens.tobytes() for tokens, _ in each}))
        same_bits &= len({fingerprint(list(pair)) for pair in each}) == 1
        for a, b in itertools.combinations(each, 2):
            divergence = max(divergence, float(_differences(a, b).max(initial=0.0)))
            if a[0].tobytes() != b[0].tobytes():
                parted.append(_common(a, b))
    return Verdict(len(outputs[0]), distinct, divergence, same_bits, min(parted, default=None))


def divergence_by_position(outputs: Sequence[Sequence[Output]]) -> np.ndarray:
    """The largest difference of a token's probability at each position, over all prompts and pairs of configurations.

    Args:
        outputs: as for `judge`.

    Returns:
        float64 [longest output]; a pair is compared up to where its tokens part, and NaN is where no pair reaches.
    """
    longest = max(len(tokens) for each in outputs for tokens, _ in each)
    largest = np.full((longest,), np.nan)
    for each in outputs:
        for a, b in itertools.combinations(each, 2):
            found = _differences(a, b)
            largest[: len(found)] = np.fmax(largest[: len(found)], found)
    return largest


def _common(a: Output, b: Output) -> int:
    """How many tokens at the beginning are the same."""
    width = min(len(a[0]), len(b[0]))
    return int(np.cumprod(a[0][:width] == b[0][:width]).sum())


def _differences(a: Output, b: Output) -> np.ndarray:
    """Of the probabilities of the tokens that both have, up to the first that differs; float64."""
    common = _common(a, b)
    return np.abs(np.exp(a[1][:common].astype(np.float64)) - np.exp(b[1][:common].astype(np.float64)))
