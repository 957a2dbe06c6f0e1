"""Whether a call fits into the devices' memory, asked before anything large is allocated."""

import dataclasses
from collections.abc import Iterable

import jax

from .buckets import capacity_that_fits

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What a call needs on each device, bytes.

    Attributes:
        cache: of keys and values.
        temporary: what the largest of its programs allocates beside its arguments, as its compiler reports.
        rows: prompts that a device holds at a time, padding included.
        positions: capacity of the cache.
        smaller: what the caller may choose smaller where computing takes too much, such as "a chunk below 64".
    """

    cache: int
    temporary: int
    rows: int
    positions: int
    smaller: str | None = None


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that JAX may still allocate on a device; None where the device does not say, as CPUs."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def least_free(devices: Iterable[jax.Device]) -> tuple[int, jax.Device] | None:
    """The device of this process with the least free memory, and how much that is."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    free = [(room, device) for device in here if (room := free_bytes(device)) is not None]
    return min(free, key=lambda pair: pair[0]) if free else None


def check_parameters(needed: int, devices: list[jax.Device]) -> None:
    """Raises `ValueError` if a device has no room for `needed` bytes of parameters."""
    least = least_free(devices)
    if least is not None and needed > least[0]:
        raise ValueError(
            f"the parameters need {needed / _GIB:.2f} GiB on each of {len(devices)} devices and {least[1]} has "
            f"{least[0] / _GIB:.2f} GiB free; cut them over more devices with tp or fsdp, or free the copy that lies "
            "elsewhere on it"
        )


def check_call(need: Need, devices: list[jax.Device]) -> None:
    """Raises `ValueError` if a device has no room for a call, with what would fit."""
    least = least_free(devices)
    if least is None or need.cache + need.temporary <= least[0]:
        return
    room, device = least
    raise ValueError(
        f"{need.rows} prompts a device with {need.positions} positions need {need.cache / _GIB:.2f} GiB for keys and "
        f"values and {need.temporary / _GIB:.2f} GiB to compute, and {device} has {room / _GIB:.2f} GiB free; "
        f"{_remedy(need, room)}"
    )


def _remedy(need: Need, room: int) -> str:
    found = []
    rows = min(need.rows - 1, room * need.rows // (need.cache + need.temporary))
    if rows > 0:
        found.append(f"at most {rows} prompts a device at a time")
    positions = capacity_that_fits((room - need.temporary) * need.positions // max(1, need.cache))
    if 0 < positions < need.positions:
        found.append(f"at most {positions} positions (prompt and new tokens)")
    elif need.smaller:
        found.append(f"a {need.smaller}")
    found.append("a mesh with more devices")
    return "use " + ", or ".join(found)
