"""The fingerprint of a tree: the same on every mesh, another for every other bit, shape, dtype or place."""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tbik_jax.fingerprint import fingerprint
from tbik_jax.mesh import make_mesh
from tests.helpers import DTYPES, normal


def array(dtype: Any = np.float32) -> np.ndarray:
    return normal(np.random.default_rng(0), (8, 16), dtype)


def test_it_is_64_hexadecimal_digits_and_the_same_every_time() -> None:
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(array()))
    assert fingerprint(array()) == fingerprint(array())


def test_it_is_the_sha256_of_paths_dtypes_shapes_and_bytes() -> None:
    """Figures in files are compared with it, so its definition stays."""
    tree = {"b": [np.float32(-0.0)], "a": np.arange(2, dtype=np.int32)}
    digest = hashlib.sha256(b"['a']:int32:(2,);\x00\x00\x00\x00\x01\x00\x00\x00")
    digest.update(b"['b'][0]:float32:();\x00\x00\x00\x80")
    assert fingerprint(tree) == digest.hexdigest()


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ((1, 1, 1), ()),
        ((1, 1, 8), ("tp",)),
        ((1, 1, 8), (None, "tp")),
        ((2, 2, 2), (("data", "tp"), "fsdp")),
        ((2, 1, 4), ("tp",)),
        ((3, 1, 2), (None, "tp")),
        ((8, 1, 1), ()),
    ],
)
@pytest.mark.parametrize("name", DTYPES)
def test_it_does_not_depend_on_the_mesh(
    name: str, sizes: tuple[int, int, int], spec: tuple[Any, ...]
) -> None:
    x = array(DTYPES[name])
    placed = jax.device_put(x, NamedSharding(make_mesh(*sizes), PartitionSpec(*spec)))
    assert fingerprint({"w": placed}) == fingerprint({"w": x}) == fingerprint({"w": jnp.asarray(x)})


def test_it_does_not_depend_on_the_layout_in_memory() -> None:
    x = array()
    assert fingerprint(np.asfortranarray(x)) == fingerprint(x) == fingerprint(np.repeat(x, 2, axis=0)[::2])


def test_every_bit_counts() -> None:
    x = array()
    seen = {fingerprint(x)}
    for bit in (0, 15, 31):
        changed = x.view(np.uint32).copy()
        changed[3, 5] ^= np.uint32(1 << bit)
        seen.add(fingerprint(changed.view(np.float32)))
    assert len(seen) == 4


def test_zeros_of_two_signs_and_nans_of_two_payloads_differ() -> None:
    pairs = [(0x00000000, 0x80000000), (0x7FC00000, 0x7FC00001)]
    for pair in pairs:
        values = [np.asarray([word], np.uint32).view(np.float32) for word in pair]
        for put in (np.asarray, jnp.asarray):
            assert fingerprint(put(values[0])) != fingerprint(put(values[1]))


def test_dtype_shape_path_and_order_count() -> None:
    zeros = np.zeros(8, np.float32)
    trees = [
        {"a": zeros},
        {"b": zeros},
        [zeros],
        zeros,
        {"a": zeros.reshape(2, 4)},
        {"a": zeros.reshape(4, 2)},
        {"a": zeros.view(np.int32)},
        {"a": np.zeros(4)},  # as many bytes
        {"a": zeros[:4], "b": zeros[4:]},
        {"a": zeros[:5], "b": zeros[5:]},
        {"a": {"b": zeros}},
        {"a": np.zeros(16, np.float16)},
        {"a": np.zeros(16, ml_dtypes.bfloat16)},
        {},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint({"a": zeros, "b": 1}) == fingerprint(dict(b=1, a=zeros))


def test_python_numbers_count_with_their_type() -> None:
    assert len({fingerprint(value) for value in (1, 1.0, True, 2, 1j)}) == 5
    assert fingerprint(1.5) == fingerprint(np.float64(1.5))


def test_modules_and_keys_have_one() -> None:
    model, again, other = (nnx.Linear(4, 3, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert fingerprint(model) == fingerprint(again) != fingerprint(other)
    assert fingerprint(jax.random.key(0)) != fingerprint(jax.random.key(1))


@pytest.mark.parametrize(
    ("leaf", "kind"), [("text", "str"), (b"bytes", "bytes"), (object(), "object"), (len, "builtin")]
)
def test_other_leaves_are_refused_by_name(leaf: object, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"\['x'\] is a {kind}\w*, not an array or a number"):
        fingerprint({"w": array(), "x": leaf})
