"""The text half of a vision-language checkpoint: its config and its tensors as a text model's.

Only wrappers are known whose text half computes on text what its own model_type does: rotary
positions of images ("mrope") are those of text where there are none.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, ConfigError
from .config import Config
from .registry import FAMILIES
from .shards import Checkpoint

_WRAPPERS = frozenset(
    """
    gemma3 gemma4 internvl lfm2_vl llama4 llava llava_next mistral3 qwen2_vl qwen2_5_vl
    qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe
    """.split()
)
# Text halves that are called otherwise when they stand alone; and of configs without one of
# their own, whose fields stand beside those of the vision half.
_TEXT_TYPES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
}
# What configs leave out where a text half is as its class is by default (Gemma 3 4B, Llava 1.5).
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
DEFAULTS = {
    "gemma3_text": (262208, 2304, 9216, 26, 8, 4),
    "gemma4_text": (262144, 2304, 9216, 30, 8, 4),
    "llama": (32000, 4096, 11008, 32, 32, None),
    "llama4_text": (202048, 5120, 8192, 48, 40, 8),
    "mistral": (32000, 4096, 14336, 32, 32, 8),
    "ministral3": (131072, 4096, 14336, 34, 32, 8),
    "qwen2_vl_text": (152064, 8192, 29568, 80, 64, 8),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64, 8),
    "qwen3_5_text": (248320, 4096, 12288, 32, 16, 4),
    "qwen3_5_moe_text": (248320, 2048, None, 40, 16, 2),
    "qwen3_vl_text": (151936, 4096, 22016, 32, 32, 32),
    "qwen3_vl_moe_text": (151936, 2048, 5632, 24, 16, 16),
}
# What the text half of a whole model always does, and no field of its config says.
_ALWAYS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
# Where text tensors stand -> where they stand alone.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
# Of the whole model's fields those that are meant for its text half too.
_SHARED = tuple(
    """
    tie_word_embeddings eos_token_id bos_token_id pad_token_id torch_dtype dtype
    quantization_config transformers_version
    """.split()
)
_OF_IMAGES = ("image", "video", "vision", "audio", "mm_")


@dataclass(frozen=True)
class TextHalf:
    """A text model's config, out of a whole one of `model_type`, and the fields left behind."""

    model_type: str
    config: Config
    fields: tuple[str, ...]

    def checkpoint(self, whole: Checkpoint) -> tuple[Checkpoint, str]:
        """The text half's tensors under a text model's names, and what was left out in words.

        Raises CheckpointError where no tensor is the text half's, or two are the same.
        """
        flat = not any(
            name.startswith(("model.language_model.", "language_model.")) for name in whole.tensors
        )
        prefixes = {"model.": "model.", "lm_head.": "lm_head."} if flat else _PREFIXES
        renamed: dict[str, str] = {}
        left: Counter[str] = Counter()
        for name in whole.tensors:
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if prefix is None or name.startswith("model.visual."):
                left[".".join(name.split(".")[: 1 + name.startswith("model.")])] += 1
            else:
                renamed[name] = prefixes[prefix] + name.removeprefix(prefix)
        if not renamed:
            raise CheckpointError(
                "no tensor is called as those of a text half are (language_model.*)",
                file=whole.folder,
            )
        twice = [ours for ours, count in Counter(renamed.values()).items() if count > 1]
        if twice:
            both = " and ".join(name for name, ours in renamed.items() if ours == twice[0])
            raise CheckpointError(
                f"the text half has this tensor twice, as {both}",
                tensor=twice[0][:200],
                file=whole.folder,
            )
        tensors = {ours: replace(whole.tensors[name], name=ours) for name, ours in renamed.items()}
        placed = {ours: whole.placed[name] for name, ours in renamed.items() if whole.placed}
        parts = [f"{count} tensors of {module}" for module, count in left.items()]
        parts += [f"the config field(s) {', '.join(self.fields)}"] if self.fields else []
        return (
            replace(whole, tensors=MappingProxyType(tensors), placed=MappingProxyType(placed)),
            f"the text half of a {self.model_type} model, without {'; '.join(parts) or 'loss'}",
        )


def text_half(config: Config, file: object = None) -> TextHalf | None:
    """The text half of a whole model's config, or None for a config that is a text model's.

    Raises ConfigError for a wrapper or a text half that is not known.
    """
    kind = config.get("model_type")
    if not is_wrapped(config.fields):
        return None
    if not isinstance(kind, str) or kind not in _WRAPPERS:
        raise ConfigError(
            f"model_type {kind!r:.60} has a text half of which it is not known whether it computes "
            f"alone what it does there; known are {', '.join(sorted(_WRAPPERS))}",
            file=file,
        )
    inner = config.get("text_config")
    if inner is None:
        inner = {
            name: value
            for name, value in config.fields.items()
            if not any(part in name for part in _OF_IMAGES)
        }
        left = config.fields.keys() - inner.keys()
    elif not isinstance(inner, dict):
        raise ConfigError(f"text_config is {inner!r:.60}, expected an object", file=file)
    else:
        left = config.fields.keys() - {"text_config", "model_type", "architectures", *_SHARED}
    own_type = inner.get("model_type", kind)
    model_type = _TEXT_TYPES.get(own_type, own_type) if isinstance(own_type, str) else None
    if model_type not in FAMILIES:
        raise ConfigError(
            f"the text half of this {kind} model is of model_type {own_type!r:.60}, which is not "
            f"supported; known are {', '.join(FAMILIES)}",
            file=file,
        )
    fields = {
        name: value for name, value in inner.items() if not any(part in name for part in _OF_IMAGES)
    }
    left = left | (inner.keys() - fields.keys())
    fields.update({name: config.fields[name] for name in _SHARED if config.get(name) is not None})
    for name, size in zip(SIZES, DEFAULTS.get(own_type, ()), strict=False):
        if size is not None:
            fields.setdefault(name, size)
    for name, value in _ALWAYS.get(own_type, {}).items():
        if fields.setdefault(name, value) != value:
            raise ConfigError(
                f"{name} is {fields[name]!r:.60}, and a {kind} model computes as with {value}",
                file=file,
            )
    fields.update(model_type=model_type, architectures=[FAMILIES[model_type].hf_class])
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), dict):
            fields[name] = _of_text(fields[name])
    return TextHalf(str(kind), Config(fields, str(config.name_or_path)), tuple(sorted(left)))


def is_wrapped(fields: Mapping[str, Any]) -> bool:
    """Whether a config is of a model with a text half and another."""
    return any(fields.get(name) is not None for name in ("text_config", "vision_config"))


def _of_text(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary fields without the share of rows and columns of images."""
    kept = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    return {name: "default" if value == "mrope" else value for name, value in kept.items()}
