"""The config object that a model carries: HF's attribute names over the fields of a config.json."""

import copy
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .atomic import file as atomic_file
from .json_file import read_json

# What trainers read from any HF config, where a config.json leaves it out.
_DEFAULTS: dict[str, Any] = {
    "is_encoder_decoder": False,
    "use_cache": True,
    "tie_word_embeddings": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "quantization_config": None,
    "architectures": None,
}


class Config:
    """Fields as attributes, in HF's vocabulary; unknown ones are kept and written back.

    `Config({"model_type": "llama", ...})`, or `Config.from_folder(path)`.
    """

    def __init__(self, fields: dict[str, Any], name_or_path: str = "") -> None:
        # Underscored keys of a file are another library's private state, never ours to act on.
        kept = {k: v for k, v in fields.items() if not k.startswith("_")}
        self.__dict__["fields"] = copy.deepcopy(kept)
        self.__dict__["name_or_path"] = name_or_path

    @classmethod
    def from_folder(cls, folder: str | Path, name: str = "config.json") -> "Config":
        """Raises ConfigError if the file is missing or is no JSON object."""
        return cls(read_json(Path(folder) / name, error=ConfigError), str(folder))

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        if name == "_attn_implementation":
            raise AttributeError(
                "this config has no '_attn_implementation', which TRL asks for to load the model a "
                "second time, by transformers; give it ref_model=model.reference(), or set the "
                "field to have it do so"
            )
        raise AttributeError(f"this config has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "name_or_path" or name.startswith("_"):  # the latter are in no file
            self.__dict__[name] = value
        else:
            self.fields[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.fields == other.fields

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Config {self.to_json_string()}"

    @property
    def _name_or_path(self) -> str:
        return str(self.name_or_path)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where the config does not have it."""
        return self.fields.get(name, default)

    def get_text_config(self, decoder: bool = False) -> "Config":
        """This config: purelm's models are text models."""
        return self

    def update(self, fields: dict[str, Any]) -> None:
        """Set several fields."""
        self.fields.update(fields)

    def to_dict(self) -> dict[str, Any]:
        """A copy of all fields."""
        return copy.deepcopy(self.fields)

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of its config.json."""
        return json.dumps(self.fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into `folder`, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(folder) / "config.json") as path:
            path.write_text(self.to_json_string(), encoding="utf-8")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Config":
        return Config(self.fields, self.name_or_path)

    def __getstate__(self) -> dict[str, Any]:
        return {"fields": self.to_dict(), "name_or_path": self.name_or_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
