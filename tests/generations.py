"""Checkpoints in which every file tells its generation, so that a mixture shows."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from purelm.convert import atomic
from purelm.convert.atomic import MODEL_FILES, entry, write_safetensors

SHARDS = 4


def write_generation(folder: Path, generation: int) -> None:
    """A checkpoint in which every file tells its generation."""
    for shard in range(SHARDS):
        tensors = [entry(f"t{shard}", torch.full((1000,), float(generation)))]
        write_safetensors(folder / f"model-{shard}.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"generation": generation}))


def generation_of(folder: Path) -> int:
    """The generation of a whole checkpoint; fails for a mixed or incomplete one."""
    generation = json.loads((folder / "config.json").read_text())["generation"]
    for shard in range(SHARDS):
        values = load_file(folder / f"model-{shard}.safetensors")[f"t{shard}"]
        assert torch.equal(values, torch.full((1000,), float(generation)))
    return int(generation)


def save_generation(target: Path, generation: int) -> None:
    with atomic.folder(target, replaces=MODEL_FILES) as new:
        write_generation(new, generation)
