"""`psum` under `invariant`: one tree over all ranks for products and sums, a tree of the ranks' values for the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import tbik_jax
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

F32 = np.float32


def over(ranks: int, body: Callable[..., Any], *specs: PartitionSpec) -> Callable[..., Any]:
    mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("tp",))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def on_meshes(
    body: Callable[..., Any], specs: tuple[PartitionSpec, ...], *args: Any
) -> tuple[list[Any], list[Any]]:
    """Invariant and plain results of 1, 2, 4 and 8 ranks."""
    mapped = [over(ranks, body, *specs) for ranks in (1, 2, 4, 8)]
    return [jax.jit(tbik_jax.invariant(f))(*args) for f in mapped], [jax.jit(f)(*args) for f in mapped]


def test_a_sum_of_a_sum_is_cut_into_leaves() -> None:
    """The loss of a batch cut over ranks: the same bits for any number of them; plain, others."""
    x = mixed(np.random.default_rng(0), (48, 25))
    mine, plain = on_meshes(lambda x: lax.psum((x * 3).sum(), "tp"), (PartitionSpec("tp"),), x)
    for other in mine[1:]:
        assert_same_bits(other, mine[0])
    leaves = orders.tree_sum((x * F32(3)).reshape(8, 150))
    assert_same_bits(mine[0], orders.tree_join(list(leaves)))
    assert sum(differing(other, plain[0]) for other in plain[1:]) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_moves_or_widens_a_product_may_stand_before_the_psum(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, w = mixed(rng, (6, 256), DTYPES[dtype]), normal(rng, (256, 24), DTYPES[dtype])

    def body(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum((x @ w).T.astype(jnp.float32).reshape(8, 18), "tp")

    mine, plain = on_meshes(body, (PartitionSpec(None, "tp"), PartitionSpec("tp")), x, w)
    for each in mine:
        assert_same_bits(each, orders.matmul(x, w, 8).T.reshape(8, 18))
    assert differing(plain[0], plain[2]) > 0


def test_what_ranks_hold_meets_in_a_tree_and_the_report_says_so() -> None:
    x = mixed(np.random.default_rng(2), (4, 24))
    body = lambda x: lax.psum(jnp.exp2(x / 4096)[0], "tp")  # noqa: E731
    mapped = over(4, body, PartitionSpec("tp"))
    values = jax.jit(lambda x: jnp.exp2(x / 4096))(x)
    assert_same_bits(
        jax.jit(tbik_jax.invariant(mapped))(x), orders.tree_join([np.asarray(v) for v in values])
    )
    [entry] = [e for e in tbik_jax.report(mapped, x).entries if e.primitive == "psum"]
    assert entry.kind == "replaced" and "number of ranks" in entry.reason
    summed = over(4, lambda x: lax.psum(x.sum(), "tp"), PartitionSpec("tp"))
    [entry] = [e for e in tbik_jax.report(summed, x).entries if e.primitive == "psum"]
    assert "as on one device if the first of the dimensions summed is cut over" in entry.reason


def test_a_product_that_is_used_twice_is_made_before_its_psum() -> None:
    rng = np.random.default_rng(3)
    x, w = normal(rng, (6, 256)), normal(rng, (256, 24))

    def body(x: jax.Array, w: jax.Array) -> jax.Array:
        part = x @ w
        return lax.psum(part, "tp") + lax.pmax(part, "tp")

    mapped = over(2, body, PartitionSpec(None, "tp"), PartitionSpec("tp"))
    halves = [orders.matmul(x[:, i : i + 128], w[i : i + 128], 8) for i in (0, 128)]
    expected = halves[0] + halves[1] + np.maximum(*halves)
    assert_same_bits(jax.jit(tbik_jax.invariant(mapped))(x, w), expected)


@pytest.mark.parametrize(
    ("ranks", "body", "message"),
    [
        (3, lambda x: lax.psum(x, "tp"), "psum at .*test_psums.*3 ranks"),
        (2, lambda x: lax.psum(x, "tp", axis_index_groups=[[0], [1]]), "axis for each group"),
        (2, lambda x: lax.psum(x @ x.T, "tp"), "k=48"),
    ],
)
def test_a_psum_without_a_tree_raises(ranks: int, body: Callable[..., Any], message: str) -> None:
    mapped = over(ranks, body, PartitionSpec(None, "tp"))
    x = jax.ShapeDtypeStruct((6, 24 * ranks), jnp.float32)
    assert [e.primitive for e in tbik_jax.report(mapped, x).of("uncovered")] == ["psum"]
    with pytest.raises(ValueError, match=message):
        tbik_jax.invariant(mapped)(np.ones(x.shape, F32))
