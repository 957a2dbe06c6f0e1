"""Bits of the products of few rows on a Hopper GPU: `pytest -m gpu tests/gpu/test_few_rows_bits.py`.

`benchmarks/few_rows_speed.py` compares the shapes of the published models, and times them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tbik_jax import SamplingParams, generate, synthetic
from tbik_jax.layers import few_rows
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.pallas_kernels import (
    LayerRest,
    add_rms_norm,
    gated_matmul,
    join_subtrees,
    matmul_subtrees,
    norm_matmul,
    rest_of_layer,
    rms_norm,
    tree_join,
    tree_matmul,
)
from tbik_jax.pallas_kernels.few_rows.config import FewRowsConfig
from tbik_jax.pallas_kernels.few_rows.mosaic_gpu import norm_matmul_mosaic_gpu
from tests.helpers import assert_same_bits, cancelling, cancelling_parts, differing, normal, on_cpu, wide

EPS = 1e-6
KINDS = [normal, wide, cancelling]


pytestmark = pytest.mark.usefixtures("hopper")


def operands(make, m, d, n, dtype, parts):
    rng = np.random.default_rng([m, d, n])
    x, scale = make(rng, (m, d), dtype), (1 + normal(rng, (d,)) / 5).astype(dtype)
    y = cancelling_parts(rng, (parts, m, d)) if parts else make(rng, (m, d), dtype)
    return tuple(jnp.asarray(a) for a in (x, y, scale, make(rng, (n, d), dtype) * dtype(d**-0.5)))


def one_after_the_other(x, y, scale, w, gated):
    if y is None:
        total, normalised = x, rms_norm(x, scale, eps=EPS, backend="mosaic_gpu")
    else:
        y = join_subtrees(y, x.dtype, backend="mosaic_gpu") if y.ndim > x.ndim else y
        total, normalised = add_rms_norm(x, y, scale, eps=EPS, backend="mosaic_gpu")
    product = gated_matmul if gated else functools.partial(tree_matmul, leaves=1, transpose_rhs=True)
    return total, product(normalised, w, backend="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16.dtype.type, np.float16])
@pytest.mark.parametrize(
    ("m", "d", "n", "gated", "parts"),
    [(1, 2048, 4096, False, 2), (1, 1024, 6144, True, 4), (3, 640, 208, False, 0), (8, 2560, 4832, True, 8)],
)
def test_a_norm_in_the_product_has_the_bits_of_both(make, dtype, m, d, n, gated, parts):
    x, y, scale, w = operands(make, m, d, n, dtype, parts)
    fused = functools.partial(norm_matmul, eps=EPS, gated=gated, backend="mosaic_gpu")
    whole = fused(x, y, scale, w)
    assert_same_bits(whole, one_after_the_other(x, y, scale, w, gated))
    assert_same_bits(fused(x, None, scale, w), one_after_the_other(x, None, scale, w, gated))
    for row in range(m):  # a row stands alone
        alone = fused(x[row : row + 1], y[..., row : row + 1, :], scale, w)
        assert_same_bits(alone, tuple(out[row : row + 1] for out in whole))
    if parts > 2:  # twin: other neighbours, of nothing that hides them
        other = y[jnp.asarray([0, 2, 1, *range(3, parts)])]
        assert differing(fused(x * 0, other, scale, w)[0], fused(x * 0, y, scale, w)[0])
    # twin: the stream that was not rounded before the norm
    if parts == 0:
        unrounded = on_cpu(
            functools.partial(rms_norm, eps=EPS), x.astype(jnp.float32) + y, scale * jnp.float32(1)
        )
        product = tree_matmul(
            jnp.asarray(unrounded).astype(dtype), w, 1, transpose_rhs=True, backend="mosaic_gpu"
        )
        assert differing(product, whole[1])


@pytest.mark.gpu
@pytest.mark.parametrize("make", KINDS)
def test_no_tiling_of_a_norm_s_product_shows(make):
    x, y, scale, w = operands(make, 2, 1024, 2000, jnp.bfloat16.dtype.type, 2)
    expected = one_after_the_other(x, y, scale, w, False)
    for columns, boxes, stages, preparers, head in (
        (8, 8, 2, 1, 1),
        (56, 1, 9, 2, 3),
        (64, 2, 3, 1, 2),
        (96, 1, 2, 3, 9),  # a warpgroup without a row
        (128, 4, 2, 1, 1000),
    ):
        config = FewRowsConfig(columns=columns, boxes=boxes, stages=stages, preparers=preparers, head=head)
        for _ in range(3):  # a race need not show at once
            found = norm_matmul_mosaic_gpu(x, y, scale, w, eps=EPS, gated=False, config=config)
            assert_same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16.dtype.type, np.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 6144, 2048), (3, 2048, 1024), (8, 4096, 4096)])
def test_subtrees_join_to_the_whole_product(make, dtype, m, k, n):
    rng = np.random.default_rng([m, k, n])
    x, w = jnp.asarray(make(rng, (m, k), dtype)), jnp.asarray(make(rng, (k, n), dtype) * dtype(k**-0.5))
    whole = tree_matmul(x, w, 8, out_dtype=jnp.float32, backend="mosaic_gpu")
    possible = [parts for parts in (1, 2, 4, 8) if n // 64 * parts <= 132]  # a tile a CTA
    assert len(possible) >= 2
    for parts in (None, *possible):
        subtrees = matmul_subtrees(x, w, 8, parts=parts, backend="mosaic_gpu")
        each = list(np.asarray(subtrees))  # joined by NumPy, whose fp32 adds are correctly rounded too
        assert_same_bits(tree_join(each), whole)
        rounded = join_subtrees(subtrees, x.dtype, backend="mosaic_gpu")
        assert_same_bits(rounded, tree_matmul(x, w, 8, backend="mosaic_gpu"))
        if len(each) >= 4:  # twin: other neighbours
            assert differing(tree_join([each[i] for i in (0, 2, 1, *range(3, len(each)))]), whole)
    assert len(matmul_subtrees(x, w, 8, backend="mosaic_gpu")) > 1


def a_rest(make, dtype, size):
    """x, the rest of a layer of a published size, and the norm and product behind it."""
    d, k, f, n = {"0.6B": (1024, 2048, 3072, 4096), "1.7B": (2048, 2048, 6144, 4096)}[size]
    rng = np.random.default_rng([d, k, f, n])

    def weights(rows, columns, fan_in):
        return jnp.asarray(normal(rng, (rows, columns)) * fan_in**-0.5, dtype)

    x, heads = (jnp.asarray(make(rng, (1, one), dtype)) for one in (d, k))
    scale, behind = (jnp.asarray(1 + normal(rng, (d,)) / 5, dtype) for _ in range(2))
    rest = LayerRest(heads, weights(k, d, k), scale, weights(2 * f, d, d), weights(f, d, f), EPS)
    return x, rest, (behind, weights(n, d, d), EPS)


def op_by_op(x, rest, behind):
    attended = tree_matmul(rest.heads, rest.out_w, 8, backend="mosaic_gpu")
    total, normalised = add_rms_norm(x, attended, rest.scale, eps=EPS, backend="mosaic_gpu")
    hidden = gated_matmul(normalised, rest.gate_up_w, backend="mosaic_gpu")
    down = tree_matmul(hidden, rest.down_w, 8, backend="mosaic_gpu")
    if behind is None:
        return total, down
    total, normalised = add_rms_norm(total, down, behind[0], eps=EPS, backend="mosaic_gpu")
    return total, tree_matmul(normalised, behind[1], 1, transpose_rhs=True, backend="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16.dtype.type, np.float16])
@pytest.mark.parametrize("size", ["0.6B", "1.7B"])
def test_the_rest_of_a_layer_in_one_launch_has_the_bits_of_its_ops(make, dtype, size):
    x, rest, behind = a_rest(make, dtype, size)
    whole, last = op_by_op(x, rest, behind), op_by_op(x, rest, None)
    boards = None
    for _ in range(25):  # a race need not show at once
        total, product, boards = rest_of_layer(x, rest, behind, boards, backend="mosaic_gpu")
        assert_same_bits((total, product), whole)
        total, subtrees, boards = rest_of_layer(x, rest, None, boards, backend="mosaic_gpu")
        assert_same_bits((total, join_subtrees(subtrees, x.dtype, backend="mosaic_gpu")), last)
        assert (boards.blank == -1).all()
    # twin: another last bit of one head
    heads = rest.heads.at[0, 7].set(jnp.nextafter(rest.heads[0, 7], jnp.asarray(jnp.inf, x.dtype)))
    nudged = rest_of_layer(x, rest._replace(heads=heads * 2), behind, backend="mosaic_gpu")
    assert differing(nudged[1], whole[1])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["x", "heads", "gate_up_w", "down_w"])
def test_a_nan_whose_bits_are_all_set_keeps_nobody_waiting(where):
    """It is what a word of a board holds that has not come yet."""
    x, rest, behind = a_rest(normal, jnp.bfloat16.dtype.type, "0.6B")
    nan = jax.lax.bitcast_convert_type(jnp.uint16(0xFFFF), jnp.bfloat16)
    if where == "x":
        x = x.at[0, 5].set(nan)
    else:
        rest = rest._replace(**{where: getattr(rest, where).at[0].set(nan)})
    total, product, _ = rest_of_layer(x, rest, behind, backend="mosaic_gpu")
    assert jnp.isnan(total).any() and jnp.isnan(product).all()


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [2, 8])
def test_a_norm_and_a_join_of_subtrees_have_the_reference_s_bits(parts):
    x, y, scale, _ = operands(wide, 5, 2560, 16, jnp.bfloat16.dtype.type, parts)
    join = functools.partial(join_subtrees, dtype=jnp.bfloat16)
    assert_same_bits(join(y, backend="mosaic_gpu"), on_cpu(functools.partial(join, backend="reference"), y))
    norm = functools.partial(add_rms_norm, eps=EPS)
    found = norm(x, y, scale, backend="mosaic_gpu")
    assert_same_bits(found, on_cpu(functools.partial(norm, backend="reference"), x, y, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["0.6B", "1.7B"])
def test_a_row_alone_is_generated_as_in_company(size, monkeypatch):
    """Alone its layers take one launch each but for attention; in company, and as a scan, others do."""
    published = Qwen3Config.from_dict(synthetic.qwen3_config(size))
    sizes = dataclasses.replace(published, num_hidden_layers=3, vocab_size=4096, eos_token_id=())
    model = Qwen3(sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 4096, n) for n in (300, 7)]
    sampling = [SamplingParams(temperature=0.7, seed=3), SamplingParams()]
    calls = []
    op = few_rows.rest_of_layer
    monkeypatch.setattr(
        few_rows, "rest_of_layer", lambda *args, **options: calls.append(1) or op(*args, **options)
    )
    together = generate(model, prompts, max_new_tokens=200, sampling=sampling)
    assert not calls
    for i in range(2):
        for scan_layers in (False, True):
            alone = generate(
                model, prompts[i : i + 1], max_new_tokens=200, sampling=sampling[i], scan_layers=scan_layers
            )
            assert_same_bits((alone.tokens[0], alone.logprobs[0]), (together.tokens[i], together.logprobs[i]))
    assert calls
    # twin: a scale that differs in a layer's middle
    model.layers[1].post_attention_norm.scale_d[...] *= 1.0078125
    other = generate(model, prompts[:1], max_new_tokens=200, sampling=sampling[0])
    assert differing(other.logprobs[0], together.logprobs[0])
