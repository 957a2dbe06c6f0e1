"""Damaged checkpoint folders: each has its own error of one line that names the culprit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tbik_jax import load, synthetic
from tbik_jax.safetensors_reader import SafetensorsReader
from tests.checkpoints import EMBEDDING, HEAD, INDEX, SINGLE, TINY, edit_json, edit_tensors, read_tensors
from tests.helpers import assert_same_bits

NAME = "model.layers.0.self_attn.q_proj.weight"
OUTSIDE = ["../model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors"]
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return synthetic.write_checkpoint(tmp_path / "single", TINY)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = synthetic.write_checkpoint(tmp_path / "sharded", TINY, shards=3)
    assert sorted(file.name for file in folder.glob("*.safetensors")) == SHARDS
    return folder


def place(folder: Path, name: str, file: Any) -> None:
    """Lets the index say that a tensor lies in another file."""
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: file}))


def assert_refused(folder: Path, *words: str) -> None:
    """`load` raises one line that holds the words."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load(folder)
    for word in words:
        assert word in str(error.value)


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5, 24])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_tensors_and_slices(tmp_path: Path, shards: int, dtype: str) -> None:
    folder = synthetic.write_checkpoint(tmp_path / "c", TINY, shards=shards, dtype=dtype)
    with SafetensorsReader(folder) as reader:
        for name, value in read_tensors(folder).items():
            assert_same_bits(reader.read(name), value)
            index = tuple(slice(size // 4, size // 2) for size in value.shape)
            assert_same_bits(reader.read(name, *index), value[index])


def test_an_index_over_one_file_of_the_usual_name_is_read(single: Path) -> None:
    placements = dict.fromkeys(read_tensors(single), SINGLE)
    (single / INDEX).write_text("{}")
    edit_json(single / INDEX, lambda index: index.update(weight_map=placements))
    load(single)


def test_the_files_are_closed(sharded: Path) -> None:
    with SafetensorsReader(sharded) as reader:
        reader.read(NAME)
    with pytest.raises(KeyError, match=NAME):
        reader.read(NAME)


# --- files -----------------------------------------------------------------------------------------------


def test_no_safetensors(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    assert_refused(single, str(single), SINGLE, INDEX)


@pytest.mark.parametrize("which", ["single", "sharded"])
@pytest.mark.parametrize(
    "cut",
    [
        lambda header, size: 0,
        lambda header, size: 5,  # within the length of the header
        lambda header, size: 8,
        lambda header, size: 8 + header // 2,
        lambda header, size: 8 + header,
        lambda header, size: (8 + header + size) // 2,
        lambda header, size: size - 1,
    ],
)
def test_a_truncated_file(request: pytest.FixtureRequest, which: str, cut: Callable[[int, int], int]) -> None:
    folder = request.getfixturevalue(which)
    file = folder / (SINGLE if which == "single" else SHARDS[1])
    data = file.read_bytes()
    file.write_bytes(data[: cut(int.from_bytes(data[:8], "little"), len(data))])
    assert_refused(folder, str(file), "truncated or damaged", "download it again")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"PK\x03\x04" * 100, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_no_safetensors(single: Path, content: bytes) -> None:
    (single / SINGLE).write_bytes(content)
    assert_refused(single, str(single / SINGLE), "truncated or damaged")


def test_a_file_with_something_appended(single: Path) -> None:
    with (single / SINGLE).open("ab") as file:
        file.write(b"more")
    assert_refused(single, str(single / SINGLE), "truncated or damaged")


# --- the index -------------------------------------------------------------------------------------------


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / SHARDS[2]).unlink()
    assert_refused(sharded, str(sharded / SHARDS[2]), "is missing", "index")


@pytest.mark.parametrize("file", [SHARDS[1], SHARDS[2]])
def test_an_index_that_places_a_tensor_in_a_wrong_file(sharded: Path, file: str) -> None:
    place(sharded, EMBEDDING, file)
    assert_refused(sharded, EMBEDDING, "place", INDEX, str(sharded))


def test_an_index_that_places_an_unknown_tensor(sharded: Path) -> None:
    place(sharded, "model.extra", SHARDS[0])
    assert_refused(sharded, str(sharded / SHARDS[0]), "lacks the tensor model.extra", INDEX)


def test_an_index_that_leaves_a_tensor_out(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(NAME))
    assert_refused(sharded, NAME, "does not place")


@pytest.mark.parametrize("file", SHARDS[1:])
def test_a_tensor_in_two_files(sharded: Path, file: str) -> None:
    """The one that the index does not name may be another version of it."""
    embedding = read_tensors(sharded)[EMBEDDING]
    edit_tensors(sharded / file, {EMBEDDING: np.zeros_like(embedding)})
    assert_refused(sharded, EMBEDDING, str(sharded / file), "does not place")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}', b"\xff\xfe"]
)
def test_a_broken_index(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert_refused(sharded, str(sharded / INDEX), "no safetensors index")


def test_an_empty_index(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(b'{"weight_map": {}}')
    assert_refused(sharded, str(sharded), "lacks the tensor")


@pytest.mark.parametrize("file", [*OUTSIDE, "..", ".", "", "config.json", "a\0b", 5, None, [SHARDS[0]]])
def test_an_index_that_leaves_the_folder_or_names_no_safetensors(sharded: Path, file: Any) -> None:
    (sharded.parent / SINGLE).write_bytes((sharded / SHARDS[0]).read_bytes())
    place(sharded, EMBEDDING, file)
    assert_refused(sharded, str(sharded / INDEX), EMBEDDING, repr(file))


def test_an_index_beside_a_single_file_that_it_does_not_name(sharded: Path) -> None:
    (sharded / SINGLE).write_bytes((sharded / SHARDS[0]).read_bytes())
    assert_refused(sharded, str(sharded), SINGLE, INDEX, "remove one")


# --- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [NAME, EMBEDDING, "model.norm.weight", "model.layers.1.self_attn.k_norm.weight"]
)
def test_a_missing_tensor(single: Path, name: str) -> None:
    shape = read_tensors(single)[name].shape
    edit_tensors(single / SINGLE, {name: None})
    assert_refused(single, str(single), f"lacks the tensor {name} of shape {shape}")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "x"]
)
def test_an_unused_tensor(single: Path, name: str) -> None:
    edit_tensors(single / SINGLE, {name: np.zeros((4,), np.float32)})
    assert_refused(single, str(single), f"holds the tensor {name}", "does not use")


@pytest.mark.parametrize("shape", [(32, 256), (128, 32), (8192,), (1, 256, 32), (256, 32, 1)])
def test_a_misshapen_tensor(single: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(single / SINGLE, {NAME: np.zeros(shape, np.float32)})
    assert_refused(single, NAME, str(shape), "(256, 32)")


@pytest.mark.parametrize(
    ("dtype", "label"),
    [(np.int8, "I8"), (np.float64, "F64"), (np.bool_, "BOOL"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")],
)
@pytest.mark.parametrize("name", [NAME, HEAD])
def test_an_unsupported_dtype(single: Path, name: str, dtype: Any, label: str) -> None:
    """HEAD is the redundant one of a tied checkpoint."""
    shape = (64, 32) if name == HEAD else (256, 32)
    edit_tensors(single / SINGLE, {name: np.zeros(shape, dtype)})
    assert_refused(single, f"{name} is {label}", "BF16, F16, F32")


@pytest.mark.parametrize("shape", [(32, 64), (64, 16), (2048,)])
def test_a_misshapen_tied_head(single: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(single / SINGLE, {HEAD: np.zeros(shape, ml_dtypes.bfloat16)})
    assert_refused(single, HEAD, str(shape), "(64, 32)")
