"""Training: the same loss, gradients, optimiser state and weights on every mesh, and what they are worth."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tbik_jax
from benchmarks.hlo import ordered_by_xla
from tbik_jax.layers import InvariantNumerics, invariant
from tbik_jax.layers import training as training_layers
from tbik_jax.layers.training import InvariantTraining
from tbik_jax.models import Qwen3
from tbik_jax.training import shard_model, value_and_grad
from tests.helpers import assert_same_bits, differing
from tests.models_small import CONFIG, small_model
from tests.training_small import Training, batch, next_token_loss, twenty_steps

MESHES = (
    *({axis: size} for axis in ("tp", "fsdp", "data") for size in (2, 4, 8)),
    {"data": 2, "fsdp": 2, "tp": 2},
    {"fsdp": 2, "tp": 4},
    {"data": 4, "tp": 2},
    {"data": 2, "fsdp": 4},
)


def _label(sizes):
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _gradient(model, rows, loss_fn=next_token_loss, sizes=None, **options):
    mesh = tbik_jax.make_mesh(**(sizes or {}))
    loss, gradients = value_and_grad(loss_fn, mesh=mesh, **options)(model, rows)
    return np.asarray(loss), [np.asarray(x) for x in jax.tree.leaves(gradients)]


@pytest.mark.parametrize("sizes", MESHES, ids=_label)
def test_twenty_steps_are_the_same_bits_on_every_mesh(sizes):
    assert_same_bits(twenty_steps(**_options(sizes), **sizes), twenty_steps())


@pytest.mark.parametrize("numerics", ["invariant", "plain"])
def test_a_loss_of_two_arrays_of_tokens(numerics):
    """Loops that are independent: on the CPU they once met in one another's collectives, and stopped."""

    def preference(model, rows):
        return model.logprobs(rows["other"]) - model.logprobs(rows["tokens"]), rows["weights"]

    rows = batch(3) | {"other": batch(4)["tokens"]}
    results = []
    for sizes in ({}, {"data": 2, "tp": 2}, {"fsdp": 2, "tp": 4}):
        mesh = tbik_jax.make_mesh(**sizes)
        model = shard_model(small_model(), mesh)
        gradient = value_and_grad(preference, mesh=mesh, numerics=numerics)
        for _ in range(12 if sizes else 1):
            results.append(
                tbik_jax.fingerprint([np.asarray(x) for x in jax.tree.leaves(gradient(model, rows))])
            )
    assert len(set(results)) == (1 if numerics == "invariant" else 3)


def _options(sizes):
    """Without remat programs are smaller; that it changes no bit is tested beside."""
    return {"remat": False} if sizes in MESHES[:-1] else {}


# Meshes of the test above, whose compiled steps serve here too.
@pytest.mark.parametrize(("before", "after"), [({"tp": 4}, {"data": 4, "tp": 2}), ({"fsdp": 8}, {})], ids=str)
def test_a_run_goes_on_from_a_checkpoint_on_another_mesh(before, after, tmp_path):
    first = Training(tbik_jax.make_mesh(**before), **_options(before))
    losses = first.steps(0, 10)
    tbik_jax.save_checkpoint(tmp_path, 10, model=first.model, optimizer=first.optimizer)
    mesh = tbik_jax.make_mesh(**after)
    second = Training(mesh, **_options(after))
    second.steps(0, 1)  # what it has learnt so far gives way
    restored = tbik_jax.restore_checkpoint(
        tmp_path, model=second.model, optimizer=second.optimizer, mesh=mesh
    )
    assert restored.step == 10
    assert_same_bits((losses + second.steps(10, 20), second.state()), twenty_steps())


def test_a_run_that_forgets_its_optimiser_shows(tmp_path):
    """The twin: the parameters alone are not the run."""
    first = Training(tbik_jax.make_mesh())
    first.steps(0, 10)
    tbik_jax.save_checkpoint(tmp_path, 10, model=first.model, optimizer=first.optimizer)
    second = Training(tbik_jax.make_mesh())
    tbik_jax.restore_checkpoint(tmp_path, model=second.model)
    assert differing(np.stack(second.steps(10, 20)), np.stack(twenty_steps()[0][10:])) > 5


def test_twenty_steps_learn_something():
    losses, _ = twenty_steps()
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_plain_numerics_do_not_agree():
    alone, split = twenty_steps("plain"), twenty_steps("plain", fsdp=2, tp=2)
    assert differing(np.stack(alone[0]), np.stack(split[0])) > 10
    np.testing.assert_allclose(
        np.stack(alone[0]), np.stack(split[0]), rtol=2e-2
    )  # the same training all the same


@pytest.fixture(scope="module")
def whole():
    """Loss and gradients of a model in bfloat16 with tied embeddings, on one device in one pass."""
    model = _tied()
    return model, batch(3), *_gradient(model, batch(3))


def _tied():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    return Qwen3(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(5))


@pytest.mark.parametrize(
    "options",
    [
        {"microbatches": 2},
        {"microbatches": 8},
        {"microbatches": 2, "sizes": {"fsdp": 2, "tp": 2}},
        {"remat": False},
        {"scan_layers": False, "sizes": {"data": 2, "tp": 2}},
    ],
    ids=str,
)
def test_neither_passes_nor_remat_nor_layers_change_a_bit(whole, options):
    model, rows, loss, gradients = whole
    assert_same_bits(_gradient(model, rows, **options), (loss, gradients))


def test_gradients_of_parts_that_are_averaged_and_then_added_show(whole):
    """The twin: accumulation outside of the tree."""
    model, rows, *_ = whole
    other = batch(12)
    both = {name: np.concatenate([x, other[name]]) for name, x in rows.items()}
    weights = [part["weights"].sum() for part in (rows, other)]
    parts = [_gradient(model, part)[1] for part in (rows, other)]
    total = [(a * weights[0] + b * weights[1]) / sum(weights) for a, b in zip(*parts, strict=True)]
    exact = _gradient(model, both, microbatches=2)[1]
    assert sum(differing(a, b) for a, b in zip(total, exact, strict=True)) > 100
    for a, b in zip(total, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_padding_changes_nothing(whole):
    model, rows, loss, gradients = whole
    # The tokens of weight 0 are behind all others of their row.
    seen = np.concatenate([np.ones((len(rows["weights"]), 1)), rows["weights"]], axis=1) > 0
    other = dict(rows, tokens=np.where(seen, rows["tokens"], (rows["tokens"] + 5) % 128).astype(np.int32))
    assert differing(other["tokens"], rows["tokens"]) > 10
    found = _gradient(model, other)
    assert_same_bits(found[0], loss)
    assert_same_bits(
        [np.abs(g) for g in found[1]], [np.abs(g) for g in gradients]
    )  # but for the sign of a zero


def test_a_batch_without_weights_has_no_loss_and_no_gradient(whole):
    model, rows, *_ = whole
    loss, gradients = _gradient(model, dict(rows, weights=np.zeros_like(rows["weights"])))
    assert loss == 0 and not any(g.any() for g in gradients)


def test_log_probabilities_are_those_of_score():
    """What the trainer sees is what a rollout saw."""
    model, rows = small_model(), batch(4)
    found = []

    def keep(model, rows):
        logprobs = model.logprobs(rows["tokens"])
        jax.debug.callback(lambda x: found.append(np.asarray(x)), logprobs)
        return -logprobs, rows["weights"]

    _gradient(model, rows, keep)
    jax.effects_barrier()
    scored = tbik_jax.score(model, [row.tolist() for row in rows["tokens"]], mesh=tbik_jax.make_mesh(tp=2))
    assert_same_bits(found[0], np.stack([np.asarray(row) for row in scored]))


def _keeping(model, rows):
    logprobs = model.logprobs(rows["tokens"])
    return (-logprobs, rows["weights"]), {"logprobs": logprobs, "first": rows["tokens"][:, 0]}


@pytest.mark.parametrize(
    "options",
    [{}, {"microbatches": 4}, {"microbatches": 2, "sizes": {"data": 2, "fsdp": 2, "tp": 2}}],
    ids=str,
)
def test_aux_has_every_row_in_its_place(whole, options):
    model, rows, loss, gradients = whole
    options = dict(options)
    mesh = tbik_jax.make_mesh(**options.pop("sizes", {}))
    (found, aux), found_gradients = value_and_grad(_keeping, mesh=mesh, has_aux=True, **options)(model, rows)
    assert_same_bits(aux["first"], rows["tokens"][:, 0])
    assert_same_bits(aux["logprobs"], np.stack(tbik_jax.score(model, list(rows["tokens"]))))
    assert_same_bits((found, found_gradients), (loss, gradients))


def test_aux_needs_an_entry_for_each_row(whole):
    model, rows, *_ = whole

    def summed(model, rows):
        losses, aux = _keeping(model, rows)
        return losses, {"mean": jnp.mean(aux["logprobs"])}

    with pytest.raises(ValueError, match=re.escape("aux['mean'] of the loss function has shape ()")):
        value_and_grad(summed, mesh=tbik_jax.make_mesh(), has_aux=True)(model, rows)


@pytest.mark.parametrize(
    ("backend", "h", "expected"),
    [("mosaic_gpu", 64, "mosaic_gpu"), ("mosaic_gpu", 16, "reference"), ("reference", 64, "reference")],
)
def test_attention_gives_training_what_it_gives_inference(monkeypatch, backend, h, expected):
    """Where inference takes a kernel, the train step must not take the reference, whose bits are others."""
    q = k = v = jnp.ones((1, 16, 2, h), jnp.bfloat16)
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    taken = []
    kept = jnp.zeros((1, 16, 2), jnp.float32)
    monkeypatch.setattr(invariant, "attention", lambda *x, backend: taken.append(backend) or x[0])
    monkeypatch.setattr(
        training_layers, "attention_with_lse", lambda *x, backend: taken.append(backend) or (x[0], kept)
    )
    monkeypatch.setattr(
        training_layers, "attention_backward", lambda *x, backend: taken.append(backend) or x[:3]
    )
    InvariantNumerics(backend=backend).attention(q, k, v, positions)
    ops = InvariantTraining(backend=backend)
    _, pullback = jax.vjp(lambda q: ops.attention(q, k, v, positions), q)
    pullback(q)
    assert taken == [expected] * 3


def test_gradients_are_those_of_plain_jax_in_float32():
    model, rows = small_model(jnp.float32), batch(6)
    loss, gradients = _gradient(model, rows)
    plain_loss, plain = _gradient(model, rows, numerics="plain")
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    for found, expected in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_gradients_predict_the_loss():
    """Finite differences of the loss itself, along a random direction."""
    model, rows = small_model(jnp.float32), batch(8)
    _, gradients = _gradient(model, rows)
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(state)
    way = [rng.standard_normal(x.shape).astype(np.float32) * np.float32(np.std(x) + 0.1) for x in leaves]

    def loss(step):
        moved = [x + np.float32(step) * d for x, d in zip(leaves, way, strict=True)]
        return float(_gradient(nnx.merge(graphdef, jax.tree.unflatten(treedef, moved)), rows)[0])

    step = 1e-3
    slope = sum(float((g.astype(np.float64) * d).sum()) for g, d in zip(gradients, way, strict=True))
    assert slope == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-2, abs=1e-3)


def test_any_elementwise_loss_is_invariant():
    """A policy-gradient loss with clipped ratios."""

    def loss_fn(model, rows):
        logprobs = model.logprobs(rows["tokens"])
        ratio = 1 + (logprobs - jax.lax.stop_gradient(logprobs))
        return -jnp.minimum(ratio * rows["gain"], jnp.clip(ratio, 0.8, 1.2) * rows["gain"]), rows["weights"]

    model = small_model()
    rows = dict(batch(9), gain=np.random.default_rng(1).standard_normal((8, 1)).astype(np.float32))
    assert_same_bits(
        _gradient(model, rows, loss_fn, {"data": 2, "fsdp": 2}), _gradient(model, rows, loss_fn, {"tp": 4})
    )


def _hlo(numerics, **sizes):
    mesh = tbik_jax.make_mesh(**sizes)
    model, rows = shard_model(small_model(), mesh), batch(0)
    state = jax.tree.leaves(nnx.state(model))
    graphdef, full = nnx.split(model)
    treedef = jax.tree.structure(full)

    def run(leaves, rows):
        merged = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        return value_and_grad(next_token_loss, mesh=mesh, numerics=numerics)(merged, rows)

    options = tbik_jax.training.COMPILER_OPTIONS if numerics == "invariant" else {}
    return jax.jit(run, compiler_options=options).lower(state, rows).compile().as_text()


def test_no_sum_of_the_compiled_gradient_is_left_to_xla():
    hlo = _hlo("invariant", data=2, fsdp=2, tp=2)
    assert "collective-permute" in hlo and "all-gather" in hlo
    assert ordered_by_xla(hlo) == []


def test_the_plain_gradient_has_such_sums():
    lines = "\n".join(ordered_by_xla(_hlo("plain", data=2, fsdp=2, tp=2)))
    assert all(f" {kind}" in lines for kind in ("dot(", "all-reduce", "reduce-scatter", "reduce("))


@pytest.mark.parametrize(
    ("sizes", "rows", "options", "message"),
    [
        ({"data": 3}, 6, {}, "data=3 x fsdp=1 ranks and 1 micro-batches cut the batch into 3 parts"),
        ({"data": 4}, 8, {"microbatches": 4}, "into 16 parts"),
        ({"data": 4}, 6, {}, "6 rows cannot be cut into 4 equal parts"),
        ({}, 3, {}, "3 rows of 16 tokens, which a rank has in a pass, do not cut into token leaves"),
        ({}, 8, {"microbatches": 3}, "microbatches=3 must be 1, 2, 4 or 8"),
        ({}, 8, {"numerics": "exact"}, "numerics='exact' is unknown"),
    ],
)
def test_what_cuts_no_complete_subtrees_is_refused(sizes, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _gradient(small_model(), batch(0, rows), sizes=sizes, **options)


def test_rows_in_an_order_of_ones_own_are_refused():
    """As one would put chosen and rejected answers behind one another: their order would follow the mesh."""

    def loss_fn(model, rows):
        both = jnp.concatenate([rows["tokens"], rows["tokens"]])
        return -model.logprobs(both)[:8], rows["weights"]

    with pytest.raises(ValueError, match=r"takes integer tokens \[8, T\].*not int32 \(16, 16\)"):
        _gradient(small_model(), batch(0), loss_fn)


def test_two_calls_do_not_go_with_passes():
    def loss_fn(model, rows):
        return model.logprobs(rows["tokens"]) - model.logprobs(rows["tokens"][:, ::-1]), rows["weights"]

    with pytest.raises(ValueError, match="calls logprobs 2 times"):
        _gradient(small_model(), batch(0, 16), loss_fn, microbatches=2)


def test_the_ambient_mesh_may_lack_axes():
    model, rows = small_model(), batch(3)
    with jax.set_mesh(jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        loss, gradients = value_and_grad(next_token_loss)(model, rows)
    expected = _gradient(model, rows, sizes={"fsdp": 2, "tp": 2})
    assert_same_bits((np.asarray(loss), [np.asarray(x) for x in jax.tree.leaves(gradients)]), expected)


def test_a_model_that_lies_elsewhere_is_refused():
    mesh = tbik_jax.make_mesh(tp=2)
    model = small_model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"does not lie on the mesh tp=2.*shard_model"):
        tbik_jax.train_step(next_token_loss, mesh=mesh)(model, optimizer, batch(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 200}, "vocab_size=200"),
        ({"num_key_value_heads": 6, "num_attention_heads": 12, "head_dim": 32}, "num_key_value_heads=6"),
    ],
    ids=str,
)
def test_a_model_whose_gradients_do_not_cut_is_refused(change, message):
    model = Qwen3(dataclasses.replace(CONFIG, **change), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        _gradient(model, batch(0))


def test_arrays_of_a_batch_need_the_same_rows():
    rows = batch(0)
    with pytest.raises(ValueError, match="the same number of leading rows; these have 4, 8"):
        _gradient(small_model(), dict(rows, weights=rows["weights"][:4]))


def test_a_loss_function_must_return_losses_and_weights():
    def scalar(model, rows):
        return jnp.mean(model.logprobs(rows["tokens"])), rows["weights"]

    with pytest.raises(ValueError, match=r"the loss function returned losses float32 \(\)"):
        _gradient(small_model(), batch(0), scalar)
    with pytest.raises(ValueError, match=r"must return \(losses, weights\), two arrays \[B, T\]"):
        _gradient(small_model(), batch(0), lambda model, rows: model.logprobs(rows["tokens"]))
