"""How a byte-level tokenizer of a GGUF file cuts a text, by the name that the file has for it.

`tokenizer.ggml.pre` is one of llama.cpp's names (src/llama-vocab.cpp there), each of a list of
expressions that cut a text one after another, what matches and what lies between alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_NFC = {"type": "NFC"}

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# What ByteLevel cuts by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _THREE = r"\p{N}", r"\p{N}{1,3}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK = (
    r'[!"#$%&'
    r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _ENDS
)


def _words(digits: str, letters: str = r"\p{L}+", other: str = r"[^\s\p{L}\p{N}]") -> str:
    """Llama 3's rule and those that were made after it."""
    front = r"|[^\r\n\p{L}\p{N}]?"
    return f"{_ENGLISH}{front}{letters}|{digits}| ?{other}+[\\r\\n]*{_ENDS}"


def _cased(digits: str, after: str) -> str:
    """GPT-4o's rule: a word begins where lower case ends."""
    front = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{front}{_UPPER}*{_LOWER}+{after}|{front}{_UPPER}+{_LOWER}*{after}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS
    )


@dataclass(frozen=True)
class Splits:
    """A rule: a text is normalised, cut by each of `patterns` in turn, and its bytes are taken.

    ignore_merges: a word that is a token is taken whole. bos: a first token is added unless the
    file says otherwise.
    """

    patterns: tuple[str, ...]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    bos: bool = False

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The rule as tokenizer.json has it."""
        steps = [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
            for p in self.patterns
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, _BYTES]}


_RULES: dict[str, Splits] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum": Splits(
        (GPT2,)
    ),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": Splits((_DIGIT, GPT2)),
    "command-r": Splits((_DIGIT, GPT2), _NFC),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Splits(
        (_words(_THREE),), ignore_merges=True, bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": Splits((_words(_THREE),)),
    "qwen2 deepseek-r1-qwen megrez": Splits((_words(_DIGIT),), _NFC),
    "stablelm2 hunyuan grok-2 solar-open": Splits((_words(_DIGIT),)),
    "qwen35": Splits((_words(_DIGIT, r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]"),), _NFC),
    "gpt-4o llama4 kanana2 minimax-m2": Splits((_cased(_THREE, _ENGLISH + "?"),)),
    "tekken": Splits((_cased(_DIGIT, ""),), ignore_merges=True, bos=True),
    "tiny_aya": Splits(
        (r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_THREE, _ENGLISH + "?")),
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": Splits((_THREE, "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK)),
    "deepseek-coder": Splits((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)),
    "minicpm5": Splits((_THREE, _words(r"\p{N}+")), ignore_merges=True),
    "bailingmoe bailingmoe2 llada-moe": Splits(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "seed-coder": Splits(
        (_ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _ENDS,)
    ),
    "exaone-moe": Splits(
        (
            _ENGLISH + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "bloom poro-chat gpt3-finnish": Splits((_BLOOM,)),
    "viking": Splits((_BLOOM, _DIGIT)),
    "falcon": Splits((_PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
    "default": Splits((_PUNCTUATION.replace("`", ""), GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
SPLITS: dict[str, Splits] = {name: rule for names, rule in _RULES.items() for name in names.split()}


def essence(normalizer: Any, pre_tokenizer: Any) -> list[Any]:
    """What two ways to write one rule in a tokenizer.json have in common."""
    made: list[Any] = [step for step in steps(normalizer) if step != {"type": "NFC"}]
    nfc = len(made) < len(steps(normalizer))
    space = False
    for step in steps(pre_tokenizer):
        kind = step["type"]
        pattern = step.get("pattern", {}).get("Regex")
        if kind == "ByteLevel":
            space = space or bool(step.get("add_prefix_space", True))
            # One without a word on it cuts.
            made += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            made.append(_DIGIT)
        elif kind == "Digits":
            made.append(r"\p{N}+")
        elif kind == "Punctuation" and str(step.get("behavior")) == "Contiguous":
            made.append(_PUNCTUATION)
        elif kind == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
            made.append(_plain(pattern))
        else:
            made.append(step)
    return [*made, {"NFC": nfc, "add_prefix_space": space}]


def _plain(pattern: str) -> str:
    """An expression as it is written here."""
    for theirs, ours in (
        ("\r", r"\r"),
        ("\n", r"\n"),
        (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _ENGLISH),
    ):
        pattern = pattern.replace(theirs, ours)
    return pattern


def steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [step for each in inner for step in steps(each)]


def name_of(normalizer: Any, pre_tokenizer: Any, ignore_merges: bool) -> str | None:
    """The name of the rule that a tokenizer.json has, one with the same merging if there is one."""
    wanted = essence(normalizer, pre_tokenizer)
    found = [
        (rule.ignore_merges != ignore_merges, name)
        for name, rule in SPLITS.items()
        if essence(rule.normalizer, rule.pre_tokenizer) == wanted
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def described(normalizer: Any, pre_tokenizer: Any) -> str:
    """The rule in words, for a message."""
    return json.dumps(essence(normalizer, pre_tokenizer), ensure_ascii=False)[:300]
