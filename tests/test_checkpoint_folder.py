"""A checkpoint is whole or it is not used: kills, damage, steps that are there already, and the old ones that go."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tbik_jax import checkpoint, checkpoint_steps, make_mesh, restore_checkpoint, save_checkpoint
from tbik_jax.checkpoint_folder import new_step
from tests.training_states import (
    State,
    abstract_model,
    assert_same_state,
    empty_state,
    new_state,
    restore,
    save,
    write_two_steps,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A folder with steps 1 and 2, not to be changed, and the state of step 2."""
    folder = tmp_path_factory.mktemp("template")
    return folder, write_two_steps(folder)


@pytest.fixture
def template(written: tuple[Path, State]) -> Path:
    return written[0]


@pytest.fixture
def state(written: tuple[Path, State]) -> State:
    return written[1]


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(template, tmp_path / "run"))


_KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from tbik_jax import checkpoint, checkpoint_folder
from tbik_jax import make_mesh
from tests import training_states as t

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

write_group = checkpoint.write_group
def killed_after_the_model(path, arrays):
    write_group(path, arrays)
    kill()

if sys.argv[2] == "arrays":
    checkpoint.write_group = killed_after_the_model
else:  # the manifest is there, and the name is not
    checkpoint_folder.flush = kill
t.save(Path(sys.argv[1]), 3, t.new_state(make_mesh(tp=2), seed=9))
print("not killed")
"""


@pytest.mark.parametrize("where", ["arrays", "name"])
def test_a_killed_save_is_passed_over(where: str, folder: Path, state: State) -> None:
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), where],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    (partial,) = folder.glob(".step_00000003.partial-*")
    assert (partial / "model-0000").is_dir() and (partial / "checkpoint.json").exists() == (where == "name")
    assert checkpoint_steps(folder) == [1, 2]
    found = empty_state()
    with pytest.warns(UserWarning, match=f"{partial.name} was interrupted .*; step 2 is restored instead"):
        assert restore(folder, found).step == 2
    assert_same_state(found, state)
    with pytest.raises(
        ValueError, match=r"step 3 is not whole: .*partial-.* was interrupted .*step 1, step 2"
    ):
        restore(folder, found, step=3)
    save(folder, 3, state, keep=2)  # the run goes on, and clears what the kill left
    assert checkpoint_steps(folder) == [2, 3] and not partial.exists()


def test_an_error_leaves_nothing(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tbik_jax.checkpoint_folder.flush", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 0, model=state[0])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save_checkpoint(tmp_path, 0, model=state[0])
    assert checkpoint_steps(tmp_path) == [0]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_every_file_counts(damage: Callable[[Path], None], folder: Path, template: Path) -> None:
    path = folder / "step_00000002"
    for file in files_of(path):
        damage(file)
        if file.name == "checkpoint.json" and damage is truncate:
            os.truncate(file, file.stat().st_size - 1)  # the last byte is only a line's end
        assert checkpoint_steps(folder) == [1], file
        shutil.copy(template / file.relative_to(folder), file)
        assert checkpoint_steps(folder) == [1, 2], file


@pytest.mark.parametrize(
    ("pattern", "damage", "reason"),
    [
        ("checkpoint.json", Path.unlink, "lacks checkpoint.json"),
        ("model-0000/d/*", truncate, r"holds \d+ bytes and was saved with \d+"),
        ("optimizer-0000/manifest.ocdbt", Path.unlink, "lacks the file optimizer-0000/manifest.ocdbt of"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over(
    pattern: str, damage: Callable[[Path], None], reason: str, folder: Path, state: State
) -> None:
    path = folder / "step_00000002"
    damage(next(path.glob(pattern)))
    found = empty_state()
    with pytest.warns(UserWarning, match=f"step_00000002.*{reason}.*; step 1 is restored instead"):
        restored = restore(folder, found)
    assert (restored.step, restored.extra) == (1, {"cursor": 1})
    assert_same_state(found, new_state(make_mesh(), seed=1))
    with pytest.raises(ValueError, match=f"^step 2 is not whole: .*{reason}.*; whole are step 1$"):
        restore(folder, found, step=2)
    with pytest.raises(ValueError, match=f"step 2 of .* though damaged .*{reason}.*remove"):
        save(folder, 2, state)
    assert restore(folder, found, step=1).step == 1


def test_a_whole_newest_one_is_taken_without_a_warning(folder: Path) -> None:
    """Warnings are errors here; what an earlier kill left beside newer checkpoints is no news."""
    (folder / ".step_00000001.partial-0123abcd").mkdir()
    assert restore(folder, empty_state()).step == 2


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def test_a_flipped_bit_is_found_in_every_file(folder: Path, state: State) -> None:
    path = folder / "step_00000002"
    for file in files_of(path):
        if file.name == "checkpoint.json":
            continue
        before = file.read_bytes()
        flip_a_bit(file)
        with pytest.raises(
            ValueError, match=r"is damaged: its CRC-32 is [0-9a-f]{8} and was [0-9a-f]{8}"
        ) as error:
            restore(folder, empty_state())
        assert str(file) in str(error.value)
        file.write_bytes(before)
    assert restore(folder, empty_state()).step == 2


def test_changed_contents_change_nothing(folder: Path, state: State) -> None:
    """Sizes are as they were, so the checkpoint counts as whole; a part that is not asked for is not looked at."""
    data = max(
        (folder / "step_00000002" / "optimizer-0000").rglob("d/*"), key=lambda file: file.stat().st_size
    )
    flip_a_bit(data)
    assert checkpoint_steps(folder) == [1, 2]
    found = new_state(make_mesh(tp=2), seed=5)
    with pytest.raises(ValueError, match=r"optimizer-0000.* is damaged"):
        restore(folder, found)
    assert_same_state(found, new_state(make_mesh(), seed=5))
    restore_checkpoint(folder, model=found[0])
    assert_same_state(found[:1], state[:1])


def test_orbax_does_not_find_a_flipped_bit(
    folder: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why there are checksums: without them the model comes back with other bits."""
    data = max((folder / "step_00000002" / "model-0000").rglob("d/*"), key=lambda file: file.stat().st_size)
    flip_a_bit(data)
    monkeypatch.setattr(checkpoint, "check_contents", lambda *args: None)
    found = abstract_model()
    restore_checkpoint(folder, model=found)
    with pytest.raises(AssertionError):
        assert_same_state((found,), state[:1])


def test_what_orbax_cannot_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the model was read, which stays as it was."""
    for file in (folder / "step_00000002" / "optimizer-0000").glob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    monkeypatch.setattr(checkpoint, "check_contents", lambda *args: None)
    found = new_state(make_mesh(tp=2), seed=5)
    with pytest.raises(ValueError, match="step_00000002/optimizer-0000 is damaged and cannot be read"):
        restore(folder, found)
    assert_same_state(found, new_state(make_mesh(), seed=5))


def test_nothing_to_restore(tmp_path: Path) -> None:
    model = abstract_model()
    assert checkpoint_steps(tmp_path / "none") == []
    with pytest.raises(ValueError, match="no whole checkpoint: there is no such folder"):
        restore_checkpoint(tmp_path / "none", model=model)
    with pytest.raises(ValueError, match="no whole checkpoint: it is empty"):
        restore_checkpoint(tmp_path, model=model)
    (tmp_path / ".step_00000004.partial-0123abcd").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*partial-0123abcd was interrupted"):
        restore_checkpoint(tmp_path, model=model)
    with pytest.raises(ValueError, match="no checkpoint of step 5; whole are none"):
        restore_checkpoint(tmp_path, model=model, step=5)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        checkpoint_steps(tmp_path / "file")


def test_another_format_is_named(folder: Path) -> None:
    manifest = folder / "step_00000002" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="is of format 9; this version reads format 1"):
        restore(folder, empty_state())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda manifest: {**manifest, "extra": {"epoch": 4}}, "CRC-32 is .* and was"),
        (lambda manifest: {**manifest, "step": 6}, "its step is 6"),
        (lambda manifest: {**manifest, "files": {}}, "CRC-32 is"),
        (lambda manifest: {**manifest, "files": []}, r"'files' is \[\]"),
        *(
            (lambda manifest, name=name: {key: manifest[key] for key in manifest if key != name}, name)
            for name in ("files", "model", "arrays", "groups", "rng", "extra", "step", "versions")
        ),
    ],
)
def test_a_manifest_that_was_changed_is_damaged(
    damage: Callable[[dict[str, Any]], dict[str, Any]], message: str, folder: Path
) -> None:
    """What it says of itself is compared, too; with the older checkpoint there, that one is taken."""
    manifest = folder / "step_00000002" / "checkpoint.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole))  # another layout is no damage
    restore(folder, empty_state(), step=2)
    manifest.write_text(json.dumps(damage(whole)))
    with pytest.raises(ValueError, match=f"step 2 is not whole: .*damaged: .*{message}"):
        restore(folder, empty_state(), step=2)
    del whole["crc32"]  # as older versions wrote it
    manifest.write_text(json.dumps(whole))
    restore(folder, empty_state(), step=2)


# --- saving ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder: Path, template: Path) -> None:
    with pytest.raises(ValueError, match=r"step 2 of .* is there already and is not overwritten"):
        save(folder, 2, new_state(make_mesh(), seed=4))
    for file in files_of(template):
        assert (folder / file.relative_to(template)).read_bytes() == file.read_bytes()
    assert len(files_of(folder)) == len(files_of(template))


def test_the_slower_of_two_writers_is_told(tmp_path: Path, template: Path) -> None:
    with pytest.raises(ValueError, match=r"step 2 of .* is there already"), new_step(tmp_path, 2):
        shutil.copytree(template / "step_00000002", tmp_path / "step_00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert checkpoint_steps(tmp_path) == [2]


def test_old_ones_go_when_the_new_one_is_whole(
    folder: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = state[0]

    def fails(path: Path) -> None:
        assert checkpoint_steps(folder) == [1, 2]
        raise OSError("the disk")

    with monkeypatch.context() as patch:
        patch.setattr("tbik_jax.checkpoint_folder.flush", fails)
        with pytest.raises(OSError, match="the disk"):
            save_checkpoint(folder, 3, model=model, keep=1)
    assert checkpoint_steps(folder) == [1, 2]
    save_checkpoint(folder, 3, model=model)
    assert checkpoint_steps(folder) == [1, 2, 3]
    save_checkpoint(folder, 4, model=model, keep=3)
    assert checkpoint_steps(folder) == [2, 3, 4]
    next((folder / "step_00000002").glob("model-0000/d/*")).unlink()
    save_checkpoint(folder, 6, model=model, keep=2)
    assert checkpoint_steps(folder) == [4, 6]
    assert (folder / "step_00000002").is_dir()  # damaged: for somebody to look at
    save_checkpoint(
        folder, 5, model=model, keep=1
    )  # a run that went back keeps what it wrote before and after
    assert checkpoint_steps(folder) == [5, 6]
    assert sorted(p.name for p in folder.iterdir()) == [f"step_0000000{i}" for i in (2, 5, 6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step=-1 must be a whole number of at least 0"),
        ({"step": True}, "step=True must be a whole number"),
        ({"step": 1.0}, "step=1.0 must be a whole number"),
        ({"keep": 0}, "keep=0 must be a whole number of at least 1"),
        ({"extra": {"x": float("nan")}}, "does not come back from JSON"),
        ({"extra": {"x": (1, 2)}}, "does not come back from JSON"),
        ({"extra": {1: 2}}, "does not come back from JSON"),
        ({"extra": {"x": np.ones(2)}}, "does not come back from JSON"),
        ({"extra": [1]}, "does not come back from JSON"),
        ({"rng": 3}, "rng is a int; pass a key"),
        ({"model": abstract_model()}, "model.embedding_vd is a ShapeDtypeStruct"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, Any], message: str, tmp_path: Path, state: State) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, **{"step": 0, "model": state[0], **change})
    assert list(tmp_path.iterdir()) == []


def test_more_processes_are_refused(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="JAX runs in 2 processes"):
        save_checkpoint(tmp_path, 0, model=state[0])
    with pytest.raises(ValueError, match="JAX runs in 2 processes"):
        restore_checkpoint(tmp_path, model=state[0])


@pytest.mark.parametrize("below", [(), ("run",)])
def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path, below):
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"notes.* is not a folder; checkpoints need one"):
        new_step(file.joinpath(*below), 2).__enter__()
    assert file.read_text() == "mine"
