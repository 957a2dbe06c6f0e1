"""The command line `tbik-jax`: one file a command, and what they share.

Exit status: 0 when everything held, 1 when a promise is broken, 2 for a user's mistake, 3 for an error of the program.
"""

from .app import app, main

__all__ = ["app", "main"]
