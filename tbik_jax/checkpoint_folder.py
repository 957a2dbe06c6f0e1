"""A folder of checkpoints, one a step: written under another name, renamed when whole, and never overwritten.

    folder/step_00000100/checkpoint.json   the manifest, written last: the arrays, and size and CRC of every file
    folder/step_00000100/model-0000/ ...   what Orbax wrote
    folder/.step_00000200.partial-1f3a...  a save that is under way, or was killed

So a checkpoint under its own name was whole when it got that name, and the manifest tells whether it still is. A folder
belongs to one run: two processes that save to it at once may delete each other's old checkpoints.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_MANIFEST = "checkpoint.json"
_FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"\.step_(\d{8,})\.partial-[0-9a-f]+")
_DELETED = re.compile(r"\.step_(\d{8,})\.deleted-[0-9a-f]+")


class IncompleteCheckpoint(ValueError):
    """A checkpoint that lacks a file or a part of one."""


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return folder / f"step_{step:08d}"


def step_paths(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, ascending, whole or not; none where there is no such folder."""
    return {step: path for step, path in _entries(folder, _STEP) if step_path(folder, step) == path}


def partial_paths(folder: Path) -> list[tuple[int, Path]]:
    """Saves that are under way or were interrupted, with their steps, ascending."""
    return _entries(folder, _PARTIAL)


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder of checkpoints")
    named = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a look at the size of every file that it names.

    The contents of the files are left to `check_contents`.

    Raises:
        IncompleteCheckpoint: the manifest or another file is missing or truncated.
        ValueError: the manifest is of another format.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"{path} lacks {_MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise IncompleteCheckpoint(f"{path / _MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path / _MANIFEST} is of format {found!r}; this version reads format {_FORMAT}")
    if damage := _damage(path, manifest):
        raise IncompleteCheckpoint(f"{path / _MANIFEST} is damaged: {damage}")
    for name, saved in manifest["files"].items():
        file, size = path / name, saved["bytes"]
        if not file.is_file():
            raise IncompleteCheckpoint(f"{path} lacks the file {name} of {size} bytes")
        if file.stat().st_size != size:
            raise IncompleteCheckpoint(f"{file} holds {file.stat().st_size} bytes and was saved with {size}")
    return manifest


def _damage(path: Path, manifest: dict[str, Any]) -> str | None:
    """What cannot be so of a manifest as it was saved, or None."""
    for name in ("files", "model", "arrays", "groups"):
        if not isinstance(manifest.get(name), dict):
            return f"{name!r} is {manifest.get(name)!r}"
    if (
        not isinstance(manifest.get("step"), int)
        or step_path(path.parent, manifest["step"]).name != path.name
    ):
        return f"its step is {manifest.get('step')!r}"
    if missing := {"rng", "extra", "versions"} - manifest.keys():
        return f"it lacks {', '.join(sorted(missing))}"
    saved = manifest.pop("crc32", None)  # checkpoints of before it was written have none
    if saved is not None and saved != _own_crc32(manifest):
        return f"its CRC-32 is {_own_crc32(manifest)} and was {saved}"
    return None


def _own_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def check_contents(path: Path, manifest: dict[str, Any], groups: Container[str]) -> None:
    """Reads the files of some groups of arrays once and compares their CRC-32 with the manifest's.

    Orbax's chunks hold no checksum: a flipped bit of a weight would come back as another weight.

    Raises:
        ValueError: a file has other contents than were saved.
    """
    saved = {name: entry for name, entry in manifest["files"].items() if name.split("/")[0] in groups}
    for (name, entry), found in zip(saved.items(), _crc32s([path / name for name in saved]), strict=True):
        if found != entry["crc32"]:
            raise ValueError(
                f"{path / name} is damaged: its CRC-32 is {found:08x} and was {entry['crc32']:08x} when it was saved; "
                "restore another step"
            )


def _crc32s(files: list[Path]) -> list[int]:
    """Of whole files; zlib lets go of the interpreter's lock, so threads help."""

    def crc32(file: Path) -> int:
        value = 0
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                value = zlib.crc32(block, value)
        return value

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        return list(pool.map(crc32, files))


@contextlib.contextmanager
def new_step(folder: Path, step: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Makes the checkpoint of a step appear whole, or not at all.

    Yields:
        A folder to write files to, and a dict to fill with what else the manifest is to hold. When the block ends, the
        manifest is written, all of it is flushed to the disk, and the folder gets its name. When it raises, nothing is
        left.

    Raises:
        ValueError: the step is there already, or the folder cannot be made.
    """
    final = step_path(folder, step)
    _check_free(final, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{error.filename or folder} is not a folder; checkpoints need one") from None
    partial = folder / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        manifest: dict[str, Any] = {}
        yield partial, manifest
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "crc32": crc32}
            for path, crc32 in zip(files, _crc32s(files), strict=True)
        }
        whole = json.loads(json.dumps({"format": _FORMAT, "step": step, **manifest, "files": entries}))
        text = json.dumps({**whole, "crc32": _own_crc32(whole)}, indent=1)
        (partial / _MANIFEST).write_text(text + "\n", encoding="utf-8")
        flush(partial)
        _check_free(final, step)  # another process may have been faster
        partial.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(final: Path, step: int) -> None:
    if not final.exists():
        return
    try:
        read_manifest(final)
        state = "is there already and is not overwritten"
    except ValueError as error:
        state = f"is there already, though damaged ({error})"
    raise ValueError(f"step {step} of {final.parent} {state}; save another step, or remove {final} first")


def delete_older(folder: Path, step: int, keep: int) -> None:
    """Deletes whole checkpoints before `step`, all but the newest `keep - 1`, and what interrupted saves left.

    A checkpoint loses its name before its first file, so that a kill leaves no half of one. Later steps stay (a run may
    have gone back), and so do damaged ones, which somebody may want to look at.
    """
    older = []
    for other, path in step_paths(folder).items():
        with contextlib.suppress(ValueError):
            read_manifest(path)
            older += [path] if other < step else []
    for path in older[: max(len(older) - (keep - 1), 0)]:
        path.rename(path.with_name(f".{path.name}.deleted-{uuid.uuid4().hex[:8]}"))
    for _, path in (*_entries(folder, _DELETED), *partial_paths(folder)):
        shutil.rmtree(path, ignore_errors=True)


def flush(folder: Path) -> None:
    """Flushes every file under a folder, and the folders themselves, to the disk."""
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
