"""Bits on real GPUs: `pytest -m gpu` on one Hopper GPU, `pytest -m multi_gpu` on two or more.

`benchmarks/check_tree_matmul.py` and `benchmarks/generate_matrix.py` check the same at real sizes and keep the results.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbik_jax
from tbik_jax import SamplingParams, generate, make_mesh, synthetic, tree_matmul
from tbik_jax.pallas_kernels import tree_join
from tests.helpers import assert_same_bits, cancelling, differing, normal, wide

K, N = 1024, 272
ROWS = (1, 2, 3, 63, 64, 65, 128, 129, 300)


@pytest.fixture(scope="module")
def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        pytest.skip("no GPU here")


@pytest.fixture(scope="module")
def two_gpus(gpus):
    if len(gpus) < 2:
        pytest.skip("one GPU here")
    return gpus


def _inputs(make, dtype):
    rng = np.random.default_rng(3)
    return jnp.asarray(make(rng, (max(ROWS), K), dtype)), jnp.asarray(normal(rng, (K, N), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_do_not_depend_on_the_batch(gpus, make, dtype):
    if dtype == jnp.float16 and make is wide:
        pytest.skip("2**24 of spread is more than float16 has")
    x, w = _inputs(make, dtype)
    whole = tree_matmul(x, w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
    for m in ROWS:
        part = tree_matmul(x[:m], w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
        assert_same_bits(part, whole[:m])
    stored_nk = tree_matmul(x, w.T, 8, out_dtype=jnp.float32, transpose_rhs=True, backend="mosaic_gpu")
    assert_same_bits(stored_nk, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_joined_give_the_whole_product(gpus, ranks):
    x, w = _inputs(wide, jnp.bfloat16)
    k = K // ranks
    parts = [
        tree_matmul(x[:, i * k : (i + 1) * k], w[i * k : (i + 1) * k], 8 // ranks, out_dtype=jnp.float32)
        for i in range(ranks)
    ]
    whole = tree_matmul(x, w, 8, out_dtype=jnp.float32)
    assert_same_bits(tree_join(parts), whole)
    # twin: another number of leaves is another order
    assert differing(tree_matmul(x, w, 1, out_dtype=jnp.float32), whole) > 0


@pytest.mark.gpu
def test_numerics(gpus):
    x, w = _inputs(normal, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    plain = np.abs(np.asarray(jnp.dot(x, w, preferred_element_type=jnp.float32), np.float64) - exact).max()
    ours = np.abs(np.asarray(tree_matmul(x, w, 8, out_dtype=jnp.float32), np.float64) - exact).max()
    assert ours <= 4 * plain


@pytest.mark.multi_gpu
def test_generate_on_one_and_two_gpus(two_gpus, tmp_path):
    model = tbik_jax.load(synthetic.write_checkpoint(tmp_path / "model", synthetic.small_config()))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 1024, n) for n in (5, 1, 12)]
    sampling = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9),
    ]
    outs = [
        generate(model, prompts, mesh=make_mesh(**m), max_new_tokens=16, sampling=sampling)
        for m in ({"tp": 1}, {"tp": 2}, {"data": 2}, {"fsdp": 2})
    ]
    for out in outs[1:]:
        assert_same_bits((out.tokens, out.logprobs), (outs[0].tokens, outs[0].logprobs))
