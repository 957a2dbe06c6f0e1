"""`tbik-jax generate`: continues prompts, and prints text as it comes."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..fingerprint import fingerprint
from ..generation import GenerateOutput, NumericsName
from ..generation import generate as generate_tokens
from ..mesh import mesh_label
from ..sampling import SamplingParams
from .errors import command
from .model import encode, load_tokenizer, open_model
from .options import (
    CpuDevicesOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    MeshOption,
    ModelArgument,
    TokenizerOption,
    describe_devices,
    mesh_of,
    use_cpu_devices,
)
from .prompts import Conversation, read_conversations, read_prompts, render
from .terminal import Terminal

EXAMPLE = 'tbik-jax generate synthetic "Once upon a time" --mesh tp=2,data=1 --cpu-devices 8'


@dataclasses.dataclass(frozen=True)
class _Request:
    """One text to write: the prompt as the user gave it, as the model reads it, and how to sample."""

    prompt: str
    ids: list[int]
    sampling: SamplingParams


@command
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPTS", help="Texts to continue.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Text file, one prompt a line; - is stdin."),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON file of chat messages, for the model's chat template."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in a chat.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most probable tokens up to p.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt, with seeds from --seed on.")] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write on past end tokens.")] = False,
    mesh: MeshOption = "tp=1",
    numerics: Annotated[NumericsName, typer.Option(help="invariant keeps the promise.")] = "invariant",
    dtype: DtypeOption = "bfloat16",
    tokenizer: TokenizerOption = None,
    cpu_devices: CpuDevicesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Continue prompts: with the same bits on any mesh and in any batch.

    Prompts are arguments, lines of a file, or chat messages. Text goes to stdout as it comes, and the fingerprint of
    tokens and log-probabilities to stderr.
    """
    use_cpu_devices(cpu_devices)
    terminal = Terminal(as_json=as_json)
    devices = mesh_of(mesh, terminal)
    sampling = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + i)
        for i in range(samples)
    ]
    texts, conversations = _read(prompts or [], prompts_file, messages, chat)
    with open_model(model, terminal) as folder:
        words = load_tokenizer(folder, tokenizer, terminal)
        requests = [
            _Request(prompt, ids, each)
            for prompt, ids in [*_plain(words, texts), *_chats(words, conversations)]
            for each in sampling
        ]
        loaded = folder.load(devices, dtype, terminal)
        run = functools.partial(
            generate_tokens,
            loaded,
            [request.ids for request in requests],
            mesh=devices,
            max_new_tokens=max_new_tokens,
            sampling=[request.sampling for request in requests],
            eos_id=None if ignore_eos else folder.eos_id or None,
            numerics=numerics,
        )
        began = time.monotonic()
        if len(requests) == 1 and not as_json:
            out = _stream(run, words, terminal)
        else:
            out = _all_at_once(run, requests, words, max_new_tokens, terminal)
    digest = fingerprint([out.tokens, out.logprobs])
    terminal.note(
        f"{sum(map(len, out.tokens))} tokens in {time.monotonic() - began:.1f} s with compiling, {numerics}, "
        f"{mesh_label(devices)} of {describe_devices()}, fingerprint {digest}"
    )
    terminal.emit(
        {
            "model": model,
            "numerics": numerics,
            "mesh": dict(devices.shape),
            "device": devices.devices.flat[0].device_kind,
            "outputs": _outputs(requests, out, words),
            "fingerprint": digest,
        }
    )
    return 0


def _read(
    prompts: list[str], prompts_file: Path | None, messages: Path | None, chat: bool
) -> tuple[list[str], list[Conversation]]:
    """Texts to continue, and conversations for the chat template."""
    texts = [*prompts, *(read_prompts(prompts_file) if prompts_file else ())]
    conversations = read_conversations(messages) if messages else []
    if not texts and not conversations:
        raise ValueError("no prompt; write one behind the model, or name a file with --prompts or --messages")
    if chat:
        return [], [[{"role": "user", "content": text}] for text in texts] + conversations
    return texts, conversations


def _plain(words: Any, texts: list[str]) -> list[tuple[str, list[int]]]:
    return list(zip(texts, encode(words, texts), strict=True))


def _chats(words: Any, conversations: list[Conversation]) -> list[tuple[str, list[int]]]:
    """The last message of each, and the token ids of what the template makes of all of them."""
    if not conversations:
        return []
    ids = encode(words, render(words, conversations), special_tokens=False)
    return [(conversation[-1]["content"], row) for conversation, row in zip(conversations, ids, strict=True)]


def _outputs(requests: list[_Request], out: GenerateOutput, words: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": request.prompt,
            "seed": request.sampling.seed,
            "text": words.decode(tokens),
            "tokens": tokens.tolist(),
            "logprobs": logprobs.tolist(),
        }
        for request, tokens, logprobs in zip(requests, out.tokens, out.logprobs, strict=True)
    ]


def _stream(run: Callable[..., GenerateOutput], words: Any, terminal: Terminal) -> GenerateOutput:
    """Prints one text while it is written: whole characters only, since a token may end inside one."""
    told: list[int] = []
    printed = 0
    with contextlib.ExitStack() as spinner:
        spinner.enter_context(terminal.working("compiling"))

        def on_tokens(_: int, tokens: np.ndarray, __: np.ndarray) -> None:
            nonlocal printed
            spinner.close()
            told.extend(tokens.tolist())
            text = words.decode(told).rstrip("\N{REPLACEMENT CHARACTER}")
            terminal.out.print(text[printed:], end="", markup=False)
            printed = max(printed, len(text))

        out = run(on_tokens=on_tokens)
    terminal.out.print(words.decode(told)[printed:], markup=False)
    return out


def _all_at_once(
    run: Callable[..., GenerateOutput],
    requests: list[_Request],
    words: Any,
    max_new_tokens: int,
    terminal: Terminal,
) -> GenerateOutput:
    """Counts tokens while they are written, and prints prompts and texts in the end."""
    with terminal.working(f"generating {len(requests)} texts", len(requests) * max_new_tokens) as advance:
        out = run(on_tokens=lambda _, tokens, __: advance(len(tokens)))
    for request, tokens in zip(requests, out.tokens, strict=True):
        terminal.show(request.prompt, style="bold", end="", markup=False)
        terminal.show(words.decode(tokens), markup=False)
    return out
