"""The proof of bits: what it draws, and that a configuration with other bits, or none, does not get past it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import check_configs
from benchmarks.check_configs import Case, config_name, layer_cases, random_cases
from benchmarks.matmul_bits import KINDS, count_differences, make_inputs, reference_config
from tbik_jax.pallas_kernels.tree_matmul import tuned
from tbik_jax.pallas_kernels.tree_matmul.config import MosaicConfig, fits
from tbik_jax.pallas_kernels.tree_matmul.plan import check_leaves

CASE = Case(m=70, k=512, n=64, leaves=2, transpose_rhs=True, dtype="bfloat16", seed=0)
REFERENCE = reference_config(CASE.k, CASE.leaves)
OTHER = dataclasses.replace(REFERENCE, stages=3)


@pytest.fixture
def check(monkeypatch):
    """Checks `CASE` with a kernel that the test gives; each configuration's product is `change(product)`."""

    def run(change, case=CASE):
        def kernel(x, w, *, leaves, out_dtype, config, **_):
            x, w = (a.astype(jnp.float32) for a in (x, w.T))
            y = sum(
                x[:, i::leaves] @ w[i::leaves] for i in range(leaves)
            )  # an order for each number of leaves
            return change(y, config).astype(out_dtype)

        monkeypatch.setattr(check_configs, "tree_matmul_mosaic_gpu", kernel)
        monkeypatch.setattr(check_configs, "choose_config", lambda *_, **__: REFERENCE)
        monkeypatch.setattr(check_configs, "candidate_configs", lambda *_, **__: (REFERENCE, OTHER))
        with jax.default_device(jax.devices("cpu")[0]):
            (record,) = check_configs.check_configs(case)
        return record

    return run


def test_equal_bits_pass_and_the_twin_differs(check):
    record = check(lambda y, config: y)
    assert record["failed"] == 0 and record["configs"] == 2 and record["twin"] > 0
    assert record["checks"] == 1 + len(KINDS) * (2 * 2 + 1)


def test_one_bit_of_one_element_fails(check):
    def change(y, config):
        bits = jax.lax.bitcast_convert_type(y, jnp.uint32)
        flipped = bits.at[-1, -1].set(bits[-1, -1] ^ 1)
        return jax.lax.bitcast_convert_type(flipped, jnp.float32) if config == OTHER else y

    record = check(change)
    assert record["failed"] == 2 * len(KINDS)
    assert all(config_name(OTHER) in why and "1 of 4480 differ" in why for why in record["failures"])


def test_a_twin_that_has_the_same_bits_fails(check):
    record = check(lambda y, config: jnp.zeros_like(y))
    assert [why for why in record["failures"]] == ["twin: 1 leaves gave the bits of 2"]


def test_a_configuration_that_does_not_compile_fails_and_one_that_crashed_is_left_out(check):
    def change(y, config):
        if config == OTHER:
            raise ValueError("too many registers")
        return y

    (why,) = check(change)["failures"]
    assert "does not compile: ValueError: too many registers" in why
    assert check(change, dataclasses.replace(CASE, skip=(config_name(OTHER),)))["failed"] == 0


def test_payloads_of_nans_count_but_are_told_apart():
    a = np.array([1, np.nan, -0.0, np.nan], np.float32)
    b = a.copy()
    b.view(np.uint32)[1] ^= 1
    b[2] = 0.0
    assert tuple(map(int, count_differences(jnp.asarray(a), jnp.asarray(b)))) == (2, 1)


def test_cases_are_what_the_kernel_covers_and_do_not_change():
    cases = random_cases(200, 3) + layer_cases(3)
    assert cases == random_cases(200, 3) + layer_cases(3)
    for case in cases:
        assert 1 <= case.m <= 4100 and case.n % 16 == 0
        check_leaves(case.k, case.leaves)
    drawn = cases[:200]
    assert any(case.k // case.leaves % 64 for case in drawn) and any(case.m == 1 for case in drawn)
    assert {(case.leaves, case.transpose_rhs) for case in drawn} == {
        (s, t) for s in (1, 2, 4, 8) for t in (0, 1)
    }
    assert {case.dtype for case in drawn} == {"bfloat16", "float16"}


def test_the_cases_have_cut_last_rounds_of_every_number_of_leaves():
    cut = [c.leaves for c in layer_cases(0) + random_cases(48, 0) if any_last_split(c)]
    assert set(cut) == {2, 4, 8}
    assert not any_last_split(dataclasses.replace(CASE, leaves=1))


def any_last_split(case):
    return any(config.last_split > 1 for config in check_configs.configs_of(case))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_inputs_are_of_their_kind(dtype):
    made = {}
    for kind in KINDS:
        x, w = jax.jit(make_inputs, static_argnums=(0, 1, 2, 3, 4))(kind, 64, 512, 32, dtype, 1)
        assert x.dtype == w.dtype == dtype and x.shape == (64, 512) and w.shape == (512, 32)
        made[kind] = tuple(np.asarray(a).astype(np.float64) for a in (x, w))
    tiny = float(jnp.finfo(dtype).tiny)
    x, w = made["subnormal"]
    assert np.mean((np.abs(x) < tiny) & (x != 0)) > 0.5 and np.mean((np.abs(w) < tiny) & (w != 0)) > 0.1
    x, w = made["special"]
    assert np.isnan(x).any() and np.isposinf(x).any() and np.isneginf(x).any() and np.isfinite(x).mean() > 0.9
    x, w = made["wide"]
    spread = np.median(np.abs(x), axis=0)
    assert spread.max() / spread.min() > 2**16
    x, w = made["cancel"]
    assert np.abs(x @ w).mean() < 0.02 * (np.abs(x) @ np.abs(w)).mean()


def test_entries_measured_with_fewer_rows_that_do_not_fit_are_left_out(monkeypatch):
    path = tuned.table_path("NVIDIA H200")
    monkeypatch.setattr(tuned, "table_path", lambda kind: path)
    case = Case(m=1000, k=4096, n=3072, leaves=1, transpose_rhs=True, dtype="bfloat16", seed=0)
    entries = tuned.read_table(path)[case.k, case.n, case.leaves, case.transpose_rhs]
    too_large = [MosaicConfig(**c) for _, c in entries if c and not fits(MosaicConfig(**c), case.m, 1)]
    assert too_large
    assert not set(too_large) & set(check_configs.configs_of(case))
