"""Which implementation of an op runs: by device, or the one that was named, or an error."""

import jax
import jax.numpy as jnp

BACKENDS = ("reference", "mosaic_gpu")


def device_backend(device: jax.Device) -> str:
    """The backend of a device: `mosaic_gpu` on Hopper (compute capability 9.x), `reference` elsewhere."""
    capability = str(getattr(device, "compute_capability", ""))
    return "mosaic_gpu" if device.platform == "gpu" and capability.startswith("9.") else "reference"


def resolve_backend(backend: str | None, dtype: jax.typing.DTypeLike) -> str:
    """The backend that runs for inputs of `dtype`.

    Args:
        backend: a name, which means that one or an error; None chooses by JAX's default device and the dtype
            (`mosaic_gpu` multiplies bfloat16 and float16; float32 takes the reference, which states the same order).
        dtype: of the operands.

    Raises:
        ValueError: an unknown name, or a backend that this device or dtype does not have.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if backend is None:
        default = jax.config.jax_default_device
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
        return device_backend(device) if half else "reference"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None to choose"
        )
    if backend == "mosaic_gpu" and not half:
        raise ValueError(
            f"backend='mosaic_gpu' multiplies bfloat16 and float16, not {jnp.dtype(dtype)}; use 'reference'"
        )
    return backend
