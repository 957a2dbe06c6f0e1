"""Draws docs/figures/tree.svg: the tree over eight leaves, and which rank owns what. `python docs/draw_tree.py`."""

from pathlib import Path

FILE = Path(__file__).parent / "figures" / "tree.svg"
WIDTH, HEIGHT = 980, 560
LEFT, STEP = 110, 76  # of the first leaf's centre, and between leaves
LEVELS = (300, 225, 150, 75)  # y of the leaves, and of the three levels above
WHERE = (
    "",
    "in a rank; between two for tp=8",
    "in a rank; between two for tp=4, 8",
    "in a rank; between two for tp=2, 4, 8",
)
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#d6a200")


def text(
    x: float, y: float, content: str, size: int = 13, anchor: str = "middle", color: str = "#222"
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{content}</text>'
    )


def nodes() -> dict[tuple[int, int], float]:
    """x of node i of each level; a node stands between its children."""
    at = {(0, i): float(LEFT + STEP * i) for i in range(8)}
    for level in (1, 2, 3):
        for i in range(8 >> level):
            at[level, i] = (at[level - 1, 2 * i] + at[level - 1, 2 * i + 1]) / 2
    return at


def tree() -> list[str]:
    """Lines, then nodes over them."""
    at, out = nodes(), []
    for (level, i), x in at.items():
        for child in (2 * i, 2 * i + 1) if level else ():
            ends = f'x1="{x:g}" y1="{LEVELS[level]}" x2="{at[level - 1, child]:g}" y2="{LEVELS[level - 1]}"'
            out.append(f'<line {ends} stroke="#999" stroke-width="1.5"/>')
    for (level, i), x in at.items():
        y = LEVELS[level]
        if level:
            out.append(f'<circle cx="{x:g}" cy="{y}" r="15" fill="white" stroke="#555" stroke-width="1.5"/>')
            out.append(text(x, y + 6, "+", 18))
        else:
            out.append(
                f'<rect x="{x - 30:g}" y="{y - 16}" width="60" height="32" rx="4" fill="#eee" stroke="#555"/>'
            )
            out.append(text(x, y + 5, f"leaf {i}"))
    for level in (1, 2, 3):
        out.append(text(LEFT + 7.6 * STEP, LEVELS[level] + 5, WHERE[level], 12, "start", "#666"))
    out.append(text(at[3, 0], 30, "one rounding to the output dtype", 13))
    out.append(
        f'<line x1="{at[3, 0]:g}" y1="38" x2="{at[3, 0]:g}" y2="60" stroke="#999" stroke-width="1.5"/>'
    )
    out.append(text(LEFT + 7.6 * STEP, LEVELS[0] - 2, "K/8 terms each, ascending k,", 12, "start", "#666"))
    out.append(text(LEFT + 7.6 * STEP, LEVELS[0] + 14, "one fp32 accumulation", 12, "start", "#666"))
    return out


def owners() -> list[str]:
    """A row a tp: boxes over the leaves that a rank holds."""
    out = []
    for row, tp in enumerate((1, 2, 4, 8)):
        y, leaves = 350 + 50 * row, 8 // tp
        out.append(text(60, y + 22, f"tp={tp}", 14, "end"))
        for rank in range(tp):
            x, width = LEFT + STEP * rank * leaves - 34, STEP * leaves - 8
            out.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="34" rx="4" fill="{COLORS[rank]}" fill-opacity="0.85"/>'
            )
            out.append(text(x + width / 2, y + 22, f"rank {rank}", 13, "middle", "white"))
    return out


def svg() -> str:
    """The figure, on white so that it can be read on a dark page too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    title = "<title>Eight leaves meet in a binary tree; each rank of tp=1, 2, 4 or 8 owns a complete subtree</title>"
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>'
    return "\n".join([head, title, back, *tree(), *owners(), "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(svg())
