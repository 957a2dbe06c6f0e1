"""The model of a command: where it lies, its tokenizer, its parameters."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .. import synthetic, synthetic_tokenizer
from ..loading import load, local_folder
from ..models import Qwen3, Qwen3Config
from .terminal import Terminal

#: What the model "synthetic" is: small enough for a laptop, cut so that tp = 8 works.
SYNTHETIC = {"num_hidden_layers": 2}
#: One of them is in every tokenizer's folder.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on this machine.

    Attributes:
        name: what the user called it.
        path: the folder.
        config: of the model.
        eos_id: tokens that end a text; empty for the synthetic model, which would end anywhere.
    """

    name: str
    path: Path
    config: Qwen3Config
    eos_id: tuple[int, ...]

    def load(self, mesh: Mesh | None, dtype: str, terminal: Terminal) -> Qwen3:
        """The parameters on a mesh (None: one device)."""
        with terminal.working(f"loading {self.name}"):
            return jax.block_until_ready(load(self.path, mesh=mesh, dtype=dtype))


@contextlib.contextmanager
def open_model(name: str, terminal: Terminal) -> Iterator[ModelFolder]:
    """Finds, downloads or makes a checkpoint.

    Args:
        name: a folder, a hub id, or "synthetic".
        terminal: for progress.

    Yields:
        The checkpoint, for as long as the context lasts.

    Raises:
        ValueError: there is no such model, or it is none of ours.
    """
    if name == "synthetic":
        with tempfile.TemporaryDirectory(prefix="tbik-jax-") as folder:
            path = synthetic.write_checkpoint(Path(folder) / "synthetic", synthetic.small_config(**SYNTHETIC))
            synthetic_tokenizer.write_tokenizer(path)
            yield ModelFolder(name, path, Qwen3Config.from_folder(path), ())
        return
    if Path(name).is_dir():
        path = Path(name)
    else:
        with terminal.working(f"downloading {name}"):
            path = local_folder(name)
    config = Qwen3Config.from_folder(path)
    yield ModelFolder(name, path, config, config.eos_token_id)


def load_tokenizer(model: ModelFolder, other: str | None = None, terminal: Terminal | None = None) -> Any:
    """The model's tokenizer, or that of another folder or hub id.

    Raises:
        ValueError: there is none, or its vocabulary is larger than the model's.
    """
    on_hub = model.name != "synthetic" and not Path(model.name).is_dir()
    source = other or (model.name if on_hub else str(model.path))
    with (terminal or Terminal(as_json=False)).working("loading the tokenizer"):
        tokenizer = _load_tokenizer(source)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the vocabulary of {model.name} "
            f"{model.config.vocab_size}: they do not belong together; name the model's own with --tokenizer"
        )
    return tokenizer


def _load_tokenizer(source: str) -> Any:
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that there is no PyTorch, which nobody needs
    from transformers import AutoTokenizer  # takes seconds to import

    local = Path(source).is_dir()
    if local and not any((Path(source) / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer from config.json alone, and say nothing
        raise ValueError(
            f"{source} holds no tokenizer ({' or '.join(_TOKENIZER_FILES)}); name one with --tokenizer, or copy its "
            "files there"
        )
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise ValueError(
            f"no tokenizer can be loaded from {source}: {reason}; name another with --tokenizer"
        ) from None


def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts.

    Args:
        tokenizer: of the model.
        texts: one a prompt.
        special_tokens: let the tokenizer add its own; a chat template has written them already.

    Raises:
        ValueError: a text gives no token.
    """
    encoded = [tokenizer.encode(text, add_special_tokens=special_tokens) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {text!r} gives no token; write at least one character")
    return encoded
