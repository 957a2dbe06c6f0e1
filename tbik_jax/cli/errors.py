"""What an exception means to a person at the command line: one line with a remedy, and the exit status."""

import functools
import re
import sys
import traceback
from collections.abc import Callable

import jax
import typer

BROKEN_PROMISE, USER_MISTAKE, PROGRAM_ERROR = 1, 2, 3


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """A command that exits with the status it returns, and whose errors are one line; `--debug` shows the traceback."""

    @functools.wraps(function)
    def run(*args: object, **options: object) -> None:
        try:
            status = function(*args, **options)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if options.get("debug"):
                traceback.print_exc()
            status, line = explain(error)
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(status or 0)

    return run


def explain(error: Exception) -> tuple[int, str]:
    """The exit status and the line of text for an error."""
    text = " ".join(str(error).split())
    if _out_of_memory(error, text):
        wanted = re.search(r"allocat\w* ([\d.]+ ?\w*i?B\b|\d+ bytes)", text)
        return USER_MISTAKE, (
            f"out of memory on a device{f' ({wanted[1]} more were asked for)' if wanted else ''}; use a larger mesh "
            "(--mesh tp=2), fewer prompts at a time, fewer --max-new-tokens or --dtype bfloat16, and look in "
            "nvidia-smi for other processes that hold the memory"
        )
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        reason = text.partition("Unable to initialize backend")[2].partition(" (")[0].strip()
        return USER_MISTAKE, (
            f"JAX cannot start the backend {reason}; `tbik-jax verify` says what is wrong, and JAX_PLATFORMS=cpu runs "
            "without a GPU"
        )
    if isinstance(error, ValueError | FloatingPointError | OSError):
        return USER_MISTAKE, text or type(error).__name__
    return PROGRAM_ERROR, (
        f"{type(error).__name__}: {text[:300]} (not a mistake of yours, as far as this program can tell: "
        "--debug shows where; please report it)"
    )


def _out_of_memory(error: Exception, text: str) -> bool:
    kinds = isinstance(error, jax.errors.JaxRuntimeError | MemoryError)
    return kinds and (
        isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    )
