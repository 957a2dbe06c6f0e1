"""Whether the installed JAX is one that this version's bits are promised for. Imports nothing heavy: it comes first."""

import importlib.metadata
import sys
from pathlib import Path

#: From the first of a minor series up to the next series, as in pyproject.toml. Equal bits are not promised beyond it.
SUPPORTED = {"jax": ((0, 11, 2), (0, 12)), "flax": ((0, 12, 10), (0, 13))}


def check_versions() -> None:
    """Raises `ImportError` with a remedy if jax or flax is missing or of another series.

    The command line is a module of the package and is imported after it: so for `tbik-jax` the message ends the program
    here, in one line and with the status of a user's mistake.
    """
    message = next(filter(None, (version_problem(name, installed(name)) for name in SUPPORTED)), None)
    if message is None:
        return
    if Path(sys.argv[0]).name == "tbik-jax":
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(message)


def installed(package: str) -> str | None:
    """The version of a package that is installed; None if none is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problem(package: str, version: str | None) -> str | None:
    """What is wrong with that version of `package`, and what to do; None if nothing is."""
    least, below = SUPPORTED[package]
    wanted = f"{package}>={_text(least)},<{_text(below)}"
    if version is None:
        return f"tbik-jax needs {wanted} and it is not installed; run: pip install '{wanted}'"
    if least <= _numbers(version) < below:
        return None
    return (
        f"tbik-jax needs {wanted}, since another series may have other bits, and {version} is installed; "
        f"run: pip install '{wanted}'"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.11.2.dev5" as (0, 11, 2)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


check_versions()  # at import, since `tbik_jax` imports this module before the others
