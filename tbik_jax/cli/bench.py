"""`tbik-jax bench`: what invariance costs on this machine."""

from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
import typer
from rich.table import Table

from ..bench.environment import environment
from ..bench.tables import TABLES, Row, Sizes, count, measure
from ..mesh import mesh_label
from .errors import command
from .options import (
    CpuDevicesOption,
    DebugOption,
    JsonOption,
    MeshOption,
    describe_devices,
    mesh_of,
    use_cpu_devices,
)
from .terminal import Terminal

EXAMPLE = "tbik-jax bench matmul attention"
_CLOCKS = {
    True: "device time by CUPTI; decode by the host's clock",
    False: "CPU, by the host's clock: references, which state the order and are not made for speed",
}


@command
def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLES", help="Of matmul, attention, decode; all by default."),
    ] = None,
    size: Annotated[str, typer.Option(help="Of Qwen3, on a GPU: 0.6B, 1.7B, 4B, 8B, 14B, 32B.")] = "8B",
    layers: Annotated[int, typer.Option(min=1, help="Of the model that decodes; more compile longer.")] = 4,
    mesh: MeshOption = "tp=1",
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Time products, attention and decoding of Qwen3, invariant beside plain, in one process.

    The ratio is plain's time over invariant's: above 1 the invariant one is faster. The scripts under benchmarks/ of
    the repository measure more sizes; on a CPU this measures small ones.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    chosen = tables or list(TABLES)
    devices = mesh_of(mesh, terminal)
    on_gpu = jax.devices()[0].platform == "gpu"
    sizes = Sizes.for_gpu(size, layers) if on_gpu else Sizes.for_cpu()
    rows: list[Row] = []
    with terminal.working("measuring", count(chosen, sizes)) as advance:
        for row in measure(chosen, sizes, devices):
            rows.append(row)
            advance(what=f"measured {row.what}")
    model = f"Qwen3-{size}" if on_gpu else "a small Qwen3"
    decoder = f"decode: {sizes.config.num_hidden_layers} layers on {mesh_label(devices)}"
    title = f"{model}, bfloat16, {describe_devices()}; {decoder}\n{_CLOCKS[on_gpu]}"
    terminal.show(_table(rows, title))
    terminal.emit(
        {
            "environment": environment(),
            "model": model,
            "layers": sizes.config.num_hidden_layers,
            "mesh": dict(devices.shape),
            "clock": _CLOCKS[on_gpu],
            "rows": [vars(row) | {"ratio": row.ratio} for row in rows],
        }
    )
    return 0


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "what", "invariant, us", "plain, us", "ratio"):
        table.add_column(name, justify="left" if name in ("", "what") else "right")
    for i, row in enumerate(rows):
        first = not i or rows[i - 1].table != row.table
        table.add_row(
            row.table if first else "",
            row.what,
            f"{row.invariant_us:.1f}",
            f"{row.plain_us:.1f}",
            f"{row.ratio:.2f}",
        )
    for name in dict.fromkeys(row.table for row in rows):
        mean = float(np.exp(np.mean([np.log(row.ratio) for row in rows if row.table == name])))
        table.add_row("", f"{name}, geometric mean", "", "", f"{mean:.2f}", style="bold")
    return table
