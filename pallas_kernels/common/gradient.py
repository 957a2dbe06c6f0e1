"""Fail closed where a gradient in tree order does not exist yet."""

import functools

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def inference_only(x: jax.Array, op: str) -> jax.Array:
    """Returns `x`; differentiating through it raises `ValueError`.

    JAX would differentiate the references too, with reductions in an order that follows batch and mesh.

    Args:
        x: the result of an op.
        op: its name, for the message.
    """
    return x


@inference_only.defjvp
def _raise(op: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise ValueError(f"{op} has no gradient in tree order yet; cut the path with jax.lax.stop_gradient")
