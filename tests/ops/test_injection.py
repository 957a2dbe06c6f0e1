"""`TreeDotGeneral` in Flax layers and inside shard_map: the order, one trace, the tree over ranks, its gradient."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import tbik_jax
from tbik_jax import TreeDotGeneral
from tbik_jax.ops import contraction
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

F32 = np.float32
ROWS = (((1,), (0,)), ((), ()))


def layers(dot_general: Any, einsum: Any) -> dict[str, Any]:
    """Layers without a bias: (call, input)."""
    x = normal(np.random.default_rng(0), (9, 64))

    def nnx_layer(cls: Any, *sizes: Any, **options: Any) -> Any:
        return cls(*sizes, use_bias=False, dot_general=dot_general, rngs=nnx.Rngs(0), **options)

    dense = nn.Dense(24, use_bias=False, dot_general=dot_general)
    parameters = dense.init(jax.random.key(0), x)
    return {
        "nnx.Linear": (nnx_layer(nnx.Linear, 64, 24), x),
        "nnx.LinearGeneral": (
            nnx_layer(nnx.LinearGeneral, (4, 16), (2, 12), axis=(-2, -1)),
            x.reshape(9, 4, 16),
        ),
        "nnx.Einsum": (nnx.Einsum("bk,kn->bn", (64, 24), einsum_op=einsum, rngs=nnx.Rngs(0)), x),
        "linen.Dense": (lambda x: dense.apply(parameters, x), x),
    }


@pytest.mark.parametrize("name", ["nnx.Linear", "nnx.LinearGeneral", "nnx.Einsum", "linen.Dense"])
def test_flax_layers_take_it(name: str) -> None:
    layer, x = layers(TreeDotGeneral(), tbik_jax.einsum)[name]
    plain, _ = layers(jax.lax.dot_general, jnp.einsum)[name]
    whole = layer(x)
    np.testing.assert_allclose(whole, plain(x), rtol=1e-5, atol=1e-5)
    assert_same_bits(layer(x[2:3]), whole[2:3])
    one_leaf, _ = layers(TreeDotGeneral(leaves=1), lambda *a, **k: tbik_jax.einsum(*a, leaves=1, **k))[name]
    assert differing(one_leaf(x), whole) > 0


def test_equal_ones_share_a_trace() -> None:
    assert TreeDotGeneral(leaves=4, axis=("a", "b")) == TreeDotGeneral(leaves=4, axis=["a", "b"])  # type: ignore[arg-type]
    assert hash(TreeDotGeneral()) == hash(TreeDotGeneral(leaves=8))
    contraction._dot.clear_cache()
    x = jnp.ones((5, 32))
    w = jnp.ones((32, 32))

    def model(x: jax.Array, count: int) -> jax.Array:
        for _ in range(count):
            x = TreeDotGeneral()(x, w, ROWS)
        return x

    text = jax.jit(model, static_argnums=1).lower(x, 6).as_text()
    assert (
        len(re.findall(r"call @_dot\w*\(", text)) == 6
        and len(re.findall(r"func private @_dot\w*\(", text)) == 1
    )
    traces = []

    def counted(layer: nnx.Linear, x: jax.Array) -> jax.Array:
        traces.append(1)
        return layer(x)

    run = nnx.jit(counted)
    for seed in range(3):
        run(nnx.Linear(32, 8, dot_general=TreeDotGeneral(), rngs=nnx.Rngs(seed)), x)
    assert len(traces) == 1
    run(nnx.Linear(32, 8, dot_general=TreeDotGeneral(leaves=1), rngs=nnx.Rngs(0)), x)
    assert len(traces) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_inside_shard_map_it_has_the_bits_of_one_device(ranks: int, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, w = mixed(rng, (6, 256), DTYPES[dtype]), normal(rng, (256, 24), DTYPES[dtype])
    mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("tp",))
    specs = PartitionSpec(None, "tp"), PartitionSpec("tp", None)

    def sharded(dot: Any) -> Any:
        return jax.shard_map(dot, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)

    def loss(dot: Any) -> Any:
        return jax.jit(jax.grad(lambda x, w: tbik_jax.sum(dot(x, w).astype(F32) ** 2), argnums=(0, 1)))

    alone = lambda x, w: TreeDotGeneral()(x, w, ROWS)  # noqa: E731
    across = sharded(lambda x, w: TreeDotGeneral(axis="tp")(x, w, ROWS))
    assert_same_bits(jax.jit(across)(x, w), alone(x, w))
    assert_same_bits(loss(across)(x, w), loss(alone)(x, w))
    text = jax.jit(jax.grad(lambda x, w: across(x, w).astype(F32).sum())).lower(x, w).compile().as_text()
    assert not re.search(r"(f32|bf16)\[[^=]*(all-reduce|reduce-scatter)\(", text)
    plain = sharded(lambda x, w: jax.lax.psum(x @ w, "tp"))
    assert "all-reduce" in jax.jit(plain).lower(x, w).compile().as_text()
    assert differing(jax.jit(plain)(x, w), jax.jit(lambda x, w: x @ w)(x, w)) > 0


@pytest.mark.parametrize(
    ("dot", "k", "message"),
    [
        (TreeDotGeneral(leaves=2, axis="tp"), 256, "2 leaves"),
        (TreeDotGeneral(axis="tp"), 192, "k=192"),
    ],
)
def test_a_cut_that_does_not_fit_raises(dot: TreeDotGeneral, k: int, message: str) -> None:
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("tp",))
    specs = PartitionSpec(None, "tp"), PartitionSpec("tp", None)
    call = jax.shard_map(
        lambda x, w: dot(x, w, ROWS), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, k), F32), np.ones((k, 3), F32))
    with pytest.raises(ValueError, match="leaves=3"):
        TreeDotGeneral(leaves=3)
