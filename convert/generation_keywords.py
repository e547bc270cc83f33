"""transformers' keywords for `generate`: where their values come from, and those that wait."""

import difflib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError

# transformers' keywords that do not work yet, each with the values that ask for nothing.
WAITING: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_tokenizer": (),
    "begin_suppress_tokens": (),
    "cache_implementation": ("dynamic", "static", "hybrid"),
    "constraints": (),
    "custom_generate": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "inputs_embeds": (),
    "max_time": (),
    "negative_prompt_attention_mask": (),
    "negative_prompt_ids": (),
    "num_beam_groups": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "past_key_values": (),
    "penalty_alpha": (0.0,),
    "position_ids": (),
    "remove_invalid_values": (False,),
    "speculation_type": (),
    "synced_gpus": (False,),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}

# Keywords that change no token here: how transformers computes.
WITHOUT_EFFECT = frozenset(
    {"cache_config", "compile_config", "disable_compile", "low_memory", "max_cache_len"}
    | {"prefill_chunk_size", "use_cache"}
)


def check_options(options: Mapping[str, Any], parameters: Iterable[str]) -> None:
    """TypeError for unknown keywords, NotImplementedError for those that wait."""
    for name in options:
        if name in WAITING or name in WITHOUT_EFFECT:
            continue
        known = [*parameters, *WAITING, *WITHOUT_EFFECT]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")
    check_waiting(options, "generate")


def check_waiting(fields: Mapping[str, Any], where: str) -> None:
    """NotImplementedError if one of `fields` asks for what does not work yet."""
    for name, idle in WAITING.items():
        value = fields.get(name)
        if value is not None and not any(value is x or value == x for x in idle):
            raise NotImplementedError(f"{where}: {name}={value!r} does not work yet; leave it out")


@dataclass(frozen=True, slots=True)
class Settings:
    """What keywords are set to: by the call, by its generation_config, or by the model's own."""

    call: Mapping[str, Any]
    given: Mapping[str, Any]
    own: Mapping[str, Any]

    @classmethod
    def of(
        cls, call: Mapping[str, Any], generation_config: Any, own: Mapping[str, Any]
    ) -> "Settings":
        """Raises ArgumentError, and NotImplementedError for what does not work yet."""
        given = fields_of(generation_config)
        check_waiting(given, "generation_config")
        check_waiting(own, "the model's generation_config")
        return cls(call, given, own)

    def __call__(self, name: str, default: Any = None) -> Any:
        """The first value that is there."""
        found = self.asked(name)
        if found is None:
            found = self.own.get(name)
        return default if found is None else found

    def whole(self, name: str, default: int | None) -> int | None:
        """The same of a whole number; raises ArgumentError for something else."""
        value = self(name, default)
        try:
            return None if value is None else operator.index(value)
        except TypeError:
            raise ArgumentError(f"{name} is {value!r}, expected a whole number") from None

    def asked(self, name: str) -> Any:
        """What the call says, itself or by its generation_config; None for nothing."""
        found = self.call.get(name)
        return self.given.get(name) if found is None else found


def fields_of(generation_config: Any) -> dict[str, Any]:
    """The fields of a Config, a dict, or transformers' GenerationConfig."""
    if generation_config is None:
        return {}
    if isinstance(generation_config, Mapping):
        return dict(generation_config)
    if hasattr(generation_config, "to_dict"):
        return dict(generation_config.to_dict())
    raise ArgumentError(
        f"generation_config is a {type(generation_config).__name__}, expected a Config, a dict or "
        "transformers' GenerationConfig"
    )
