"""`python -m tbik_jax` is `tbik-jax`."""

from .cli import main

if __name__ == "__main__":
    main()
