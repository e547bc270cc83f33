"""Other libraries as users load them for QLoRA, each imported when it is measured.

Unsloth is a black box: its public functions are called.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bring(peer: str) -> None:
    """Import what `peer` needs, which changes other libraries: before torch is used."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    if peer == "unsloth-graphs":
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "1"
    for name in ("unsloth",) if peer.startswith("unsloth") else ("transformers", "peft"):
        import_module(name)


def load(peer: str, folder: str, length: int | None = None, *, in_16bit: bool = False) -> Any:
    """The model of `folder` in bf16, in 4-bit double-quantized NF4 unless in_16bit, before
    adapters; length: the longest row, where it matters.
    """
    if peer.startswith("unsloth"):
        return _unsloth_base(folder, length, in_16bit)
    return _hf(peer, folder, in_16bit)


def adapted(peer: str, model: Any, rank: int, length: int) -> Any:
    """`model` with adapters on attention and MLP, ready for training as `peer` names it."""
    return _ADAPTERS[peer](model, rank, length).train()


def for_generation(peer: str, model: Any) -> Any:
    """`model` as its library generates."""
    if peer.startswith("unsloth"):
        import_module("unsloth").FastLanguageModel.for_inference(model)
        return model
    return model.eval()


def _hf(peer: str, folder: str, in_16bit: bool) -> Any:
    import torch

    hf = import_module("transformers")
    if peer == "hf-liger":
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    four_bits = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return hf.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=None if in_16bit else four_bits,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
    )


def _unsloth_base(folder: str, length: int | None, in_16bit: bool) -> Any:
    import torch

    longest = {} if length is None else {"max_seq_length": length}
    model, _ = import_module("unsloth").FastLanguageModel.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        load_in_4bit=not in_16bit,
        local_files_only=True,
        **longest,
    )
    return model


def _unsloth(**options: Any) -> Callable[[Any, int, int], Any]:
    def adapters(model: Any, rank: int, length: int) -> Any:
        return import_module("unsloth").FastLanguageModel.get_peft_model(
            model,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            max_seq_length=length,
            random_state=3407,
            **{"use_gradient_checkpointing": "unsloth"} | options,
        )

    return adapters


def _peft(model: Any, rank: int, length: int) -> Any:
    peft = import_module("peft")
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
        ),
    )


_ADAPTERS: dict[str, Callable[[Any, int, int], Any]] = {
    "unsloth": _unsloth(),
    "unsloth-auto": _unsloth(checkpoint_skip_layers="auto"),
    "unsloth-off": _unsloth(use_gradient_checkpointing=False),
    "hf": _peft,
    "hf-liger": _peft,
}
# The part after the hyphen says with which settings.
TRAINED = tuple(_ADAPTERS)
GENERATING = ("unsloth", "unsloth-graphs", "hf")
