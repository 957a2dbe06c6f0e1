"""What the tests of the kernels need: a Hopper GPU."""

import jax
import pytest

from tbik_jax.pallas_kernels.common.backend import device_backend


@pytest.fixture(scope="module")
def hopper():
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here")
    if device_backend(device) != "mosaic_gpu":
        pytest.skip("no Hopper GPU here")
