"""The tokenizer of the demo: any text survives it, and the same arguments give the same files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbik_jax import synthetic, synthetic_tokenizer

TINY = synthetic.small_config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    head_dim=16,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer as transformers loads it from a checkpoint folder, beside a config.json of Qwen3."""
    transformers = pytest.importorskip("transformers")
    path = synthetic.write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "c", TINY)
    return transformers.AutoTokenizer.from_pretrained(
        synthetic_tokenizer.write_tokenizer(path), local_files_only=True
    )


def test_tokenizer_fills_the_vocabulary_of_the_demo_model(tokenizer) -> None:
    assert len(tokenizer) == synthetic.small_config()["vocab_size"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_tokenizer_special_tokens_have_the_ids_of_the_config(tokenizer) -> None:
    ids = (synthetic.BOS_ID, synthetic_tokenizer.IM_START_ID, synthetic.EOS_ID)
    assert tuple(tokenizer.convert_tokens_to_ids(synthetic_tokenizer.SPECIAL_TOKENS)) == ids
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", synthetic.EOS_ID)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", synthetic.BOS_ID)
    assert tokenizer("<|im_start|>user").input_ids[0] == synthetic_tokenizer.IM_START_ID
    assert tokenizer.decode([*ids, *tokenizer("the end").input_ids], skip_special_tokens=True) == "the end"


@settings(max_examples=30, deadline=None, database=None)
@given(text=st.text())
def test_tokenizer_returns_any_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text", ["", " two  spaces , and don't\n\n\ttabs ", "cafe\u0301 日本語 👩‍👩‍👧", "<|im_end|>\n"]
)
def test_tokenizer_returns_awkward_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_knows_english_words(tokenizer) -> None:
    text = "The captain could not explain the result of the test."
    assert len(tokenizer(text).input_ids) <= 1.5 * len(text.split())


def test_chat_template(tokenizer) -> None:
    pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("vocab_size", [259, 400, 4096])
def test_vocabulary_is_never_larger_than_asked(tmp_path: Path, vocab_size: int) -> None:
    path = synthetic_tokenizer.write_tokenizer(tmp_path, vocab_size=vocab_size)
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    assert 259 <= len(vocabulary) <= vocab_size
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_vocabulary_too_small_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=258 .* at least 259"):
        synthetic_tokenizer.write_tokenizer(tmp_path, vocab_size=258)


def test_a_fresh_process_makes_the_same_files_without_jax_or_torch(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    synthetic_tokenizer.write_tokenizer(synthetic.write_checkpoint(here, TINY))
    script = f"""
import json, sys, types
package = types.ModuleType("tbik_jax")  # the folder without its __init__.py, which imports JAX
package.__path__ = [{str(Path(synthetic.__file__).parent)!r}]
sys.modules["tbik_jax"] = package
from tbik_jax import synthetic, synthetic_tokenizer
path = synthetic.write_checkpoint({str(there)!r}, json.loads({json.dumps(TINY)!r}))
synthetic_tokenizer.write_tokenizer(path)
assert not {{"jax", "torch", "transformers", "flax"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    for file in here.iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes(), file.name
