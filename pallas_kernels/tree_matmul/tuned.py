"""The configurations that measuring found faster than the rule in `config.py`: data, one file a kind of device.

`benchmarks/tune_matmul.py` writes the files. A file is a JSON array with one line for each weight shape:

    {"k": 4096, "n": 4096, "leaves": 8, "transpose_rhs": false, "configs": [[16, {...}], [64, null], [128, {...}]]}

`configs` holds the most rows an entry is for and its configuration, fewest rows first. null means that the rule is as
good there. Like every choice of a configuration this one decides the speed and no bit.
"""

import functools
import json
from pathlib import Path
from typing import Any

Key = tuple[int, int, int, bool]  # k, n, leaves, transpose_rhs
Config = dict[str, Any]
Entries = tuple[tuple[int, Config | None], ...]
Table = dict[Key, Entries]

FOLDER = Path(__file__).parent / "tuned"
_FIELDS = ("k", "n", "leaves", "transpose_rhs", "configs")


def table_path(device_kind: str) -> Path:
    """The file of a kind of device, as JAX names it: "NVIDIA H200" has nvidia_h200.json."""
    name = "".join(c if c.isalnum() else "_" for c in device_kind.lower())
    return FOLDER / f"{name}.json"


def lookup(device_kind: str, m: int, n: int, k: int, leaves: int, transpose_rhs: bool) -> Config | None:
    """The tuned configuration of x [m, k] @ w, as fields of `MosaicConfig`.

    Args:
        device_kind: As JAX names it.
        m: Rows of x.
        n: Columns of the product.
        k: Length of the contraction.
        leaves: Leaves that k is cut into.
        transpose_rhs: Whether w is [n, k].

    Returns:
        The entry for the fewest rows that are at least m, or else for the most rows; None where the table has none or
        defers to the rule.

    Raises:
        ValueError: The file is malformed; it names the line.
    """
    entries = _table(device_kind).get((k, n, leaves, transpose_rhs), ((0, None),))
    config = next((config for most, config in entries if m <= most), entries[-1][1])
    return None if config is None else dict(config)


@functools.cache
def _table(device_kind: str) -> Table:
    path = table_path(device_kind)
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> Table:
    """Reads and checks a file.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    table: Table = {}
    lines = [(number, text.strip()) for number, text in enumerate(path.read_text().splitlines(), 1)]
    lines = [(number, text) for number, text in lines if text]
    if len(lines) < 2 or lines[0][1] != "[" or lines[-1][1] != "]":
        raise ValueError(f"{path}:1: must be a JSON array: [ and ] on lines of their own, one object a line")
    body = lines[1:-1]
    for index, (number, text) in enumerate(body):
        try:
            if text.endswith(",") != (index + 1 < len(body)):
                raise ValueError("needs a comma after every object but the last")
            key, entries = _parse(json.loads(text.removesuffix(",")))
            if key in table:
                raise ValueError(f"k, n, leaves, transpose_rhs = {key} a second time")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        table[key] = entries
    return table


def write_table(table: Table, path: Path) -> None:
    """Writes a file that `read_table` reads, sorted, so that versions of it can be compared."""
    lines = []
    for key, entries in sorted(table.items()):
        row = dict(zip(_FIELDS, (*key, entries), strict=True))
        lines.append(json.dumps(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + ("\n" if lines else "") + "]\n")


def _parse(row: Any) -> tuple[Key, Entries]:
    if not isinstance(row, dict) or tuple(row) != _FIELDS:
        raise ValueError(f"must be an object of {', '.join(_FIELDS)}, in this order")
    k, n, leaves, transpose_rhs = (row[name] for name in _FIELDS[:-1])
    if not (_positive(k) and _positive(n)):
        raise ValueError(f"k={k!r} and n={n!r} must be whole numbers of at least 1")
    if not _positive(leaves) or leaves not in (1, 2, 4, 8) or not isinstance(transpose_rhs, bool):
        raise ValueError(
            f"leaves={leaves!r} must be 1, 2, 4 or 8, transpose_rhs={transpose_rhs!r} true or false"
        )
    return (k, n, leaves, transpose_rhs), _parse_entries(row["configs"])


def _parse_entries(rows: Any) -> Entries:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"configs={rows!r} must be a list of [most rows, configuration]")
    entries: list[tuple[int, Config | None]] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not _positive(row[0]):
            raise ValueError(f"entry {row!r} must be [most rows, configuration]")
        most, config = row
        if entries and most <= entries[-1][0]:
            raise ValueError(f"entry for {most} rows must come before the one for {entries[-1][0]}")
        if config is not None and (
            not isinstance(config, dict) or not all(isinstance(value, int) for value in config.values())
        ):
            raise ValueError(
                f"configuration {config!r} must be null or an object of whole numbers and truths"
            )
        entries.append((most, config))
    return tuple(entries)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
