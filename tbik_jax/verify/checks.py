"""A check: something that runs, may find a promise broken, and leaves bits whose fingerprint can be kept."""

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import jax
import numpy as np

from ..fingerprint import fingerprint
from ..synthetic import random_values
from ..versions import installed

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Broken(Exception):
    """A promise does not hold here; the text says which and by how much."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise of one op.

    Attributes:
        name: of the op or the collective.
        what: is compared, in a few words.
        run: returns a tree of arrays that is a function of nothing but the device's kind and the versions.
    """

    name: str
    what: str
    run: Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a check.

    Attributes:
        name: of the check.
        what: was compared.
        ok: it held; None where it was not reached in time.
        detail: what is wrong, or how the bits compare with those that are kept.
        fingerprint: of what it computed; None where it was broken or not reached.
        seconds: it took.
    """

    name: str
    what: str
    ok: bool | None
    detail: str
    fingerprint: str | None
    seconds: float


def run_checks(
    checks: Sequence[Check], *, limit: float, kept: dict[str, str] | None = None
) -> Iterator[Result]:
    """Runs checks one by one.

    Args:
        checks: to run.
        limit: seconds after which no further one begins; those left are reported as not reached.
        kept: fingerprints by name, as they must be; None takes those for this kind of device, if there are any.
    """
    kept = expected_fingerprints() if kept is None else kept
    began = time.monotonic()
    for check in checks:
        if time.monotonic() - began > limit:
            yield Result(
                name=check.name,
                what=check.what,
                ok=None,
                detail=f"not reached in {limit:.0f} s",
                fingerprint=None,
                seconds=0.0,
            )
            continue
        yield _run(check, kept)


def _run(check: Check, kept: dict[str, str]) -> Result:
    began = time.monotonic()
    result = functools.partial(Result, name=check.name, what=check.what)
    try:
        found = fingerprint(jax.tree.map(np.asarray, check.run()))
    except Broken as broken:
        return result(ok=False, detail=str(broken), fingerprint=None, seconds=time.monotonic() - began)
    except Exception as error:  # a kernel that does not compile is a broken promise too
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return result(ok=False, detail=detail, fingerprint=None, seconds=time.monotonic() - began)
    ok, detail = True, ""
    if check.name in kept:
        ok = found == kept[check.name]
        detail = (
            "the bits that are kept"
            if ok
            else f"other bits than those kept for {device_key()}: fingerprint {found[:12]}, not {kept[check.name][:12]}"
        )
    return result(ok=ok, detail=detail, fingerprint=found, seconds=time.monotonic() - began)


def device_key() -> str:
    """What bits are promised for: kind of device (for CPUs the machine), jax, and this package."""
    device = jax.devices()[0]
    kind = f"{device.device_kind} {platform.machine()}" if device.platform == "cpu" else device.device_kind
    return f"{kind}, jax {installed('jax')}"


def expected_fingerprints() -> dict[str, str]:
    """Fingerprints by check that are kept for this kind of device and this JAX; empty if there are none."""
    text = resources.files(__package__).joinpath("expected.json").read_text(encoding="utf-8")
    return json.loads(text).get(device_key(), {})


def same(actual: Any, expected: Any, what: str) -> None:
    """Raises `Broken` unless every bit of two trees of arrays is equal."""
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        wrong = _bits(ours) != _bits(theirs)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise Broken(f"{what}: {int(wrong.sum())} of {wrong.size} elements differ, the first at {first}")


def differs(actual: Any, expected: Any, what: str) -> None:
    """Raises `Broken` if two trees are equal bit for bit: then the comparison beside it shows nothing."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    if not any((_bits(ours) != _bits(theirs)).any() for ours, theirs in pairs):
        raise Broken(f"{what}: has the same bits, so this check could not fail")


def wide_values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 values with a spread of 2**-12 .. 2**12 along the last axis: the same in every version of numpy."""
    exponents = np.random.PCG64(seed).random_raw(shape[-1]) % np.uint64(25)
    return np.ldexp(random_values("wide", shape, seed, 1.0), exponents.astype(np.int32) - 12)


def _bits(x: Any) -> np.ndarray:
    array = np.ascontiguousarray(np.asarray(x))
    return array.view(_INTEGERS[array.dtype.itemsize])
