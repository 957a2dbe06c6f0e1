"""Prompts from the command line, a file or chat messages."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: For those who want to see something first.
EXAMPLES = (
    "The same prompt and weights, and yet",
    "A tree of additions",
    "Eight devices sat around a table and",
    "Once upon a time",
    "def reduce(values):",
    "The rollout engine and the trainer disagree about",
    "In the morning the river",
    "1 + 1 =",
)
#: Messages with role and content.
Conversation = list[dict[str, str]]
_EXPECTED = '[{"role": "user", "content": "..."}], or a list of such lists'


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank; "-" is stdin.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    lines = _read(path).splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def read_conversations(path: Path) -> list[Conversation]:
    """Chat messages in a JSON file: one conversation, or a list of them.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; write {_EXPECTED}") from None
    conversations = value if value and isinstance(value, list) and isinstance(value[0], list) else [value]
    for conversation in conversations:
        if not (isinstance(conversation, list) and conversation and all(map(_is_message, conversation))):
            raise ValueError(f"{path} holds no chat messages; write {_EXPECTED}")
    return conversations


def render(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """Conversations as the model's chat template writes them, up to where the model answers.

    Raises:
        ValueError: the tokenizer has no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; give the prompts as plain text, without --chat")
    try:
        return [
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
    except ImportError:
        raise ValueError("chat templates need jinja2; run: pip install jinja2") from None
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template refuses the messages: {error}") from None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
