"""TP 1, 2, 4 and 8 on one device have one set of bits: what larger meshes compute, with one device's arithmetic.

On the CPU it checks the emulation against real meshes of virtual devices; `tests/gpu` runs it on a GPU's kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbik_jax import make_mesh
from tbik_jax.mesh import resolve_mesh
from tbik_jax.models.qwen3.modules import cache_spec, init_cache
from tbik_jax.pallas_kernels.rope.api import rope_tables
from tbik_jax.steps import Engine
from tests import in_turn
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG, small_model

LENGTHS = np.asarray([20, 9], np.int32)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 20)).astype(np.int32)
CAPACITY = 128


def states(model, tp, emulated, numerics="invariant"):
    mesh = resolve_mesh(make_mesh() if emulated else make_mesh(tp=tp))
    engine = Engine.create(model, mesh, numerics, scan_layers=False)
    cache = init_cache(engine.steps.cache_shapes(2, CAPACITY))
    tables = tuple(map(jnp.asarray, rope_tables(CAPACITY, CONFIG.head_dim, CONFIG.rope_theta)))
    if not emulated:
        place = NamedSharding(mesh, PartitionSpec())
        arrays = jax.device_put((TOKENS, LENGTHS, tables), place)
        return engine.steps.hidden_states(engine.parameters, cache, *arrays)
    specs = cache_spec(CONFIG, stacked=False)
    return in_turn.hidden_states(engine, cache, specs, *map(jnp.asarray, (TOKENS, LENGTHS)), tables, tp)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_in_turn_have_the_bits_of_a_mesh(monkeypatch, tp):
    model = small_model(jnp.float32)
    expected = jax.tree.map(np.asarray, states(model, 1, emulated=False))
    in_turn.patch_kernels(monkeypatch)
    assert_same_bits(states(model, tp, emulated=True), expected)
