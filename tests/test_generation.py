"""The main promise: one prompt, the same bits on every mesh, in every batch, with every chunking and sampling."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import tbik_jax
from tbik_jax import SamplingParams, generate, make_mesh, score, synthetic
from tbik_jax.models import Qwen3
from tests.helpers import assert_same_bits, differing
from tests.models_small import CONFIG, prompts, small_model

NEW = 10
#: Of `test_the_bits_are_the_stored_ones`, on the CPU with the versions in constraints.txt.
STORED = "d5a8374776383387ca47c97c015fd62cf3fbcca16235ab1d54e07d4a73656ab4"
PROMPTS = prompts()
#: Greedy, tempered, and filtered rows in one batch.
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.0, top_k=5, seed=2),
    SamplingParams(temperature=1.2, top_p=0.8, seed=3),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=2**40 + 4),
    SamplingParams(),
]
MESHES = {
    "tp=2": {"tp": 2},
    "tp=4": {"tp": 4},
    "tp=8": {"tp": 8},
    "data=3 (3 devices)": {"data": 3},
    "data=5 (5 devices)": {"data": 5},
    "data=3 tp=2 (6 devices)": {"data": 3, "tp": 2},
    "data=7 (7 devices)": {"data": 7},
    "fsdp=3": {"fsdp": 3},
    "fsdp=2 tp=2": {"fsdp": 2, "tp": 2},
    "data=2 fsdp=2 tp=2": {"data": 2, "fsdp": 2, "tp": 2},
}


#: bfloat16 roundings hide most changes of the last fp32 bit; in float32 a wrong order shows at once.
SENSITIVE = jnp.float32


@pytest.fixture(scope="module")
def model():
    return small_model(SENSITIVE)


@pytest.fixture(scope="module")
def expected(model):
    """One device, one batch."""
    return generate(model, PROMPTS, mesh=make_mesh(), max_new_tokens=NEW, sampling=SAMPLING)


def _take(out, indices):
    return [out.tokens[i] for i in indices], [out.logprobs[i] for i in indices]


def _sequences(out):
    return [prompt + tokens.tolist() for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]


def _assert_score_equals(scores, out):
    for prompt, row, logprobs in zip(PROMPTS, scores, out.logprobs, strict=True):
        assert_same_bits(row[len(prompt) - 1 :], logprobs)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_every_mesh_gives_the_same_bits(model, expected, sizes):
    mesh = make_mesh(**sizes)
    out = generate(model, PROMPTS, mesh=mesh, max_new_tokens=NEW, sampling=SAMPLING)
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


@pytest.mark.parametrize("name", ["tp=8", "fsdp=3", "data=2 fsdp=2 tp=2"])
def test_score_gives_generates_bits_on_every_mesh(model, expected, name):
    scores = score(model, _sequences(expected), mesh=make_mesh(**MESHES[name]))
    _assert_score_equals(scores, expected)


def test_every_device_count_has_a_mesh():
    counts = {int(np.prod(list(sizes.values()))) for sizes in MESHES.values()} | {1}
    assert counts == set(range(1, 9))


def test_plain_numerics_give_other_bits(model, expected):
    plain = [
        generate(
            model, PROMPTS, mesh=make_mesh(tp=tp), max_new_tokens=NEW, sampling=SAMPLING, numerics="plain"
        )
        for tp in (1, 8)
    ]
    assert tbik_jax.fingerprint(plain[0].logprobs) != tbik_jax.fingerprint(plain[1].logprobs)
    # and yet it is the same model: the first token's probability is close
    for a, b in zip(plain[0].logprobs, expected.logprobs, strict=True):
        assert abs(float(a[0]) - float(b[0])) < 1e-4


def test_plain_score_misses_generates_bits_on_another_mesh(model, expected):
    plain = generate(
        model, PROMPTS, mesh=make_mesh(), max_new_tokens=NEW, sampling=SAMPLING, numerics="plain"
    )
    scores = score(model, _sequences(plain), mesh=make_mesh(tp=8), numerics="plain")
    rows = [row[len(p) - 1 :] for p, row in zip(PROMPTS, scores, strict=True)]
    assert sum(differing(a, b) for a, b in zip(rows, plain.logprobs, strict=True)) > 0


def test_a_users_mesh_in_another_order(model, expected):
    devices = np.asarray(jax.devices()[:4])[::-1].reshape(2, 2)  # tp slowest, devices backwards
    out = generate(model, PROMPTS, mesh=Mesh(devices, ("tp", "data")), max_new_tokens=NEW, sampling=SAMPLING)
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


def test_the_ambient_mesh_is_used(model, expected):
    with jax.set_mesh(jax.make_mesh((2,), ("tp",))):  # of one axis, and with explicit axis types
        out = generate(model, PROMPTS, max_new_tokens=NEW, sampling=SAMPLING)
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


@pytest.mark.parametrize("order", [[3], [0], [4, 1], [5, 4, 3, 2, 1, 0], [2, 2, 2]], ids=str)
def test_the_batch_does_not_enter(model, expected, order):
    out = generate(
        model,
        [PROMPTS[i] for i in order],
        mesh=make_mesh(),
        max_new_tokens=NEW,
        sampling=[SAMPLING[i] for i in order],
    )
    assert_same_bits((out.tokens, out.logprobs), _take(expected, order))


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunked_prefill_gives_the_same_bits(model, expected, chunk):
    out = generate(
        model, PROMPTS, mesh=make_mesh(tp=2), max_new_tokens=NEW, sampling=SAMPLING, prefill_chunk=chunk
    )
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


def test_plain_numerics_follow_the_batch_and_the_chunk(model):
    """Twin of the two tests above."""
    arguments = {
        "mesh": make_mesh(),
        "max_new_tokens": NEW,
        "sampling": SamplingParams(),
        "numerics": "plain",
    }
    whole = generate(model, PROMPTS, **arguments)
    alone = [generate(model, [prompt], **arguments).logprobs[0] for prompt in PROMPTS]
    chunked = generate(model, PROMPTS, prefill_chunk=7, **arguments).logprobs
    for other in (alone, chunked):
        assert sum(differing(a, b) for a, b in zip(other, whole.logprobs, strict=True)) > 0


def test_prompts_longer_than_a_split():
    """Prefill, chunks and scoring across block (64 keys) and split (1024 keys) boundaries, end to end."""
    long = dataclasses.replace(CONFIG, max_position_embeddings=1200, num_hidden_layers=1)
    model = Qwen3(long, dtype=SENSITIVE, rngs=nnx.Rngs(3))
    rows = prompts((63, 1022, 65, 130, 64))
    outs = [
        generate(model, rows, mesh=make_mesh(tp=tp), max_new_tokens=4, prefill_chunk=chunk)
        for tp, chunk in ((1, 512), (4, 300))
    ]
    assert_same_bits((outs[1].tokens, outs[1].logprobs), (outs[0].tokens, outs[0].logprobs))
    whole = [row + tokens.tolist() for row, tokens in zip(rows, outs[0].tokens, strict=True)]
    scores = score(model, whole, mesh=make_mesh(tp=2), chunk=256)
    for row, each, logprobs in zip(rows, scores, outs[0].logprobs, strict=True):
        assert_same_bits(each[len(row) - 1 :], logprobs)


def test_float16_parameters():
    model = small_model(jnp.float16)
    outs = [
        generate(model, PROMPTS, mesh=make_mesh(**m), max_new_tokens=4) for m in ({}, {"data": 3, "tp": 2})
    ]
    assert_same_bits((outs[1].tokens, outs[1].logprobs), (outs[0].tokens, outs[0].logprobs))


def test_the_bits_are_the_stored_ones(tmp_path):
    """A change of these bits is a change of the contract: see CONTRIBUTING, "Changing bits"."""
    model = tbik_jax.load(
        synthetic.write_checkpoint(tmp_path / "model", synthetic.small_config(num_hidden_layers=1))
    )
    out = generate(model, [[5, 6, 7], [900]], mesh=make_mesh(tp=2), max_new_tokens=6, sampling=SAMPLING[:2])
    assert tbik_jax.fingerprint([out.tokens, out.logprobs]) == STORED


@pytest.mark.parametrize("chunk", [3, 16])
def test_chunked_score_gives_the_same_bits(model, expected, chunk):
    _assert_score_equals(score(model, _sequences(expected), mesh=make_mesh(tp=2), chunk=chunk), expected)


def test_a_longer_cache_and_more_tokens_keep_the_first_ones(model, expected):
    out = generate(model, PROMPTS, mesh=make_mesh(), max_new_tokens=100, sampling=SAMPLING)
    firsts = [t[:NEW] for t in out.tokens], [p[:NEW] for p in out.logprobs]
    assert_same_bits(firsts, (expected.tokens, expected.logprobs))
    # past one block of the cache: still what score computes in one pass
    sequences = [p + t.tolist() for p, t in zip(PROMPTS, out.tokens, strict=True)]
    _assert_score_equals(score(model, sequences, mesh=make_mesh()), out)


def test_layers_one_by_one_or_as_a_scan(model, expected):
    out = generate(
        model, PROMPTS, mesh=make_mesh(tp=2), max_new_tokens=NEW, sampling=SAMPLING, scan_layers=False
    )
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


def test_bfloat16_parameters():
    model = small_model(jnp.bfloat16)
    outs = [
        generate(model, PROMPTS, mesh=make_mesh(**sizes), max_new_tokens=NEW, sampling=SAMPLING)
        for sizes in ({}, {"data": 3, "tp": 2}, {"tp": 8})
    ]
    for out in outs[1:]:
        assert_same_bits((out.tokens, out.logprobs), (outs[0].tokens, outs[0].logprobs))
    _assert_score_equals(score(model, _sequences(outs[0]), mesh=make_mesh(tp=4)), outs[0])


def _fingerprint_in_a_fresh_process(numerics):
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "import tbik_jax\n"
        "from tests.models_small import small_model, prompts\n"
        "from tests.test_generation import NEW, SAMPLING, SENSITIVE\n"
        "out = tbik_jax.generate(small_model(SENSITIVE), prompts(), mesh=tbik_jax.make_mesh(tp=4),\n"
        f"                        max_new_tokens=NEW, sampling=SAMPLING, numerics='{numerics}')\n"
        "print(tbik_jax.fingerprint([out.tokens, out.logprobs]))\n"
    )
    compiles_itself = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=compiles_itself, capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


def test_a_fresh_process_gives_the_same_bits(expected):
    fresh = _fingerprint_in_a_fresh_process("invariant")
    assert fresh == tbik_jax.fingerprint([expected.tokens, expected.logprobs])


def test_a_fresh_process_with_plain_numerics_gives_others(model):
    """Twin: the other process has another mesh, which plain numerics follow."""
    here = generate(model, PROMPTS, mesh=make_mesh(), max_new_tokens=NEW, sampling=SAMPLING, numerics="plain")
    assert _fingerprint_in_a_fresh_process("plain") != tbik_jax.fingerprint([here.tokens, here.logprobs])


def test_a_broken_tree_is_noticed(model, expected, monkeypatch):
    """Twin of the mesh test: with `lax.psum` in place of the tree the bits differ."""
    from tbik_jax import steps
    from tbik_jax.layers import invariant

    steps._steps.cache_clear()
    monkeypatch.setattr(
        invariant, "tree_psum", lambda x, axis, out_dtype: jax.lax.psum(x, axis).astype(out_dtype)
    )
    out = generate(model, PROMPTS, mesh=make_mesh(tp=8), max_new_tokens=NEW, sampling=SAMPLING)
    steps._steps.cache_clear()
    assert tbik_jax.fingerprint(out.logprobs) != tbik_jax.fingerprint(expected.logprobs)


def test_a_plan_that_follows_the_mesh_is_noticed(model, expected, monkeypatch):
    """Twin of the mesh test: one leaf a rank, as an ordinary sharded matmul has it."""
    from tbik_jax import steps
    from tbik_jax.pallas_kernels.tree_matmul.plan import ContractionPlan

    steps._steps.cache_clear()
    monkeypatch.setattr(ContractionPlan, "local_leaves", lambda self, ranks: 1)
    out = generate(model, PROMPTS, mesh=make_mesh(tp=2), max_new_tokens=NEW, sampling=SAMPLING)
    steps._steps.cache_clear()
    assert tbik_jax.fingerprint(out.logprobs) != tbik_jax.fingerprint(expected.logprobs)


def test_an_end_token_stops_its_row(model, expected):
    eos = int(expected.tokens[0][3])
    out = generate(model, PROMPTS, mesh=make_mesh(tp=2), max_new_tokens=NEW, sampling=SAMPLING, eos_id=eos)
    for tokens, logprobs, whole, whole_logprobs in zip(
        out.tokens, out.logprobs, expected.tokens, expected.logprobs, strict=True
    ):
        hits = np.flatnonzero(whole == eos)
        count = hits[0] + 1 if hits.size else NEW
        assert_same_bits((tokens, logprobs), (whole[:count], whole_logprobs[:count]))
    several = generate(
        model, PROMPTS[:1], mesh=make_mesh(), max_new_tokens=NEW, eos_id=[eos, int(expected.tokens[0][1])]
    )
    assert len(several.tokens[0]) <= 2


@pytest.mark.parametrize("eos", [False, True])
def test_streamed_tokens_are_the_result(model, expected, eos):
    new = 20  # more than one look
    eos_id = int(expected.tokens[0][3]) if eos else None
    arguments = {
        "mesh": make_mesh(data=2, tp=2),
        "max_new_tokens": new,
        "sampling": SAMPLING,
        "eos_id": eos_id,
    }
    parts = {i: [] for i in range(len(PROMPTS))}
    out = generate(model, PROMPTS, on_tokens=lambda i, t, p: parts[i].append((t, p)), **arguments)
    whole = generate(model, PROMPTS, **arguments)
    assert_same_bits((out.tokens, out.logprobs), (whole.tokens, whole.logprobs))
    joined = [[np.concatenate(each) for each in zip(*parts[i], strict=True)] for i in parts]
    assert_same_bits([j[0] for j in joined], out.tokens)
    assert_same_bits([j[1] for j in joined], out.logprobs)
    assert max(len(each) for each in parts.values()) > 1  # it came in parts


def test_any_iterable_of_sampling_parameters_will_do(model):
    each = [SamplingParams(temperature=0.7, seed=i) for i in range(len(PROMPTS))]
    out, expected = (
        generate(model, PROMPTS, mesh=make_mesh(), max_new_tokens=2, sampling=given)
        for given in ((one for one in each), each)
    )
    assert_same_bits((out.tokens, out.logprobs), (expected.tokens, expected.logprobs))


@pytest.mark.parametrize(("new", "ends"), [(6, False), (8, True), (1, False)])
def test_steps_behind_the_last_change_nothing(model, expected, monkeypatch, new, ends):
    """Where the host asks behind several steps only, some are run past the limit, or after all rows have ended."""
    from tbik_jax import steps

    arguments = {"mesh": make_mesh(data=2, tp=2), "max_new_tokens": new, "sampling": SAMPLING}
    if ends:  # the first row at its third token
        arguments |= {"eos_id": sorted({int(tokens[2]) for tokens in expected.tokens})}
    often = generate(model, PROMPTS, **arguments)
    steps._steps.cache_clear()
    monkeypatch.setattr(steps, "_LEAST_ROOM", 1)
    seldom = generate(model, PROMPTS, **arguments)
    parts = [[] for _ in PROMPTS]
    streamed = generate(model, PROMPTS, on_tokens=lambda i, t, p: parts[i].extend(t), **arguments)
    steps._steps.cache_clear()
    for out in (seldom, streamed):
        assert_same_bits((out.tokens, out.logprobs), (often.tokens, often.logprobs))
    assert [list(map(int, part)) for part in parts] == [tokens.tolist() for tokens in often.tokens]
    assert ends == any(len(tokens) < new for tokens in often.tokens)


def test_what_the_callback_raises_ends_the_generation(model):
    seen = []

    def stop(index, tokens, logprobs):
        seen.append(index)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, mesh=make_mesh(), max_new_tokens=64, on_tokens=stop)
    assert seen == [0]


def test_prompts_of_one_bucket_share_their_programs(model):
    from tbik_jax.program import Program

    generate(model, [[1] * 70], mesh=make_mesh(), max_new_tokens=20)
    compiled = []
    original = Program._compile
    try:
        Program._compile = lambda self, shapes: compiled.append(1) or original(self, shapes)
        for length, new in ((90, 20), (67, 24), (97, 17)):
            generate(model, [[1] * length], mesh=make_mesh(), max_new_tokens=new)
        assert not compiled
        generate(model, [[1] * 98], mesh=make_mesh(), max_new_tokens=20)  # twin: the next bucket
        assert compiled
    finally:
        Program._compile = original


@pytest.mark.parametrize(("rows", "tokens"), [(1, 8193), (32, 257), (8193, 1), (1, 1), (3, 100_000)])
def test_the_default_chunk_leaves_no_pass_nearly_empty(rows, tokens):
    from tbik_jax.buckets import bucket
    from tbik_jax.generation import _chunk

    chunk = _chunk(None, tokens, rows)
    passes = -(-tokens // chunk)
    assert chunk == bucket(chunk) and chunk * rows <= max(2 * 8192, 96 * rows)
    assert chunk * passes < 1.5 * max(tokens, 16) + 16


def test_one_seed_for_all_and_one_a_prompt(model):
    same = [PROMPTS[0]] * 3
    hot = SamplingParams(temperature=1.5, seed=5)
    one = generate(model, same, mesh=make_mesh(data=3), max_new_tokens=NEW, sampling=hot)
    assert_same_bits(one.tokens[1:], [one.tokens[0]] * 2)
    each = [SamplingParams(temperature=1.5, seed=s) for s in (5, 6, 7)]
    many = generate(model, same, mesh=make_mesh(data=3), max_new_tokens=NEW, sampling=each)
    assert_same_bits(many.tokens[0], one.tokens[0])
    assert len({t.tobytes() for t in many.tokens}) == 3


def test_output_types(expected):
    for tokens, logprobs in zip(expected.tokens, expected.logprobs, strict=True):
        assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
        assert tokens.shape == logprobs.shape == (NEW,)
        assert ((tokens >= 0) & (tokens < CONFIG.vocab_size)).all() and (logprobs <= 0).all()


def test_score_of_a_single_token_is_empty(model):
    assert [row.shape for row in score(model, [[3], [4]], mesh=make_mesh())] == [(0,), (0,)]
