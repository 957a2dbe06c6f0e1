"""Models: taps change no bit, the first op that differs is named, and a faulty kernel is found.

On the CPU taps leave plain bits as they are too; what is compared are programs, so few sizes are.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tbik_jax
from tbik_jax import make_mesh
from tbik_jax.bisect import Configuration, bisect, compare, trace_model
from tbik_jax.bisect.model import END_OPS, LAYER_OPS
from tbik_jax.layers.base import TP
from tbik_jax.layers.invariant import InvariantNumerics
from tbik_jax.models import Qwen3
from tests.helpers import assert_same_bits, bits
from tests.models_small import CONFIG, prompts

SEQUENCES = prompts((6, 9, 3))


@pytest.fixture(scope="module")
def model():
    return Qwen3(dataclasses.replace(CONFIG, num_hidden_layers=1), rngs=nnx.Rngs(7))


def configuration(numerics, tp, **fields):
    return Configuration(mesh=make_mesh(tp=tp), numerics=numerics, **fields)


@pytest.fixture(scope="module")
def invariant(model):
    """All at once on one device, with the run that has no taps."""
    return trace_model(model, SEQUENCES, configuration("invariant", 1))


@pytest.fixture(scope="module")
def plain(model):
    return trace_model(model, SEQUENCES, configuration("plain", 1))


def test_taps_change_no_bit_and_miss_no_op(model, invariant, plain):
    names = [op.name for op in invariant.ops]
    assert sorted(names) == sorted([*END_OPS, *(f"layer 0/{name}" for name in LAYER_OPS)])
    assert names[:3] == ["embedding", "layer 0/residual_in", "layer 0/input_norm"] and names[-1] == "logprob"
    assert invariant.faithful and plain.faithful
    scored = tbik_jax.score(model, SEQUENCES, mesh=make_mesh(), scan_layers=False)
    assert_same_bits(invariant.values["logprob"], np.concatenate(scored))
    for op in invariant.ops:
        value = invariant.values[op.name]
        assert value.shape == (5 + 8 + 2, *op.shape) and value.dtype.name == op.dtype and op.ranks_agree
    assert invariant.values["logits"].shape[1] == CONFIG.vocab_size
    rows = invariant.values["embedding"]
    assert_same_bits(rows, np.concatenate([model.embedding_vd[...][np.asarray(s[:-1])] for s in SEQUENCES]))


def test_taps_that_change_a_result_are_told(model, monkeypatch):
    """The twin: where the run without taps ends in other bits, the trace says so."""
    from tbik_jax.bisect import model as module

    untapped = module._TappedRun.tapped
    monkeypatch.setattr(
        module._TappedRun, "untapped", lambda self, rows: [x + np.float32(1e-6) for x in SAVED["logprobs"]]
    )
    SAVED: dict = {}

    def tapped(self, *args):
        SAVED["logprobs"] = untapped(self, *args)
        return SAVED["logprobs"]

    monkeypatch.setattr(module._TappedRun, "tapped", tapped)
    trace = trace_model(model, SEQUENCES, configuration("plain", 1))
    assert trace.faithful is False and any("with taps" in note for note in compare(trace, trace).notes)


def test_plain_parts_at_the_first_product_that_tp_cuts(model, plain):
    """Fingerprints find the same op as values, without how far apart they are."""
    fingerprints = trace_model(model, SEQUENCES, configuration("plain", 4), keep="*/o_proj", check=False)
    found = compare(plain, fingerprints)
    assert found.first.name == "layer 0/o_proj" and found.first.max_ulp > 0 and found.first.max_abs > 0
    by_name = {op.name: op for op in found.ops}
    assert by_name["layer 0/down_proj"].differing is None and by_name["layer 0/down_proj"].differs
    assert by_name["logprob"].differing > 0 and by_name["logprob"].rows == 15
    assert not any(by_name[f"layer 0/{name}"].differs for name in ("qkv", "q", "k", "v", "attention"))
    assert (
        not found.promised and not found.broken and set(fingerprints.values) == {"layer 0/o_proj", "logprob"}
    )


def test_invariant_has_the_same_bits_in_other_batches_and_chunks(model, invariant):
    """On four devices, two rows at a time with a rank of the data axis each, and two tokens a pass."""
    right = Configuration(mesh=make_mesh(data=2, tp=2), batch_size=2, chunk=2)
    found = bisect(
        invariant, right, model=model, sequences=[SEQUENCES[2], SEQUENCES[0], [1, 2, 3]], check=False
    )
    assert (
        found.same_bits
        and found.promised
        and not found.notes
        and found.right.endswith("data=2 tp=2, batch 2, chunk 2")
    )
    assert {op.rows for op in found.ops} == {5 + 2}


def test_a_faulty_kernel_is_named(model, invariant, monkeypatch):
    """The twin: attention that is one step off for one element on two ranks breaks the promise, and is the first."""
    attention = InvariantNumerics.attention

    def faulty(self, q, k, v, positions):
        out = attention(self, q, k, v, positions)
        if lax.axis_size(TP) == 1:
            return out
        words = lax.bitcast_convert_type(out, jnp.uint16)
        wrong = (lax.axis_index(TP) == 1).astype(jnp.uint16)
        return lax.bitcast_convert_type(words.at[1, 4, 3, 5].set(words[1, 4, 3, 5] ^ wrong), out.dtype)

    monkeypatch.setattr(InvariantNumerics, "attention", faulty)
    tbik_jax.steps._steps.cache_clear()
    right = trace_model(model, SEQUENCES, configuration("invariant", 2), check=False)
    tbik_jax.steps._steps.cache_clear()
    found = compare(invariant, right)
    first = found.first
    assert found.broken and first.name == "layer 0/attention" and first.layer == 0
    assert (first.differing, first.max_ulp, first.at) == (1, 1, (1, 4))
    (place,) = np.argwhere(bits(right.values[first.name]) != bits(invariant.values[first.name]))
    assert place.tolist() == [5 + 4, 8 + 3, 5]  # the other rank's heads come behind the first one's 8


def test_mistakes_are_told(model):
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number"):
        Configuration(batch_size=0)
    with pytest.raises(ValueError, match="sequence 1 has 1 token"):
        trace_model(model, [[1, 2], [3]], Configuration())
    with pytest.raises(ValueError, match="needs the model and the sequences"):
        bisect(Configuration(), Configuration())
    assert len(jax.devices()) == 8
