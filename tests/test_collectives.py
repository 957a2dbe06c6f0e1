"""Collectives in tree order: the bits of `tree_join` on any mesh, forward and backward, and no reduction of XLA's."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tbik_jax.collectives import TRANSPORTS, choose_transport, tree_all_gather, tree_psum, tree_psum_scatter
from tbik_jax.pallas_kernels import tree_matmul
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, cancelling, differing, mixed, normal, wide

F32 = np.float32
SIZES = (1, 2, 4, 8)
#: Axis names and sizes, slowest first; tp in every place.
MESHES = {
    "fastest": {"data": 2, "tp": 4},
    "slowest": {"tp": 4, "data": 2},
    "middle": {"data": 2, "tp": 2, "fsdp": 2},
    "alone": {"tp": 8},
}


def make(axes: dict[str, int]) -> Mesh:
    count = math.prod(axes.values())
    return Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


def on(mesh: Mesh, body: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`body` of this rank's arrays; arrays have one leading dimension an axis of the mesh, in and out."""
    lead = len(mesh.axis_names)

    def local(*args: jax.Array) -> jax.Array:
        out = body(*(a.reshape(a.shape[lead:]) for a in args))
        return out.reshape((1,) * lead + out.shape)

    spec = PartitionSpec(*mesh.axis_names)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def values(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any = F32, kind=cancelling, seed: int = 0
) -> np.ndarray:
    """A value a rank: those that meet over any axis cancel."""
    lead = tuple(mesh.shape.values())
    flat = kind(np.random.default_rng(seed), (math.prod(shape), math.prod(lead)))
    return flat.T.reshape(*lead, *shape).astype(dtype)


def ranks_first(x: np.ndarray, mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """x [*mesh, ...] as [ranks, *other axes, ...], ranks in lexicographic order of `axes`."""
    moved = np.moveaxis(x, [mesh.axis_names.index(a) for a in axes], range(len(axes)))
    return moved.reshape(-1, *moved.shape[len(axes) :])


def ranks_back(x: np.ndarray, mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """The inverse of `ranks_first`."""
    x = x.reshape(*(mesh.shape[a] for a in axes), *x.shape[1:])
    return np.moveaxis(x, range(len(axes)), [mesh.axis_names.index(a) for a in axes])


def joined(x: np.ndarray, mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """What every rank must hold: the join of the group's values in rank order, rounded once."""
    parts = ranks_first(x, mesh, axes)
    total = orders.round_to(orders.tree_join(list(parts.astype(F32))), x.dtype)
    return ranks_back(np.broadcast_to(total, parts.shape), mesh, axes)


def scattered(x: np.ndarray, mesh: Mesh, axes: tuple[str, ...], dim: int, tiled: bool) -> np.ndarray:
    """What every rank must hold: its slice of the join."""
    total = ranks_first(joined(x, mesh, axes), mesh, axes)
    dim += len(mesh.axis_names) - len(axes)
    pieces = [np.split(part, len(total), axis=dim)[rank] for rank, part in enumerate(total)]
    return ranks_back(np.stack(pieces if tiled else [p.squeeze(dim) for p in pieces]), mesh, axes)


# --- tree_psum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_psum_is_the_join_of_the_ranks(size: int, name: str) -> None:
    mesh = make({"tp": size})
    run = on(mesh, lambda x: tree_psum(x, "tp"))
    for kind in (normal, wide, cancelling):
        x = values(mesh, (3, 50), DTYPES[name], normal if size == 1 else kind)
        assert_same_bits(run(x), joined(x, mesh, ("tp",)))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_transport_carries_the_same_tree(size: int, name: str, transport: Any) -> None:
    mesh = make({"tp": size})
    for kind in (normal, wide, cancelling):
        x = values(mesh, (3, 8, 9), F32, normal if size == 1 else kind)
        x[..., 0, 0, 0] = -0.0
        run = on(mesh, lambda x: tree_psum(x, "tp", out_dtype=DTYPES[name], transport=transport))
        assert_same_bits(run(x), orders.round_to(joined(x, mesh, ("tp",)), DTYPES[name]))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("axes", [("data", "tp"), ("tp", "data")])
@pytest.mark.parametrize("place", ["fastest", "slowest", "middle"])
def test_every_transport_knows_the_order_of_several_axes(
    place: str, axes: tuple[str, ...], transport: Any
) -> None:
    mesh = make(MESHES[place])
    x, ct = (values(mesh, (8, 9), seed=seed) for seed in (0, 1))
    op = functools.partial(tree_psum, axis_name=axes, transport=transport)
    assert_same_bits(on(mesh, op)(x), joined(x, mesh, axes))
    assert_same_bits(on(mesh, pullback(op))(x, ct), joined(ct, mesh, axes))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_transport_follows_size_and_ranks_alone(ranks: int) -> None:
    assert choose_transport(1, ranks) == choose_transport(4096, ranks) == "all_gather"
    assert choose_transport(1 << 24, ranks) == "all_to_all"
    assert choose_transport((1 << 24) + 1, ranks) == "butterfly"
    assert choose_transport(1 << 20, ranks) == ("butterfly" if ranks == 2 else "all_to_all")


@pytest.mark.parametrize("shape", [(3, 50), (512, 1024), (513, 1023)])
def test_sums_of_any_size_have_the_same_bits(shape: tuple[int, ...]) -> None:
    mesh = make({"tp": 4})
    x = values(mesh, shape)
    assert_same_bits(on(mesh, lambda x: tree_psum(x, "tp"))(x), joined(x, mesh, ("tp",)))


@pytest.mark.parametrize("place", MESHES)
def test_psum_does_not_depend_on_the_place_of_the_axis(place: str) -> None:
    mesh = make(MESHES[place])
    x = values(mesh, (3, 50))
    assert_same_bits(on(mesh, lambda x: tree_psum(x, "tp"))(x), joined(x, mesh, ("tp",)))


@pytest.mark.parametrize("axes", [("data", "tp"), ("tp", "data"), ("fsdp", "data", "tp"), ("tp",)])
@pytest.mark.parametrize("place", ["fastest", "slowest", "middle"])
def test_several_axes_are_one_axis_in_the_order_of_their_names(place: str, axes: tuple[str, ...]) -> None:
    axes = tuple(a for a in axes if a in MESHES[place])
    mesh = make(MESHES[place])
    x = values(mesh, (3, 50))
    assert_same_bits(on(mesh, lambda x: tree_psum(x, axes))(x), joined(x, mesh, axes))


def test_psum_is_the_same_in_every_run_and_keeps_negative_zero() -> None:
    mesh = make({"tp": 8})
    run = on(mesh, lambda x: tree_psum(x, "tp"))
    x = values(mesh, (3, 50))
    first = np.asarray(run(x))
    for _ in range(20):
        assert_same_bits(run(x), first)
    zeros = np.full((8, 3, 50), -0.0, F32)
    assert_same_bits(run(zeros), zeros)


@pytest.mark.parametrize("op", [tree_psum, tree_psum_scatter])
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_hold_the_canonical_nan(size: int, op: Callable[..., jax.Array]) -> None:
    """x + y and y + x differ in which payload survives, and so would the ranks of a pair and the sizes of an axis."""
    payloads = (np.uint32(0xFFC00001) + np.arange(size, dtype=np.uint32)).view(F32)
    x = np.repeat(payloads, size * 5).reshape(size, size, 5)
    out = np.asarray(on(make({"tp": size}), lambda x: op(x, "tp"))(x))
    assert_same_bits(out, np.full_like(out, np.nan))


def test_psum_inside_a_scan_and_beside_other_work() -> None:
    mesh = make({"tp": 8})
    x = values(mesh, (4, 50))

    def body(x: jax.Array) -> jax.Array:
        return lax.map(lambda row: tree_psum(row * 2, "tp") * F32(0.5), x)

    assert_same_bits(on(mesh, body)(x), joined(x, mesh, ("tp",)))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_leaves_of_the_ranks_are_the_leaves_of_the_whole_matmul(size: int, name: str) -> None:
    """The contract: K cut over any number of ranks gives the bits of K on one device."""
    rng = np.random.default_rng(0)
    x, w = mixed(rng, (5, 256), DTYPES[name]), mixed(rng, (256, 32), DTYPES[name])

    def body(x: jax.Array, w: jax.Array) -> jax.Array:
        partial = tree_matmul(x, w, 8 // size, out_dtype=F32)
        return tree_psum(partial, "tp").astype(x.dtype)

    parts = np.stack(np.split(x, size, axis=1)), np.stack(np.split(w, size, axis=0))
    out = np.asarray(on(make({"tp": size}), body)(*parts))
    expected = orders.round_to(orders.matmul(x, w, 8), x.dtype)
    assert_same_bits(out, np.broadcast_to(expected, out.shape))


# --- tree_psum_scatter and tree_all_gather -----------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_scatter_is_a_slice_of_psum(size: int, tiled: bool, name: str) -> None:
    mesh = make({"tp": size})
    x = values(mesh, (3 * size if tiled else size, 20), DTYPES[name], normal if size == 1 else cancelling)
    run = on(mesh, lambda x: tree_psum_scatter(x, "tp", tiled=tiled))
    assert_same_bits(run(x), scattered(x, mesh, ("tp",), 0, tiled))


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_scatter_cuts_any_dimension(dim: int, tiled: bool) -> None:
    mesh = make({"data": 2, "tp": 4})
    shape = [5, 3, 6]
    shape[dim] = 12 if tiled else 4
    x = values(mesh, tuple(shape))
    run = on(mesh, lambda x: tree_psum_scatter(x, "tp", scatter_dimension=dim, tiled=tiled))
    assert_same_bits(run(x), scattered(x, mesh, ("tp",), dim % 3, tiled))


@pytest.mark.parametrize("axes", [("data", "tp"), ("tp", "data"), ("tp", "fsdp", "data")])
@pytest.mark.parametrize("place", ["fastest", "slowest", "middle"])
def test_scatter_over_several_axes(place: str, axes: tuple[str, ...]) -> None:
    axes = tuple(a for a in axes if a in MESHES[place])
    mesh = make(MESHES[place])
    x = values(mesh, (16, 5))
    run = on(mesh, lambda x: tree_psum_scatter(x, axes, tiled=True))
    assert_same_bits(run(x), scattered(x, mesh, axes, 0, True))


@pytest.mark.parametrize("axes", [("tp",), ("data", "tp"), ("tp", "data")])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_puts_the_ranks_side_by_side(dim: int, axes: tuple[str, ...]) -> None:
    mesh = make({"data": 2, "tp": 2})
    x = values(mesh, (3, 5))
    parts = ranks_first(x, mesh, axes)  # [ranks, *other axes, 3, 5]
    whole = np.concatenate(list(parts), axis=dim % 2 + parts.ndim - 3)
    out = on(mesh, lambda x: tree_all_gather(x, axes, axis=dim, tiled=True))(x)
    assert_same_bits(out, ranks_back(np.stack([whole] * len(parts)), mesh, axes))


def test_gather_stacks_any_dtype_on_any_number_of_ranks() -> None:
    mesh = make({"tp": 3})
    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    for axis, expected in ((0, x), (1, x.T), (-1, x.T)):
        out = on(mesh, lambda x, axis=axis: tree_all_gather(x, "tp", axis=axis))(x)
        assert_same_bits(out, np.stack([expected] * 3))


def test_gather_moves_along_the_first_dimension() -> None:
    """Along another one XLA would transpose the elements before and after, and does in the twin."""
    mesh = make({"tp": 4})
    x = values(mesh, (3, 5))
    for gather, dimension in ((tree_all_gather, 0), (lax.all_gather, 1)):
        text = compiled_text(mesh, lambda x, gather=gather: gather(x, "tp", axis=1, tiled=True), x)
        (line,) = (line for line in text.splitlines() if " all-gather(" in line)
        assert f"dimensions={{{dimension}}}" in line


# --- gradients ---------------------------------------------------------------------------------------------


def pullback(op: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The cotangent of x, from x and the cotangent of op(x)."""
    return lambda x, ct: jax.vjp(op, x)[1](ct)[0]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("place", MESHES)
def test_the_gradient_of_psum_is_psum_of_the_cotangents(place: str, name: str) -> None:
    mesh = make(MESHES[place])
    x, ct = (values(mesh, (3, 50), DTYPES[name], seed=seed) for seed in (0, 1))
    run = on(mesh, pullback(lambda x: tree_psum(x, "tp")))
    assert_same_bits(run(x, ct), joined(ct, mesh, ("tp",)))


@pytest.mark.parametrize("axes", [("data", "tp"), ("tp", "data")])
def test_the_gradient_of_psum_over_two_axes_keeps_their_order(axes: tuple[str, ...]) -> None:
    mesh = make({"data": 2, "tp": 4})
    x, ct = (values(mesh, (3, 50), seed=seed) for seed in (0, 1))
    assert_same_bits(on(mesh, pullback(lambda x: tree_psum(x, axes)))(x, ct), joined(ct, mesh, axes))


@pytest.mark.parametrize("axes", [("tp",), ("data", "tp"), ("tp", "data")])
@pytest.mark.parametrize(("dim", "tiled"), [(0, True), (1, True), (0, False), (1, False)])
def test_the_gradient_of_scatter_gathers_the_cotangents(dim: int, tiled: bool, axes: tuple[str, ...]) -> None:
    mesh = make({"data": 2, "tp": 2})
    ranks = 2 ** len(axes)
    shape = [3, 5]
    shape[dim] = 3 * ranks if tiled else ranks
    x = values(mesh, tuple(shape))
    op = on(mesh, lambda x: tree_psum_scatter(x, axes, scatter_dimension=dim, tiled=tiled))
    ct = normal(np.random.default_rng(1), np.shape(op(x)))
    run = on(mesh, pullback(lambda x: tree_psum_scatter(x, axes, scatter_dimension=dim, tiled=tiled)))
    gather = on(mesh, lambda ct: lax.all_gather(ct, axes, axis=dim, tiled=tiled))
    assert_same_bits(run(x, ct), gather(ct))


@pytest.mark.parametrize(
    ("axes", "name"),
    [(("tp",), "float32"), (("tp",), "bfloat16"), (("data", "tp"), "float32"), (("tp", "data"), "float32")],
)
@pytest.mark.parametrize(("dim", "tiled"), [(0, True), (1, True), (0, False), (-1, False)])
def test_the_gradient_of_gather_scatters_the_cotangents(
    dim: int, tiled: bool, axes: tuple[str, ...], name: str
) -> None:
    mesh = make({"data": 2, "tp": 4})
    ranks = math.prod(mesh.shape[a] for a in axes)
    x = values(mesh, (3, 5), DTYPES[name], normal)
    out = [3, 5]
    if tiled:
        out[dim] *= ranks
    else:
        out.insert(dim % 3, ranks)
    ct = values(mesh, tuple(out), DTYPES[name], seed=1)
    run = on(mesh, pullback(lambda x: tree_all_gather(x, axes, axis=dim, tiled=tiled)))
    expected = scattered(ct, mesh, axes, dim % len(out), tiled)
    assert_same_bits(run(x, ct), expected)


# --- the compiled program ----------------------------------------------------------------------------------

OPS = {
    "psum": lambda x: tree_psum(x, "tp", transport="butterfly"),
    "psum of two axes": lambda x: tree_psum(x, ("data", "tp"), transport="butterfly"),
    "psum_scatter": lambda x: tree_psum_scatter(x, "tp", tiled=True),
    "all_gather": lambda x: tree_all_gather(x, "tp", tiled=True),
}


def compiled_text(mesh: Mesh, body: Callable[..., jax.Array], *args: np.ndarray) -> str:
    return on(mesh, body).lower(*args).compile().as_text()


@pytest.mark.parametrize("name", OPS)
def test_the_program_permutes_and_holds_no_reduction_of_xla(name: str) -> None:
    mesh = make({"data": 2, "tp": 4})
    x = values(mesh, (8, 3))
    forward = compiled_text(mesh, OPS[name], x)
    ct = np.asarray(on(mesh, OPS[name])(x))
    backward = compiled_text(mesh, pullback(OPS[name]), x, ct)
    assert "all-reduce" not in forward + backward and "reduce-scatter" not in forward + backward
    assert ("collective-permute" in forward) == (name != "all_gather")
    assert ("collective-permute" in backward) == (name != "psum_scatter")


@pytest.mark.parametrize(
    ("transport", "moves"), [("all_gather", ["all-gather"]), ("all_to_all", ["all-to-all", "all-gather"])]
)
def test_the_other_transports_hold_no_reduction_of_xla(transport: Any, moves: list[str]) -> None:
    mesh = make({"data": 2, "tp": 4})
    text = compiled_text(mesh, lambda x: tree_psum(x, "tp", transport=transport), values(mesh, (8, 3)))
    assert all(move in text for move in moves)
    assert "all-reduce" not in text and "reduce-scatter" not in text


def test_all_to_all_hands_out_rounded_sums() -> None:
    """Half of the bytes: what is gathered is bfloat16 already."""
    mesh = make({"tp": 4})
    op = functools.partial(tree_psum, axis_name="tp", out_dtype=DTYPES["bfloat16"], transport="all_to_all")
    text = compiled_text(mesh, op, values(mesh, (8, 3)))
    (line,) = (line for line in text.splitlines() if re.search(r" all-gather\(", line))
    assert "u16[" in line.partition(" all-gather(")[0]


def test_twin_the_ordinary_sum_is_a_reduction_of_xla() -> None:
    mesh = make({"tp": 8})
    assert "all-reduce" in compiled_text(mesh, lambda x: lax.psum(x, "tp"), values(mesh, (8, 3)))
    gradient = pullback(lambda x: lax.all_gather(x, "tp", tiled=True))
    text = compiled_text(mesh, gradient, values(mesh, (8, 3)), values(mesh, (64, 3)))
    assert "all-reduce" in text or "reduce-scatter" in text


def test_twin_the_ordinary_sum_has_other_bits() -> None:
    mesh = make({"tp": 8})
    for seed in range(10):
        x = values(mesh, (3, 500), seed=seed)
        if differing(on(mesh, lambda x: lax.psum(x, "tp"))(x), joined(x, mesh, ("tp",))):
            return
    pytest.skip("lax.psum of this XLA adds eight ranks in tree order")


def test_twin_the_order_of_two_axes_shows() -> None:
    mesh = make({"data": 2, "tp": 4})
    x = values(mesh, (3, 500))
    assert differing(joined(x, mesh, ("data", "tp")), joined(x, mesh, ("tp", "data")))


# --- errors ------------------------------------------------------------------------------------------------


def trace(axes: dict[str, int], op: Callable[[jax.Array], Any], x: jax.ShapeDtypeStruct) -> None:
    body = jax.shard_map(
        op, mesh=make(axes), in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    jax.eval_shape(body, x)


X = jax.ShapeDtypeStruct((8, 3), F32)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_ranks_that_form_no_tree_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"tree_psum: axis 'tp' has {size} ranks, .* use 1, 2, 4 or 8"):
        trace({"tp": size}, lambda x: tree_psum(x, "tp"), X)
    with pytest.raises(ValueError, match=f"tree_psum_scatter: axis 'tp' has {size} ranks"):
        trace({"tp": size}, lambda x: tree_psum_scatter(x, "tp"), X)
    with pytest.raises(ValueError, match=f"axis 'tp' has {size} ranks"):
        trace({"tp": size}, jax.grad(lambda x: tree_all_gather(x, "tp").sum()), X)


def test_one_uneven_axis_of_several_is_refused() -> None:
    with pytest.raises(ValueError, match="axis 'data' has 3 ranks"):
        trace({"data": 3, "tp": 2}, lambda x: tree_psum(x, ("data", "tp")), X)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("op", [tree_psum, tree_psum_scatter])
def test_other_dtypes_are_refused(op: Callable[..., Any], dtype: str) -> None:
    with pytest.raises(ValueError, match=f"adds float32, bfloat16 or float16, not {dtype}"):
        trace({"tp": 8}, lambda x: op(x, "tp"), jax.ShapeDtypeStruct((8, 3), dtype))


@pytest.mark.parametrize("op", [tree_psum, tree_psum_scatter, tree_all_gather])
def test_an_axis_named_twice_is_refused(op: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="name an axis twice"):
        trace({"tp": 2}, lambda x: op(x, ("tp", "tp")), X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scatter_dimension": 1, "tiled": True}, "over 8 ranks: dimension 1 has size 3; .* a multiple of 8"),
        ({"scatter_dimension": 1}, "dimension 1 has size 3; it must be 8, or pass tiled=True"),
        ({"scatter_dimension": 2}, "dimension 2 is out of range for an array of 2 dimensions"),
        ({"scatter_dimension": -3}, "dimension -3 is out of range"),
    ],
)
def test_scatter_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace({"tp": 8}, lambda x: tree_psum_scatter(x, "tp", **change), X)


def test_gather_refuses_a_dimension_out_of_range() -> None:
    with pytest.raises(ValueError, match="dimension 3 is out of range for an array of 3 dimensions"):
        trace({"tp": 8}, lambda x: tree_all_gather(x, "tp", axis=3), X)
    with pytest.raises(ValueError, match="dimension 2 is out of range for an array of 2 dimensions"):
        trace({"tp": 8}, lambda x: tree_all_gather(x, "tp", axis=2, tiled=True), X)


def test_a_transport_that_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut 15 elements into 8 equal shares; use 'butterfly'"):
        trace(
            {"tp": 8}, lambda x: tree_psum(x, "tp", transport="all_to_all"), jax.ShapeDtypeStruct((5, 3), F32)
        )
    with pytest.raises(ValueError, match="transport='ring' is unknown; use one of butterfly, all_gather"):
        trace({"tp": 8}, lambda x: tree_psum(x, "tp", transport="ring"), X)


@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn"])
def test_other_result_types_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"rounds to float32, bfloat16 or float16, not to {dtype}"):
        trace({"tp": 8}, lambda x: tree_psum(x, "tp", out_dtype=dtype), X)


def test_an_unknown_axis_is_an_error() -> None:
    with pytest.raises((NameError, KeyError, ValueError), match="ep"):
        trace({"tp": 8}, lambda x: tree_psum(x, "ep"), jnp.zeros((8, 3)))
