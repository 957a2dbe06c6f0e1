"""Device meshes with the axes data, fsdp and tp."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

#: Axis names, slowest first. The batch is cut over data and fsdp, weights over fsdp and tp.
AXES = ("data", "fsdp", "tp")
BATCH_AXES = ("data", "fsdp")
TP_SIZES = (1, 2, 4, 8)


def make_mesh(
    data: int = 1, fsdp: int = 1, tp: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data * fsdp * tp devices with axes ("data", "fsdp", "tp").

    Args:
        data: replicas that share the batch.
        fsdp: ranks that share the batch and cut the weights, which are gathered where they are used.
        tp: tensor-parallel ranks: 1, 2, 4 or 8.
        devices: at least data * fsdp * tp of them, the first are used; all of JAX's by default.

    Raises:
        ValueError: a size below 1, tp not in 1, 2, 4, 8, or fewer devices than the mesh needs.
    """
    sizes = {"data": data, "fsdp": fsdp, "tp": tp}
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"mesh axis {name}={size} must be a whole number of at least 1")
    _check_tp(tp)
    available = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(available):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} x tp={tp} needs {needed} devices and {len(available)} are there; "
            f"use fewer, or virtual CPU devices: jax.config.update('jax_num_cpu_devices', {max(8, needed)}) before the "
            f"first use of JAX, on the command line --cpu-devices {max(8, needed)}"
        )
    return Mesh(np.asarray(available[:needed]).reshape(data, fsdp, tp), AXES)


def resolve_mesh(mesh: Mesh | None) -> Mesh:
    """The mesh a call runs on, with all three axes; axes that `mesh` lacks get size 1.

    Args:
        mesh: a mesh with any of the axes data, fsdp and tp, in any order; None for the ambient mesh (`jax.set_mesh`),
            else one device.

    Raises:
        ValueError: an axis of another name, a tp size other than 1, 2, 4 or 8, or None under `jax.jit`.
    """
    if mesh is None:
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:
            raise ValueError("mesh=None cannot see the ambient mesh under jax.jit; pass the mesh") from None
        if mesh.empty:
            return make_mesh(devices=jax.devices()[:1])
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, not {type(mesh).__name__}; tbik_jax.make_mesh makes one"
        )
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise ValueError(
            f"mesh axis {unknown[0]!r} is unknown (axes: {', '.join(map(str, mesh.axis_names))}); "
            f"use any of {', '.join(AXES)}"
        )
    _check_tp(mesh.shape.get("tp", 1))
    missing = tuple(name for name in AXES if name not in mesh.axis_names)
    devices = mesh.devices.reshape((1,) * len(missing) + mesh.devices.shape)
    return Mesh(devices, missing + tuple(mesh.axis_names))


def entered(mesh: Mesh, values: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes `mesh` the ambient one for a call with `values`, since JAX refuses a `shard_map` under another one.

    Raises:
        ValueError: the values are being traced, under another ambient mesh.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)):
        return jax.set_mesh(mesh)
    ambient = jax.sharding.get_abstract_mesh()
    if not ambient.empty and ambient != mesh.abstract_mesh:
        raise ValueError(
            f"the ambient mesh of this jax.jit has the axes {ambient.axis_names}, and the call's is {mesh_label(mesh)} "
            f"with {AXES}; make the ambient one with tbik_jax.make_mesh, or set none"
        )
    return contextlib.nullcontext()


def mesh_label(mesh: Mesh) -> str:
    """A short name such as "data=3 tp=2"; axes of size 1 are left out."""
    parts = [f"{name}={mesh.shape[name]}" for name in AXES if mesh.shape.get(name, 1) > 1]
    return " ".join(parts) or "1 device"


def _check_tp(tp: int) -> None:
    if tp not in TP_SIZES:
        raise ValueError(
            f"mesh axis tp={tp} does not cut the tree of 8 leaves into complete subtrees; use tp=1, 2, 4 or 8 "
            "(other device counts through the data axis, e.g. data=3, tp=2 for 6)"
        )
