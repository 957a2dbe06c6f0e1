"""Meshes: every number of devices from 1 to 8 has one, a user's mesh keeps its order, the rest is refused."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from tbik_jax.mesh import AXES, TP_SIZES, make_mesh, mesh_label, resolve_mesh


def devices(count: int) -> np.ndarray:
    return np.asarray(jax.devices()[:count])


def ids(mesh: Mesh) -> list[int]:
    return [device.id for device in mesh.devices.flat]


def meshes() -> list[tuple[int, int, int]]:
    """(data, fsdp, tp) of every mesh that eight devices allow."""
    sizes = range(1, 9)
    return [(d, f, t) for d in sizes for f in sizes for t in TP_SIZES if d * f * t <= 8]


# --- make_mesh ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "fsdp", "tp"), meshes())
def test_make_mesh_has_three_axes_and_the_first_devices(data: int, fsdp: int, tp: int) -> None:
    mesh = make_mesh(data, fsdp, tp)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tp": tp}
    assert ids(mesh) == ids(Mesh(devices(data * fsdp * tp), "x"))


@pytest.mark.parametrize("count", range(1, 9))
def test_every_number_of_devices_has_a_mesh(count: int) -> None:
    found = [shape for shape in meshes() if np.prod(shape) == count]
    assert (count, 1, 1) in found and (1, count, 1) in found
    assert ((1, 1, count) in found) == (count in TP_SIZES)


def test_make_mesh_is_one_device_by_default_and_takes_others() -> None:
    assert ids(make_mesh()) == ids(make_mesh(tp=np.int64(1))) == [jax.devices()[0].id]
    chosen = jax.devices()[::-2]
    assert ids(make_mesh(data=2, tp=2, devices=chosen)) == [device.id for device in chosen]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 3}, "mesh axis tp=3 does not cut the tree of 8 leaves .* use tp=1, 2, 4 or 8"),
        ({"tp": 16}, "mesh axis tp=16"),
        ({"tp": 0}, "mesh axis tp=0 must be a whole number of at least 1"),
        ({"data": 0}, "mesh axis data=0 must be a whole number"),
        ({"fsdp": -2}, "mesh axis fsdp=-2 must be a whole number"),
        ({"data": 2.0}, "mesh axis data=2.0 must be a whole number"),
        ({"data": 3, "tp": 4}, "data=3 x fsdp=1 x tp=4 needs 12 devices and 8 are there; use fewer"),
        ({"fsdp": 9}, "needs 9 devices and 8 are there"),
    ],
)
def test_make_mesh_refuses(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_make_mesh_refuses_more_than_the_given_devices() -> None:
    with pytest.raises(ValueError, match="needs 4 devices and 2 are there"):
        make_mesh(tp=4, devices=jax.devices()[:2])


# --- resolve_mesh ------------------------------------------------------------------------------------------


def test_a_whole_mesh_stays_as_it_is() -> None:
    mesh = make_mesh(2, 2, 2)
    assert resolve_mesh(mesh) == mesh


@pytest.mark.parametrize(
    "names", [("tp", "data"), ("fsdp", "tp"), ("tp", "fsdp", "data"), ("data",), ("tp",)]
)
def test_the_order_of_axes_and_devices_is_kept_and_missing_axes_are_added(names: tuple[str, ...]) -> None:
    shape = (2,) * len(names)
    chosen = devices(2 ** len(names))[::-1]
    mesh = resolve_mesh(Mesh(chosen.reshape(shape), names))
    assert set(mesh.axis_names) == set(AXES)
    assert tuple(name for name in mesh.axis_names if name in names) == names
    assert all(mesh.shape[name] == (2 if name in names else 1) for name in AXES)
    assert ids(mesh) == [device.id for device in chosen]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes_of_jax_serve(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tp"), axis_types=(axis_type,) * 2)
    assert dict(resolve_mesh(mesh).shape) == {"fsdp": 1, "data": 2, "tp": 4}


def test_no_mesh_is_one_device() -> None:
    mesh = resolve_mesh(None)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tp": 1} and ids(mesh) == [jax.devices()[0].id]


def test_no_mesh_is_the_ambient_mesh_where_there_is_one() -> None:
    ambient = Mesh(devices(4)[::-1].reshape(2, 2), ("tp", "data"))
    with jax.set_mesh(ambient):
        assert resolve_mesh(None) == resolve_mesh(ambient)
        assert resolve_mesh(make_mesh(tp=8)) == make_mesh(tp=8)
    assert resolve_mesh(None).size == 1


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((2,), ("model",), r"mesh axis 'model' is unknown \(axes: model\); use any of data, fsdp, tp"),
        ((2, 2), ("data", "seq"), "mesh axis 'seq' is unknown"),
        ((3,), ("tp",), "mesh axis tp=3 does not cut the tree"),
        ((6,), ("tp",), "mesh axis tp=6"),
    ],
)
def test_resolve_mesh_refuses(shape: tuple[int, ...], names: tuple[str, ...], message: str) -> None:
    mesh = Mesh(devices(int(np.prod(shape))).reshape(shape), names)
    with pytest.raises(ValueError, match=message):
        resolve_mesh(mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        resolve_mesh(None)


@pytest.mark.parametrize("other", [4, "tp=2", AbstractMesh((2,), ("tp",)), jax.devices])
def test_resolve_mesh_refuses_what_is_no_mesh(other: object) -> None:
    with pytest.raises(ValueError, match=f"not {type(other).__name__}; tbik_jax.make_mesh makes one"):
        resolve_mesh(other)


@pytest.mark.parametrize(
    ("sizes", "label"),
    [
        ((1, 1, 1), "1 device"),
        ((1, 1, 4), "tp=4"),
        ((3, 1, 2), "data=3 tp=2"),
        ((2, 2, 2), "data=2 fsdp=2 tp=2"),
    ],
)
def test_a_label_names_the_axes_that_cut(sizes: tuple[int, int, int], label: str) -> None:
    assert mesh_label(make_mesh(*sizes)) == label


def test_the_ambient_mesh_cannot_be_seen_under_jit():
    def traced(x: jax.Array) -> jax.Array:
        resolve_mesh(None)
        return x

    with pytest.raises(ValueError, match="mesh=None cannot see the ambient mesh"):
        jax.jit(traced)(1)
