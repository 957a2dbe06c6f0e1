"""Functions: the equation that differs by its source line, rows of two batches, ranks, scans, what is passed over."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tbik_jax.bisect import Call, bisect, plot, trace_call
from tests.helpers import normal

ROWS = 9


def classify(x, w):
    return jax.nn.softmax(x @ w)


@pytest.mark.parametrize("numerics", ["plain", "invariant"])
def test_a_row_alone_and_in_a_batch(numerics, tmp_path):
    """Plain, the product gives the row other bits in a batch; invariant, it does not."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, (ROWS, 1024)), normal(rng, (1024, 128))
    found = bisect(
        Call(fn=classify, args=(x[2:3], w), numerics=numerics, batch=1),
        Call(fn=classify, args=(x, w), numerics=numerics, batch=ROWS, rows=[2]),
    )
    assert found.promised == (numerics == "invariant") and not found.broken and not found.passed_over
    assert found.same_bits == (numerics == "invariant") and {op.rows for op in found.ops} == {1}
    if numerics == "plain":
        assert found.first.op == "dot_general" and found.first.elements == 128
        assert "test_function.py:" in found.first.source and "(classify)" in found.first.source
        plot(found, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def on_ranks(ranks):
    mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("tp",))

    def layer(x, up, down):
        hidden = jax.nn.relu(x @ up)
        partial = hidden @ down
        return lax.psum(partial, "tp") * 2

    specs = PartitionSpec(), PartitionSpec(None, "tp"), PartitionSpec("tp", None)
    return jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())


@pytest.mark.parametrize("numerics", ["plain", "invariant"])
def test_values_cut_over_ranks_are_put_together(numerics):
    rng = np.random.default_rng(1)
    args = normal(rng, (8, 64)), normal(rng, (64, 128)), normal(rng, (128, 48))
    found = bisect(*(Call(fn=on_ranks(n), args=args, numerics=numerics) for n in (1, 4)))
    products = [op for op in found.ops if op.op == "dot_general"]
    assert products[0].elements == 8 * 128 and not products[0].differs  # columns of both ranks
    if numerics == "invariant":
        assert found.same_bits and not found.passed_over
    else:
        assert found.first.op.startswith("psum") and found.first.elements == 8 * 48
        ((name, reason),) = found.passed_over
        assert name.startswith("dot_general") and "partial sums" in reason


def cut_in_squares(ranks, spec, changed=0.0):
    mesh = Mesh(np.asarray(jax.devices()[: ranks**2]).reshape(ranks, ranks), ("a", "b"))

    def shifted(x):
        first = (lax.axis_index("a") == 0) & (lax.axis_index("b") == 0)
        return (jnp.abs(x) + 1).at[0, 0].add(jnp.where(first, changed, 0.0))

    return jax.shard_map(shifted, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


@pytest.mark.parametrize("spec", [PartitionSpec("a", "b"), PartitionSpec("b", "a")])
def test_squares_that_agree_another_way_are_passed_over(spec):
    x = normal(np.random.default_rng(5), (4, 4))
    found = bisect(*(Call(fn=cut_in_squares(n, spec), args=(x,)) for n in (1, 2)))
    assert found.same_bits
    several = {name.split(" ")[0] for name, reason in found.passed_over if "several ways" in reason}
    compared = {op.op for op in found.ops if op.elements == 16}
    if spec == PartitionSpec("a", "b"):
        assert not several and {"abs", "add"} <= compared
    else:
        assert {"abs", "add"} <= several and not {"abs", "add"} & compared
    other = Call(fn=cut_in_squares(2, spec, changed=0.5), args=(x,))
    found = bisect(Call(fn=cut_in_squares(1, spec), args=(x,)), other)
    assert found.first.differing == 1 and found.first.max_abs == 0.5


def test_ranks_that_have_changed_places_differ():
    x = normal(np.random.default_rng(7), (4, 4))
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def exchanged(order):
        def body(x):
            return lax.ppermute(x, ("a", "b"), list(enumerate(order))) + 1

        spec = PartitionSpec("a", "b")
        return Call(
            fn=jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), args=(x,)
        )

    found = bisect(exchanged((0, 1, 2, 3)), exchanged((0, 2, 1, 3)))
    assert found.first.op == "ppermute" and found.first.differing == 8
    assert bisect(exchanged((0, 2, 1, 3)), exchanged((0, 2, 1, 3))).same_bits


def test_a_row_in_a_folded_axis():
    """The first way is that of rows one after the other; time-major rows are passed over, and others differ."""

    def by_time(x, change=0.0):
        return jnp.abs(x).T.reshape(-1) + change

    x = normal(np.random.default_rng(6), (4, 6))
    alone = Call(fn=by_time, args=(x[1:2],), batch=1)
    found = bisect(alone, Call(fn=by_time, args=(x,), batch=4, rows=[1]))
    assert found.same_bits and {name.split(" ")[0] for name, _ in found.passed_over} >= {"add"}
    found = bisect(alone, Call(fn=by_time, args=(x, np.float32(1)), batch=4, rows=[1]))
    assert found.first.op == "add" and found.first.differing == 6
    by_row = Call(fn=lambda x: jnp.abs(x).reshape(-1) + 1, args=(x,), batch=4, rows=[1])
    found = bisect(Call(fn=by_row.fn, args=(x[1:2],), batch=1), by_row)
    assert found.same_bits and not found.passed_over


def layers(x, w, twist=0.0):
    def layer(c, w):
        return jnp.tanh(c @ w), c.sum()

    c, sums = lax.scan(layer, x, w)
    c = lax.while_loop(lambda s: s.sum() < 0, lambda s: s + 1, c)
    return lax.cond(sums[0] > 1e9, lambda c: c * 2, lambda c: c + twist, c)


def test_the_first_iteration_that_differs_is_named():
    rng = np.random.default_rng(2)
    x, w = normal(rng, (4, 16)), normal(rng, (3, 16, 16))
    other = w.copy()
    other[1, 3, 3] += np.float32(0.5)
    found = bisect(Call(fn=layers, args=(x, w)), Call(fn=layers, args=(x, other)))
    assert found.first.name.startswith("dot_general[1]") and "test_function.py" in found.first.source
    names = [op.name.split(" #")[0] for op in found.ops]
    assert names[:4] == ["dot_general[0]", "tanh[0]", "reduce_sum[0]", "dot_general[1]"]
    assert names.count("tanh[2]") == 1 and {"while", "cond"} <= set(names)
    assert bisect(Call(fn=layers, args=(x, w)), Call(fn=layers, args=(x, w))).same_bits


def test_a_loop_is_one_op():
    x, w = np.ones((4, 16), np.float32), np.zeros((1, 16, 16), np.float32)
    found = bisect(Call(fn=layers, args=(x, w, 0.0)), Call(fn=layers, args=(x, w, np.float32(1))))
    assert found.first.op == "cond" and found.first.max_abs == 1


def test_plain_against_invariant_is_no_broken_promise():
    rng = np.random.default_rng(3)
    call = {"fn": jnp.matmul, "args": (normal(rng, (4, 256)), normal(rng, (256, 8)))}
    found = bisect(Call(**call), Call(**call, numerics="invariant"))
    assert found.first.op == "dot_general" and not found.broken


def test_taps_change_no_result_and_a_trace_outlives_the_process(tmp_path):
    rng = np.random.default_rng(4)
    x, w = normal(rng, (4, 16)), normal(rng, (3, 16, 16))
    for numerics in ("plain", "invariant"):
        trace = trace_call(Call(fn=layers, args=(x, w), numerics=numerics, batch=4))
        assert trace.faithful
        trace.save(tmp_path / "a.trace")
        assert bisect(tmp_path / "a.trace", trace).same_bits


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="must be 'plain' or 'invariant'"):
        Call(fn=jnp.sin, numerics="exact")
    with pytest.raises(ValueError, match="need a batch that has them"):
        Call(fn=jnp.sin, rows=[0])
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="batches of one size, 4, with other rows"):
        bisect(Call(fn=jnp.sin, args=(x,), batch=4, rows=[0]), Call(fn=jnp.sin, args=(x,), batch=4, rows=[1]))
    with pytest.raises(ValueError, match=r"name them with Call\.rows"):
        bisect(Call(fn=jnp.sin, args=(x[:2],), batch=2), Call(fn=jnp.sin, args=(x,), batch=4))
    with pytest.raises(ValueError, match="is no Configuration, Call, Trace or file"):
        bisect(3, Call(fn=jnp.sin, args=(x,)))


def test_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "bisect.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(compile(block, "bisect.md", "exec"), names)
    assert "first op that differs: dot_general" in capsys.readouterr().out
    assert names["found"].first.op == "dot_general" and (tmp_path / "classify.png").is_file()
