"""What a command writes, and where: results on stdout, progress on stderr, with --json only JSON on stdout."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

Advance = Callable[..., None]

_LONG = 2.0  # seconds, after which a step is worth a line where there is no terminal to draw on


class Terminal:
    """Stdout and stderr of one command."""

    def __init__(self, *, as_json: bool):
        """Args: as_json: results are JSON."""
        self.as_json = as_json
        self.out = Console(soft_wrap=True, highlight=False)
        self.err = Console(stderr=True, soft_wrap=True, highlight=False)

    def note(self, text: str) -> None:
        """A line on stderr."""
        self.err.print(text, markup=False, style="dim")

    def show(self, *things: Any, **options: Any) -> None:
        """Something for a person, on stdout; nothing with --json."""
        if not self.as_json:
            self.out.print(*things, **options)

    def emit(self, value: Any) -> None:
        """The result for a machine, on stdout; nothing without --json."""
        if self.as_json:
            print(json.dumps(value, indent=2, allow_nan=False))

    @contextlib.contextmanager
    def working(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """Shows progress on stderr: a spinner, or a bar of `total` steps, or one line afterwards where no terminal is.

        Yields:
            A function: called with a number it advances by so many steps; `what=` changes the text.
        """
        began = time.monotonic()
        bar = (BarColumn(), MofNCompleteColumn()) if total is not None else ()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
        with Progress(
            *columns,
            console=self.err,
            transient=True,
            redirect_stdout=False,  # results go where the user sends them
            redirect_stderr=False,
            disable=not self.err.is_terminal,
        ) as progress:
            task = progress.add_task(what, total=total)

            def advance(steps: int = 1, *, what: str | None = None) -> None:
                progress.update(task, advance=steps, description=what)

            yield advance
        seconds = time.monotonic() - began
        if not self.err.is_terminal and seconds > _LONG:
            self.note(f"{what}: {seconds:.0f} s")
