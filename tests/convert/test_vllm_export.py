"""What `to_vllm` writes: what transformers and peft make of it, vLLM's rules, and vLLM itself."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import bridged
import httpx
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from purelm import FastLanguageModel
from purelm.convert.bridge import CausalLM
from purelm.convert.vllm_export import RANKS
from purelm.errors import ArgumentError, SaveError
from purelm.nn import tree

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = bridged.ids(length=9)
ALL = {
    "default": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "math": {"r": 3, "use_rslora": True, "target_modules": ["down_proj", "v_proj"]},
    "uneven": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"q_proj": 5},
    },
}


def wearing(folder: Path, adapters: dict[str, dict[str, Any]], family: str = "llama") -> CausalLM:
    model = bridged.bridge(tiny.save(tiny.hf_model(family), folder))
    for name, settings in adapters.items():
        model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in model.worn.values():
            for leaf in tree.leaves(one.adapters):
                leaf.b.normal_(0, 0.3, generator=generator)
    model.set_adapter(next(iter(adapters)))
    return model


@pytest.fixture
def model(tmp_path: Path) -> CausalLM:
    return wearing(tmp_path / "source", ALL)


def factors(folder: Path, max_rank: int) -> dict[str, torch.Tensor]:
    """What vLLM's loader makes of an adapter's folder: the changes to weights, or an error.

    Its rules, of `PEFTHelper` and `LoRAModel`: four fields count, of a config without modules to
    save, biases and DoRA; one rank and scale; tensors are named base_model.model.MODULE.lora_A or
    lora_B.weight.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["bias"] == "none" and not config["use_dora"]
    r, alpha = config["r"], config["lora_alpha"]
    assert 0 < r <= max_rank and alpha > 0
    scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        prefix, module = name[:17], name[17:].removesuffix(".weight")
        assert prefix == "base_model.model." and module.endswith((".lora_A", ".lora_B"))
        assert a.shape[0 if module.endswith("A") else 1] == r
        if module.endswith(".lora_A"):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[module.removesuffix(".lora_A")] = scale * (b.double() @ a.double())
    return found


def same(ours: Any, theirs: Any) -> None:
    with torch.no_grad():
        bridged.same_logits(ours(IDS).logits, theirs(IDS).logits)


def test_transformers_and_peft_compute_what_the_model_does(model: CausalLM, tmp_path: Path) -> None:
    out = model.to_vllm(tmp_path / "served")
    base = transformers.AutoModelForCausalLM.from_pretrained(out.base, dtype=torch.float32).eval()
    with model.disable_adapter():
        same(model, base)
    assert list(out.adapters) == list(ALL) and out.max_lora_rank == 16
    for i, (name, folder) in enumerate(out.adapters.items()):
        model.set_adapter(name)
        worn = peft.PeftModel.from_pretrained(base, folder, adapter_name=f"a{i}").eval()
        same(model, worn)
        base = worn.unload()
        changes = factors(folder, out.max_lora_rank)
        assert changes
        for module, change in changes.items():
            path = model.origin.family.names.to_ours(f"{module}.weight").removesuffix(".weight")
            leaf = tree.at(model.adapters, path)
            want = leaf.scale * (leaf.b.double() @ leaf.a.double())
            assert (change - want).abs().max() <= 1e-6 * want.abs().max()


def test_the_command_serves_each_by_its_name(model: CausalLM, tmp_path: Path) -> None:
    """vLLM's rank is one of a few; a second export leaves nothing of the first."""
    place = tmp_path / "my model"
    out = model.to_vllm(place, selected_adapters=["math", "uneven"])
    assert out.command == (
        *("vllm", "serve", f"{place}/base", "--served-model-name", "my model"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"),
        *("--lora-modules", f"math={place}/adapters/math", f"uneven={place}/adapters/uneven"),
    )
    assert f"'{place}/base'" in str(out) and out.max_lora_rank in RANKS
    (place / "notes.txt").write_text("mine")
    out = model.to_vllm(place, selected_adapters="default")
    assert out.max_lora_rank == 8
    assert sorted(p.name for p in place.iterdir()) == ["adapters", "base", "notes.txt"]
    assert [p.name for p in (place / "adapters").iterdir()] == ["default"]
    model.set_adapters({})
    out = model.to_vllm(place)
    assert out.adapters == {} and "--enable-lora" not in out.command
    assert not list(place.glob("adapters/*")) and (place / "base" / "config.json").exists()


def test_what_vllm_takes_merged_alone(tmp_path: Path) -> None:
    for i, (settings, says) in enumerate(
        (
            ({"target_modules": ["q_proj"], "use_dora": True}, r"magnitudes \(DoRA\)"),
            ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trained whole"),
            ({"target_modules": ["q_proj"], "r": 513}, "rank 513, more than 512"),
        )
    ):
        model = wearing(tmp_path / f"source{i}", {"default": {"r": 4, "lora_alpha": 8} | settings})
        with pytest.raises(ArgumentError, match=rf"'default' has .*{says}.* merged=True"):
            model.to_vllm(tmp_path / "served")
        assert not (tmp_path / "served").exists()
        out = model.to_vllm(tmp_path / f"served{i}", merged=True)
        assert out.adapters == {} and "--enable-lora" not in out.command
        whole = transformers.AutoModelForCausalLM.from_pretrained(out.base, dtype=torch.float32)
        same(model, whole.eval())


def test_projections_that_are_one_matrix_there(tmp_path: Path) -> None:
    """Adapters of parts go out as one of the whole, of more ranks than the others have."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj"]}
    model = wearing(tmp_path / "source", {"default": settings}, "phi3")
    out = model.to_vllm(tmp_path / "served")
    assert set(factors(out.adapters["default"], out.max_lora_rank)) >= {
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(out.base, dtype=torch.float32)
    same(model, peft.PeftModel.from_pretrained(base, out.adapters["default"]).eval())


def test_experts_keep_their_names(tmp_path: Path) -> None:
    """vLLM has them one by one, and the shared one beside, also where peft has parameters."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"]}
    model = wearing(tmp_path / "source", {"default": settings}, "qwen2_moe")
    out = model.to_vllm(tmp_path / "served")
    found = factors(out.adapters["default"], out.max_lora_rank)
    leaf = model.adapters["layers"][1]["mlp"]["experts"]["up"]
    want = leaf.scale * (leaf.b[3].double() @ leaf.a[3].double())
    assert (found["model.layers.1.mlp.experts.3.up_proj"] - want).abs().max() < 1e-6
    assert "model.layers.1.mlp.shared_expert.down_proj" in found
    config = json.loads((out.adapters["default"] / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert set(config["target_modules"]) == {"up_proj", "down_proj"}


def test_a_4_bit_model_goes_out_in_both_precisions(tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model("llama"), tmp_path / "source")
    model = bridged.bridge(folder, quantize="nf4")
    model = FastLanguageModel.get_peft_model(model, r=4)
    full = model.to_vllm(tmp_path / "full")
    assert "quantization_config" not in json.loads((full.base / "config.json").read_text())
    source, written = (load_file(f / "model.safetensors") for f in (folder, full.base))
    assert source.keys() == written.keys()
    assert all(torch.equal(source[name], written[name]) for name in source)
    four = model.to_vllm(tmp_path / "four", save_method="merged_4bit")
    config = json.loads((four.base / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"]


def test_bad_input(model: CausalLM, tmp_path: Path) -> None:
    for options, says in (
        ({"save_method": "lora"}, "save_method is 'lora'"),
        ({"selected_adapters": ["other"]}, "no adapter 'other'"),
        ({"selected_adapters": ["math"], "merged": True}, "leave selected_adapters out"),
    ):
        with pytest.raises(ArgumentError, match=says):
            model.to_vllm(tmp_path / "served", **options)
    with pytest.raises(SaveError, match="loaded from"):
        model.to_vllm(tmp_path / "source")
    # Nor is the folder of an earlier export for the base that it holds.
    again = bridged.bridge(model.to_vllm(tmp_path / "earlier").base)
    with pytest.raises(SaveError, match="earlier/base is what the model was loaded from"):
        again.to_vllm(tmp_path / "earlier", merged=True)
    with pytest.raises(TypeError):
        model.to_vllm(tmp_path / "served", rank=3)
    assert not (tmp_path / "served").exists()


@contextmanager
def vllm_serves(command: Sequence[str], log: Path) -> Iterator[str]:
    """The address of vLLM's server, which `command` starts."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    more = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    small = ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    own = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    own.pop("PYTHONPATH", None)
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*command, *more, *small], env=own, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(600):
            if server.poll() is not None:
                break
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        assert server.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


# Its dependencies are pinned to other versions: it may have an environment of its own.
VLLM = os.environ.get("PURELM_VLLM") or shutil.which("vllm")


@pytest.mark.full
@pytest.mark.skipif(VLLM is None, reason="no vllm: install it, or name its command in PURELM_VLLM")
@pytest.mark.parametrize("merged", [False, True])
def test_vllm_answers_as_the_model_does(tmp_path: Path, merged: bool) -> None:
    """Greedy ids of the base and of every adapter, of the server that the command starts; merged,
    of what the folder holds, whose weights are rounded to 16 bits."""
    model, _ = FastLanguageModel.from_pretrained(
        "purelm/tiny", load_in_4bit=False, dtype="float32", device_map="cpu"
    )
    for i, (name, settings) in enumerate(ALL.items()):
        model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for leaf in tree.leaves(model.worn[name].adapters):
            with torch.no_grad():
                leaf.b.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    model.set_adapter("math")
    out = model.to_vllm(tmp_path / "served", merged=merged)
    prompts = [[4, 17, 29, 40], [5] * 20, list(range(100, 163))]

    def wanted() -> list[list[int]]:
        each = (
            model.generate(torch.tensor([p]), max_new_tokens=24, eos_token_id=[]) for p in prompts
        )
        return [ids[0, len(p) :].tolist() for p, ids in zip(prompts, each, strict=True)]

    def answered(name: str) -> list[list[int]]:
        body = {"model": name, "prompt": prompts, "max_tokens": 24, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        reply = httpx.post(f"{url}/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return [choice["token_ids"] for choice in reply.json()["choices"]]

    found = {}
    with vllm_serves([str(VLLM), *out.command[1:]], tmp_path / "log") as url:
        found[None] = answered("served")
        for name in out.adapters:
            found[name] = answered(name)
    if merged:
        model, _ = FastLanguageModel.from_pretrained(
            str(out.base), load_in_4bit=False, dtype="float32", device_map="cpu"
        )
        assert found == {None: wanted()}
        return
    assert set(found) == {None, *ALL}
    for name, ids in found.items():
        with model.disable_adapter() if name is None else nullcontext():
            if name is not None:
                model.set_adapter(name)
            assert ids == wanted(), name
    assert len({str(ids) for ids in found.values()}) == len(found)
