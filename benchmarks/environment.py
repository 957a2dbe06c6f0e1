"""What a result was measured on; the package's own function, under the name that the benchmarks know."""

from tbik_jax.environment import environment

__all__ = ["environment"]
