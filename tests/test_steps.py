"""Engaged: the compiled steps hold our collectives and no reduction that XLA may reorder."""

import re

import numpy as np
import pytest

from benchmarks.hlo import ordered_by_xla
from tbik_jax import SamplingParams, collectives, make_mesh, steps
from tbik_jax.mesh import resolve_mesh
from tbik_jax.run import Padded, Run
from tbik_jax.sampling import sampling_arrays
from tbik_jax.steps import DecodeState, Engine
from tests.models_small import CONFIG, prompts, small_model


def _programs(numerics: str, **sizes: int) -> dict[str, str]:
    """Optimised HLO of each step."""
    mesh = resolve_mesh(make_mesh(**sizes))
    engine = Engine.create(small_model(), mesh, numerics)
    batch = Padded.of([np.asarray(p, np.int32) for p in prompts((5, 3))], mesh)
    run = Run(engine, batch, 128, CONFIG)
    steps, parameters, cache, tables = engine.steps, engine.parameters, run._shapes, run._tables
    tokens, lengths = run._put((batch.window(0, 16), batch.lengths))
    sampling = run._put(
        sampling_arrays([SamplingParams(temperature=1.0, top_k=3, top_p=0.5)] * batch.size, CONFIG.vocab_size)
    )
    state = DecodeState.start(batch.last(), batch.lengths, 16)
    eos, zero = np.asarray([-1], np.int32), np.int32(0)
    lowered = {
        "prefill": steps.prefill.lower(parameters, cache, tokens, lengths, zero, tables),
        "decode": steps.decode[True].lower(parameters, cache, state, np.int32(4), sampling, eos, tables),
        "score": steps.score.lower(parameters, cache, tokens, tokens, lengths, zero, tables),
    }
    return {name: each.compile().as_text() for name, each in lowered.items()}


def _decode_text(room: int) -> str:
    mesh = resolve_mesh(make_mesh())
    engine = Engine.create(small_model(), mesh, "invariant")
    batch = Padded.of([np.asarray(p, np.int32) for p in prompts((5, 3))], mesh)
    run = Run(engine, batch, 128, CONFIG)
    sampling = run._put(sampling_arrays([SamplingParams()] * batch.size, CONFIG.vocab_size))
    state = DecodeState.start(batch.last(), batch.lengths, room)
    arguments = (engine.parameters, run._shapes, state, np.int32(4), sampling, np.asarray([-1], np.int32))
    return engine.steps.decode[False].lower(*arguments, run._tables).as_text()


def test_the_host_asks_behind_several_steps_where_there_are_many():
    """XLA on a GPU asks the host before each turn of a loop whose number of turns it does not know."""
    few, many = (_decode_text(room).count("stablehlo.while") for room in (48, 64))
    assert many == few + 1


@pytest.mark.parametrize(
    ("gigabytes", "room", "expected"),
    [(3.4, 64, 8), (16.4, 512, 4), (65.5, 4096, 2), (65.5, 63, 1), (0.001, 48, 1)],
)
def test_the_longer_a_step_takes_the_fewer_are_run_for_nothing(gigabytes, room, expected):
    assert steps.steps_a_look(int(gigabytes * 1e9), room) == expected


def test_the_check_knows_every_form():
    lines = (
        "%a = f32[2]{0} all-reduce(%x), to_apply=%sum",
        "%a = (s32[2]{0}, bf16[4]{0}) all-reduce-start(%x, %y), to_apply=%sum",
        "%a = f32[1]{0} reduce-scatter(%x), to_apply=%sum",
        "%a = f32[2,2]{1,0} dot(%x, %y)",
    )
    for line in lines:
        assert ordered_by_xla(line) == [line]
    region = (
        "%sum (a: f32[], b: f32[]) -> bf16[] {\n  %c = f32[] add(%a, %b)\n  ROOT %d = bf16[] convert(%c)\n}\n"
    )
    assert len(ordered_by_xla(region + "%r = bf16[] reduce(%x, %z), to_apply=%sum")) == 1
    for line in ("%a = u32[2]{0} all-reduce(%x), to_apply=%or", "%m = f32[] reduce(%x, %z), to_apply=%max"):
        assert ordered_by_xla(line) == []


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"data": 2, "fsdp": 2, "tp": 2}], ids=str)
def test_no_reduction_is_left_to_xla(sizes, monkeypatch):
    # The transport whose steps nothing else in the program takes.
    monkeypatch.setattr(collectives, "choose_transport", lambda size, ranks: "butterfly")
    steps._steps.cache_clear()
    for name, hlo in _programs("invariant", **sizes).items():
        assert "collective-permute" in hlo, name
        assert ordered_by_xla(hlo) == [], name
    steps._steps.cache_clear()


def test_the_check_finds_them_in_plain_numerics():
    for name, hlo in _programs("plain", tp=4).items():
        lines = "\n".join(ordered_by_xla(hlo))
        assert "all-reduce" in lines, name
        assert re.search(r"dot\(|matmul|reduce\(", lines), name
        assert "collective-permute" not in hlo, name


def test_weights_are_gathered_over_several_fsdp_ranks_only():
    dims = {}
    for name, sizes in {"one": {"tp": 4}, "two": {"fsdp": 2, "tp": 4}}.items():
        engine = Engine.create(small_model(), resolve_mesh(make_mesh(**sizes)), "invariant")
        dims[name] = dict(engine.steps._parallel.fsdp_dims)
    assert dims["one"] == {}
    assert dims["two"] == {
        "embedding_vd": 1,
        "qkv_weight_kghd": 3,
        "o_weight_kqhd": 3,
        "gate_up_weight_cfd": 2,
        "down_weight_fd": 1,
        "lm_head_weight_vd": 1,
    }


def test_the_cache_is_donated():
    for name, hlo in _programs("invariant", tp=2).items():
        assert "input_output_alias" in hlo, name


def test_bfloat16_roundings_are_explicit():
    """`reduce_precision` is what no pass may drop, with or without excess precision."""
    assert "reduce-precision" in _programs("invariant", tp=1)["prefill"]


def test_excess_precision_is_off(monkeypatch):
    import jax

    from tbik_jax import steps

    asked = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **keywords: asked.append(keywords) or jit(f, **keywords))
    steps._steps.cache_clear()
    Engine.create(small_model(), resolve_mesh(make_mesh()), "invariant")
    steps._steps.cache_clear()
    options = [each["compiler_options"] for each in asked if "compiler_options" in each]
    assert options and all(each["xla_allow_excess_precision"] is False for each in options)
