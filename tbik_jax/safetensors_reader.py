"""Reads slices of the tensors of a Hugging Face checkpoint folder, single-file or sharded."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("BF16", "F16", "F32")


class SafetensorsReader:
    """An open checkpoint; a context manager. Only the slices that are asked for are read."""

    def __init__(self, folder: str | Path):
        """Opens the folder's safetensors files.

        Raises:
            ValueError: no safetensors there, a file that is missing, truncated or damaged, or one that holds other
                tensors than the index says.
        """
        self._folder = Path(folder)
        self._open: list[Any] = []
        self._tensors: dict[str, Any] = {}  # name -> the open file that holds it
        try:
            for name, placed in _files(self._folder).items():
                handle = _open_file(self._folder / name)
                self._open.append(handle)
                found = set(handle.keys())
                if placed is not None:
                    _check_placement(self._folder / name, found, placed)
                self._tensors.update(dict.fromkeys(found, handle))
        except BaseException:
            self.close()
            raise

    def check(self, expected: Mapping[str, tuple[int, ...]], allowed: Mapping[str, str]) -> None:
        """Compares the checkpoint with the tensors of a model.

        Args:
            expected: name -> shape of every tensor that the model needs.
            allowed: name -> twin of tensors that may be there if they equal their twin bit for bit.

        Raises:
            ValueError: a missing, unused or misshapen tensor, or one of an unsupported dtype; it is named.
        """
        for name, shape in expected.items():
            if name not in self._tensors:
                raise ValueError(f"{self._folder} lacks the tensor {name} of shape {shape}")
            self._check_tensor(name, shape)
        for name in sorted(set(self._tensors) - set(expected)):
            if name not in allowed:
                raise ValueError(f"{self._folder} holds the tensor {name}, which the model does not use")
            twin = allowed[name]
            self._check_tensor(name, expected[twin])
            if not np.array_equal(_bits(self.read(name)), _bits(self.read(twin))):
                raise ValueError(
                    f"config.json ties {name} to {twin}, but the checkpoint's {name} differs from it; "
                    "set tie_word_embeddings to false in config.json, or remove the tensor"
                )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._tensors[name].get_slice(name)
        found = tuple(entry.get_shape())
        if found != tuple(shape):
            raise ValueError(f"tensor {name} has shape {found}; config.json asks for {shape}")
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"tensor {name} is {entry.get_dtype()}; supported are {', '.join(_DTYPES)}")

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A slice of a tensor in its stored dtype; the whole tensor without an index."""
        entry = self._tensors[name].get_slice(name)
        try:
            return entry[index] if index else entry[:]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"tensor {name} of {self._folder} cannot be read: {error}") from None

    def close(self) -> None:
        """Closes the files."""
        for handle in self._open:
            handle.__exit__(None, None, None)
        self._open, self._tensors = [], {}

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _files(folder: Path) -> Mapping[str, set[str] | None]:
    """File name -> the tensors it must hold, None where no index says."""
    index, single = folder / _INDEX, folder / _SINGLE
    if index.is_file():
        files = _indexed_files(index)
        if single.is_file() and _SINGLE not in files:
            raise ValueError(
                f"{folder} holds {_SINGLE}, and {_INDEX} that does not name it; remove one of them"
            )
        return files
    if single.is_file():
        return {_SINGLE: None}
    raise ValueError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}; is it a Hugging Face checkpoint folder?"
    )


def _indexed_files(index: Path) -> dict[str, set[str] | None]:
    try:
        placements = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no safetensors index: {error!r}") from None
    files: dict[str, set[str]] = {}
    for tensor, name in placements:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} places {tensor} in {name!r}, which is no safetensors file of its folder"
            )
        files.setdefault(name, set()).add(tensor)
    return {**files}


def _check_placement(path: Path, found: set[str], placed: set[str]) -> None:
    """Raises unless a file holds what the index says: a tensor of that name in another file may differ."""
    if placed - found:
        raise ValueError(f"{path} lacks the tensor {min(placed - found)} that {_INDEX} places there")
    if found - placed:
        raise ValueError(f"{path} holds the tensor {min(found - placed)} that {_INDEX} does not place there")


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint's index names it")
    try:
        return safe_open(path, framework="numpy").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; copy or download it again") from None


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
