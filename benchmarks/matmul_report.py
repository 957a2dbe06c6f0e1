"""What a table of matmul times says: the targets, a printed table, a plot."""

import math
import statistics
from pathlib import Path
from typing import Any

Point = dict[str, Any]

VARIANTS = ("tree", "chain", "triton")
# Name, which points, least geometric mean, least ratio. "row" is row-parallel: TP cuts its K.
_GROUPS: tuple[tuple[str, Any, float | None, float | None], ...] = (
    ("row, M <= 128", lambda row, m, tp: row and m <= 128, 1.0, 0.85),
    ("row, M 256 and 512", lambda row, m, tp: row and 128 < m < 1024, None, None),
    ("row, M >= 1024, TP 2 to 8", lambda row, m, tp: row and m >= 1024 and tp > 1, 0.95, 0.80),
    ("row, M >= 1024, TP 1", lambda row, m, tp: row and m >= 1024 and tp == 1, 0.90, 0.80),
    ("column, all M", lambda row, m, tp: not row, 0.95, None),
    ("column, M <= 128", lambda row, m, tp: not row and m <= 128, 0.95, None),
    ("column, M 256 and 512", lambda row, m, tp: not row and 128 < m < 1024, 0.95, None),
    ("column, M >= 1024", lambda row, m, tp: not row and m >= 1024, 0.95, None),
    ("all", lambda row, m, tp: True, None, None),
)


def ratio(point: Point, variant: str) -> float | None:
    """How many times as fast as `dot` a variant was. A chain that is the tree itself was not timed twice."""
    us = point["us"]
    if variant == "chain" and point["leaves"] == 1:
        variant = "tree"
    return us["dot"] / us[variant] if variant in us and "dot" in us else None


def summarize(points: list[Point]) -> list[dict[str, Any]]:
    """A row for each variant and group of points: mean and least ratio, and whether the tree reaches its targets."""
    rows = []
    for variant in VARIANTS:
        for name, belongs, least_mean, least in _GROUPS:
            if variant == "chain" and name.startswith("column"):
                continue  # one leaf there: the tree itself
            chosen = [
                (r, p)
                for p in points
                if belongs(p["row_parallel"], p["m"], p["tp"]) and (r := ratio(p, variant)) is not None
            ]
            if not chosen:
                continue
            worst, where = min(chosen, key=lambda pair: pair[0])
            row = {
                "variant": variant,
                "group": name,
                "points": len(chosen),
                "geomean": round(statistics.geometric_mean(r for r, _ in chosen), 4),
                "min": round(worst, 4),
                "min_at": f"{where['layer']} {where['model']} TP {where['tp']} M {where['m']}",
                "under_1": sum(r < 1 for r, _ in chosen),
            }
            if variant == "tree" and least_mean is not None:
                row |= {"target_geomean": least_mean, "target_min": least}
                row["met"] = row["geomean"] >= least_mean and worst >= (least or 0)
            rows.append(row)
    return rows


def print_table(points: list[Point], summary: list[dict[str, Any]]) -> None:
    """Ratios of the tree to `dot`, a line a layer and TP; then the summary."""
    ms = sorted({p["m"] for p in points})
    by_layer: dict[tuple[Any, ...], dict[int, float | None]] = {}
    for p in points:
        by_layer.setdefault((p["layer"], p["model"], p["tp"]), {})[p["m"]] = ratio(p, "tree")
    print(f"{'tree / jnp.dot':24}" + "".join(f"{m:>6}" for m in ms))
    for (layer, model, tp), row in sorted(
        by_layer.items(), key=lambda item: (*_place(*item[0][:2]), item[0][2])
    ):
        cells = [f"{r:6.2f}" if (r := row.get(m)) is not None else "     -" for m in ms]
        print(f"{layer:9} {model:5} TP {tp:<5}" + "".join(cells))
    for row in summary:
        target = ""
        if "met" in row:
            least = f", min {row['target_min']}" if row["target_min"] else ""
            target = f"  {'met' if row['met'] else 'MISSED'} (geomean {row['target_geomean']}{least})"
        print(
            f"{row['variant']:7}{row['group']:27}{row['points']:4} points  geomean {row['geomean']:.3f}  "
            f"min {row['min']:.2f} at {row['min_at']}{target}"
        )


def plot(points: list[Point], path: Path, title: str) -> None:
    """Ratio against M: a panel for each layer and model, a line for each TP; the one-leaf chain dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(p["layer"], p["model"]) for p in points}, key=lambda key: _place(*key))
    tps = sorted({p["tp"] for p in points})
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (layer, model) in zip(axes.flat, panels, strict=False):
        axis.set_title(f"{layer} of {model}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        mine = [p for p in points if (p["layer"], p["model"]) == (layer, model)]
        for index, tp in enumerate(tps):
            for variant, style in (("tree", "-"), ("chain", "--")):
                line = sorted(
                    (p["m"], r)
                    for p in mine
                    if p["tp"] == tp
                    and (variant == "tree" or p["leaves"] > 1)
                    and (r := ratio(p, variant)) is not None
                )
                if line:
                    label = f"TP {tp}" + ("" if variant == "tree" else ", one leaf")
                    axis.plot(*zip(*line, strict=True), style, color=f"C{index}", linewidth=1.2, label=label)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.supxlabel("M")
    figure.supylabel("times as fast as jnp.dot")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    labels = sorted(handles, key=lambda label: ("leaf" in label, label))
    figure.legend([handles[label] for label in labels], labels, loc="lower right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _place(layer: str, model: str) -> tuple[int, float]:
    order = ("o_proj", "down_proj", "qkv", "gate_up", "lm_head")
    return order.index(layer) if layer in order else len(order), float(model.rstrip("B") or 0)
