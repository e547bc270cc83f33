"""The README.md of a model on the hub: what it was made from, how, and how to load it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..nn import tree

if TYPE_CHECKING:
    from .bridge import CausalLM

CARD = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WHAT = {
    "adapter": "A LoRA adapter",
    "merged": "A whole model, its LoRA adapter merged in",
    "gguf": "GGUF files, the LoRA adapter merged in",
}


def model_card(model: CausalLM, repo_id: str, kind: str, folder: Path) -> str:
    """The card of `model` as saved in `folder`; kind: "adapter", "merged" or "gguf".

    A base that is a folder of this machine is not named: its path says nothing to others.
    """
    origin = model.origin
    known = _HUB_NAME.fullmatch(origin.name) is not None and not os.path.exists(origin.name)
    base = origin.name if known else None
    adapted = bool(tree.leaves(model.adapters))
    whole = model.train_all
    head = []
    if base:
        head.append(f"base_model: {json.dumps(base)}")
        if kind != "adapter" or not whole:
            relation = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}[kind]
            head.append(f"base_model_relation: {relation}")
    library = {"adapter": "transformers" if whole else "peft", "merged": "transformers"}
    if kind in library:
        head.append(f"library_name: {library[kind]}")
    head += ["pipeline_tag: text-generation", "tags:", "- purelm"]
    head += ["- lora"] if adapted else []
    head += ["- gguf"] if kind == "gguf" else []
    what = _WHAT[kind] if adapted else "A whole model" if kind != "gguf" else "GGUF files"
    source = f" of [{base}](https://huggingface.co/{base})" if base else ""
    revision = f" at {origin.revision}" if base and origin.revision else ""
    lines = [f"# {repo_id.split('/')[-1]}", "", f"{what}{source}{revision}, made with purelm."]
    config = model.peft_config.get("default")
    if adapted and config is not None:
        fields = config.to_dict()
        lines += ["", "| Adapter | |", "| --- | --- |"]
        rows = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
        lines += [f"| {name} | {_shown(fields[name])} |" for name in rows if name in fields]
        lines.append(f"| base weights while training | {origin.quantize or model.dtype} |")
    lines += ["", "## Loading", "", "```python", *_loading(repo_id, kind, folder), "```", ""]
    return "\n".join(["---", *head, "---", "", *lines])


def _shown(value: object) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, (list, set)) else str(value)


def _loading(repo_id: str, kind: str, folder: Path) -> list[str]:
    if kind == "gguf":
        names = sorted(path.name for path in folder.glob("*.gguf"))
        return [
            "from llama_cpp import Llama",
            "",
            f"model = Llama.from_pretrained({json.dumps(repo_id)}, {json.dumps(names[0])})",
        ]
    return [
        "import purelm",
        "",
        f"model, tokenizer = purelm.FastLanguageModel.from_pretrained({json.dumps(repo_id)})",
    ]
