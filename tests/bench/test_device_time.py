"""How device times are dealt out to calls, with a recorder that stands in for CUPTI."""

import collections

import jax.numpy as jnp
import pytest

from tbik_jax.bench import device_time


class Recorder:
    """Each function launches the kernels it is given, and the n-th call of it takes n times as long."""

    def __init__(self, kernels, lost=0):
        self.kernels, self.lost, self.order, self.inputs = kernels, lost, [], []
        self.calls = collections.Counter()

    def start(self):
        self.recorded, self.order, self.inputs = [], [], []
        self.calls.clear()

    def stop(self):
        return self.recorded[: len(self.recorded) - self.lost * (len(self.recorded) > 6)]

    def call(self, name, function, inputs):
        self.calls[name] += 1
        self.order.append(name)
        self.inputs.append(inputs[0])
        self.recorded += [(kernel, ms * self.calls[name]) for kernel, ms in self.kernels[name]]
        return jnp.zeros(())


KERNELS = {"one": [("a", 0.001)], "two": [("b", 0.001), ("c", 0.002)]}
FUNCTIONS = dict.fromkeys(KERNELS, lambda x: x)
SETS = [(i,) for i in range(5)]


def test_a_call_takes_what_all_its_kernels_take():
    recorder = Recorder(KERNELS)
    found = device_time.compare(FUNCTIONS, SETS, recorder)
    assert found["one"].calls == found["two"].calls == 24
    assert (found["one"].kernels, found["two"].kernels) == (1, 2)
    assert found["one"].us == pytest.approx(12.5) and found["two"].us == pytest.approx(37.5)
    assert found["one"].p10 < found["one"].us < found["one"].p90


def test_functions_take_turns_each_with_the_next_inputs():
    recorder = Recorder(KERNELS)
    device_time.compare(FUNCTIONS, SETS, recorder)
    assert recorder.order[:16] == ["one"] * 4 + ["two"] * 8 + ["one"] * 4
    assert all((b - a) % 5 == 1 for a, b in zip(recorder.inputs, recorder.inputs[1:], strict=False))


def test_long_functions_are_called_less():
    slow = {"one": [("a", 2.0)], "two": [("b", 0.01)]}
    assert device_time.compare(FUNCTIONS, SETS, Recorder(slow))["two"].calls == 6


def test_a_record_that_is_not_that_of_the_calls_is_an_error():
    with pytest.raises(RuntimeError, match="where 72 were launched"):
        device_time.compare(FUNCTIONS, SETS, Recorder(KERNELS, lost=1))
    with pytest.raises(RuntimeError, match="no kernel of one"):
        device_time.compare(FUNCTIONS, SETS, Recorder(KERNELS | {"one": []}))


def test_screening_names_each_function_before_it_runs():
    named = []
    found = device_time.screen(FUNCTIONS, SETS, Recorder(KERNELS), named.append)
    assert named == ["one", "two"] and found == {"one": 2.0, "two": 6.0}


def test_input_sets_do_not_fit_in_the_cache_together():
    assert device_time.count_sets(1_000_000) * 1_000_000 >= 150_000_000
    assert device_time.count_sets(400_000_000) == 1
    assert device_time.count_sets(100) == device_time.MOST_SETS
