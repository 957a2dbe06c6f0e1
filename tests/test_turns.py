"""Two halves of a prompt that take turns: the bits of one pass, and sums under way while the other half computes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.hlo import ordered_by_xla
from tbik_jax import collectives, generate, make_mesh, steps
from tbik_jax.layers import turns
from tbik_jax.layers.base import Turns
from tbik_jax.layers.turns import alone, alternate
from tbik_jax.mesh import resolve_mesh
from tbik_jax.models import Qwen3
from tbik_jax.run import Padded, Run
from tbik_jax.steps import Engine
from tests.models_small import CONFIG, prompts

THREE = dataclasses.replace(CONFIG, num_hidden_layers=3)
WIDTH = 16


def _model(layers: int = 3, dtype: Any = jnp.bfloat16) -> Qwen3:
    return Qwen3(dataclasses.replace(THREE, num_hidden_layers=layers), dtype=dtype, rngs=nnx.Rngs(7))


def _run(model: Qwen3, numerics: str = "invariant", overlap: bool = True, **sizes: int) -> Run:
    mesh = resolve_mesh(make_mesh(**sizes))
    engine = Engine.create(model, mesh, numerics, scan_layers=False, overlap_prefill=overlap)
    batch = Padded.of([np.asarray(p, np.int32) for p in prompts((40, 3, 17, 33))], mesh)
    return Run(engine, batch, 128, model.config)


def _cache(model: Qwen3, **sizes: int) -> list[np.ndarray]:
    """Bits of the cache behind two passes."""
    run = _run(model, **sizes)
    run.prepare_prefill(WIDTH)
    run.allocate()
    run.prefill(0, WIDTH)
    run.prefill(WIDTH, WIDTH)
    return [np.asarray(each).view(np.uint8) for each in jax.tree.leaves(run.cache)]


def _prefill_hlo(run: Run) -> str:
    args = run._prefill_arguments(0, WIDTH)
    return run._engine.steps.prefill.lower(run._engine.parameters, run._shapes, *args).as_text()


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets from how many tokens of a pass on halves take turns."""

    def set_to(tokens: int) -> None:
        steps._steps.cache_clear()
        monkeypatch.setattr(steps, "OVERLAPPED_TOKENS", tokens)

    yield set_to
    steps._steps.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [({"tp": 2}, jnp.bfloat16), ({"tp": 8}, jnp.float32), ({"data": 2, "tp": 4}, jnp.float32)],
    ids=str,
)
def test_halves_in_turns_have_the_bits_of_one_device(sizes: dict[str, int], dtype: Any, least: Any) -> None:
    """In float32, as in a model so small the rounding to bfloat16 hides most of another order."""
    model = _model(dtype=dtype)
    alone_on_one = _cache(model, tp=1)
    assert np.count_nonzero(alone_on_one[-1])
    least(WIDTH)
    for found, expected in zip(_cache(model, **sizes), alone_on_one, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers(layers: int, least: Any) -> None:
    model = _model(layers)
    expected = _cache(model, tp=1)
    least(WIDTH)
    np.testing.assert_array_equal(_cache(model, tp=2), expected)


def test_twin_another_order_of_the_ranks_shows(least: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    expected = _cache(model, tp=1)
    least(WIDTH)
    monkeypatch.setattr(
        turns,
        "join_shares",
        lambda shares, dtype: collectives.join_shares(shares[jnp.array([0, 2, 1, 3])], dtype),
    )
    assert any((a != b).any() for a, b in zip(_cache(model, tp=4), expected, strict=True))


def test_a_pass_of_enough_tokens_takes_turns_and_leaves_no_sum_to_xla(least: Any) -> None:
    least(4 * WIDTH)
    run = _run(_model(), tp=2)
    lowered = _prefill_hlo(run)
    # two sums a half in each of two layers, there and back; of the third only keys and values are wanted
    assert lowered.count("all_to_all") == 2 * 2 * 2 * 2
    assert "optimization_barrier" in lowered
    args = run._prefill_arguments(0, WIDTH)
    compiled = run._engine.steps.prefill.lower(run._engine.parameters, run._shapes, *args).compile()
    assert ordered_by_xla(compiled.as_text()) == []
    assert "all-to-all" in compiled.as_text()


@pytest.mark.parametrize(
    ("tokens", "numerics", "sizes"),
    [
        (4 * WIDTH + 1, "invariant", {"tp": 2}),
        (WIDTH, "invariant", {"tp": 1}),
        (WIDTH, "invariant", {"fsdp": 2, "tp": 2}),  # each half would gather the weights
        (WIDTH, "batch_invariant", {"tp": 2}),
        (WIDTH, "plain", {"tp": 2}),
    ],
)
def test_others_go_in_one_piece(tokens: int, numerics: str, sizes: dict[str, int], least: Any) -> None:
    least(tokens)
    lowered = _prefill_hlo(_run(_model(2), numerics, **sizes))
    assert "all_to_all" not in lowered  # small sums that are not cut take other transports


def test_only_where_it_is_asked_for(least: Any) -> None:
    least(WIDTH)
    assert "all_to_all" not in _prefill_hlo(_run(_model(2), overlap=False, tp=2))


def test_generate_passes_it_on(least: Any) -> None:
    least(WIDTH)
    model, tokens = _model(2), prompts((21, 3))
    outs = [
        generate(
            model, tokens, mesh=make_mesh(tp=2), max_new_tokens=2, scan_layers=False, overlap_prefill=overlap
        )
        for overlap in (False, True)
    ]
    for one, other in zip(outs[0].logprobs, outs[1].logprobs, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
    engines = steps._steps.cache_info()
    assert engines.currsize == 2  # two kinds of programs


def test_turns_go_in_order_and_wait_for_the_one_before() -> None:
    log = []

    def piece(name: str, x: jax.Array) -> Turns[None]:
        for turn in range(3):
            log.append(f"{name}{turn}")
            x = jnp.sin(x)
            if turn < 2:
                x = yield x, x

    def run(x: jax.Array, y: jax.Array) -> None:
        log.clear()
        alternate([piece("a", x), piece("b", y)], [0, 0, 1, 0, 1, 1])

    jaxpr = str(jax.make_jaxpr(run)(1.0, 2.0))
    assert log == ["a0", "a1", "b0", "a2", "b1", "b2"]
    # all but the first of each
    assert jaxpr.count("optimization_barrier") == 4


def test_pieces_that_have_ended_are_passed_over_and_left_turns_are_an_error() -> None:
    def piece(count: int) -> Turns[None]:
        for _ in range(count):
            yield None, None

    alternate([piece(1), piece(3)], [0, 1] * 4)
    with pytest.raises(AssertionError, match=r"pieces \[1\] have turns left"):
        alternate([piece(1), piece(3)], [0, 1, 0, 1])


def test_alone_gives_the_result() -> None:
    def piece() -> Turns[int]:
        got = yield 3, None
        return got + 1

    assert alone(piece()) == 4


@pytest.mark.parametrize(
    ("sizes", "numerics", "scan", "asked", "expected"),
    [
        ({"tp": 2}, "invariant", False, True, True),
        ({"tp": 2}, "invariant", False, False, False),
        ({"tp": 1}, "invariant", False, True, False),
        ({"tp": 2}, "invariant", True, True, False),
        ({"fsdp": 2, "tp": 2}, "invariant", False, True, False),
        ({"tp": 2}, "batch_invariant", False, True, False),
        ({"tp": 2}, "plain", False, True, False),
    ],
)
def test_copy_engines_are_asked_for_only_where_halves_can_take_turns(
    sizes: dict[str, int],
    numerics: str,
    scan: bool,
    asked: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **keywords: given.append(keywords) or jit(f, **keywords))
    steps._steps.cache_clear()
    Engine.create(
        _model(1), resolve_mesh(make_mesh(**sizes)), numerics, scan_layers=scan, overlap_prefill=asked
    )
    steps._steps.cache_clear()
    options = [each["compiler_options"] for each in given if each.get("compiler_options")]
    assert sum("xla_gpu_use_memcpy_local_p2p" in each for each in options) == expected  # prefill's alone
