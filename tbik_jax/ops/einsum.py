"""`einsum` as a chain of `dot_general`s from left to right, so that no size of a batch chooses the order."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from opt_einsum.parser import parse_einsum_input

from ..pallas_kernels.common.dtypes import FLOATS
from ..pallas_kernels.tree_matmul.plan import LEAVES
from . import steps
from .contraction import contract
from .reductions import check_float


def einsum(
    subscripts: str,
    *operands: jax.Array,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: Any = None,
    leaves: int = LEAVES,
) -> jax.Array:
    """`jnp.einsum` in tree order.

    Operands meet from left to right, `((a, b), c), ...`, whatever their sizes: `jnp.einsum` would choose a path by
    them, and so by the batch. What meets is a `dot_general`, whose contracted dimensions come in the order of the right
    operand's letters; letters that no other operand and no output has are summed first, by `tree_sum`. Everything
    between the operands and the result is fp32, and the result is rounded once.

    Args:
        subscripts: as in `jnp.einsum`, with or without `->`, ellipses too. A letter stands once in an operand.
        *operands: bfloat16, float16 or float32.
        precision: as in `dot_general`.
        preferred_element_type: of the result; the operands' common dtype by default.
        out_sharding: as in `dot_general`.
        leaves: of every contraction, as in `dot_general`.

    Returns:
        The result.

    Raises:
        ValueError: a letter twice in one operand, sizes that differ, or dtypes that the contract does not cover.
    """
    arrays = [jnp.asarray(x) for x in operands]
    for x in arrays:
        check_float("einsum", x)
    dtype = jnp.result_type(*arrays) if preferred_element_type is None else jnp.dtype(preferred_element_type)
    if dtype.name not in FLOATS:
        raise ValueError(f"einsum rounds to {', '.join(FLOATS)}, not to {dtype}")
    inputs, output, _ = parse_einsum_input(
        (subscripts, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    )
    letters = inputs.split(",")
    _check(subscripts, letters, output, arrays)
    sizes = _sizes(letters, arrays)
    terms = [_squeeze(*term, sizes) for term in zip(letters, arrays, strict=True)]
    terms = [
        _sum_alone(*term, "".join(name for j, (name, _) in enumerate(terms) if j != i) + output)
        for i, term in enumerate(terms)
    ]
    names, value = terms[0]
    for i, (other_names, other) in enumerate(terms[1:], start=1):
        wanted = "".join(name for name, _ in terms[i + 1 :]) + output
        last = i == len(terms) - 1
        names, value = _meet(
            names,
            value,
            other_names,
            other,
            wanted,
            precision,
            dtype if last else jnp.dtype("float32"),
            leaves,
        )
    value = jnp.transpose(value, [names.index(c) for c in output if c in names])
    shape = tuple(sizes[c] for c in output)
    if (
        value.shape != shape
    ):  # a letter of length 1 in every operand that has it was kept; nothing else is missing
        raise ValueError(f"einsum {subscripts!r}: output {output!r} has a letter that no operand has")
    value = value if value.dtype == dtype else steps.narrow(steps.widen(value), dtype.name)
    return value if out_sharding is None else jax.lax.with_sharding_constraint(value, out_sharding)


def _check(subscripts: str, letters: list[str], output: str, arrays: list[jax.Array]) -> None:
    for names, x in zip(letters, arrays, strict=True):
        if len(names) != x.ndim:
            raise ValueError(
                f"einsum {subscripts!r}: {names!r} does not name the dimensions of shape {x.shape}"
            )
        repeated = [c for c, count in collections.Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(
                f"einsum {subscripts!r}: {repeated[0]!r} stands twice in {names!r}; take jnp.diagonal of it first"
            )
    if len(set(output)) < len(output):
        raise ValueError(
            f"einsum {subscripts!r}: the output {output!r} names a dimension twice; name each once"
        )


def _sizes(letters: list[str], arrays: list[jax.Array]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for names, x in zip(letters, arrays, strict=True):
        for c, n in zip(names, x.shape, strict=True):
            known = sizes.get(c, 1)
            if n != known and 1 not in (n, known):
                raise ValueError(
                    f"einsum: dimension {c!r} has sizes {known} and {n}; they must be equal, or 1"
                )
            sizes[c] = n if known == 1 else known
    return sizes


def _squeeze(names: str, x: jax.Array, sizes: dict[str, int]) -> tuple[str, jax.Array]:
    """Drops dimensions of length 1 that another operand makes longer."""
    alone = tuple(i for i, c in enumerate(names) if x.shape[i] != sizes[c])
    return "".join(c for i, c in enumerate(names) if i not in alone), jax.lax.squeeze(x, alone)


def _sum_alone(names: str, x: jax.Array, others: str) -> tuple[str, jax.Array]:
    alone = tuple(i for i, c in enumerate(names) if c not in others)
    if not alone:
        return names, x
    return "".join(c for c in names if c in others), steps.total(steps.widen(x), alone)


def _meet(
    names: str,
    x: jax.Array,
    other_names: str,
    y: jax.Array,
    wanted: str,
    precision: Any,
    dtype: jnp.dtype,
    leaves: int,
) -> tuple[str, jax.Array]:
    shared = [c for c in other_names if c in names]
    batch = [c for c in shared if c in wanted]
    contracted = [c for c in shared if c not in wanted]
    places = [
        tuple(each.index(c) for c in some) for some in (contracted, batch) for each in (names, other_names)
    ]
    dims = (places[0], places[1]), (places[2], places[3])
    out = contract(x, y, dims, precision, dtype, leaves=leaves)
    rest = [c for each in (names, other_names) for c in each if c not in shared]
    return "".join([*batch, *rest]), out
