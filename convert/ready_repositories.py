"""Repositories whose weights are in 4 bits already, of models that are asked for by other names."""

from pathlib import Path

from ..errors import ArgumentError

# All by bitsandbytes in double-quantized NF4; "-unsloth-bnb-4bit" keep some projections in 16 bits.
READY = {
    "meta-llama/Meta-Llama-3-8B": "unsloth/llama-3-8b-bnb-4bit",
    "meta-llama/Meta-Llama-3-8B-Instruct": "unsloth/llama-3-8b-Instruct-bnb-4bit",
    "meta-llama/Llama-3.1-8B": "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
    "meta-llama/Llama-3.1-8B-Instruct": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
    "meta-llama/Llama-3.1-70B": "unsloth/Meta-Llama-3.1-70B-bnb-4bit",
    "meta-llama/Llama-3.2-1B": "unsloth/Llama-3.2-1B-bnb-4bit",
    "meta-llama/Llama-3.2-1B-Instruct": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "meta-llama/Llama-3.2-3B": "unsloth/Llama-3.2-3B-bnb-4bit",
    "meta-llama/Llama-3.2-3B-Instruct": "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    "meta-llama/Llama-3.3-70B-Instruct": "unsloth/Llama-3.3-70B-Instruct-bnb-4bit",
    "unsloth/Llama-3.2-1B": "unsloth/Llama-3.2-1B-bnb-4bit",
    "unsloth/Llama-3.2-1B-Instruct": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "unsloth/Llama-3.2-3B": "unsloth/Llama-3.2-3B-bnb-4bit",
    "unsloth/Llama-3.2-3B-Instruct": "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    "mistralai/Mistral-7B-v0.3": "unsloth/mistral-7b-v0.3-bnb-4bit",
    "mistralai/Mistral-7B-Instruct-v0.3": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
    "google/gemma-2-9b": "unsloth/gemma-2-9b-bnb-4bit",
    "google/gemma-2-27b": "unsloth/gemma-2-27b-bnb-4bit",
    "Qwen/Qwen3-1.7B": "unsloth/Qwen3-1.7B-unsloth-bnb-4bit",
    "Qwen/Qwen3-4B": "unsloth/Qwen3-4B-unsloth-bnb-4bit",
    "Qwen/Qwen3-8B": "unsloth/Qwen3-8B-unsloth-bnb-4bit",
    "Qwen/Qwen3-14B": "unsloth/Qwen3-14B-unsloth-bnb-4bit",
    "Qwen/Qwen3-32B": "unsloth/Qwen3-32B-unsloth-bnb-4bit",
}
_LOWER = {name.lower(): ready for name, ready in READY.items()}


def ready(name: str, *, quantize: str | None, revision: str | None) -> tuple[str, str]:
    """The repository to load for `name`, itself where the table has no other, and what that was.

    A path that exists is always loaded itself. Raises ArgumentError where what is asked for is not
    4 bits, or a revision, which another repository has not.
    """
    if quantize != "nf4":
        raise ArgumentError(
            "prefer_prequantized=True is of repositories in 4 bits; load with load_in_4bit=True, "
            "or leave it out"
        )
    found = None if Path(name).expanduser().exists() else _LOWER.get(name.lower())
    if found is None:
        return name, f"prefer_prequantized: no repository in 4 bits is known for {name}"
    if revision is not None:
        raise ArgumentError(
            f"prefer_prequantized=True would load {found}, which has no revision {revision!r:.60} "
            f"of {name}; leave one of the two out"
        )
    return found, f"prefer_prequantized: {found}, in 4 bits already, instead of {name}"
