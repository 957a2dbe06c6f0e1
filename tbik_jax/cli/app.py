"""The app: registers the commands, and says what a user got wrong in one line."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, bisect, compare, export, generate, import_, verify
from .errors import USER_MISTAKE

#: One line a command, in the order of `tbik-jax --help`: name, function, example.
_COMMANDS: tuple[tuple[str, Callable[..., Any], str], ...] = (
    ("generate", generate.generate, generate.EXAMPLE),
    ("compare", compare.compare, compare.EXAMPLE),
    ("verify", verify.verify, verify.EXAMPLE),
    ("bench", bench.bench, bench.EXAMPLE),
    ("bisect", bisect.bisect, bisect.EXAMPLE),
    ("import", import_.import_, import_.EXAMPLE),
    ("export", export.export, export.EXAMPLE),
)


class OneLineErrors(TyperGroup):
    """A group whose usage errors are one line on stderr, and exit with 2."""

    def main(  # type: ignore[override]  # the others are passed by name
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any
    ) -> Any:
        try:
            status = super().main(args, standalone_mode=False, **options)
        except typer.Abort:
            status = 130
        except Exception as error:
            if not hasattr(error, "format_message"):  # else it is one of the parser's own errors
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "tbik-jax"
            message = error.format_message().rstrip(".")
            print(f"error: {message}; see {command} --help", file=sys.stderr)
            status = USER_MISTAKE
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="tbik-jax",
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"tbik-jax {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Deterministic inference in JAX: the same bits on any mesh, in any batch.

    Exit status: 0 all held, 1 a promise is broken, 2 a mistake in the call, 3 an error of the program.
    """


for _name, _function, _example in _COMMANDS:
    app.command(_name, epilog=f"Example: `{_example}`")(_function)


def main() -> None:
    """The entry point of `tbik-jax` and of `python -m tbik_jax`."""
    app(prog_name="tbik-jax")
