"""What a user gets wrong gets one clear error, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tbik_jax import SamplingParams, generate, make_mesh, score
from tests.helpers import assert_same_bits
from tests.models_small import CONFIG, prompts, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


BAD_CALLS = {
    "no prompts": ({"prompts": []}, "no prompts were given"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1 is empty"),
    "text": ({"prompts": ["hello"]}, "tokenize them first"),
    "one text": ({"prompts": "hello"}, "tokenize them first"),
    "flat ids": ({"prompts": [1, 2]}, "prompt 0 must be a flat sequence"),
    "no sequence": ({"prompts": 5}, "must be a sequence of token-id sequences, not int"),
    "nested unevenly": ({"prompts": [[1, [2]]]}, "prompt 0 must be a flat sequence"),
    "floats": ({"prompts": [[0.5]]}, "whole numbers, not float64"),
    "id too large": ({"prompts": [[1, 128]]}, "prompt 0 holds token id 128; the vocabulary is 0 .. 127"),
    "negative id": ({"prompts": [[-1]]}, "token id -1"),
    "too long": ({"prompts": [[1] * 257], "max_new_tokens": 1}, "exceed max_position_embeddings=256"),
    "too long with new": ({"prompts": [[1] * 250], "max_new_tokens": 7}, "shorten it by 1 tokens"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    "chunk": ({"prefill_chunk": 0}, "prefill_chunk=0"),
    "callback": ({"on_tokens": "print"}, "on_tokens='print' must be callable"),
    "sampling": ({"sampling": 3}, "one for each prompt, not 3"),
    "sampling rows": ({"sampling": [None]}, "one for each prompt, not [None]"),
    "sampling names": ({"sampling": {"temperature": 1.0}}, "one for each prompt, not {'temperature': 1.0}"),
    "sampling count": ({"sampling": [SamplingParams()] * 2}, "one for each of the 1 prompts"),
    "eos": ({"eos_id": 128}, "eos_id=128 is no token id"),
    "numerics": (
        {"numerics": "exact"},
        "numerics='exact' is unknown; use one of invariant, plain, batch_invariant",
    ),
    "mesh type": ({"mesh": "tp=2"}, "must be a jax.sharding.Mesh, not str"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls(model, arguments, message):
    call = {"prompts": [[1, 2, 3]], "mesh": make_mesh(), "max_new_tokens": 4, **arguments}
    with pytest.raises(ValueError, match=r".") as caught:
        generate(model, call.pop("prompts"), **call)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tp_of_three(model):
    mesh = Mesh(np.asarray(jax.devices()[:3]), ("tp",))
    with pytest.raises(ValueError, match=r"tp=3 does not cut the tree of 8 leaves.*use tp=1, 2, 4 or 8"):
        generate(model, [[1]], mesh=mesh)


def test_unknown_axis(model):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    with pytest.raises(ValueError, match=r"mesh axis 'model' is unknown.*use any of data, fsdp, tp"):
        generate(model, [[1]], mesh=mesh)


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 999]], ["text"]])
def test_bad_sequences(model, sequences):
    with pytest.raises(ValueError, match=r"sequence|token id"):
        score(model, sequences, mesh=make_mesh())


def test_score_too_long(model):
    with pytest.raises(ValueError, match="sequence 0 of 257 tokens exceeds max_position_embeddings=256"):
        score(model, [[1] * 257], mesh=make_mesh())


def test_nan_weights_are_reported_not_sampled_from():
    model = small_model()
    model.lm_head_weight_vd[...] = model.lm_head_weight_vd[...].at[100, 3].set(jnp.nan)
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, top_k=3)):
        with pytest.raises(
            FloatingPointError, match="logits of prompt 0 for position 5 hold NaN or infinity"
        ):
            generate(model, prompts((5, 2)), mesh=make_mesh(tp=2), max_new_tokens=3, sampling=sampling)
    with pytest.raises(FloatingPointError, match="logits of sequence 0 for position 1"):
        score(model, prompts((5, 2)), mesh=make_mesh(tp=2))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_embedding_hurts_its_prompt_alone(model, value):
    broken = small_model()
    broken.embedding_vd[...] = broken.embedding_vd[...].at[77].set(value)
    good, bad = [[1, 2, 3], [4, 5]], [6, 77, 8]
    greedy = {"mesh": make_mesh(), "max_new_tokens": 2}
    with pytest.raises(FloatingPointError, match="prompt 2 for position 3"):
        generate(broken, [*good, bad], **greedy)
    out, clean = generate(broken, good, **greedy), generate(model, good, **greedy)
    if not any(77 in t for t in clean.tokens):
        assert_same_bits(out.logprobs, clean.logprobs)


def test_kv_heads_bound_tp():
    import dataclasses

    from flax import nnx

    from tbik_jax.models import Qwen3

    config = dataclasses.replace(CONFIG, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"num_key_value_heads=4 cannot be cut over tp=8"):
        generate(Qwen3(config, rngs=nnx.Rngs(0)), [[1]], mesh=make_mesh(tp=8))


def test_a_dtype_that_is_not_supported():
    from flax import nnx

    from tbik_jax.models import Qwen3

    with pytest.raises(ValueError, match="dtype float64 is not supported; use bfloat16, float16 or float32"):
        Qwen3(CONFIG, dtype=np.float64, rngs=nnx.Rngs(0))


def test_a_vocabulary_that_has_no_eight_leaves():
    import dataclasses

    from flax import nnx

    from tbik_jax.models import Qwen3

    config = dataclasses.replace(CONFIG, vocab_size=501)
    with pytest.raises(ValueError, match=r"vocab_size=501 cannot be cut into 8 equal leaves; .* to 504"):
        generate(Qwen3(config, rngs=nnx.Rngs(0)), [[1]], mesh=make_mesh())
    config = dataclasses.replace(CONFIG, intermediate_size=192)
    with pytest.raises(ValueError, match=r"intermediate_size: k=192 cannot be cut into 8 leaves"):
        generate(Qwen3(config, rngs=nnx.Rngs(0)), [[1]], mesh=make_mesh())


def test_score_checks_its_chunk_even_where_there_is_nothing_to_score(model):
    with pytest.raises(ValueError, match="chunk=0 must be a whole number"):
        score(model, [[1]], mesh=make_mesh(), chunk=0)
