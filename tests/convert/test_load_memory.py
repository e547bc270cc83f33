"""Memory that runs out while a model is loaded: said with the bytes, and given back."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from purelm.convert import load
from purelm.convert.registry import family_of
from purelm.convert.safetensors_write import entry, write_safetensors
from purelm.errors import LoadMemoryError
from purelm.nn import params, tree

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Each level of address space beyond what there is: loads, or says what it wants and what is free.
LEVELS = """
import gc, json, resource, sys
import torch, purelm
from purelm.errors import LoadMemoryError

def size():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

folder, file = sys.argv[1:]
purelm.load(folder, quantize="nf4", dtype=torch.float32)  # what is imported late
purelm.load(folder, dtype=torch.float32)
gc.collect()
bytes, found, before = int(file), [], size()
for level in range(10):
    resource.setrlimit(resource.RLIMIT_AS, (before + bytes * (level + 1) // 6, -1))
    try:
        spec, params = purelm.load(folder, dtype=torch.float32)
        found.append("loaded")
    except LoadMemoryError as problem:
        found.append(str(problem))
    spec = params = problem = None
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    gc.collect()
    found[-1] = [found[-1], size() - before]
spec, params = purelm.load(folder, dtype=torch.float32)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 49 MB."""
    path = tmp_path_factory.mktemp("large")
    family = family_of(CONFIG)
    drawn = params.init(family.spec(CONFIG), generator=torch.Generator().manual_seed(0))
    entries = [entry(family.names.to_hf(name), leaf.float()) for name, leaf in tree.items(drawn)]
    write_safetensors(path / "model.safetensors", entries, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux")
def test_ten_levels_of_address_space(folder: Path) -> None:
    total = (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LEVELS, str(folder), str(total)]
    # Large blocks go back to the system as soon as they are free.
    around = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=around
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    words = [text for text, _ in found]
    refused = [text for text in words if text != "loaded"]
    assert words == refused + ["loaded"] * (10 - len(refused)) and 2 <= len(refused) <= 8
    for text in refused:
        assert f"about {total // 10**6:,}," in text and "are free now" in text
    assert max(grown for _, grown in found[: len(refused)]) <= 0.01 * total  # nothing is left


def test_nothing_is_held_by_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was read before memory ran out, on whichever device it did."""
    true, seen = load._read_all, []

    def late(*args: object) -> object:
        made = true(*args)
        seen.append(weakref.ref(made["embed"]["weight"]))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(load, "_read_all", late)
    caught: list[BaseException] = []
    try:
        load.load_folder(folder, quantize=None, dtype=torch.float32, device=torch.device("cpu"))
    except LoadMemoryError as problem:
        caught.append(problem)
    assert "Tried to allocate 2.00 GiB" in str(caught[0])
    gc.collect()
    assert seen[0]() is None and caught
