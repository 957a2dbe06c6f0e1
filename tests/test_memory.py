"""A call that does not fit is refused with what would fit, before its cache exists."""

import dataclasses

import jax
import pytest

from tbik_jax import generate, make_mesh, memory, run, score
from tbik_jax.memory import Need, check_call, check_parameters
from tests.models_small import prompts, small_model

NEED = Need(cache=6 * 2**30, temporary=2 * 2**30, rows=8, positions=4096, smaller="prefill_chunk below 1024")


class Device:
    """Stands in for a GPU with so much free memory."""

    process_index = 0

    def __init__(self, free: int | None, name: str = "gpu:0"):
        self.free, self.name = free, name

    def memory_stats(self):
        return None if self.free is None else {"bytes_limit": self.free + 100, "bytes_in_use": 100}

    def __str__(self):
        return self.name


def test_what_fits_passes():
    check_call(NEED, [Device(8 * 2**30)])
    check_parameters(5, [Device(5)])


def test_devices_that_do_not_say_pass():
    check_call(NEED, [Device(None)])
    check_parameters(2**60, [Device(None)])


def test_the_fullest_device_decides():
    with pytest.raises(ValueError, match=r"gpu:1 has 5\.00 GiB free"):
        check_call(NEED, [Device(9 * 2**30), Device(5 * 2**30, "gpu:1")])


def test_one_byte_too_much_is_refused_with_what_would_fit():
    with pytest.raises(ValueError) as caught:
        check_call(NEED, [Device(8 * 2**30 - 1)])
    assert "8 prompts a device with 4096 positions need 6.00 GiB for keys and values and 2.00 GiB" in str(
        caught.value
    )
    assert "use at most 7 prompts a device at a time, or at most 3072 positions" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_refusal_advises_fits():
    """Positions come in buckets: the advice must be one."""
    room = 7 * 2**30
    with pytest.raises(ValueError, match="at most 7 prompts a device at a time, or at most 3072 positions"):
        check_call(NEED, [Device(room)])
    check_call(dataclasses.replace(NEED, cache=NEED.cache * 3 // 4, positions=3072), [Device(room)])
    check_call(
        dataclasses.replace(NEED, cache=NEED.cache * 7 // 8, temporary=NEED.temporary * 7 // 8, rows=7),
        [Device(room)],
    )


def test_an_overfull_device_advises_nothing_negative():
    with pytest.raises(ValueError) as caught:
        check_call(NEED, [Device(-5)])
    assert "-" not in str(caught.value).partition("use ")[2].replace("prefill_chunk", "")


def test_where_computing_alone_is_too_much_a_smaller_chunk_is_the_remedy():
    one = dataclasses.replace(NEED, rows=1)
    with pytest.raises(ValueError, match="use a prefill_chunk below 1024, or a mesh with more devices"):
        check_call(one, [Device(2**30)])


def test_parameters_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"parameters need 2\.00 GiB on each of 1 devices and gpu:0 has 1\.00"
    ):
        check_parameters(2 * 2**30, [Device(2**30)])


@pytest.fixture
def full(monkeypatch):
    """The CPU says that it has little memory left, and nobody may make a cache."""

    def set_free(free):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        monkeypatch.setattr(run, "init_cache", lambda shapes: pytest.fail("allocated"))

    return set_free


@pytest.mark.parametrize("call", [generate, score])
def test_generate_and_score_ask_before_they_allocate(full, call):
    model = small_model()
    full(50_000)
    with pytest.raises(ValueError, match=r"2 prompts a device with 128 positions need .* GiB free; use"):
        call(model, prompts((5, 3)), mesh=make_mesh())


def test_with_room_they_run(monkeypatch):
    """Twin of the above."""
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 2**40)
    generate(small_model(), prompts((5, 3)), mesh=make_mesh(), max_new_tokens=2)
    assert asked


def test_parameters_already_in_place_need_nothing(monkeypatch):
    model = small_model()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    generate(model, [[1]], mesh=make_mesh(), max_new_tokens=1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match="prompts a device"):  # not the parameters: they lie there
        generate(model, [[1]], mesh=make_mesh(), max_new_tokens=1)
    other = make_mesh(devices=jax.devices()[1:2])
    with pytest.raises(ValueError, match="the parameters need"):
        generate(model, [[1]], mesh=other, max_new_tokens=1)
