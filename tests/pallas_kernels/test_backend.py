"""Which backend runs: by device and dtype, or the one that was named, or an error."""

import importlib.metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tbik_jax.pallas_kernels.common.backend import (
    BACKENDS,
    TRITON_VERSIONS,
    device_backend,
    require_triton,
    resolve_backend,
    resolve_float32_backend,
    resolve_row_backend,
)
from tbik_jax.pallas_kernels.tree_matmul.api import tree_matmul


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "reference"),
        ("gpu", "9.0", "mosaic_gpu"),
        ("gpu", "8.0", "triton"),
        ("gpu", "8.9", "triton"),
        ("gpu", "7.5", "reference"),
        ("gpu", "10.0", "reference"),
        ("gpu", "12.0", "reference"),
        ("gpu", "gfx90a", "reference"),
        ("tpu", None, "reference"),
    ],
)
def test_a_device_has_one_backend(platform: str, capability: str | None, expected: str) -> None:
    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert device_backend(device) == expected


def test_row_wise_ops_have_no_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert resolve_row_backend("op", None, jnp.bfloat16, None) == "reference"
    with pytest.raises(ValueError, match="op has no backend 'triton'"):
        resolve_row_backend("op", "triton", jnp.bfloat16, None)
    device.compute_capability = "9.0"
    assert resolve_row_backend("op", None, jnp.bfloat16, None) == "mosaic_gpu"
    assert resolve_row_backend("op", None, jnp.float32, None) == "reference"
    assert resolve_row_backend("op", "reference", jnp.bfloat16, None) == "reference"
    assert resolve_row_backend("op", None, jnp.bfloat16, "takes less") == "reference"
    assert resolve_row_backend("op", "mosaic_gpu", jnp.bfloat16, None) == "mosaic_gpu"
    with pytest.raises(ValueError, match="op: backend 'mosaic_gpu' takes less; use backend='reference'"):
        resolve_row_backend("op", "mosaic_gpu", jnp.bfloat16, "takes less")


def test_a_kernel_that_is_named_on_another_device_is_refused() -> None:
    for resolve in (
        lambda: resolve_row_backend("op", "mosaic_gpu", jnp.bfloat16, None),
        lambda: resolve_float32_backend("op", "mosaic_gpu", None),
    ):
        with pytest.raises(
            ValueError, match=r"op: backend 'mosaic_gpu' needs a Hopper GPU .* default device is"
        ):
            resolve()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_cpu_runs_the_reference(dtype: str) -> None:
    assert resolve_backend(None, dtype) == "reference"
    assert resolve_backend("reference", dtype) == "reference"
    for device in (jax.devices()[3], "cpu"):
        with jax.default_device(device):
            assert resolve_backend(None, dtype) == "reference"


def test_the_default_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [hopper])
    assert resolve_backend(None, jnp.bfloat16) == "mosaic_gpu"
    assert resolve_backend(None, jnp.float16) == "mosaic_gpu"
    assert resolve_backend(None, jnp.float32) == "reference"
    hopper.compute_capability = "8.0"
    assert resolve_backend(None, jnp.bfloat16) == resolve_backend(None, jnp.float16) == "triton"
    assert resolve_backend(None, jnp.float32) == "reference"


@pytest.mark.parametrize("name", ["pallas", "", "Reference", "mosaic"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}' is unknown; use one of {', '.join(BACKENDS)}"):
        resolve_backend(name, jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_a_kernel_refuses_what_it_cannot_multiply(backend: str, dtype: str) -> None:
    message = f"backend='{backend}' takes bfloat16 and float16, not {dtype}; use 'reference'"
    with pytest.raises(ValueError, match=message):
        resolve_backend(backend, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_a_named_backend_that_cannot_run_here_is_an_error(backend: str, dtype: str) -> None:
    x, w = jnp.zeros((16, 128), dtype), jnp.zeros((128, 16), dtype)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(ValueError, match=r"use (backend=)?'reference'"),
    ):
        tree_matmul(x, w, backend=backend)


@pytest.mark.parametrize("package", TRITON_VERSIONS)
@pytest.mark.parametrize("installed", [None, "0.4.0"])
def test_triton_needs_its_packages(
    monkeypatch: pytest.MonkeyPatch, package: str, installed: str | None
) -> None:
    def version(name: str) -> str:
        if name != package:
            return TRITON_VERSIONS[name]
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    ampere = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [ampere])
    wanted = f"{package}=={TRITON_VERSIONS[package]}"
    found = "it is not installed" if installed is None else "0.4.0 is installed"
    message = (
        rf"backend='triton' needs {wanted} and {found}; pip install 'tbik-jax\[triton\]', or use backend="
    )
    with pytest.raises(ValueError, match=message):
        tree_matmul(jnp.zeros((16, 128), jnp.bfloat16), jnp.zeros((128, 16), jnp.bfloat16))


def test_triton_runs_with_what_the_tests_install() -> None:
    require_triton()
