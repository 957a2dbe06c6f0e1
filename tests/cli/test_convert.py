"""`tbik-jax import` and `export`: every bit comes back, and nothing is overwritten."""

import pytest

from tbik_jax import fingerprint, load, synthetic, synthetic_tokenizer
from tests.cli.conftest import SMALL


@pytest.fixture
def folder(tmp_path):
    path = synthetic.write_checkpoint(tmp_path / "model", synthetic.small_config(**SMALL))
    synthetic_tokenizer.write_tokenizer(path)
    return path


def test_there_and_back(run_json, folder, tmp_path):
    imported = run_json(f"import {folder} {tmp_path}/checkpoints --step 3 --mesh tp=2")
    assert imported["checkpoint"].endswith("step_00000003")
    assert imported["tokenizer"] == ["tokenizer.json", "tokenizer_config.json"]
    exported = run_json(f"export {tmp_path}/checkpoints {tmp_path}/back --mesh fsdp=2")
    assert exported["step"] == 3 and exported["dtype"] == "bfloat16"
    assert fingerprint(load(tmp_path / "back")) == fingerprint(load(folder))
    for name in exported["tokenizer"]:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_another_dtype_is_kept(run_json, folder, tmp_path):
    run_json(f"import {folder} {tmp_path}/checkpoints --dtype float32")
    assert run_json(f"export {tmp_path}/checkpoints {tmp_path}/back")["dtype"] == "float32"
    assert fingerprint(load(tmp_path / "back", dtype="float32")) == fingerprint(load(folder, dtype="float32"))


def test_mistakes(run, folder, tmp_path):
    checkpoints, back = tmp_path / "checkpoints", tmp_path / "back"
    assert run(f"import {folder} {checkpoints}").exit_code == 0
    assert run(f"export {checkpoints} {back}").exit_code == 0
    for line, message in (
        (f"import {folder} {checkpoints}", "step 0 of"),
        (f"export {checkpoints} {back}", "holds config.json already and is not overwritten"),
        (f"export {checkpoints} {tmp_path}/new --step 7", "holds no checkpoint of step 7; whole are step 0"),
        (f"export {tmp_path}/none {tmp_path}/new", "there is no such folder"),
        (f"export {checkpoints} {tmp_path}/new --tokenizer {tmp_path}/none", "is no folder"),
        (f"import {tmp_path} {checkpoints} --step 1", "holds no config.json"),
    ):
        result = run(line)
        assert result.exit_code == 2 and message in result.stderr, (line, result.stderr)
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_of_another_model_is_refused(run, folder, tmp_path):
    assert run(f"import {folder} {tmp_path}/checkpoints").exit_code == 0
    synthetic_tokenizer.write_tokenizer(folder, vocab_size=300)
    result = run(f"import {folder} {tmp_path}/checkpoints --step 1")
    assert result.exit_code == 2 and "is of another model than" in result.stderr
    assert not (tmp_path / "checkpoints" / "step_00000001").exists()
