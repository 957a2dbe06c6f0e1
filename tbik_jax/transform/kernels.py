"""Kernels, which nobody can see into: their names, and whether this package wrote them."""

from pathlib import Path
from typing import Any

from jax.extend import source_info_util

from .. import pallas_kernels
from .primitives import KERNELS

_HERE = (str(Path(__file__).parents[1]), str(Path(pallas_kernels.__file__).parent))


def name_of(eqn: Any) -> str:
    """The name of a kernel, which a rule must name to trust it."""
    for key in ("name", "target_name", "call_target_name"):
        if isinstance(eqn.params.get(key), str):
            return eqn.params[key]
    return eqn.primitive.name


def of_this_package(eqn: Any) -> bool:
    """Whether the innermost line that made `eqn` is one of this package, whose kernels keep the contract."""
    return source_info_util.summarize(eqn.source_info).startswith(tuple(f"{path}/" for path in _HERE))


def within(jaxpr: Any) -> bool:
    """Whether `jaxpr` holds a kernel, calls included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inner = (v for eqn in jaxpr.eqns for v in eqn.params.values())
    return any(eqn.primitive.name in KERNELS for eqn in jaxpr.eqns) or any(
        within(v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")
    )
