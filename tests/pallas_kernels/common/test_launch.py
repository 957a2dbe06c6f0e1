"""Engaged: kernels of a program with overlapping launches wait before they touch what other kernels make."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core as mosaic_gpu_core

from tbik_jax.pallas_kernels.attention import mosaic_gpu as attention
from tbik_jax.pallas_kernels.attention.config import AttentionConfig
from tbik_jax.pallas_kernels.attention.plan import AttentionPlan
from tbik_jax.pallas_kernels.common import launch as launches
from tbik_jax.pallas_kernels.common.launch import Launch, current_launch, overlapping
from tbik_jax.pallas_kernels.qk_norm_rope.mosaic_gpu import qk_norm_rope_mosaic_gpu
from tbik_jax.pallas_kernels.rms_norm import mosaic_gpu as rms_norm
from tbik_jax.pallas_kernels.tree_matmul import mosaic_gpu as tree_matmul

BF16 = jnp.bfloat16
EARLY = Launch(early=True)
WAIT, RELEASE = "griddepcontrol_wait", "griddepcontrol_launch_dependents"


def rows(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(x, w):
    return tree_matmul.tree_matmul_mosaic_gpu(x, w, leaves=4, out_dtype=BF16)


def norm(x, y, scale):
    return rms_norm.rms_norm_mosaic_gpu(x, scale, eps=1e-6, y=y)


def attend(variant, q, k, v, positions):
    config = AttentionConfig(
        variant=variant, **({} if variant == "tiles" else {"parts": 3, "second_launch": True})
    )
    return attention.attention_mosaic_gpu(q, k, v, positions, plan=AttentionPlan(), scale=1.0, config=config)


qkv = rows(1, 1, 2, 4, 64), rows(64), rows(64), *2 * [rows(256, 32, dtype=jnp.float32)]
qkv += rows(1, 1, dtype=jnp.int32), rows(1, dtype=jnp.int32), rows(1, 256, 2, 64), rows(1, 256, 2, 64)
decode = rows(1, 1, 4, 64), rows(1, 2048, 2, 64), rows(1, 2048, 2, 64), rows(1, 1, dtype=jnp.int32)
KERNELS = {
    "tree_matmul": (matmul, (rows(3, 1024), rows(1024, 256)), 1),
    "add_rms_norm": (norm, (rows(3, 1024), rows(3, 1024), rows(1024)), 1),
    "qk_norm_rope": (functools.partial(qk_norm_rope_mosaic_gpu, eps=1e-6), qkv, 1),
    "columns": (functools.partial(attend, "columns"), decode, 2),
    "split": (functools.partial(attend, "split"), decode, 2),
    "tiles": (functools.partial(attend, "tiles"), decode, 1),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tree_matmul, "_resident_clusters", lambda size: 132 // size)
    monkeypatch.setattr(attention, "_check_device", lambda *_: None)


def lowered(name, launch):
    """The modules that a GPU would get, and how often the program waits and lets the next kernel start."""
    function, operands, count = KERNELS[name]
    known = set(mosaic_gpu_core.KNOWN_KERNELS)
    with overlapping(launch):
        traced = jax.jit(lambda *args: function(*args)).trace(*operands)  # a program of its own
        traced.lower(lowering_platforms=("cuda",))
    new = [module for key, module in mosaic_gpu_core.KNOWN_KERNELS.items() if key not in known]
    assert len(new) == count
    text = str(traced.jaxpr)
    return new, text.count(WAIT), text.count(RELEASE)


@pytest.mark.parametrize("name", KERNELS)
def test_an_early_kernel_is_launched_so_and_waits(name):
    modules, waits, releases = lowered(name, EARLY)
    assert all(b"uses_pdl" in module for module in modules)
    assert (waits, releases) == ((3, 1) if name == "tree_matmul" else (len(modules), len(modules)))


@pytest.mark.parametrize("name", KERNELS)
def test_others_do_neither(name):
    modules, waits, releases = lowered(name, Launch())
    assert not any(b"uses_pdl" in module for module in modules)
    assert (waits, releases) == (0, 0)


def test_of_a_matmul_only_the_copies_of_ready_weights_do_not_wait():
    modules, waits, releases = lowered("tree_matmul", Launch(early=True, weights_ready=True))
    assert all(b"uses_pdl" in module for module in modules)
    assert (waits, releases) == (2, 1)  # the copies of x, and the consumers


def kernels_that_wait(name):
    """The bodies, as primitives' names in order, of the kernels that wait."""
    function, operands, _ = KERNELS[name]
    found = []

    def walk(jaxpr):
        names = [equation.primitive.name for equation in jaxpr.eqns]
        if WAIT in names:
            found.append(names)
        for equation in jaxpr.eqns:
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    with overlapping(EARLY):
        walk(jax.make_jaxpr(lambda *args: function(*args))(*operands).jaxpr)
    return found


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "tree_matmul"])
def test_nothing_comes_before_the_wait(name):
    found = kernels_that_wait(name)
    assert len(found) == KERNELS[name][2]
    for names in found:
        assert names[:2] == [RELEASE, WAIT]
        assert len(names) > 10


def test_a_wait_that_comes_late_is_seen(monkeypatch):
    def late(body, launch):
        def waiting(*args, **kwargs):
            body(*args, **kwargs)
            launches.release_next(launch)
            launches.wait_for_last(launch)

        return waiting

    monkeypatch.setattr(rms_norm, "wait_first", late)
    rms_norm._run.clear_cache()
    [names] = kernels_that_wait("add_rms_norm")
    assert names[:2] != [RELEASE, WAIT]
    rms_norm._run.clear_cache()


def test_the_launch_ends_with_its_context():
    with overlapping(EARLY):
        assert current_launch() == EARLY
        with pytest.raises(RuntimeError), overlapping(Launch()):
            assert current_launch() == Launch()
            raise RuntimeError
        assert current_launch() == EARLY
    assert current_launch() == Launch()


def test_the_interpreter_has_no_launches():
    x, w = jnp.ones((2, 64), BF16), jnp.ones((64, 64), BF16)
    run = functools.partial(
        tree_matmul.tree_matmul_mosaic_gpu, leaves=4, out_dtype=jnp.float32, interpret=True
    )
    with overlapping(EARLY):
        assert (run(x, w) == 64).all()
