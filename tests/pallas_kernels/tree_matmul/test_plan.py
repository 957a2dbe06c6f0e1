"""The reduction plan: every Qwen3 on every mesh, a function of global sizes alone, and the errors."""

import dataclasses
import inspect

import jax
import pytest

from tbik_jax import synthetic
from tbik_jax.pallas_kernels.tree_matmul.plan import (
    LEAF_MULTIPLE,
    LEAVES,
    ContractionPlan,
    check_leaves,
    plan_contraction,
)

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
DTYPES = ("bfloat16", "float16", "float32")
TP = (1, 2, 4, 8)


def contractions(size: str) -> dict[str, tuple[int, int, str]]:
    """Name of a contraction -> its global K, its global N and its role."""
    config = synthetic.qwen3_config(size)
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    return {
        "qkv": (d, q + 2 * kv, "column"),
        "o": (q, d, "row"),
        "gate_up": (d, 2 * f, "column"),
        "down": (f, d, "row"),
        "lm_head": (d, config["vocab_size"], "column"),
    }


CONTRACTIONS = [(size, name) for size in SIZES for name in contractions(size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "name"), CONTRACTIONS)
def test_every_contraction_of_every_qwen3_has_a_plan(size: str, name: str, dtype: str) -> None:
    k, n, role = contractions(size)[name]
    plan = plan_contraction(k=k, n=n, dtype=dtype, role=role)
    assert plan.leaves == (LEAVES if role == "row" else 1)
    assert plan.k == k == plan.leaves * plan.leaf_size and plan.leaf_size % LEAF_MULTIPLE == 0
    assert plan.order == "neighbours_first"


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize(("size", "name"), CONTRACTIONS)
def test_every_contraction_of_every_qwen3_can_be_cut(size: str, name: str, tp: int) -> None:
    k, n, role = contractions(size)[name]
    plan = plan_contraction(k=k, n=n, dtype="bfloat16", role=role)
    if role == "column":  # N is cut, K is whole
        assert n % tp == 0 and plan.local_leaves(1) == 1
    else:
        assert plan.local_leaves(tp) == LEAVES // tp
        assert check_leaves(k // tp, LEAVES // tp) == plan.leaf_size


def test_the_plan_is_a_function_of_global_sizes_dtype_and_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no way in for M, a batch or a mesh, and the devices are not looked at."""
    before = plan_contraction(k=3072, n=1024, dtype="bfloat16", role="row")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not depend on the devices")

    for name in ("devices", "local_devices", "device_count", "local_device_count", "default_backend"):
        monkeypatch.setattr(jax, name, refuse)
    assert plan_contraction(k=3072, n=1024, dtype="bfloat16", role="row") == before
    assert set(inspect.signature(plan_contraction).parameters) == {"k", "n", "dtype", "role"}
    assert plan_contraction(k=3072, n=9999, dtype="float32", role="row") == before


def test_a_plan_is_data() -> None:
    plan = plan_contraction(k=256, n=16, dtype="bfloat16", role="row")
    assert plan == ContractionPlan(k=256, leaves=8, leaf_size=32) and len({plan, plan}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.leaves = 4
    with pytest.raises(TypeError):
        ContractionPlan(256, 8, 32)


@pytest.mark.parametrize(
    ("k", "leaves", "message"),
    [
        (6160, 8, "k=6160 cannot be cut into 8 leaves .* multiple of 128 .the next is 6272."),
        (100, 1, "k=100 .* multiple of 16 .the next is 112."),
        (0, 8, "k=0 .*next is 128"),
        (-128, 8, "k=-128 .*next is 128"),
        (48, 2, "k=48 .*next is 64"),
        (384, 3, "leaves=3 is not supported; use 1, 2, 4 or 8"),
        (4096, 16, "leaves=16"),
        (4096, 0, "leaves=0"),
        (4096, -1, "leaves=-1"),
    ],
)
def test_uneven_k_is_refused_with_numbers_and_a_remedy(k: int, leaves: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_leaves(k, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6160}, "k=6160 cannot be cut into 8 leaves"),
        ({"k": 100, "role": "column"}, "k=100 cannot be cut into 1 leaves"),
        ({"role": "both"}, "role='both' is unknown; use 'row'"),
        ({"dtype": "int8"}, "dtype int8 has no reduction plan; use one of bfloat16, float16, float32"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"n": 0}, "n=0 must be at least 1"),
    ],
)
def test_plan_contraction_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_contraction(**{"k": 256, "n": 16, "dtype": "bfloat16", "role": "row", **change})


@pytest.mark.parametrize("ranks", [0, -1, 3, 5, 6, 16])
def test_ranks_that_hold_no_complete_subtree_are_refused(ranks: int) -> None:
    plan = plan_contraction(k=256, n=16, dtype="bfloat16", role="row")
    with pytest.raises(ValueError, match=f"8 leaves of k=256 .* over {ranks} ranks; use 1, 2, 4, 8"):
        plan.local_leaves(ranks)
