"""Which implementation of an op runs: by device, or the one that was named, or an error."""

import importlib.metadata

import jax
import jax.numpy as jnp

BACKENDS = ("reference", "mosaic_gpu", "triton")

#: The versions of its packages that the `triton` backend runs with. Other ones may have other bits.
TRITON_VERSIONS = {"triton": "3.6.0", "jax-triton": "0.3.1"}

# By the first part of the compute capability. Blackwell (10.x, 12.x) has neither: Mosaic's kernel is for Hopper's MMA,
# and nobody has compared the bits of Triton's tilings there. On 10.x large and small tiles even take different MMAs.
_GPU_BACKENDS = {"8": "triton", "9": "mosaic_gpu"}


def device_backend(device: jax.Device) -> str:
    """The backend of a device; an op that has no such kernel, or none for its sizes, runs its reference there.

    `mosaic_gpu` on Hopper (compute capability 9.x), `triton` on Ampere and Ada (8.x), `reference` elsewhere. What is
    installed does not enter: without the packages that `triton` needs, a product there is an error.
    """
    major, dot, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return _GPU_BACKENDS.get(major, "reference") if device.platform == "gpu" and dot else "reference"


def resolve_backend(backend: str | None, dtype: jax.typing.DTypeLike) -> str:
    """The backend that runs for inputs of `dtype`.

    Args:
        backend: a name, which means that one or an error; None chooses by JAX's default device and the dtype
            (the kernels multiply bfloat16 and float16; float32 takes the reference, which states the same order).
        dtype: of the operands.

    Raises:
        ValueError: an unknown name, or a backend that this device or dtype does not have.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if backend is None:
        return device_backend(_default_device()) if half else "reference"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None to choose"
        )
    if backend != "reference" and not half:
        raise ValueError(
            f"backend={backend!r} takes bfloat16 and float16, not {jnp.dtype(dtype)}; use 'reference'"
        )
    return backend


def resolve_float32_backend(op: str, backend: str | None, refusal: str | None) -> str:
    """The backend of an op on float32 rows that has a reference and a Hopper kernel.

    Args:
        op: its name, for the message.
        backend: "reference" or "mosaic_gpu", which means that one or an error; None chooses by JAX's default device
            and by `refusal`.
        refusal: why the kernel does not take these sizes, or None if it does.

    Raises:
        ValueError: an unknown name, or a kernel that does not take the sizes.
    """
    if backend is None:
        return float32_backend(device_backend(_default_device()), refusal)
    if backend not in ("reference", "mosaic_gpu"):
        raise ValueError(f"backend={backend!r} is not one of reference, mosaic_gpu; or None to choose")
    if backend == "mosaic_gpu":
        if refusal:
            raise ValueError(f"{op}: backend 'mosaic_gpu': {refusal}; use 'reference', or None to choose")
        require_hopper(op)
    return backend


def float32_backend(backend: str, refusal: str | None) -> str:
    """What an op on float32 rows runs where the matmul's backend is `backend`."""
    return "mosaic_gpu" if backend == "mosaic_gpu" and refusal is None else "reference"


def resolve_row_backend(
    op: str, backend: str | None, dtype: jax.typing.DTypeLike, refusal: str | None
) -> str:
    """The backend of a row-wise op, which has no `triton` one: `mosaic_gpu`, or `reference`.

    Args:
        op: its name, for the message.
        backend: a name, which means that one or an error; None chooses by device, dtype and `refusal`.
        dtype: of the operands.
        refusal: why the kernel does not take these operands, or None if it does.

    Raises:
        ValueError: an unknown name, or a backend that this op, dtype, device or size does not have.
    """
    if backend is None:
        resolved = resolve_backend(None, dtype)
        return "mosaic_gpu" if resolved == "mosaic_gpu" and refusal is None else "reference"
    if backend == "triton":
        raise ValueError(f"{op} has no backend 'triton'; use 'mosaic_gpu' on Hopper, or 'reference'")
    if resolve_backend(backend, dtype) == "mosaic_gpu":
        if refusal:
            raise ValueError(
                f"{op}: backend 'mosaic_gpu' {refusal}; use backend='reference', or None to choose"
            )
        require_hopper(op)
    return backend


def require_hopper(op: str) -> None:
    """Raises `ValueError` if JAX's default device is no Hopper GPU."""
    device = _default_device()
    if device_backend(device) != "mosaic_gpu":
        raise ValueError(
            f"{op}: backend 'mosaic_gpu' needs a Hopper GPU (compute capability 9.x) and the default device is "
            f"{device}; use backend='reference', or None to choose"
        )


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def require_triton() -> None:
    """Checks that the packages of the `triton` backend are installed, without importing them.

    Raises:
        ValueError: one is missing, or is not of the version in `TRITON_VERSIONS`.
    """
    for package, version in TRITON_VERSIONS.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != version:
            found = "it is not installed" if installed is None else f"{installed} is installed"
            raise ValueError(
                f"backend='triton' needs {package}=={version} and {found}; "
                "pip install 'tbik-jax[triton]', or use backend='reference'"
            )
