"""Tiny model folders whose projections are stored in fp8, and the model that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"hidden_size": 144, "intermediate_size": 272, "head_dim": 40}
FINE = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
ONE = {"quant_method": "fp8", "activation_scheme": "static"}
# How publishers write them: the kind of scales, their dtype and shape if not as `scales` makes
# them, how the names end, what else lies beside, and the config.
PUBLISHERS: dict[str, tuple[str, Any, str, str | None, dict[str, Any]]] = {
    "block": ("block", None, "_scale_inv", None, FINE),
    "block e8m0": ("block", torch.float8_e8m0fnu, "_scale_inv", None, {**FINE, "fmt": "e4m3"}),
    "row": ("row", None, "_scale", None, ROWS),
    "tensor": ("tensor", None, "_scale", ".input_scale", ROWS),
    "llm-compressor blocks": ("block", torch.bfloat16, "_scale", ".k_scale", ROWS),
    "ministral": ("tensor", (), "_scale_inv", ".activation_scale",
                  {**ONE, "weight_block_size": None, "dequantize": False}),
    "autofp8": ("tensor", (), "_scale", ".input_scale", {**ONE, "ignored_layers": ["lm_head"]}),
    "fbgemm": ("row", None, "_scale", None,
               {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": ("tensor", (), "_scale", ".v_scale",
                 {"quant_method": "modelopt", "quant_algo": "FP8"}),
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj.weight"


def scales(w: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest of each block over the largest fp8 number."""
    if kind == "tensor":
        return w.abs().amax().reshape(1) / 448
    if kind == "row":
        return w.abs().amax(1, keepdim=True) / 448
    rows = [r.split(128, 1) for r in w.split(128)]
    return torch.stack([torch.stack([b.abs().max() for b in row]) for row in rows]) / 448


def spread(scale: torch.Tensor, shape: torch.Size, kind: str) -> torch.Tensor:
    """The scale of every element, in float64."""
    scale = scale.double()
    if kind != "block":
        return scale.expand(shape)
    i, j = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
    return scale[i][:, j]


def stored(folder: Path, publisher: str, change: Callable[[Tensors], Any] | None = None) -> Any:
    """A folder in fp8, and transformers' model with the weights that it stands for."""
    kind, form, end, beside, fields = PUBLISHERS[publisher]
    model = tiny.hf_model("qwen3", **SIZES)
    tiny.save(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fields
    (folder / "config.json").write_text(json.dumps(config))
    tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
    for name, w in list(tensors.items()):
        if "_proj.weight" in name:
            scale = scales(w, kind)
            scale = scale.reshape(form) if isinstance(form, tuple) else scale.to(form)
            codes = (w.double() / spread(scale, w.shape, kind)).clamp(-448, 448)
            tensors[name] = codes.to(torch.float8_e4m3fn)
            tensors[name + end] = scale
            state[name] = (tensors[name].double() * spread(scale, w.shape, kind)).float()
            if beside is not None:
                tensors[name.replace(".weight", beside)] = torch.ones(1)
    model.load_state_dict(state)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model
