"""`tbik-jax verify`: what is installed, what is wrong with it, and whether the kernels give the expected bits."""

import time
from typing import Annotated

import typer
from rich.table import Table

from ..verify import Facts, Problem, Result, collect_facts, mesh_checks, op_checks, problems, run_checks
from ..verify.checks import device_key, expected_fingerprints
from .errors import BROKEN_PROMISE, command
from .options import CpuDevicesOption, DebugOption, JsonOption, use_cpu_devices
from .terminal import Terminal

EXAMPLE = "tbik-jax verify --cpu-devices 8"


@command
def verify(
    limit: Annotated[float, typer.Option(min=0, help="Seconds after which no further check begins.")] = 100,
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Check an installation: versions, driver, devices, links, and the bits of every kernel that would be used.

    Says what is wrong and what to do. Exits with 1 if a promise is broken, or could not be checked in time.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    with terminal.working("starting JAX"):
        facts = collect_facts()
    found = problems(facts)
    _show_facts(facts, found, terminal)
    checks = [*op_checks(), *mesh_checks()]
    results: list[Result] = []
    began = time.monotonic()
    with terminal.working("checking", len(checks)) as advance:
        for check, result in zip(checks, run_checks(checks, limit=limit), strict=True):
            results.append(result)
            advance(what=f"checked {check.name}")
    ok = all(result.ok for result in results) and not any(problem.wrong for problem in found)
    _show_results(results, terminal)
    held = sum(result.ok is True for result in results)
    verdict = "all as it should be" if ok else "NOT as it should be"
    terminal.show(
        f"[bold {'green' if ok else 'red'}]{verdict}[/]: {held} of {len(results)} checks held on "
        f"{facts.devices[0].kind} in {time.monotonic() - began:.0f} s"
    )
    terminal.emit(
        {
            "ok": ok,
            "facts": facts.as_dict(),
            "problems": [vars(problem) for problem in found],
            "device": device_key(),
            "bits_are_kept": bool(expected_fingerprints()),
            "checks": [vars(result) for result in results],
        }
    )
    return 0 if ok else BROKEN_PROMISE


def _show_facts(facts: Facts, found: list[Problem], terminal: Terminal) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    first = facts.devices[0]
    capability = f", compute capability {first.capability}" if first.capability else ""
    memory = f", {first.memory_gib} GiB each" if first.memory_gib else ""
    table.add_row("devices", f"{len(facts.devices)} x {first.kind}{capability}{memory}")
    versions = [f"{name} {version}" for name, version in facts.versions.items() if version]
    table.add_row("versions", f"python {facts.python}, {', '.join(versions)}")
    table.add_row("driver", facts.driver or "none")
    if facts.links:
        table.add_row("links", ", ".join(f"{pair} {link}" for pair, link in facts.links.items()))
    for name, value in facts.variables.items():
        table.add_row(name, value)
    terminal.show(table)
    for problem in found:
        mark = "[bold red]wrong[/]" if problem.wrong else "[yellow]note[/] "
        terminal.show(f"{mark} ", end="")
        terminal.show(f"{problem.text}\n      to do: {problem.remedy}", markup=False)


def _show_results(results: list[Result], terminal: Terminal) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "op", "compared", "s"):
        table.add_column(name, no_wrap=name == "op", justify="right" if name == "s" else "left")
    marks = {True: "[green]ok[/]", False: "[bold red]BROKEN[/]", None: "[red]left out[/]"}
    for result in results:
        what = result.what if result.ok else f"{result.what}: {result.detail}"
        table.add_row(marks[result.ok], result.name, what, f"{result.seconds:.1f}")
    terminal.show(table)
    if any(result.ok is False for result in results):
        terminal.show(
            "to do: compare with a fresh environment (pip install -c constraints.txt), without XLA_FLAGS; if it stays, "
            "report the output of tbik-jax verify --json"
        )
    elif not expected_fingerprints():
        terminal.show(
            f"no bits are kept for {device_key()}: each op was compared with what it promises, and no more"
        )
