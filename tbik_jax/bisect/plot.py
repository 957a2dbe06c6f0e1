"""Where two runs differ, as an image."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .compare import Bisection, OpDifference
from .model import LAYER_OPS

if TYPE_CHECKING:  # matplotlib takes a while to import, and who plots nothing need not wait
    from matplotlib.axes import Axes

_SHOWN = 60  # ops of a function that get a name


def plot(found: Bisection, file: str | Path) -> None:
    """Writes an image of a bisection; its name's suffix says the format.

    Of a model: bars with the share of elements that differ in each layer, above a map of the share by op and layer,
    grey where all bits are equal; the first op that differs has a frame. Of a function: a bar an op, in order.

    Args:
        found: what `compare` or `bisect` gave.
        file: to write.
    """
    from matplotlib.figure import Figure

    layers = sorted({op.layer for op in found.ops if op.layer is not None})
    if layers:
        figure = Figure(figsize=(min(16.0, 5.5 + 0.3 * len(layers)), 7), layout="constrained")
        panels = figure.subplots(2, 1, height_ratios=[1, 2.4], sharex=True)
        _layers(found, layers, panels[0])
        _map(found, layers, panels[1])
    else:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        _ops(found, figure.subplots())
    first = found.first
    text = "no bit differs" if first is None else f"first op that differs: {first.name}"
    figure.suptitle(f"{found.left}  against  {found.right}\n{text}", fontsize=10)
    figure.savefig(file, dpi=100)


def _share(op: OpDifference) -> float:
    """Of elements that differ; of rows, where only fingerprints were kept."""
    if op.differing is None:
        return op.differing_rows / op.rows
    return op.differing / max(1, op.elements)


def _layers(found: Bisection, layers: list[int], panel: "Axes") -> None:
    largest = [max(_share(op) for op in found.ops if op.layer == layer) for layer in layers]
    panel.bar(range(1, len(layers) + 1), largest, color="C3")
    ends = {0: ("embedding",), len(layers) + 1: ("residual_out", "final_norm", "logits", "logprob")}
    for column, names in ends.items():
        shares = [_share(op) for op in found.ops if op.layer is None and op.op in names]
        panel.bar(column, max(shares, default=0), color="C1")
    panel.set(ylabel="largest share of\nelements that differ", ylim=(0, 1))
    panel.grid(axis="y", alpha=0.3)


def _map(found: Bisection, layers: list[int], panel: "Axes") -> None:
    """Ops down, layers across, with the ends of the model in a column before and one behind."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    ends = [op for op in found.ops if op.layer is None]
    names = ["embedding", *LAYER_OPS, *(op.op for op in ends if op.op != "embedding")]
    cells = np.full((len(names), len(layers) + 2), np.nan)
    place: dict[str, tuple[int, int]] = {}
    for op in found.ops:
        column = (
            layers.index(op.layer) + 1
            if op.layer is not None
            else 0
            if op.op == "embedding"
            else len(layers) + 1
        )
        place[op.name] = names.index(op.op), column
        cells[place[op.name]] = _share(op)
    smallest = min((_share(op) for op in found.ops if op.differs), default=1e-3)
    norm = LogNorm(vmin=min(smallest, 0.5), vmax=1)
    panel.imshow(np.where(cells == 0, 1.0, np.nan), cmap="Greys", vmin=0.75, vmax=2.1, aspect="auto")
    image = panel.imshow(np.where(cells > 0, cells, np.nan), cmap="inferno_r", norm=norm, aspect="auto")
    panel.figure.colorbar(image, ax=panel, label="share of elements that differ (grey: none)")
    if found.first is not None:
        row, column = place[found.first.name]
        panel.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="C2", linewidth=2.5, clip_on=False
            )
        )
    step = max(1, len(layers) // 18)
    ticks = list(range(0, len(layers), step))
    panel.set_xticks(
        [0, *(i + 1 for i in ticks), len(layers) + 1], ["in", *(str(layers[i]) for i in ticks), "out"]
    )
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_xlabel("layer")


def _ops(found: Bisection, panel: "Axes") -> None:
    shares = [_share(op) for op in found.ops]
    panel.bar(range(len(shares)), shares, color="C3", width=1.0 if len(shares) > _SHOWN else 0.8)
    if len(shares) <= _SHOWN:
        panel.set_xticks(range(len(shares)), [op.name for op in found.ops], rotation=90, fontsize=7)
    first = next((i for i, op in enumerate(found.ops) if op.differs), None)
    if first is not None:
        panel.axvline(first - 0.5, color="C2", linewidth=2)
    panel.set(
        ylabel="share of elements that differ", ylim=(0, 1), xlabel="op, in the order in which they ran"
    )
    panel.grid(axis="y", alpha=0.3)
