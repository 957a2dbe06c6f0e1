"""Weights from mesh to mesh: every bit arrives, and none by way of the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tbik_jax
from tbik_jax import rl
from tbik_jax.reshard import reshard
from tests.helpers import assert_same_bits
from tests.models_small import small_model


def _mesh(first, fsdp, tp):
    return tbik_jax.make_mesh(fsdp=fsdp, tp=tp, devices=jax.devices()[first:])


#: (first device, fsdp, tp) of source and target.
PAIRS = {
    "same devices": ((0, 4, 1), (0, 1, 4)),
    "some of the devices": ((0, 4, 1), (0, 1, 2)),
    "more devices": ((0, 1, 2), (0, 2, 4)),
    "other devices": ((0, 2, 2), (4, 1, 4)),
    "overlapping": ((0, 2, 2), (2, 1, 4)),
    "one and one": ((0, 1, 1), (1, 1, 1)),
}


@pytest.fixture
def no_host(monkeypatch):
    """Makes a JAX array's way to the host an error."""

    def refuse(self):
        raise AssertionError("an array was copied to the host")

    def forbid():
        monkeypatch.setattr(array.ArrayImpl, "_value", property(refuse))

    yield forbid
    monkeypatch.undo()


def _awkward():
    """bfloat16 [16, 8] with both zeros, infinities, a NaN and a subnormal."""
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(jnp.bfloat16)
    x[::5, ::3], x[1, 1], x[9, 5], x[15, 7], x[3, 2] = -0.0, np.inf, -np.inf, np.nan, 1e-40
    return x


@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_every_bit_arrives_without_the_host(pair, no_host, monkeypatch):
    source, target = (_mesh(*sizes) for sizes in pair)
    x = _awkward()
    placed = jax.device_put(x, NamedSharding(source, P("tp", "fsdp")))
    wanted = {"cut": NamedSharding(target, P("tp", "fsdp")), "whole": NamedSharding(target, P())}
    no_host()
    moved = reshard({"cut": placed, "whole": placed}, wanted)
    monkeypatch.undo()
    assert {name: each.sharding for name, each in moved.items()} == wanted
    assert_same_bits(moved, {"cut": x, "whole": x})


def test_the_check_finds_the_host_in_device_put(no_host):
    """The twin, and the reason for `reshard`."""
    source, target = (_mesh(*sizes) for sizes in PAIRS["some of the devices"])
    placed = jax.device_put(_awkward(), NamedSharding(source, P("tp", "fsdp")))
    no_host()
    with pytest.raises(AssertionError, match="copied to the host"):
        jax.device_put(placed, NamedSharding(target, P("tp", "fsdp")))


def test_devices_in_another_order_are_another_mesh():
    source = _mesh(0, 1, 4)
    target = Mesh(source.devices[..., ::-1], source.axis_names)
    placed = jax.device_put(_awkward(), NamedSharding(source, P("tp")))
    moved = reshard([placed], [NamedSharding(target, P("tp"))])[0]
    assert moved.sharding.mesh == target
    assert_same_bits(moved, _awkward())


@pytest.mark.parametrize(
    "pair", [PAIRS["same devices"], PAIRS["other devices"], PAIRS["overlapping"]], ids=str
)
def test_a_model_that_was_handed_over_outlives_the_trainers(pair):
    source, target = (_mesh(*sizes) for sizes in pair)
    model = tbik_jax.shard_model(small_model(), source)
    expected = jax.device_get(jax.tree.leaves(nnx.state(model)))
    copy = rl.hand_over(model, target)
    for x in jax.tree.leaves(nnx.state(model)):
        x.delete()  # as a train step's donation does
    leaves = jax.tree.leaves(nnx.state(copy))
    assert all(x.sharding.mesh == target for x in leaves)
    assert_same_bits(leaves, expected)
