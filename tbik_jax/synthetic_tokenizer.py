"""A small byte-level BPE tokenizer, trained on the text in this file: no download, no torch, no JAX.

The demo and the tests need text to become tokens and back, not a good tokenizer. Like `synthetic`, this is a pure
function of its arguments.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .synthetic import BOS_ID, EOS_ID

IM_START_ID = 1
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The tokens of the ids `BOS_ID`, `IM_START_ID` and `EOS_ID`."""


def write_tokenizer(path: str | os.PathLike[str], *, vocab_size: int = 1024) -> Path:
    """Trains a byte-level BPE on the text in this module and writes tokenizer.json and tokenizer_config.json.

    `transformers.AutoTokenizer.from_pretrained(path)` reads it without a network. Any text survives encoding
    and decoding, and the same `vocab_size` gives the same files. The end-of-sequence token is `<|im_end|>`,
    padding is `<|endoftext|>`, and the chat template is the plain part of Qwen3's.

    Args:
        path: A folder, made if missing; usually that of `write_checkpoint`, with its `vocab_size`.
        vocab_size: Upper bound on the number of tokens, at least 259 (256 bytes and 3 special tokens). The
            text is small, so the vocabulary may end up smaller; it is never larger.

    Returns:
        The path.

    Raises:
        ValueError: `vocab_size` is below 259.
        FileExistsError: The path is a file.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small for all bytes; use at least {least}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),  # first, so that they have the ids 0, 1, 2 whatever the size
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[BOS_ID],
        "additional_special_tokens": [SPECIAL_TOKENS[IM_START_ID]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": _CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PARAGRAPHS = """\
A number in a computer has only so many digits. When two numbers are added, the digits that do not fit \
are dropped, and what is dropped depends on which two numbers met first. Add the same list in another \
order and the last digit of the answer may change. Most of the time nobody notices. A model that writes \
text notices, because it chooses the next word by comparing two scores, and when the scores are close the \
last digit decides.
The harbour was quiet in the morning. Two boats had come in during the night, and their crews were \
asleep. An old woman walked along the wall with her dog, counting the gulls. "There were nine yesterday," \
she said, "and today there are eleven." The dog did not answer. It had seen a fish in the shallow water \
and wanted to know whether it would move.
How do you make bread? Mix 500 g of flour with 350 g of water, 10 g of salt and a little yeast. Let the \
dough rest for an hour, fold it, and let it rest again. Heat the oven to 230 degrees. Bake the loaf for \
40 minutes, then let it cool before you cut it. If the crust is pale, bake it longer next time; if it is \
hard, put a bowl of water below it.
Dear Martha, thank you for your letter. We arrived on the 3rd of May, and the garden is already green. \
The children have built a house in the apple tree, and they won't come down for dinner unless somebody \
reads them a story. I think you'd like it here. Please write soon, and tell us when your train comes in.
def total(values):
    result = 0.0
    for value in values:
        result = result + value
    return result
Question: Which is larger, 17 times 23 or 400? Answer: 17 times 23 is 391, so 400 is larger, by 9. \
Question: What is the capital of France? Answer: Paris. Question: Why is the sky blue? Answer: Small \
things in the air scatter short waves of light more than long ones, and blue light has short waves.
"""

_SUBJECTS = (
    "the teacher|a small machine|my neighbour|the first engineer|every student|the captain|our model|"
    "the old library|a young doctor|the committee|the other team|an honest merchant|the river|"
    "a patient reader|the gardener|the clock|one of the children|the whole village|a careful scientist|"
    "the night train|nobody|the second answer|her brother"
)
_VERBS = (
    "found|remembered|wanted to change|could not explain|carried|was looking for|has already finished|"
    "will describe|forgot|would rather keep|measured|began to understand|should compare|built|followed|"
    "opened|never trusted|wrote about|counted|had to repeat|cannot see|is thinking about|sold|"
    "might need|returned"
)
_OBJECTS = (
    "the same question|a different story|a box of letters|the long road|three numbers|"
    "the broken window|that music|a simple reason|the weather|another language|the result of the test|"
    "an empty room|the price of water|some good advice|the next word|a map of the country|"
    "the order of the words|both sides|the light|a list of names|the truth|the work of many years|"
    "everything|the beginning of the book|a new idea|the table"
)
_ENDINGS = (
    "in the evening|before the meeting|without any help|at the end of the street|for the first time|"
    "after the winter|because it was late|as if nothing had happened|under the bridge|with great care|"
    "when the rain stopped|once again|in a single day|although it seemed impossible|"
    "on the other side of the hill|while the others were asleep|between two mountains|"
    "for almost no reason|since the last summer"
)


def _training_text() -> Iterator[str]:
    """Yields the paragraphs and 500 sentences; each list is walked at its own step, so few pairs repeat."""
    yield from _PARAGRAPHS.splitlines()
    lists = [text.split("|") for text in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)]
    for i in range(500):
        words = [choices[i * step % len(choices)] for choices, step in zip(lists, (1, 2, 3, 5), strict=True)]
        sentence = " ".join(words)
        yield sentence[0].upper() + sentence[1:] + ("?" if i % 11 == 0 else ".")
