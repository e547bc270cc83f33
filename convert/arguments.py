"""What `from_pretrained`'s arguments mean together: precision, device, what is not there yet."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..errors import ArgumentError
from ..nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Policy
from ..quant import fake
from .load import default_device
from .precision import Quantize

Auto = Literal["auto"]


class Default(int):
    """A default that equals and prints as True, yet is not somebody's explicit True."""

    def __repr__(self) -> str:
        return "True"

    __str__ = __repr__


DEFAULT_4BIT: Any = Default(1)

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}


def check_flags(**given: Any) -> None:
    """Raise ArgumentError for a value that is neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, bool | Default):
            raise ArgumentError(f"{name} is {value!r}, expected True or False")


def choose_quantize(
    *,
    load_in_4bit: bool,
    load_in_8bit: bool,
    load_in_16bit: bool,
    load_in_fp8: bool | str,
    full_finetuning: bool,
) -> Quantize:
    """ "nf4", "int8", "fp8", "fp8_block" or None (16 bits).

    Raises ArgumentError for two precisions asked for.
    """
    check_flags(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        load_in_16bit=load_in_16bit,
        full_finetuning=full_finetuning,
    )
    asked = {
        "load_in_4bit": bool(load_in_4bit) and not isinstance(load_in_4bit, Default),
        "load_in_8bit": load_in_8bit,
        "load_in_16bit": load_in_16bit,
        "load_in_fp8": load_in_fp8,
    }
    named = [name for name, value in asked.items() if value]
    if len(named) > 1:
        raise ArgumentError(f"{' and '.join(named)} are both asked for; ask for one precision")
    if load_in_fp8 not in (True, False, "row", "block"):
        raise ArgumentError(
            f"load_in_fp8 is {load_in_fp8!r}, expected False, True (a scale a row) or 'block'"
        )
    if full_finetuning and named and named != ["load_in_16bit"]:
        raise ArgumentError(
            "full_finetuning trains every weight, and quantized weights are frozen; "
            f"leave {named[0]} out"
        )
    if load_in_fp8:
        return "fp8_block" if load_in_fp8 == "block" else "fp8"
    if load_in_8bit:
        return "int8"
    if load_in_16bit or full_finetuning or not load_in_4bit:
        return None
    return "nf4"


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: as asked, else bfloat16 where the device has it, else float16."""
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in _DTYPES:
            raise ArgumentError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if dtype is None:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.bfloat16
    if dtype not in _DTYPES.values():
        raise ArgumentError(f"dtype is {dtype}, expected bfloat16, float16 or float32")
    return dtype


def choose_device(device_map: Any) -> torch.device:
    """The one device that `device_map` names; under torchrun, this rank's."""
    if isinstance(device_map, Mapping):
        places = {str(place): place for place in device_map.values()}
        if not places:
            raise ArgumentError("device_map is {}, which names no device")
        if len(places) > 1:
            raise NotImplementedError(f"device_map={dict(device_map)!r}: several devices")
        device_map = next(iter(places.values()))
    if device_map is None or device_map in ("sequential", "auto"):
        if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return default_device()
    if device_map in ("balanced", "balanced_low_0", "unsloth", "unsloth_balanced"):
        raise NotImplementedError(f"device_map={device_map!r}: several devices")
    try:
        device = torch.device("cuda", device_map) if type(device_map) is int else None
        device = device or torch.device(device_map)
    except (RuntimeError, TypeError) as problem:
        raise ArgumentError(f"device_map is {device_map!r}, which names no device") from problem
    if device.type == "meta":
        raise ArgumentError(f"device_map is {device_map!r}, which holds no numbers")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ArgumentError(f"device_map is {device_map!r}, but there is no CUDA device here")
        device = torch.device("cuda", device.index or 0)
    return device


def choose_residuals(use_gradient_checkpointing: bool | str | None) -> Policy | Auto:
    """What becomes of each layer's residuals: False keeps all, True runs the large ones again,
    "unsloth" also sends the others to the host, "auto" fills the memory there is.
    """
    if use_gradient_checkpointing in (True, False):
        return RECOMPUTE if use_gradient_checkpointing else KEEP
    if use_gradient_checkpointing == "unsloth":
        return OFFLOAD
    if use_gradient_checkpointing == "auto":
        return "auto"
    raise ArgumentError(
        f"use_gradient_checkpointing is {use_gradient_checkpointing!r}, "
        "expected True, False, 'unsloth' or 'auto'"
    )


def check_tiled(unsloth_tiled_mlp: Any) -> None:
    """Raise ArgumentError for an `unsloth_tiled_mlp` that is no size of tile of ours."""
    if unsloth_tiled_mlp not in (True, False, "arctic"):
        raise ArgumentError(
            f"unsloth_tiled_mlp is {unsloth_tiled_mlp!r}, expected True or 'arctic' (as many "
            "tokens at a time as the model is wide) or False"
        )


def check_scheme(qat_scheme: str | None) -> None:
    """Raise ArgumentError for a `qat_scheme` that is none of ours, saying why."""
    if qat_scheme is None or qat_scheme in fake.SCHEMES:
        return
    why = ""
    if qat_scheme in fake.NEWER:
        why = ": its products need a GPU of compute capability 10 or above, which is not supported"
    raise ArgumentError(
        f"qat_scheme is {qat_scheme!r}, expected one of {', '.join(fake.SCHEMES)}{why}"
    )


def check_budget(memory_budget: int | None, residuals: Policy | Auto) -> None:
    """Raise ArgumentError for a budget that is no number of bytes, or that nothing would heed."""
    if memory_budget is None:
        return
    if type(memory_budget) is not int or memory_budget < 1:
        raise ArgumentError(f"memory_budget is {memory_budget!r}, expected a number of bytes")
    if residuals != "auto":
        raise ArgumentError(
            f"memory_budget={memory_budget} needs use_gradient_checkpointing='auto'; with a fixed "
            "choice there is nothing to plan"
        )
