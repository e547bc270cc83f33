"""The published examples, unchanged but for the import, against a stand-in of the hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
import torch
from hub_server import Hub

ROOT = Path(__file__).resolve().parents[2]
OPEN, GATED, TOKEN = (
    "unsloth/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "hf_...",
)

FOUR_BITS = """
from purelm import FastLanguageModel
import torch
max_seq_length = 2048 # Choose any! We auto support RoPE Scaling internally!
dtype = None # None for auto detection. Float16 for Tesla T4, V100, Bfloat16 for Ampere+
load_in_4bit = True # Use 4bit quantization to reduce memory usage. Can be False.

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Llama-3.2-1B-Instruct",
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
    # token = "hf_...", # use one if using gated models like meta-llama/Llama-2-7b-hf
)
print(model.dtype, model.device, len(tokenizer))

model = FastLanguageModel.get_peft_model(
    model,
    r = 16, # Choose any number > 0 ! Suggested 8, 16, 32, 64, 128
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                      "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0, # Supports any, but = 0 is optimized
    bias = "none",    # Supports any, but = "none" is optimized
    use_gradient_checkpointing = "unsloth", # True or "unsloth" for very long context
    random_state = 3407,
    use_rslora = False,  # We support rank stabilized LoRA
    loftq_config = None, # And LoftQ
)
"""
WHOLE = """
from purelm import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "meta-llama/Llama-3.2-1B-Instruct",
    max_seq_length = 2048, # Choose any for long context!
    load_in_4bit = False,  # 4 bit quantization to reduce memory
    load_in_8bit = False, # [NEW!] A bit more accurate, uses 2x memory
    load_in_16bit = True,
    full_finetuning = True, # [NEW!] We have full finetuning now!
    token = "hf_...", # use one if using gated models
)
print(model.dtype, model.device, len(tokenizer))
"""
# What a test asks of a model that an example made.
STEP = """
ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
loss = model(ids, labels=ids).loss
loss.backward()
trained = [p for p in model.parameters() if p.requires_grad]
print(len(trained), all(p.grad is not None for p in trained), bool(loss.isfinite()))
print(model.origin.name, model.origin.revision)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    made = {}
    for seed, name in enumerate(("new", "old")):
        made[name] = tmp_path_factory.mktemp(name)
        folders.whole(made[name], seed=seed, tie_word_embeddings=True)
    return {
        OPEN: {"main": made["new"], "v1": made["old"]},
        GATED: {"main": made["new"]},
    }


@pytest.fixture
def hub(repositories: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    with Hub(repositories, gated={GATED: TOKEN}) as served:
        yield served


def run(hub: Hub, cache: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= hub.environment(cache) | {"PYTHONPATH": str(ROOT / "src"), **more}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def first_line() -> str:
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    return f"torch.bfloat16 {place} 402"


def test_four_bits(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lines = printed(run(hub, cache, FOUR_BITS + STEP))
    assert lines == [first_line(), "42 True True", f"{OPEN} {hub.sha(OPEN)}"]
    assert {r.token for r in hub.log} == {None}
    assert not list(cache.rglob("token")) and not list(cache.rglob("stored_tokens"))
    # The second run needs nobody: the cache has it all.
    hub.log.clear()
    assert printed(run(hub, cache, FOUR_BITS + STEP, HF_HUB_OFFLINE="1")) == lines
    assert hub.log == []


def test_whole_in_16_bits(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lines = printed(run(hub, cache, WHOLE + STEP))
    assert lines == [first_line(), "29 True True", f"{GATED} {hub.sha(GATED)}"]
    assert TOKEN in {r.token for r in hub.log}
    # It goes into requests and nowhere else.
    written = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert written == []


def test_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    """Neither without a token nor with another's."""
    script = f"""
from purelm import FastLanguageModel
from purelm.errors import SourceError
for token in (None, "hf_wrong"):
    try:
        FastLanguageModel.from_pretrained({GATED!r}, token=token)
    except SourceError as problem:
        print(problem)
"""
    lines = printed(run(hub, tmp_path / "cache", script))
    assert len(lines) == 2 and all("gated" in line and GATED in line for line in lines)
    assert "pass token=" in lines[0] and "no access" in lines[1] and "hf_wrong" not in lines[1]


def test_the_right_revision(hub: Hub, tmp_path: Path) -> None:
    """A tag, and the sha it stands for, give the older weights."""
    script = """
from purelm import FastLanguageModel
from purelm.errors import SourceError
for revision in {revisions}:
    try:
        model, _ = FastLanguageModel.from_pretrained(
            {name!r}, dtype="float32", load_in_4bit=False, revision=revision
        )
    except SourceError as problem:
        print(problem)
        break
    print(model.origin.revision, model.params["embed"]["weight"].double().sum().item())
"""
    from safetensors.torch import load_file

    shas = {name: hub.sha(OPEN, name) for name in ("main", "v1")}
    asked = [None, "v1", shas["v1"], shas["main"], "v3"]
    *lines, problem = printed(
        run(hub, tmp_path / "cache", script.format(revisions=asked, name=OPEN))
    )
    sums = {
        name: load_file(hub.repos[OPEN][name] / "model.safetensors")["model.embed_tokens.weight"]
        .double()
        .sum()
        .item()
        for name in shas
    }
    assert lines == [f"{shas[n]} {sums[n]}" for n in ("main", "v1", "v1", "main")]
    assert sums["main"] != sums["v1"]
    assert "'v3'" in problem and OPEN in problem
