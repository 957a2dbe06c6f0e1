"""TP 1, 2, 4 and 8 on one device have one set of bits: what larger meshes compute, with one device's arithmetic.

On the CPU it checks the emulation against real meshes of virtual devices; `tests/gpu` runs it on a GPU's kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tbik_jax import make_mesh, synthetic
from tbik_jax.mesh import resolve_mesh
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.modules import cache_spec, init_cache
from tbik_jax.pallas_kernels.common.backend import device_backend
from tbik_jax.pallas_kernels.rope.api import rope_tables
from tbik_jax.pallas_kernels.tree_matmul.plan import ContractionPlan
from tbik_jax.steps import Engine
from tests import in_turn
from tests.helpers import assert_same_bits, differing
from tests.models_small import CONFIG, small_model

LENGTHS = np.asarray([20, 9], np.int32)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 20)).astype(np.int32)
CAPACITY = 128


def states(model, tp, emulated):
    """Hidden states and logits on a mesh of `tp` devices, or on one device that stands for them."""
    config = model.config
    mesh = resolve_mesh(make_mesh() if emulated else make_mesh(tp=tp))
    engine = Engine.create(model, mesh, "invariant", scan_layers=False)
    cache = init_cache(engine.steps.cache_shapes(2, CAPACITY))
    tables = tuple(map(jnp.asarray, rope_tables(CAPACITY, config.head_dim, config.rope_theta)))
    if not emulated:
        place = NamedSharding(mesh, PartitionSpec())
        arrays = jax.device_put((TOKENS, LENGTHS, tables), place)
        return engine.steps.hidden_states(engine.parameters, cache, *arrays)
    specs = cache_spec(config, stacked=False)
    return in_turn.hidden_states(engine, cache, specs, *map(jnp.asarray, (TOKENS, LENGTHS)), tables, tp)


def check(monkeypatch, model, sizes):
    expected = jax.tree.map(np.asarray, states(model, 1, emulated=False))
    in_turn.patch_kernels(monkeypatch)
    for tp in sizes:
        assert_same_bits(states(model, tp, emulated=True), expected)
    # twin: one leaf a rank, as an ordinary sharded matmul has it
    monkeypatch.setattr(ContractionPlan, "local_leaves", lambda self, ranks: 1)
    logits = states(model, 2, emulated=True)[1]
    assert differing(logits, expected[1]) > logits.size // 10


def test_shards_in_turn_have_the_bits_of_one_device(monkeypatch):
    check(monkeypatch, small_model(jnp.float32), (2, 4, 8))


def test_the_emulation_has_the_bits_of_a_mesh(monkeypatch):
    model = small_model(jnp.float32)
    expected = jax.tree.map(np.asarray, states(model, 4, emulated=False))
    in_turn.patch_kernels(monkeypatch)
    assert_same_bits(states(model, 4, emulated=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
def test_shards_in_turn_on_a_gpu(monkeypatch, layers):
    """A decoder layer, and a small model, with the kernels of a GPU."""
    if device_backend(jax.devices()[0]) != "mosaic_gpu":
        pytest.skip("no Hopper GPU here")
    raw = synthetic.small_config(
        num_hidden_layers=layers,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=8192,
    )
    model = Qwen3(Qwen3Config.from_dict(raw), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    check(monkeypatch, model, (1, 2, 4, 8))
