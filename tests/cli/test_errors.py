"""Errors of the libraries below, in one line with a remedy."""

import jax
import pytest

from tbik_jax.cli.errors import explain


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.\nBufferAssignment: ..."
        ),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate 12.5GiB on device 0"),
        MemoryError(),
    ],
)
def test_out_of_memory(error):
    status, line = explain(error)
    assert status == 2 and line.startswith("out of memory on a device") and "--mesh tp=2" in line
    assert "\n" not in line and "BufferAssignment" not in line


def test_out_of_memory_says_how_much():
    _, line = explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: trying to allocate 34359738368 bytes."))
    assert "34359738368 bytes more were asked for" in line


def test_no_backend():
    error = RuntimeError(
        "Unable to initialize backend 'cuda': no supported devices (you may need to uninstall ...)"
    )
    status, line = explain(error)
    assert status == 2 and line.startswith("JAX cannot start the backend 'cuda': no supported devices;")
    assert "`tbik-jax verify` says what is wrong" in line and "JAX_PLATFORMS=cpu" in line


def test_a_users_mistake_is_told_as_it_is():
    assert explain(ValueError("tp=3\nis wrong")) == (2, "tp=3 is wrong")
    assert explain(FileExistsError("x is a file"))[0] == 2
    assert explain(FloatingPointError("NaN"))[0] == 2


def test_anything_else_is_the_programs():
    for error in (KeyError("x"), jax.errors.JaxRuntimeError("INTERNAL: ptxas"), RuntimeError("CUPTI")):
        status, line = explain(error)
        assert status == 3 and "please report it" in line and type(error).__name__ in line
