"""The global norm in one order, and fp32 state beside bfloat16 parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tbik_jax
from tbik_jax.loading import parameter_shardings
from tbik_jax.models import Qwen3
from tbik_jax.optimizers import clip_by_global_norm, global_norm, mixed_precision
from tests.helpers import assert_same_bits, differing
from tests.models_small import CONFIG


def _gradients(seed=0):
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    state = nnx.state(Qwen3(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 2.0 ** rng.uniform(-8, 8, x.shape), jnp.float32),
        state,
    )


def _on(mesh, tree):
    return jax.device_put(tree, parameter_shardings(tree, mesh))


def _norm(tree, **sizes):
    mesh = tbik_jax.make_mesh(**sizes)
    return np.asarray(jax.jit(lambda t: global_norm(t, mesh=mesh))(_on(mesh, tree)))


@pytest.mark.parametrize(
    "sizes", [{"tp": 2}, {"tp": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tp": 2}, {"data": 8}], ids=str
)
def test_the_norm_is_the_same_bits_on_every_mesh(sizes):
    for seed in range(3):
        tree = _gradients(seed)
        assert_same_bits(_norm(tree, **sizes), _norm(tree))


def test_optax_norm_is_not():
    """The twin: XLA adds up a sharded array by shards."""

    def norm(tree, mesh):
        return np.asarray(jax.jit(optax.tree.norm)(_on(mesh, tree)))

    meshes = [tbik_jax.make_mesh(**sizes) for sizes in ({}, {"tp": 8}, {"fsdp": 8})]
    assert any(
        differing(norm(_gradients(seed), meshes[0]), norm(_gradients(seed), mesh))
        for seed in range(3)
        for mesh in meshes[1:]
    )


def test_the_norm_is_accurate():
    tree = _gradients()
    exact = np.sqrt(sum((np.asarray(x).astype(np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(_norm(tree), exact, rtol=2e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_is_that_of_optax(max_norm):
    tree = _gradients()
    ours, theirs = clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
    found, expected = (
        jax.jit(lambda t, tx=tx: tx.update(t, optax.EmptyState())[0])(tree) for tx in (ours, theirs)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    if max_norm > 1:  # nothing to clip: not a bit changes
        assert_same_bits(found, tree)


def test_a_norm_to_clip_at_must_be_positive():
    with pytest.raises(ValueError, match="max_norm=0 must be positive"):
        clip_by_global_norm(0)


def _walk(tx, steps, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((64,)), dtype)}
    state = tx.init(params)
    for _ in range(steps):
        gradient = {"w": jnp.asarray(rng.standard_normal((64,)), jnp.float32)}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_master_weights_are_those_of_training_in_float32():
    tx = optax.adamw(1e-3)
    params, state = _walk(mixed_precision(tx, master=True), 30)
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.standard_normal((64,)), jnp.bfloat16).astype(jnp.float32)
    wide, inner = {"w": start}, tx.init({"w": start})
    for _ in range(30):
        updates, inner = tx.update({"w": jnp.asarray(rng.standard_normal((64,)), jnp.float32)}, inner, wide)
        wide = optax.apply_updates(wide, updates)
    np.testing.assert_allclose(state.master["w"], wide["w"], rtol=1e-6)
    assert params["w"].dtype == jnp.bfloat16
    assert_same_bits(params["w"], state.master["w"].astype(jnp.bfloat16))
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


def test_without_them_small_updates_are_lost():
    """The twin, and why one wants them."""
    small = optax.sgd(1e-3)  # less than half of bfloat16's step at most of the numbers
    assert differing(*(_walk(mixed_precision(small, master=m), 40)[0]["w"] for m in (True, False))) > 20


def test_parameters_have_to_be_given():
    tx = mixed_precision(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


def test_state_lies_where_its_parameter_does():
    mesh = tbik_jax.make_mesh(tp=2)
    x = jax.device_put(jnp.ones((8, 4), jnp.bfloat16), NamedSharding(mesh, P("tp", None)))
    state = mixed_precision(optax.adamw(1e-3), master=True).init({"w": x})
    for each in jax.tree.leaves(state):
        if each.shape == x.shape:
            assert each.sharding.is_equivalent_to(x.sharding, 2)


def test_a_gradient_that_is_no_number_spoils_all_as_in_optax():
    tree = _gradients()
    first, *rest = jax.tree.leaves(tree)
    broken = jax.tree.unflatten(jax.tree.structure(tree), [first.at[0].set(jnp.nan), *rest])
    clip = clip_by_global_norm(0.5)
    found = jax.jit(lambda t: clip.update(t, optax.EmptyState())[0])(broken)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(found))
