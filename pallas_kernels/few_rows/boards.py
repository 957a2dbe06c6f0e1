"""The boards of `rest_of_layer`, as those who call it see them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

#: The bits of a word that has not come yet, and of each of its halves.
MISSING = -1


class Boards(NamedTuple):
    """Two boards, which launches take in turns.

    Attributes:
        blank: int32 [words], all bits set: the next launch's.
        used: int32 [words], whatever: the next launch blanks it.
    """

    blank: jax.Array
    used: jax.Array

    @classmethod
    def create(cls, words: int) -> "Boards":
        """Boards of so many words."""
        return cls(jnp.full((words,), MISSING, jnp.int32), jnp.zeros((words,), jnp.int32))
