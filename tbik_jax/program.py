"""A jitted step whose programs can be compiled in the background, a few at a time."""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    workers = max(2, min(8, (os.cpu_count() or 2) // 2))
    return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tbik-jax-compile")


class Program:
    """A jitted function, compiled once for each set of argument shapes.

    XLA compiles one program on one core. `start` lets a program compile while another compiles or runs; a call waits
    for its own.
    """

    def __init__(self, jitted: Any):
        """Wraps `jitted`, whose arguments always have the shardings that its `in_specs` name."""
        self.lower: Callable[..., Any] = jitted.lower
        self._compiled: dict[Any, Future[Any]] = {}
        self._lock = threading.Lock()

    def start(self, *args: Any) -> None:
        """Begins to compile for arguments like these: arrays on their devices, or `jax.ShapeDtypeStruct`s of some."""
        self._future(args)

    def temporary_bytes(self, *args: Any) -> int:
        """What the program allocates on a device beside its arguments: temporaries, and results that reuse none."""
        analysis = self._future(args).result().memory_analysis()
        if analysis is None:
            return 0
        fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return int(analysis.temp_size_in_bytes + max(0, fresh))

    def __call__(self, *args: Any) -> Any:
        """Runs the program; raises what compiling raised."""
        return self._future(args).result()(*args)

    def _future(self, args: tuple[Any, ...]) -> Future[Any]:
        leaves, treedef = jax.tree.flatten(args)
        key = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        with self._lock:
            known = self._compiled.get(key)
            if known is None or (
                known.done() and known.exception() is not None
            ):  # a failure may be tried again
                shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in leaves]
                self._compiled[key] = _compilers().submit(self._compile, jax.tree.unflatten(treedef, shapes))
            return self._compiled[key]

    def _compile(self, shapes: tuple[Any, ...]) -> Any:
        return self.lower(*shapes).compile()
