"""Comparing traces: the first op that differs, row against row, kept or fingerprinted, saved or not."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tbik_jax.bench.environment import environment
from tbik_jax.bisect import Bisection, Op, Trace, compare, load_trace, plot
from tbik_jax.bisect.bits import row_fingerprints
from tests.helpers import assert_same_bits, bits, normal

SEQUENCES = ((5, 6, 7), (1, 2, 3, 4), (8, 9))
NAMES = {"embedding": None, "layer 0/qkv": 0, "layer 0/o_proj": 0, "layer 1/qkv": 1, "logits": None}


def trace(sequences=SEQUENCES, **fields) -> Trace:
    """A model's trace with values that depend on the sequence, the position and the op alone."""
    values = {}
    for number, name in enumerate(NAMES):
        rows = [normal(np.random.default_rng((number, *each)), (len(each) - 1, 4, 2)) for each in sequences]
        values[name] = np.concatenate(rows).astype(ml_dtypes.bfloat16 if "/" in name else np.float32)
    ops = [
        Op(name=name, op=name.split("/")[-1], layer=layer, dtype=values[name].dtype.name, shape=(4, 2))
        for name, layer in NAMES.items()
    ]
    given = {"label": "a", "numerics": "invariant", "environment": environment(), "faithful": True}
    return Trace(kind="model", ops=tuple(ops), values=values, sequences=tuple(sequences), **(given | fields))


def flipped(x: Trace, name: str, *index: int, bit: int = 0) -> Trace:
    """The trace with one bit changed."""
    values = dict(x.values) | {name: x.values[name].copy()}
    view = bits(values[name])
    view[index] ^= np.asarray(1 << bit, view.dtype)
    return dataclasses.replace(x, values=values | {name: view.view(values[name].dtype)})


def prints_only(x: Trace) -> Trace:
    prints = {name: row_fingerprints(value) for name, value in x.values.items()}
    return dataclasses.replace(x, values={}, prints=prints)


def test_equal_traces_have_no_first_difference():
    found = compare(trace(), trace())
    assert found.same_bits and found.first is None and not found.broken and len(found.ops) == len(NAMES)
    assert "all 5 ops have the same bits" in str(found)


def test_one_bit_is_found_and_placed():
    right = flipped(flipped(trace(), "layer 1/qkv", 0, 0, 0), "layer 0/o_proj", 3, 2, 1)
    found = compare(trace(), right)
    first = found.first
    assert (first.name, first.layer, first.op) == ("layer 0/o_proj", 0, "o_proj")
    assert (first.differing, first.elements, first.differing_rows, first.rows) == (1, 48, 1, 6)
    assert first.at == (1, 1)  # row 3 of 2 + 3 + 1
    assert first.max_ulp == 1 and 0 < first.max_abs < 0.1
    assert found.broken and "promised the same bits" in str(found) and "sequence 1, position 1" in str(found)
    assert [op.differs for op in found.ops] == [False, False, True, True, False]


def test_signs_of_zeros_and_payloads_of_nans_count():
    left = trace()
    left.values["logits"][0, 0] = 0.0, np.nan
    minus = trace()
    minus.values["logits"][0, 0] = -0.0, np.nan
    (op,) = [op for op in compare(left, minus).ops if op.differs]
    assert (op.differing, op.max_ulp, op.max_abs, op.nans) == (1, 1, 0.0, 0)
    (op,) = [op for op in compare(left, flipped(left, "logits", 0, 0, 1)).ops if op.differs]
    assert (op.differing, op.max_ulp, op.max_abs, op.nans) == (1, None, None, 1)


def test_rows_are_matched_by_their_sequence():
    other = ((1, 2, 3, 4), (3, 3, 3, 3, 3), (5, 6, 7))
    found = compare(trace(), trace(other))
    assert found.same_bits and found.ops[0].rows == 5  # (8, 9) and (3, 3, 3, 3, 3) stand in one only
    found = compare(trace(), flipped(trace(other), "embedding", 2, 0, 0))
    assert found.first.at == (1, 2)  # of the left trace's sequences
    twice = ((5, 6, 7), (5, 6, 7))
    found = compare(trace(twice), flipped(trace(((8, 9), *twice)), "embedding", 1 + 2, 0, 0))
    assert found.first.at == (1, 0) and found.ops[0].rows == 4
    assert compare(trace(((5, 6, 7),)), flipped(trace(twice), "embedding", 2, 0, 0)).same_bits
    with pytest.raises(ValueError, match="no sequence in common"):
        compare(trace(), trace(((9, 9),)))


def test_fingerprints_tell_rows_apart():
    other = prints_only(flipped(trace(), "layer 0/o_proj", 3, 2, 1))
    for left in (trace(), prints_only(trace())):
        first = compare(left, other).first
        assert first.name == "layer 0/o_proj" and first.differing is None and first.at == (1, 1)
        assert first.differing_rows == 1 and first.elements == 48 and "by fingerprint" in str(first)
    assert compare(trace(), prints_only(trace())).same_bits


def test_other_models_are_refused():
    short = trace()
    with pytest.raises(ValueError, match="other models"):
        compare(trace(), dataclasses.replace(short, ops=short.ops[:-1]))
    ops = tuple(dataclasses.replace(op, dtype="float16") for op in short.ops)
    with pytest.raises(ValueError, match="embedding is float32"):
        compare(trace(), dataclasses.replace(short, ops=ops))
    with pytest.raises(ValueError, match="a trace of a model has nothing to compare with one of a function"):
        compare(trace(), dataclasses.replace(short, kind="function"))


@pytest.mark.parametrize(
    ("left", "right", "promised"),
    [
        ({}, {}, True),
        ({}, {"tp": 4}, True),
        ({"numerics": "plain"}, {"numerics": "plain"}, False),
        ({}, {"numerics": "plain"}, False),
        ({"numerics": "batch_invariant", "tp": 4}, {"numerics": "batch_invariant", "tp": 4}, True),
        ({"numerics": "batch_invariant", "tp": 4}, {"numerics": "batch_invariant", "tp": 2}, False),
        ({}, {"environment": environment() | {"device": "NVIDIA H200"}}, False),
    ],
)
def test_what_is_promised_and_what_is_not(left, right, promised):
    found = compare(trace(**left), flipped(trace(**right), "logits", 0, 0, 0))
    assert found.promised == promised and found.broken == promised and not found.same_bits


def test_what_a_reader_should_know_is_told():
    ops = tuple(dataclasses.replace(op, ranks_agree=op.layer is None) for op in trace().ops)
    odd = trace(faithful=False, label="odd", environment=environment() | {"device": "NVIDIA H200"})
    notes = "\n".join(compare(trace(), dataclasses.replace(odd, ops=ops)).notes)
    assert "with taps, odd ends in other bits" in notes and "NVIDIA H200" in notes
    assert "of odd, ranks that should agree differ from layer 0/qkv on" in notes
    assert compare(trace(), trace()).notes == ()


@pytest.mark.parametrize("change", [lambda x: x, prints_only], ids=["whole", "fingerprints"])
def test_a_trace_comes_back_from_its_file(tmp_path, change):
    before, file = change(trace(label="kept", tp=4)), tmp_path / "a.trace"
    before.save(file)
    after = load_trace(file)
    assert after.ops == before.ops and after.environment == before.environment
    assert (after.label, after.tp, after.sequences) == ("kept", 4, SEQUENCES)
    for kept, stored in ((before.values, after.values), (before.prints, after.prints)):
        assert set(kept) == set(stored)
        for name, value in kept.items():
            assert_same_bits(stored[name], value)
    assert compare(before, after).same_bits
    assert compare(after, change(flipped(trace(), "layer 0/qkv", 5, 3, 1))).first.name == "layer 0/qkv"
    assert [each.name for each in tmp_path.iterdir()] == ["a.trace"]


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "x"
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read as a trace"):
        load_trace(file)
    save_file({"a": np.zeros(1, np.float32)}, file)
    with pytest.raises(ValueError, match="is no trace"):
        load_trace(file)
    save_file({"a": np.zeros(1, np.float32)}, file, metadata={"tbik_jax.bisect": '{"format": 0}'})
    with pytest.raises(ValueError, match="format 0"):
        load_trace(file)


def test_json_holds_infinities_and_nans_of_values(tmp_path):
    left = trace()
    left.values["logits"][0, 0] = np.inf, np.nan
    found = compare(left, trace())
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["first"]["name"] == "logits" and not json.loads(text)["same_bits"]


@pytest.mark.parametrize("bit", [None, 3])
def test_the_plot_shows_where(tmp_path, bit):
    names = ("embedding", "layer 0/qkv", "layer 0/o_proj", "layer 1/qkv", "logits")
    right = trace() if bit is None else flipped(trace(), names[bit], 1, 1, 1)
    found = compare(trace(), right)
    plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert isinstance(found, Bisection)
