"""The measurement of the drop-in: what it compares, and that it finds a function whose rows differ."""

import builtins
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import drop_in_speed
from benchmarks.drop_in_speed import Case, _case_row, _differ, measure


def test_elements_are_compared_by_their_bits() -> None:
    a = {"x": np.asarray([0.0, 1.0, np.nan], np.float32), "y": np.asarray([1, 2])}
    b = {"x": np.asarray([-0.0, 1.0, np.nan], np.float32), "y": np.asarray([1, 3])}
    assert _differ(a, a) == 0 and _differ(a, b) == 2


def test_a_row_that_differs_alone_is_counted() -> None:
    """The twin of `invariant_differ == 0`: a function of the batch's size."""
    x = jnp.ones((4, 8))
    case = Case(
        plain=lambda x: x * 2,
        invariant=lambda x: x * x.shape[0],
        args=(x,),
        one=((x[2:3],), lambda out: out[2:3]),
    )
    row = _case_row(lambda: case)
    assert (row["plain_differ"], row["invariant_differ"], row["of"]) == (0, 8, 8)
    assert row["largest_difference"] == 1.0 and row["slowdown"] > 0 and row["clock"] == "host"


def test_the_rounding_that_jit_drops_is_found() -> None:
    row = measure("field", "bfloat16 rounding under jit", True)
    assert row["plain_differ"] > 0 and row["invariant_differ"] == 0


def test_a_library_that_is_missing_is_an_error_of_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("equinox", "haiku"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="equinox"):
        measure("model", "equinox transformer, forward", True)
    assert {"nnx transformer, forward", "haiku resnet, forward"} <= set(drop_in_speed.GROUPS["model"](True))
