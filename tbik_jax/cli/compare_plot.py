"""The plot of `tbik-jax compare`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..divergence import Output, Verdict, divergence_by_position

ENDINGS = (".png", ".svg", ".pdf")
_COLOURS = {"invariant": "#1b7837", "batch_invariant": "#d98c00", "plain": "#b2182b"}


def draw(path: Path, results: Mapping[str, tuple[Verdict, list[list[Output]]]], title: str) -> None:
    """Writes an image: distinct outputs a prompt, and the largest difference of a token's probability by position.

    Args:
        path: of the image; its ending is one of `ENDINGS`.
        results: verdict and outputs[prompt][configuration] by numerics.
        title: above it.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")  # no pyplot: no window, no state
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    figure.suptitle(title, fontsize=10)
    for i, (name, (verdict, _)) in enumerate(results.items()):
        mean = float(np.mean(verdict.distinct))
        left.bar(i, mean, color=_COLOURS[name], width=0.6)
        left.annotate(f"{mean:.2f}", (i, mean), ha="center", va="bottom")
    left.set_xticks(range(len(results)), [name.replace("_", "\n") for name in results])
    left.set_ylabel("distinct outputs a prompt (mean)")
    left.set_ylim(0, None)
    left.margins(y=0.15)
    divergences = {name: divergence_by_position(outputs) for name, (_, outputs) in results.items()}
    positive = [value for each in divergences.values() for value in each if value > 0]
    for name, each in divergences.items():
        right.plot(each, label=name, color=_COLOURS[name], marker=".", linewidth=1.2, clip_on=False)
    right.set_yscale("symlog", linthresh=min(positive, default=1e-8))  # zero is the point of it
    right.set_ylim(0, None)
    right.set_xlabel("new token")
    right.set_ylabel("largest difference of its probability")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
