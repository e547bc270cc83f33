"""llm-compressor's integer checkpoints: the model that their parts stand for, and broken ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
from packed_fields import packed
from safetensors.torch import load_file, save_file

import purelm
from purelm.convert.encoded import unpacked
from purelm.convert.load import load_folder
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder

Tensors = dict[str, torch.Tensor]
# 72 inputs of down_proj are no whole number of words.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 72, "head_dim": 16}
Q = "model.layers.0.self_attn.q_proj"
CASES: dict[str, tuple[str, int, int, bool]] = {
    # layout, bits, inputs of a group (0: a row's one), zero points
    "four bits": ("pack-quantized", 4, 8, False),
    "four bits with zero points": ("pack-quantized", 4, 8, True),
    "eight bits a row": ("pack-quantized", 8, 0, False),
    "two bits with zero points": ("pack-quantized", 2, 4, True),
    "int8": ("int-quantized", 8, 0, False),
    "int8 with zero points": ("int-quantized", 8, 8, True),
}


def numbers(w: torch.Tensor, bits: int, group: int, zeros: bool) -> tuple[torch.Tensor, ...]:
    """Signed numbers [out, in], scales and zero points [out, groups] in bf16 and int8."""
    grouped = w.unflatten(1, (-1, group or w.shape[1]))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if zeros:
        scale = ((grouped.amax(2) - grouped.amin(2)) / (high - low)).bfloat16()
        zero = (low - grouped.amin(2) / scale.float()).round().clamp(low, high)
    else:
        scale = (grouped.abs().amax(2) / high).bfloat16()
        zero = torch.zeros_like(scale, dtype=torch.float32)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(low, high)
    return codes.flatten(1).to(torch.int8), scale, zero.to(torch.int8)


def unsigned(values: torch.Tensor, bits: int) -> torch.Tensor:
    return values.long() + 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_library_packs_so(bits: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(bits)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (10, 13), generator=generator).to(torch.int8)
    assert torch.equal(library.pack_to_int32(codes, bits), packed(unsigned(codes, bits).T, bits).T)
    along = library.pack_to_int32(codes, bits, packed_dim=0)
    assert torch.equal(along, packed(unsigned(codes, bits), bits))


def parts_of(w: torch.Tensor, case: str) -> tuple[Tensors, torch.Tensor]:
    """What lies in the file for w [out, in], and what it stands for."""
    layout, bits, group, zeros = CASES[case]
    codes, scale, zero = numbers(w, bits, group, zeros)
    each = group or w.shape[1]
    want = codes.double() - zero.double().repeat_interleave(each, 1)
    want = want * scale.double().repeat_interleave(each, 1)
    parts = {"weight_scale": scale}
    if layout == "int-quantized":
        parts |= {"weight": codes, "input_scale": torch.ones(1)}
        return parts | ({"weight_zero_point": zero} if zeros else {}), want.float()
    parts["weight_packed"] = packed(unsigned(codes, bits).T, bits).T.contiguous()
    parts["weight_shape"] = torch.tensor(w.shape)
    if zeros:
        parts["weight_zero_point"] = packed(unsigned(zero, bits), bits)
    return parts, want.float()


def config(layout: str, bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


def stored(
    folder: Path, case: str, change: Callable[[Tensors], Any] | None = None, **fields: Any
) -> Any:
    """A folder in that form, and transformers' model with the weights that it stands for."""
    model = tiny.hf_model("qwen2", **SIZES)
    tiny.save(model, folder)
    tensors, state = {}, model.state_dict()
    for name, w in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            parts, state[name] = parts_of(w, case)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = w
    model.load_state_dict(state)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    quantization = {**config(*CASES[case][:2]), **fields}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": quantization})
    )
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    model = stored(tmp_path, case)
    cpu = torch.device("cpu")
    loaded = load_folder(tmp_path, quantize=None, dtype=torch.float32, device=cpu)
    assert loaded.dequantized_from == "compressed-tensors"
    ours, theirs = loaded.params["layers"][1]["mlp"]["down"]["weight"], model.state_dict()
    assert torch.equal(ours, theirs["model.layers.1.mlp.down_proj.weight"])
    with torch.no_grad():
        want = model(bridged.ids()).logits
    bridged.same_logits(decoder.forward(loaded.params, loaded.spec, bridged.ids()), want)


def test_groups_by_activation(tmp_path: Path) -> None:
    """`weight_g_idx`: the groups of inputs are no runs; -1 throughout says that they are."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffle(tensors: Tensors) -> None:
        words = tensors[Q + ".weight_packed"]
        fields = unpacked(words.T.contiguous(), 4).flatten(0, 1)
        tensors[Q + ".weight_packed"] = packed(fields[order], 4).T.contiguous()
        tensors[Q + ".weight_g_idx"] = (torch.arange(64) // 8)[order].int()
        other = Q.replace("q_proj", "k_proj")
        tensors[other + ".weight_g_idx"] = torch.full((64,), -1).int()

    model = stored(tmp_path, "four bits with zero points", shuffle)
    _, params = purelm.load(tmp_path, device="cpu", dtype=torch.float32)
    found, state = params["layers"][0]["attn"], model.state_dict()
    assert torch.equal(found["q"]["weight"], state[Q + ".weight"][:, order])
    assert torch.equal(found["k"]["weight"], state[Q.replace("q_proj", "k_proj") + ".weight"])


def test_mixed_by_module(tmp_path: Path) -> None:
    """Some modules in 4 bits, some in 8, some fp8, as "mixed-precision" has them."""

    def cleared(tensors: Tensors, module: str) -> list[int]:
        shape: list[int] = tensors[module + ".weight_shape"].tolist()
        for name in [name for name in tensors if name.startswith(module + ".weight")]:
            del tensors[name]
        return shape

    def mix(tensors: Tensors) -> None:
        for layer in (0, 1):
            for kind, case in (("v_proj", "eight bits a row"), ("o_proj", "int8")):
                module = f"model.layers.{layer}.self_attn.{kind}"
                rows, _ = cleared(tensors, module)
                parts, _ = parts_of(torch.ones(rows, 64), case)
                tensors.update({f"{module}.{part}": t for part, t in parts.items()})
            module = f"model.layers.{layer}.mlp.up_proj"
            cleared(tensors, module)
            tensors[module + ".weight"] = torch.ones(72, 64).to(torch.float8_e4m3fn)
            tensors[module + ".weight_scale"] = torch.full((72, 1), 0.5)

    groups = {str(b): {"weights": {"num_bits": b, "type": "int"}} for b in (4, 8)}
    stored(tmp_path, "four bits", mix, format="mixed-precision", config_groups=groups)
    _, params = purelm.load(tmp_path, device="cpu", dtype=torch.float32)
    layer = params["layers"][1]
    assert torch.equal(layer["mlp"]["up"]["weight"], torch.full((72, 64), 0.5))
    for name in ("v", "o"):
        w = layer["attn"][name]["weight"]
        torch.testing.assert_close(w, torch.ones_like(w), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + ".weight_scale"), "weight_scale of the same module missing"),
        (lambda t: t.pop(Q + ".weight_shape"), "weight_shape of the same module missing"),
        (lambda t: t[Q + ".weight_shape"].fill_(2**40), r"words for a weight"),
        (lambda t: t[Q + ".weight_shape"].fill_(-64), r"words for a weight"),
        (lambda t: t.update({Q + ".weight_scale": torch.ones(64, 7).bfloat16()}), "7 groups"),
        (lambda t: t.update({Q + ".weight_zero_point": torch.ones(64, 8).int()}), "zero_point"),
        (lambda t: t.update({Q + ".weight_g_idx": torch.full((64,), 9).int()}), "is of 9"),
        (lambda t: t.update({Q + ".weight_g_idx": torch.zeros(64).int()}), "unequal sizes"),
        (lambda t: t[Q + ".weight_scale"].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update({Q + ".weight": torch.ones(64, 64)}), "stored twice"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(
    change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    stored(tmp_path, "four bits", change)
    with pytest.raises(CheckpointError, match=message):
        purelm.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format": "marlin-24"}, ConfigError, "'marlin-24'; read are"),
        ({"format": ["pack-quantized"]}, ConfigError, "read are"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, ConfigError, "sparse"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8}}}}, CheckpointError, "of 8 bits"),
        ({"format": "float-quantized"}, CheckpointError, "none is"),
    ],
)
def test_other_kinds(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    stored(tmp_path, "four bits", **fields)
    with pytest.raises(error, match=message):
        purelm.load(tmp_path, device="cpu")
