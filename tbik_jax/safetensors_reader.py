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
            ValueError: no safetensors there, or a file that is missing, truncated or damaged.
        """
        self._folder = Path(folder)
        self._open: list[Any] = []
        self._tensors: dict[str, Any] = {}  # name -> the open file that holds it
        try:
            for name, expected in _files(self._folder).items():
                handle = _open_file(self._folder / name)
                self._open.append(handle)
                found = list(handle.keys())
                missing = sorted(set(expected or ()) - set(found))
                if missing:
                    raise ValueError(
                        f"{self._folder / name} lacks the tensor {missing[0]} that {_INDEX} places there"
                    )
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
            entry = self._tensors[name].get_slice(name)
            if tuple(entry.get_shape()) != tuple(shape):
                raise ValueError(
                    f"tensor {name} has shape {tuple(entry.get_shape())}; config.json asks for {shape}"
                )
            if entry.get_dtype() not in _DTYPES:
                raise ValueError(f"tensor {name} is {entry.get_dtype()}; supported are {', '.join(_DTYPES)}")
        for name in sorted(set(self._tensors) - set(expected)):
            if name not in allowed:
                raise ValueError(f"{self._folder} holds the tensor {name}, which the model does not use")
            if not np.array_equal(_bits(self.read(name)), _bits(self.read(allowed[name]))):
                raise ValueError(
                    f"config.json ties {name} to {allowed[name]}, but the checkpoint's {name} differs from it; "
                    "set tie_word_embeddings to false in config.json, or remove the tensor"
                )

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


def _files(folder: Path) -> dict[str, list[str] | None]:
    """File name -> the tensors it must hold, None where no index says."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str] | None] = {}
            for tensor, name in weight_map.items():
                held = files.setdefault(name, [])
                assert held is not None
                held.append(tensor)
        except (
            OSError,
            UnicodeDecodeError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{index} is no safetensors index: {error!r}") from None
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"{index} names the file {name!r} outside its folder")
        return files
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    raise ValueError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}; is it a Hugging Face checkpoint folder?"
    )


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint's index names it")
    try:
        return safe_open(path, framework="numpy").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; copy or download it again") from None


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
