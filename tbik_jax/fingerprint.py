"""A fingerprint of a tree of arrays: equal if and only if every bit is."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """SHA-256 over the bits of all arrays of `tree`, with their paths, shapes and dtypes.

    It does not depend on the mesh that the arrays lie on: shards are put together first. -0.0 and +0.0 differ, and so
    do NaNs of different payload.

    Args:
        tree: any pytree of arrays (JAX or numpy) and Python numbers, an NNX module among them.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: a leaf is no array or number, or is not wholly addressable from this process.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"{name} is not wholly addressable from this process; gather it first")
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.kind in "OSU":  # objects, bytes and strings
            raise ValueError(f"{name} is a {type(leaf).__name__}, not an array or a number")
        digest.update(f"{name}:{array.dtype.name}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
