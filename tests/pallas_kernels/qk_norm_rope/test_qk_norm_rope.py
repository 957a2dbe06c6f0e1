"""qk_norm_rope: the ops it is made of, and the Hopper kernel in the interpreter and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax.pallas_kernels import qk_norm_rope, rope_tables
from tbik_jax.pallas_kernels.common import backend
from tbik_jax.pallas_kernels.qk_norm_rope import mosaic_gpu as kernel
from tbik_jax.pallas_kernels.qk_norm_rope.mosaic_gpu import heads_apart, qk_norm_rope_mosaic_gpu
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, normal

EPS, CAPACITY = 1e-6, 16
NAMES = ("qkv", "q_scale", "k_scale", "cos", "sin", "positions", "lengths", "k_cache", "v_cache")


def operands(name="bfloat16", b=2, t=3, kv_heads=2, queries=2, h=32):
    """Row 0 ends within the chunk, row 1 behind it."""
    rng, dtype = np.random.default_rng([b, t, kv_heads, queries, h]), DTYPES[name]
    scales = [(1 + normal(rng, (h,)) / 5).astype(dtype) for _ in range(2)]
    positions = np.array([3, 7])[:b, None] + np.arange(t)
    lengths = np.array([4, 16])[:b]
    caches = [normal(rng, (b, CAPACITY, kv_heads, h), dtype) for _ in range(2)]
    qkv = normal(rng, (b, t, kv_heads, queries + 2, h), dtype)
    tables = rope_tables(CAPACITY, h, 1e4)
    return (qkv, *scales, *tables, positions.astype(np.int32), lengths.astype(np.int32), *caches)


def in_numpy(qkv, q_scale, k_scale, cos, sin, positions, lengths, k_cache, v_cache):
    b, t, kv_heads, group, h = qkv.shape
    cos, sin = cos[positions], sin[positions]
    q = orders.rms_norm(qkv[..., :-2, :].reshape(b, t, kv_heads * (group - 2), h), q_scale, EPS)
    k = orders.rope(orders.rms_norm(qkv[..., -2, :], k_scale, EPS), cos, sin)
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    for i, j in np.ndindex(b, t):
        live = positions[i, j] < lengths[i]
        k_cache[i, positions[i, j]] = k[i, j] if live else 0
        v_cache[i, positions[i, j]] = qkv[i, j, :, -1] if live else 0
    return orders.rope(q, cos, sin), k_cache, v_cache


@pytest.mark.parametrize("name", DTYPES)
def test_it_is_the_ops_one_after_the_other(name):
    args = operands(name)
    out = jax.jit(functools.partial(qk_norm_rope, eps=EPS))(*args)
    assert_same_bits(out, in_numpy(*args))


@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_heads": 2, "queries": 1, "h": 64},
        {"kv_heads": 1, "queries": 4, "h": 128},
        {"kv_heads": 3, "queries": 2, "h": 32},  # a KV head's queries lie side by side
        {"kv_heads": 2, "queries": 5, "h": 128, "b": 1, "t": 1},
    ],
)
def test_the_kernel_has_the_same_bits(sizes):
    args = operands(**sizes)
    expected = in_numpy(*args)
    for apart in (False, True):  # a CTA a token, or one a KV head
        out = qk_norm_rope_mosaic_gpu(*map(jnp.asarray, args), eps=EPS, apart=apart, interpret=True)
        assert_same_bits(out, expected)
    assert differing(args[7], expected[1]) and differing(args[8], expected[2])  # twin: something was written


@pytest.mark.parametrize(
    ("queries", "tokens", "apart"),
    [
        (2, 1, True),
        (2, 8, True),
        (2, 32, False),
        (4, 32, True),
        (4, 128, False),
        (8, 128, True),
        (8, 512, False),
    ],
)
def test_few_tokens_have_a_cta_for_each_kv_head(monkeypatch, queries, tokens, apart):
    assert heads_apart(tokens, 8, queries) == apart
    # twin: what the kernel is launched with
    seen = []
    monkeypatch.setattr(kernel, "_run", lambda *args: seen.append(args[-1].ctas))
    shapes = [jnp.zeros(0)] * 8
    qk_norm_rope_mosaic_gpu(jnp.zeros((1, tokens, 8, queries + 2, 128), jnp.bfloat16), *shapes, eps=EPS)
    assert seen == [8 if apart else 1]


def test_the_kernel_writes_nothing_outside_of_the_cache():
    args = list(map(jnp.asarray, operands(b=1, t=1)))
    inside = args[5]
    for positions in (inside + CAPACITY, inside - CAPACITY):
        args[5] = positions
        _, k, v = qk_norm_rope_mosaic_gpu(*args, eps=EPS, interpret=True)
        assert_same_bits((k, v), (args[7], args[8]))
    args[5] = inside
    assert differing(qk_norm_rope_mosaic_gpu(*args, eps=EPS, interpret=True)[1], args[7])


def test_the_lowered_kernel_writes_in_place(monkeypatch):
    """In a loop in shard_map with donated caches: one call, whose results are its operands 7 and 8."""
    monkeypatch.setattr(backend, "device_backend", lambda device: "mosaic_gpu")
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(b=2, t=1, kv_heads=8, queries=4, h=128)
    ]

    def loop(*args):
        def step(carry):
            i, *caches = carry
            q, *caches = qk_norm_rope(*args[:7], *caches, eps=EPS, backend="mosaic_gpu")
            return (i + 1 + (q[0, 0, 0, 0] > 0).astype(jnp.int32), *caches)

        return lax.while_loop(lambda carry: carry[0] < 9, step, (jnp.int32(0), *args[7:]))

    mapped = jax.shard_map(
        loop, mesh=jax.make_mesh((1,), ("tp",)), in_specs=P(), out_specs=P(), check_vma=False
    )
    jitted = jax.jit(mapped, donate_argnums=(7, 8))
    text = jitted.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    for output, operand in ((1, 7), (2, 8)):
        alias = f"output_operand_alias<output_tuple_indices = [{output}], operand_index = {operand},"
        assert text.count(alias) == 1
    assert text.count("tf.aliasing_output") == 2
    # No slice of a stack of caches can be fused into it.
    before, after = text.split("@mosaic_gpu_v2")
    barrier = "stablehlo.optimization_barrier"
    assert before.count(barrier) == after.count(barrier) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", np.zeros((2, 3, 2, 2, 32), "f4"), r"g \+ 2, H\] with g >= 1"),
        ("q_scale", np.zeros(16, "f4"), r"takes q_scale \(32,\) float32, not \(16,\) float32"),
        ("cos", np.zeros((16, 32), "f4"), r"takes cos \(16, 16\) float32, not \(16, 32\)"),
        ("positions", np.zeros((2, 3), "i2"), r"takes positions \(2, 3\) int32, not \(2, 3\) int16"),
        ("lengths", np.zeros(3, "i4"), r"takes lengths \(2,\) int32"),
        ("k_cache", np.zeros((2, 2, 2, 32), "f4"), r"takes v_cache \(2, 2, 2, 32\)"),
        ("v_cache", np.zeros((2, 16, 2, 32), "f2"), r"takes v_cache \(2, 16, 2, 32\) float32"),
    ],
)
def test_it_refuses(name, value, message):
    args = dict(zip(NAMES, map(jnp.asarray, operands("float32")), strict=True)) | {name: jnp.asarray(value)}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**args, eps=EPS)


def test_the_kernel_refuses_other_heads():
    args = map(jnp.asarray, operands(h=16))
    with pytest.raises(ValueError, match="head_dim 32, 64, 128 or 256, not 16"):
        qk_norm_rope(*args, eps=EPS, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="eps=0 must be positive"):
        qk_norm_rope(*map(jnp.asarray, operands()), eps=0)
