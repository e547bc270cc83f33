"""Answers of a model as text: one, or a conversation on the terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import IO, Any

from .convert.arguments import choose_device
from .convert.bridge import CausalLM
from .convert.pretrained import FastLanguageModel
from .convert.streamer import CONTEXT, TextStreamer
from .convert.tokenizer import Tokenizer
from .errors import InputError, PurelmError

Message = dict[str, Any]
Write = Callable[[str], object]


class _Streamer(TextStreamer):
    """Gives each piece of the answer to `write`."""

    def __init__(self, tokenizer: Tokenizer, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


def load(
    name: str, *, in_4bit: bool = False, dtype: str | None = None, device: str | None = None
) -> tuple[CausalLM, Tokenizer]:
    """The model and tokenizer of a folder, adapter folder or hub id, in float32 on a CPU."""
    place = choose_device(device or "sequential")
    return FastLanguageModel.from_pretrained(
        name,
        max_seq_length=None,
        load_in_4bit=in_4bit,
        dtype="float32" if dtype is None and place.type == "cpu" else dtype,
        device_map=str(place),
    )


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | list[Message],
    *,
    max_new_tokens: int = 256,
    write: Write | None = None,
    **keywords: Any,
) -> str:
    """The model's continuation of a text, or its answer to a conversation, without special tokens.

    write is given each piece as soon as its characters are whole. keywords are `generate`'s. Ends
    at the model's context. Raises InputError for a prompt that leaves no room in it.
    """
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt"
        )
    ids = encoded["input_ids"]
    length, context = ids.shape[1], model.spec.max_positions
    if length == 0:
        raise InputError("the prompt has no tokens; give a text")
    if length >= context:
        raise InputError(f"the prompt has {length} tokens, the model's context is {context}")
    out = model.generate(
        ids,
        attention_mask=encoded["attention_mask"],
        max_new_tokens=min(max_new_tokens, context - length),
        streamer=None if write is None else _Streamer(tokenizer, write),
        **keywords,
    )
    before = ids[0, -CONTEXT:].tolist()
    text = str(tokenizer.decode(before + out[0, length:].tolist(), skip_special_tokens=True))
    return text[len(str(tokenizer.decode(before, skip_special_tokens=True))) :]


def repl(
    model: CausalLM,
    tokenizer: Tokenizer,
    lines: IO[str],
    out: IO[str],
    *,
    system: str | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> None:
    """Answer each line of `lines` into `out` as one conversation, until /exit or the end.

    /reset begins a new conversation. A prompt is shown only where a person types.
    """
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    typed = lines.isatty()
    if typed:
        write("/reset begins anew, /exit leaves.\n")
    while True:
        if typed:
            write("> ")
        line = lines.readline()
        said = line.strip()
        if not line or said == "/exit":
            return
        if not said:
            continue
        if said == "/reset":
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            text = answer(model, tokenizer, asked, write=write, **(keywords or {}))
        except PurelmError as problem:
            # The conversation so far stays as it was.
            write(f"[{problem}; /reset begins anew]\n")
            continue
        write("\n")
        messages = [*asked, {"role": "assistant", "content": text}]
