"""Runs leaves of an output tile one after the other, and adds up their sums in registers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_problem import Ref
from .mosaic_sums import Value, columns_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafLoop:
    """How a warpgroup multiplies a leaf, step by step.

    Attributes:
        multiply: adds the product of step number `count` to an accumulator, in the background, and returns the slot of
            the ring that the step lies in.
        free: says that a slot has been read.
        products: that `multiply` begins.
        steps: of a leaf.
        shape: of a tile, rows and columns.
        block: columns of a block of the result.
    """

    multiply: Callable[[Ref, jax.Array], jax.Array]
    free: Callable[[jax.Array], None]
    products: int
    steps: int
    shape: tuple[int, int]
    block: int
    # Not a constant to the compiler: it would unroll a short loop, and mix up what waits in which registers.
    _trips: jax.Array = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_trips", lax.optimization_barrier(jnp.int32(self.steps)))

    def group(self, count: jax.Array, leaves: int, begun: Callable[[], None]) -> Value:
        """The sum of `leaves` leaves from step number `count` on, which wait for one another in registers.

        All but the last are looked at only when the next one has begun: the tensor cores do not wait for the adds.
        `begun` is called when the first step is under way.
        """
        waiting: list[Value] = []  # complete subtrees whose right sibling has to come, the largest first

        def add_up(index: int, product: jax.Array) -> Value:
            value = columns_of(product, self.block)
            while index & 1:
                value = [left + right for left, right in zip(waiting.pop(), value, strict=True)]
                # Added up here and now: the compiler would else put it off, and keep both accumulators until then.
                value = lax.optimization_barrier(value)
                index >>= 1
            waiting.append(value)
            return value

        def leaf(index: int, begun: Callable[[], None]) -> Value:
            def ended(acc: Ref, last: jax.Array) -> Value:
                if index + 1 == leaves:
                    product = acc[...]
                    self.free(last)
                    return add_up(index, product)

                def next_begun() -> None:
                    self._free_when_read(last)
                    add_up(index, plgpu.wgmma_accumulator_load(acc, wait_n=None))

                return leaf(index + 1, next_begun)

            return self._leaf(count + index * self.steps, begun, ended)

        return leaf(0, begun)

    def _leaf(
        self, count: jax.Array, begun: Callable[[], None], ended: Callable[[Ref, jax.Array], Any]
    ) -> Any:
        """Runs the leaf whose first step is `count`, and leaves its last step in the background.

        `begun` is called when the first step is under way. Returns ended(accumulator, slot of the last step).
        """

        def run(acc: Ref) -> Any:
            def step(i: jax.Array, last: jax.Array) -> jax.Array:
                slot = self.multiply(acc, count + i)
                self._free_when_read(last)
                return slot

            first = self.multiply(acc, count)
            begun()
            return ended(acc, lax.fori_loop(1, self._trips, step, first))

        acc = plgpu.ACC(self.shape, jnp.float32)  # fresh, and so zero, for every leaf
        return pl.run_scoped(run, acc)

    def _free_when_read(self, last: jax.Array) -> None:
        # A slot is freed one step late, so that the tensor cores always have the next step's work already.
        plgpu.wgmma_wait(self.products)
        self.free(last)
