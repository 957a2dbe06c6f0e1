"""Two pieces of a prompt take turns in a layer, so that one computes while what another sums over tp is under way.

A piece's way through the layers is a generator. It yields where another may go on, with what its next turn takes and
what this turn has computed, and is sent the former back, which then waits for what the turn before it computed. XLA
begins a collective as soon as it can and waits for it as late as it can, and so keeps that order of the kernels. It is
an order in time: each piece computes the same, alone or in turns.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from jax import lax

from ..collectives import exchange_shares, gather_shares, join_shares
from .base import TP, Parallel, Turns
from .invariant import InvariantNumerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelInTurns(Parallel):
    """`Parallel` whose sums over tp end a turn: when what a rank gives is on its way, and when the result is."""

    numerics: InvariantNumerics

    def row_parallel(self, x: jax.Array, w: jax.Array) -> Turns[jax.Array]:
        """See `Parallel.row_parallel`: the bits of `tree_psum`."""
        part = self.numerics.row_partial_sum(x, w)
        shares = yield exchange_shares(part, (TP,)), part
        joined = join_shares(shares, x.dtype)
        whole = yield gather_shares(joined, (TP,), copied=True), joined
        return whole.reshape(part.shape)


def alone[T](turns: Turns[T]) -> T:
    """Runs something in turns from end to end."""
    value = None
    while True:
        try:
            value, _ = turns.send(value)
        except StopIteration as end:
            return end.value


def alternate(pieces: list[Turns[Any]], order: Iterable[int]) -> None:
    """Runs generators until all have ended.

    Args:
        pieces: with as many turns as `order` names.
        order: which piece takes the next turn.
    """
    values: list[Any] = [None] * len(pieces)
    computed, running = None, set(range(len(pieces)))
    for index in order:
        if index not in running:
            continue
        value = values[index]
        if value is not None and computed is not None:
            value, _ = lax.optimization_barrier((value, computed))
        try:
            values[index], computed = pieces[index].send(value)
        except StopIteration:
            running.remove(index)
        if not running:
            return
    raise AssertionError(f"pieces {sorted(running)} have turns left")
