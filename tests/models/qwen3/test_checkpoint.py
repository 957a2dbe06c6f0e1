"""Slices of parameters, put together from slices of Hugging Face tensors."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax import synthetic
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.checkpoint import ParameterPath, read_parameter, tensor_shapes, tied_duplicates
from tests.checkpoints import EMBEDDING, HEAD, TINY, UNTIED, expected_parameters, parameters
from tests.helpers import assert_same_bits

CONFIG = Qwen3Config.from_dict(UNTIED)
TENSORS = dict(synthetic.random_tensors(UNTIED, seed=0))
EXPECTED = expected_parameters(UNTIED, TENSORS)
NAMES = sorted(EXPECTED)
CUT = [name for name in NAMES if EXPECTED[name].ndim > 1]


class Recorder:
    """A `TensorReader` over arrays that remembers what was read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self.elements: dict[str, int] = {}

    def read(self, name: str, *index: slice) -> np.ndarray:
        for part, size in zip(index, self._tensors[name].shape, strict=True):
            assert 0 <= part.start < part.stop <= size and part.step in (None, 1), (name, index)
        array = self._tensors[name][index]
        self.elements[name] = self.elements.get(name, 0) + array.size
        return array


def path_of(name: str) -> ParameterPath:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


# --- the names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [TINY, UNTIED, *map(synthetic.qwen3_config, ("0.6B", "4B", "8B", "32B"))])
def test_tensors_are_those_of_the_synthetic_checkpoints(raw: dict[str, Any]) -> None:
    """`synthetic` says them by itself, because it is imported where the package cannot be."""
    assert tensor_shapes(Qwen3Config.from_dict(raw)) == synthetic.tensor_shapes(raw)


@pytest.mark.parametrize("raw", [TINY, UNTIED])
def test_parameters_of_the_module_are_those_of_the_checkpoint(raw: dict[str, Any]) -> None:
    config = Qwen3Config.from_dict(raw)
    tensors = dict(synthetic.random_tensors(raw, seed=0))
    abstract = parameters(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    expected = expected_parameters(raw, tensors)
    assert {name: leaf.shape for name, leaf in abstract.items()} == {n: v.shape for n, v in expected.items()}
    assert sum(v.size for v in expected.values()) == sum(v.size for v in tensors.values())


def test_only_a_tied_head_is_redundant() -> None:
    assert tied_duplicates(Qwen3Config.from_dict(TINY)) == {HEAD: EMBEDDING}
    assert tied_duplicates(CONFIG) == {}


# --- the slices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_parameter(name: str) -> None:
    value = read_parameter(CONFIG, path_of(name), whole(EXPECTED[name].shape), Recorder(TENSORS))
    assert_same_bits(value, EXPECTED[name])


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_any_slice_of_any_parameter(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    index = []
    for size in EXPECTED[name].shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    value = read_parameter(CONFIG, path_of(name), tuple(index), Recorder(TENSORS))
    assert_same_bits(value, EXPECTED[name][tuple(index)])


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_cut_reads_its_part_of_every_tensor(name: str, parts: int) -> None:
    """Along each dimension that a mesh axis may cut: as many elements are read as are returned."""
    shape = EXPECTED[name].shape
    letters = name.rsplit("_", 1)[1]
    for dim in (d for d, letter in enumerate(letters) if letter in "vkfd"):
        step = shape[dim] // parts
        for part in range(parts):
            index = list(whole(shape))
            index[dim] = slice(part * step, (part + 1) * step)
            reader = Recorder(TENSORS)
            value = read_parameter(CONFIG, path_of(name), tuple(index), reader)
            assert sum(reader.elements.values()) == value.size == math.prod(shape) // parts
            for tensor, elements in reader.elements.items():
                assert elements * parts == TENSORS[tensor].size


def test_each_tensor_belongs_to_one_parameter() -> None:
    read = []
    for name in NAMES:
        reader = Recorder(TENSORS)
        read_parameter(CONFIG, path_of(name), whole(EXPECTED[name].shape), reader)
        read.append(set(reader.elements))
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(read, 2))
    assert set().union(*read) == set(TENSORS)


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ("embedding",),
        ("layers", 0, "mlp", "up_weight"),
        ("mlp", "down_weight_fd"),
        ("layers", 0, "embedding_vd"),
        ("layers", 0),
        ("layers",),
    ],
)
def test_a_path_that_is_no_parameter_is_named(path: ParameterPath) -> None:
    with pytest.raises(ValueError, match=r"\.".join(map(str, path))):
        read_parameter(CONFIG, path, (slice(0, 1), slice(0, 1)), Recorder(TENSORS))


def test_an_error_of_the_reader_is_not_taken_for_an_unknown_parameter() -> None:
    with pytest.raises(KeyError, match=EMBEDDING):
        read_parameter(CONFIG, ("embedding_vd",), (slice(0, 1), slice(0, 1)), Recorder({}))
