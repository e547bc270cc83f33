"""The model that purelm carries, as tests of what is done with a trained model take it."""

from typing import Any

from purelm import FastLanguageModel


def load() -> Any:
    """The model in fp32 on the CPU, without a limit to its context, and its tokenizer."""
    return FastLanguageModel.from_pretrained(
        "purelm/tiny", max_seq_length=None, load_in_4bit=False, dtype="float32", device_map="cpu"
    )
