"""`tbik-jax generate`: text, JSON and streams, and what a user gets wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import tbik_jax
from tbik_jax import synthetic, synthetic_tokenizer
from tbik_jax.cli import app, generate, options
from tbik_jax.cli.terminal import Terminal
from tests.cli.conftest import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "qwen3"
    synthetic.write_checkpoint(path, synthetic.small_config(**SMALL))
    synthetic_tokenizer.write_tokenizer(path)
    return path


def test_text_json_and_the_library_agree_on_any_mesh(run, run_json, folder):
    line = f"generate {folder} a --max-new-tokens 5 --ignore-eos"
    text = run(line)
    assert text.exit_code == 0
    one, two = run_json(line), run_json(f"{line} --mesh tp=2")
    assert one["fingerprint"] == two["fingerprint"] and one["outputs"] == two["outputs"]
    assert f"fingerprint {one['fingerprint']}" in text.stderr
    assert text.stdout == one["outputs"][0]["text"] + "\n"
    params = tbik_jax.load(folder)
    out = tbik_jax.generate(params, [one_token(folder)], max_new_tokens=5)
    assert out.tokens[0].tolist() == one["outputs"][0]["tokens"]
    assert tbik_jax.fingerprint([out.tokens, out.logprobs]) == one["fingerprint"]


def one_token(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True).encode("a")


def test_several_texts_have_their_own_seeds(run, run_json, folder):
    found = run_json(
        f"generate {folder} a b --samples 2 --temperature 1 --seed 5 --max-new-tokens 5 --ignore-eos"
    )
    assert [(out["prompt"], out["seed"]) for out in found["outputs"]] == [
        ("a", 5),
        ("a", 6),
        ("b", 5),
        ("b", 6),
    ]
    assert len({tuple(out["tokens"]) for out in found["outputs"]}) == 4
    assert all(len(out["tokens"]) == len(out["logprobs"]) == 5 for out in found["outputs"])


def test_a_stream_holds_back_half_a_character(capsys):
    """The bytes of one character come in several tokens."""

    class Words:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = [list("aé".encode()[:2]), list("é€".encode()[1:4]), list("€!".encode()[2:])]
    printed = []

    def run(*, on_tokens):
        for piece in pieces:
            on_tokens(0, np.asarray(piece), None)
            printed.append(capsys.readouterr().out)

    generate._stream(run, Words(), Terminal(as_json=False))
    assert printed == ["a", "é", "€!"] and capsys.readouterr().out == "\n"


MISTAKES = {
    "no prompt": ("generate synthetic", "no prompt; write one behind the model"),
    "mesh": ("generate synthetic a --mesh tp2", "--mesh 'tp2' is no list such as tp=2,data=1"),
    "mesh axis": ("generate synthetic a --mesh pp=2", "names the axis 'pp', which is none of data, fsdp, tp"),
    "mesh axis twice": ("generate synthetic a --mesh tp=2,tp=2", "names the axis 'tp', twice"),
    "tp=3": ("generate synthetic a --mesh tp=3", "use tp=1, 2, 4 or 8"),
    "large mesh": ("generate synthetic a --mesh data=3,tp=8", "needs 24 devices and 8 are there; use fewer"),
    "large mesh, remedy": ("generate synthetic a --mesh data=3,tp=8", "on the command line --cpu-devices 24"),
    "late devices": ("generate synthetic a --cpu-devices 3", "too late: JAX runs already with 8 devices"),
    "temperature": ("generate synthetic a --temperature -1", "temperature=-1.0 must be 0 (greedy)"),
    "model": ("generate ./nowhere a", "./nowhere is no folder here, and no hub id either"),
    "no model there": ("generate {tmp} a", "holds no config.json; is it a Hugging Face checkpoint folder?"),
    "prompts file": ("generate synthetic --prompts {tmp}/none.txt", "none.txt cannot be read as text"),
    "empty file": ("generate synthetic --prompts {tmp}/empty.txt", "holds no prompt; write one a line"),
    "no JSON": ("generate synthetic --messages {tmp}/empty.txt", "is no JSON"),
    "no messages": ("generate synthetic --messages {tmp}/wrong.json", "holds no chat messages; write [{"),
    "too long": ("generate synthetic a --max-new-tokens 5000", "exceed max_position_embeddings=2048"),
    "unknown option": ("generate synthetic a --mash tp=2", "No such option: --mash"),
    "unknown command": ("generat synthetic a", "No such command 'generat'"),
    "no whole number": ("generate synthetic a --max-new-tokens x", "see tbik-jax generate --help"),
    "empty prompt": ('generate synthetic ""', "gives no token; write at least one character"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_status_2(run, line, message, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.json").write_text('{"prompt": "a"}')
    result = run(line.format(tmp=tmp_path))
    assert result.exit_code == 2 and result.stdout == ""
    lines = [row for row in result.stderr.splitlines() if row.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in result.stderr


def test_without_a_gpu_a_note_says_so(run, monkeypatch):
    assert "no GPU is used" not in run("generate synthetic").stderr
    monkeypatch.setattr(options.jax, "config", SimpleNamespace(jax_num_cpu_devices=-1))
    assert "no GPU is used: this runs on the CPU" in run("generate synthetic").stderr


def test_debug_shows_the_traceback(run):
    result = run("generate synthetic a --mesh tp=3 --debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: mesh axis tp=3")


def test_a_tokenizer_of_a_larger_model_is_refused(run, tmp_path, folder):
    synthetic.write_checkpoint(tmp_path / "small", synthetic.small_config(**SMALL, vocab_size=512))
    result = run(f"generate {tmp_path / 'small'} a --tokenizer {folder}")
    assert result.exit_code == 2
    assert (
        "tokens and the vocabulary of" in result.stderr
        and "name the model's own with --tokenizer" in result.stderr
    )
    missing = run(f"generate {tmp_path / 'small'} a")
    assert missing.exit_code == 2 and "holds no tokenizer (tokenizer.json or" in missing.stderr


def test_a_tokenizer_without_a_template_is_no_chat(run, folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    result = run(f"generate {folder} a --chat --tokenizer {tmp_path}")
    assert result.exit_code == 2 and "the tokenizer has no chat template" in result.stderr


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.split() == ["tbik-jax", tbik_jax.__version__]
