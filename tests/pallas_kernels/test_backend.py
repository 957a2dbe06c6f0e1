"""Which backend runs: by device and dtype, or the one that was named, or an error."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tbik_jax.pallas_kernels.common.backend import BACKENDS, device_backend, resolve_backend
from tbik_jax.pallas_kernels.tree_matmul.api import tree_matmul


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "reference"),
        ("gpu", "9.0", "mosaic_gpu"),
        ("gpu", "8.0", "reference"),
        ("gpu", "8.9", "reference"),
        ("gpu", "gfx90a", "reference"),
        ("tpu", None, "reference"),
    ],
)
def test_a_device_has_one_backend(platform: str, capability: str | None, expected: str) -> None:
    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert device_backend(device) == expected


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


@pytest.mark.parametrize("name", ["triton", "", "Reference", "mosaic"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}' is unknown; use one of {', '.join(BACKENDS)}"):
        resolve_backend(name, jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_mosaic_gpu_refuses_what_it_cannot_multiply(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"bfloat16 and float16, not {dtype}; use 'reference'"):
        resolve_backend("mosaic_gpu", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_named_backend_that_cannot_run_here_is_an_error(dtype: str) -> None:
    x, w = jnp.zeros((16, 128), dtype), jnp.zeros((128, 16), dtype)
    with pytest.raises(ValueError, match=r"use (backend=)?'reference'"):
        tree_matmul(x, w, backend="mosaic_gpu")
