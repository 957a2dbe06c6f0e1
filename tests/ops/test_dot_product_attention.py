"""`dot_product_attention` against `jax.nn`'s, argument by argument; a batch row stands alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbik_jax
from tests.helpers import DTYPES, assert_same_bits, differing, normal

F32 = np.float32
B, T, N, K, H = 3, 7, 4, 2, 16


def operands(seed: int = 0, dtype: Any = F32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, (B, T, heads, H), dtype) for heads in (N, K, K))
    return q, k, v


def arguments() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(1)
    lengths = np.asarray([3, 7, 1], np.int32)
    return {
        "all keys": {},
        "causal": {"is_causal": True},
        "bias": {"bias": normal(rng, (1, N, 1, T))},
        "mask": {"mask": rng.random((B, 1, T, T)) > 0.3},
        "window": {"local_window_size": (2, 1)},
        "lengths": {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths},
        "causal, scale and bias": {"is_causal": True, "scale": 0.5, "bias": normal(rng, (B, N, T, T))},
    }


@pytest.mark.parametrize("name", arguments())
def test_it_is_jax_nn_with_its_gradients(name: str) -> None:
    options = arguments()[name]
    ct = normal(np.random.default_rng(2), (B, T, N, H))

    def both(attention: Any) -> Any:
        def run(*operands: Any) -> Any:
            out, pull = jax.vjp(lambda *a: attention(*a, **options), *operands)
            return out, *pull(ct)

        return jax.jit(run)(*operands())

    pairs = zip(both(tbik_jax.dot_product_attention), both(jax.nn.dot_product_attention), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["causal", "mask"])
def test_a_batch_row_stands_alone(name: str, dtype: str) -> None:
    causal = name == "causal"

    @jax.jit
    def op(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        attention = functools.partial(tbik_jax.dot_product_attention, is_causal=causal, **options)
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(out)

    options = {key: value for key, value in arguments()[name].items() if key != "is_causal"}
    q, k, v = operands(3, DTYPES[dtype])
    whole = op(q, k, v, options)
    for row in range(B):
        cut = {key: value[row : row + 1] for key, value in options.items()}
        alone = op(*(x[row : row + 1] for x in (q, k, v)), cut)
        assert_same_bits(alone, [x[row : row + 1] for x in whole])
    wrong = op(*(x[1:2] for x in (q, k, v)), cut)
    assert differing(wrong[0], whole[0][:1]) > 0


def test_a_causal_prefix_has_its_bits_whatever_follows() -> None:
    q, k, v = operands(4)
    whole = tbik_jax.dot_product_attention(q, k, v, is_causal=True)
    assert_same_bits(
        tbik_jax.dot_product_attention(q[:, :3], k[:, :3], v[:, :3], is_causal=True), whole[:, :3]
    )


def test_without_a_batch_dimension() -> None:
    q, k, v = operands(5)
    assert_same_bits(
        tbik_jax.dot_product_attention(q[1], k[1], v[1]), tbik_jax.dot_product_attention(q, k, v)[1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[..., :8], k, v), "head size"),
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple"),
        (lambda q, k, v: (q[0], k, v), "takes"),
        (lambda q, k, v: (q.astype(np.float16), k, v), "one dtype"),
        (lambda q, k, v: (q, k, v, None, np.ones((B, 1, T, T), F32)), "bool"),
    ],
)
def test_what_is_not_covered_raises(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tbik_jax.dot_product_attention(*change(*operands()))
    assert jnp.isfinite(tbik_jax.dot_product_attention(*operands())).all()
