"""A config.json read strictly: each field is taken by a family, known as harmless, or an error."""

import re
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import ConfigError

T = TypeVar("T")
_REQUIRED: Any = object()

# Fields that do not change what the model computes.
HARMLESS = frozenset(
    """
    architectures auto_map bos_token_id dtype eos_token_id id2label is_llama_config label2id
    model_type name_or_path output_attentions output_hidden_states pad_token_id pretraining_tp
    quantization_config return_dict task_specific_params torch_dtype transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_cache use_return_dict
    problem_type finetuning_task is_decoder is_encoder_decoder add_cross_attention
    cross_attention_hidden_size chunk_size_feed_forward decoder_start_token_id sep_token_id
    prefix pruned_heads tie_encoder_decoder tokenizer_class torchscript use_bfloat16
    attn_implementation num_labels _name_or_path return_dict_in_generate
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens tf_legacy_loss cache_implementation
    """.split()
)

# Fields that would change the math, with the values that mean "off".
_OFF: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "hidden_dropout_prob": (0, None),
    "embd_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "residual_dropout": (0, None),
    "embedding_dropout": (0, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
}


class Fields:
    """The fields of one config.json, which a family takes one by one."""

    def __init__(self, raw: Mapping[str, Any], file: object = None) -> None:
        self.raw, self.file = raw, file
        self.taken: set[str] = set()
        self.fixed: set[str] = set()  # of those, the ones with one value that is known
        self._old: dict[str, str] = {}  # the names that renamed fields have in the file

    def error(self, message: str) -> ConfigError:
        """With each field called as the file calls it."""
        for name, old in self._old.items():
            message = re.sub(rf"\b{name}\b", old, message)
        return ConfigError(message, file=self.file)

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field as it stands; `default` where it is absent or null."""
        self.taken.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(f"the config has no {name!r}, which its model_type needs")
        return default

    def put(self, name: str, value: Any) -> None:
        """A field that a family computes; raises ConfigError where another value stands."""
        if self.has(name) and self.raw[name] != value:
            raise self.error(f"{name} is {self.raw[name]!r:.200}; the other fields make it {value}")
        self.raw = {**self.raw, name: value}

    def rename(self, old: str, new: str) -> None:
        """Read the field `old` as `new`; raises ConfigError where both stand and differ."""
        if not self.has(old):
            return self.taken.add(old)
        if self.has(new) and self.raw[new] != self.raw[old]:
            raise self.error(f"{old} and {new} mean the same and have different values")
        self.raw = {**{k: v for k, v in self.raw.items() if k != old}, new: self.raw[old]}
        self._old[new] = old

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1) -> int:
        """An integer of at least `low`."""
        value = self.take(name, default)
        if type(value) is not int or value < low:
            raise self.error(f"{name} is {value!r:.200}, expected an integer of at least {low}")
        # A spec is made per layer, before any file could show that there are not so many.
        high = 10_000 if name == "num_hidden_layers" else 2**31 - 1
        if value > high:
            raise self.error(f"{name} is {value!s:.40}, expected at most {high}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.take(name, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not above < value <= sys.float_info.max:
            raise self.error(f"{name} is {value!r:.200}, expected a number above {above:g}")
        return float(value)

    def integer_or_null(self, name: str, default: int | None, *, low: int = 1) -> int | None:
        """An integer of at least `low`, or null; `default` only where the field is absent."""
        self.taken.add(name)
        if self.raw.get(name, default) is None:
            return None
        return self.integer(name, default, low=low)

    def number_or_null(self, name: str, default: float | None) -> float | None:
        """A positive number, or null; `default` only where the field is absent."""
        self.taken.add(name)
        if self.raw.get(name, default) is None:
            return None
        return self.number(name, default)

    def numbers(self, name: str, length: int, default: float | None = None) -> tuple[float, ...]:
        """A list of `length` positive numbers, where it is absent all `default`."""
        value = self.take(name, _REQUIRED if default is None else [default] * length)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(f"{name} is {value!r:.200}, expected a list of {length} numbers")
        return tuple(Fields({name: x}, self.file).number(name) for x in value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """A boolean."""
        value = self.take(name, default)
        if type(value) is not bool:
            raise self.error(f"{name} is {value!r:.200}, expected true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: Any = _REQUIRED) -> T:
        """The meaning of one of the texts in `choices`."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(f"{name} is {value!r:.200}, expected one of {', '.join(choices)}")
        return choices[value]

    def expect(self, name: str, *values: Any) -> None:
        """Raise unless the field is absent, null or one of `values`: the spec knows no other."""
        self.fixed.add(name)
        value = self.take(name, None)
        if value is not None and value not in values:
            known = " or ".join(map(repr, values))
            raise self.error(f"{name} is {value!r:.200}; no part of the model covers but {known}")

    def texts(self, name: str, length: int, choices: tuple[str, ...]) -> list[str] | None:
        """A list of `length` texts out of `choices`, or None where it is absent."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.error(f"{name} should be a list of {length} entries, one a layer")
        if unknown := sorted({str(x) for x in value if x not in choices}):
            raise self.error(f"{name} has {unknown}, known are {', '.join(choices)}")
        return value

    def finish(self) -> None:
        """Raise for fields that nobody took and that might change the math."""
        unknown = []
        for name, value in self.raw.items():
            if name in self.taken or name in HARMLESS or name.startswith("_"):
                continue
            if name in _OFF and value in _OFF[name]:
                continue
            unknown.append(f"{name:.60}={value!r:.60}")
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            shown = ", ".join(sorted(unknown)[:8]) + more
            raise self.error(
                f"no part of the model covers the config field(s) {shown}; "
                "loading without them could change what the model computes"
            )
