"""Weights stored in 4-bit floats by ModelOpt and llm-compressor: the model that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from purelm.convert.fp4_file import dequantize
from purelm.convert.load import load_folder
from purelm.errors import CheckpointError, ConfigError
from purelm.nn import decoder

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
Q = "model.layers.0.self_attn.q_proj"
VALUES = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
COMPRESSED = {"quant_method": "compressed-tensors"}
CONFIGS: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": None},
    "nvfp4": {**COMPRESSED, "format": "nvfp4-pack-quantized"},
    "mxfp4": {**COMPRESSED, "format": "mxfp4-pack-quantized"},
}


def parts_of(shape: torch.Size, case: str, seed: int) -> tuple[Tensors, torch.Tensor]:
    """Drawn codes and scales of a weight, and what it stands for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    values = VALUES.double()[torch.stack([codes & 15, codes >> 4], -1).int()].view(rows, columns)
    if case == "mxfp4":
        scale = torch.randint(118, 123, (rows, columns // 32), generator=generator)
        step = 2.0 ** (scale.double() - 127)
        parts = {"weight_packed": codes, "weight_scale": scale.to(torch.uint8)}
        return parts, values * step.repeat_interleave(32, 1)
    scale = torch.rand(rows, columns // 16, generator=generator).mul(40).to(torch.float8_e4m3fn)
    # Powers of two, so that the order of the products does not show.
    whole = torch.tensor([2.0**10 if case == "nvfp4" else 2.0**-10])
    step = scale.double() / 2**10
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    if case == "modelopt":
        names, whole = ("weight", "weight_scale", "weight_scale_2"), whole[0]
    parts = dict(zip(names, (codes, scale, whole), strict=True))
    return parts | {"input_scale": torch.ones(1)}, values * step.repeat_interleave(16, 1)


def stored(folder: Path, case: str, change: Callable[[Tensors], Any] | None = None) -> Any:
    """A folder in that form, and transformers' model with the weights that it stands for."""
    model = tiny.hf_model("qwen2", **SIZES)
    tiny.save(model, folder)
    tensors, state = {}, model.state_dict()
    for seed, (name, w) in enumerate(load_file(folder / "model.safetensors").items()):
        if "_proj.weight" in name:
            parts, want = parts_of(w.shape, case, seed)
            state[name] = want.float()
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = w
    model.load_state_dict(state)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": CONFIGS[case]}))
    return model


def load(folder: Path) -> Any:
    return load_folder(folder, quantize=None, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case: str, tmp_path: Path) -> None:
    model = stored(tmp_path, case)
    loaded = load(tmp_path)
    assert loaded.dequantized_from == ("NVFP4" if case == "modelopt" else "compressed-tensors")
    found = loaded.params["layers"][1]["mlp"]["down"]["weight"]
    assert torch.equal(found, model.state_dict()["model.layers.1.mlp.down_proj.weight"])
    with torch.no_grad():
        want = model(bridged.ids()).logits
    bridged.same_logits(decoder.forward(loaded.params, loaded.spec, bridged.ids()), want)


@pytest.mark.parametrize("case", ["nvfp4", "mxfp4"])
def test_the_library_dequantizes_so(case: str) -> None:
    """compressed-tensors' own decompression, in bf16."""
    library = pytest.importorskip(f"compressed_tensors.compressors.{case}")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group, strategy = (16, "tensor_group") if case == "nvfp4" else (32, "group")
    weights = QuantizationArgs(
        num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    parts, _ = parts_of(torch.Size((6, 64)), case, 3)
    parts.pop("input_scale", None)
    compressor = getattr(library, f"{case.upper()}PackedCompressor")
    want = compressor.decompress(parts, scheme)["weight"]
    whole = parts.get("weight_global_scale")
    ours = dequantize(parts["weight_packed"], parts["weight_scale"], whole, divides=True)
    assert torch.equal(ours.to(want.dtype), want)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("modelopt", lambda t: t.pop(Q + ".weight_scale_2"), "the scale of the whole weight"),
        ("modelopt", lambda t: t.pop(Q + ".weight_scale"), "and a weight_scale"),
        ("nvfp4", lambda t: t.pop(Q + ".weight_global_scale"), r"expected torch.uint8"),
        ("nvfp4", lambda t: t[Q + ".weight_global_scale"].zero_(), "NaN or infinite"),
        ("nvfp4", lambda t: t.update({Q + ".weight_global_scale": torch.ones(64)}), r"\[64\]"),
        ("mxfp4", lambda t: t[Q + ".weight_scale"].fill_(255), "NaN or infinite"),
        ("mxfp4", lambda t: t.update({Q + ".weight_packed": torch.ones(64, 17).byte()}), "of 32"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(
    case: str, change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    stored(tmp_path, case, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_without_a_config_that_says_so(tmp_path: Path) -> None:
    stored(tmp_path, "modelopt")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    with pytest.raises(ConfigError, match="no quantization_config"):
        load(tmp_path)
