"""`FastLanguageModel`: the published entry points over the functional core."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, ConfigError
from ..nn import tree
from . import adapter_config, adapter_file, adapter_start, base_mark, peft_config, rope_override
from .adapter_load import warn_of_precision
from .arguments import (
    DEFAULT_4BIT,
    check_budget,
    check_flags,
    check_scheme,
    check_tiled,
    choose_device,
    choose_dtype,
    choose_quantize,
    choose_residuals,
)
from .bridge import CausalLM, Origin
from .config import Config
from .end_ids import end_ids
from .fast_inference import FastInference, check_cache
from .gguf_file import GGUF, opened_in
from .gguf_tokenizer import read_tokenizer
from .hub import Source, resolve
from .load import Loaded, load_folder, read_config
from .lora_config import DEFAULT_TARGETS
from .precision import Compute, check_compute
from .ready_repositories import ready
from .registry import family_of
from .resize import resized, with_pad_token
from .tokenizer import TOKENIZERS, Tokenizer


class FastLanguageModel:
    """Loading and adapting, under the names that Unsloth published."""

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str] = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = DEFAULT_4BIT,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        load_in_fp8: bool | str = False,
        unsloth_tiled_mlp: bool = False,
        *,
        text_only: bool = False,
        prefer_prequantized: bool = False,
        quant_skip: tuple[str, ...] | list[str] = (),
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        subfolder: str | None = None,
        compute: Compute = None,
        memory_budget: int | None = None,
    ) -> tuple[CausalLM, Tokenizer]:
        """(model, tokenizer) of a local folder, GGUF file or hub repository, or an adapter of one.

        model_name is loaded exactly as given, with or without `use_exact_model_name`. The
        projections of the layers are stored in 4-bit NF4 unless another precision is asked for:
        `load_in_8bit=True` (LLM.int8: 8 bits a row, products in 8 bits a token but for outlier
        columns), `load_in_fp8=True` (e4m3 with a scale a row; "block": one a block of 128 x 128;
        what a checkpoint stores in fp8 is kept as it is), `load_in_16bit=True` or
        `load_in_4bit=False` (16 bits). compute: "fp8" computes the products of those 4-bit or fp8
        weights in fp8, forward and backward (both operands rounded to e4m3 with a scale a row),
        on a GPU that has it (compute capability 8.9) in bfloat16; head, adapters and attention
        stay in `dtype`. dtype: what is computed in
        (default bfloat16 where the device has it). max_seq_length: the length you mean to train
        at; nothing is ever cut, and rows longer than the model's own context need a
        `rope_scaling`. quant_skip: texts; a projection whose checkpoint name contains one keeps
        16 bits. use_gradient_checkpointing: what is kept for the backward pass (False: all, True:
        little, the rest is run again, "unsloth": less, on the host too); "auto" keeps what fits
        into memory_budget, in bytes with the weights included (default: what is free on the device
        at the first step of each shape, less a margin); `explain()` shows the plan, and gradients
        are the same under each. unsloth_tiled_mlp: in training dense MLPs run on as many tokens at
        a time as the model is wide, and keep only their input; True or "arctic".
        offload_embedding: the embedding stays in host memory and the rows that a batch uses are
        copied, which waits for tokens that are on the device, so that no CUDA graph holds it; of a
        model whose head is the embedding only the layers' own embeddings (Gemma 4), and not for one
        that trains it. float32_mixed_precision: True trains what is trained in fp32, with products
        in `dtype`; False trains it in `dtype`. None is True for adapters, and False with
        full_finetuning. qat_scheme: with full_finetuning, train for
        being stored in that format later: "int4", "int8", "int8-int4", "fp8-fp8" or
        "fp8-int4" as torchao rounds (weights, or activations-weights).
        prefer_prequantized: of a model that `ready_repositories` has in 4 bits load those
        files, which the model's report tells; any other name is loaded as given.
        text_only: of a vision-language model load the text half, which trains and is saved
        as a text model; the model's report says what was left out. fast_inference:
        `model.fast_generate` answers many prompts at once over the same weights, a
        training step's changes seen at once. gpu_memory_utilization: of the device's
        memory, so much may be in use when its cache is full, which grows with need.
        max_lora_rank: no adapter may have more. disable_log_stats=False: it tells the
        logger "purelm.engine", as INFO, how it goes. Without fast_inference those three
        mean nothing. float8_kv_cache: while generating, keys and values are kept in e4m3,
        in half the memory and less exactly. A parameter that is not implemented yet raises
        NotImplementedError for any value but its default.

        Raises SourceError, ConfigError, CheckpointError, TokenizerError, AdapterError for files,
        ArgumentError for arguments that contradict each other.
        """
        check_flags(
            disable_log_stats=disable_log_stats,
            fast_inference=fast_inference,
            fix_tokenizer=fix_tokenizer,
            offload_embedding=offload_embedding,
            trust_remote_code=trust_remote_code,
            use_exact_model_name=use_exact_model_name,
            local_files_only=local_files_only,
            text_only=text_only,
            prefer_prequantized=prefer_prequantized,
        )
        if trust_remote_code:
            raise ArgumentError(
                "trust_remote_code=True: purelm never runs code from a repository; "
                "supported architectures need none"
            )
        quantize = choose_quantize(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            load_in_fp8=load_in_fp8,
            full_finetuning=full_finetuning,
        )
        if float32_mixed_precision not in (None, True, False):
            raise ArgumentError(
                f"float32_mixed_precision is {float32_mixed_precision!r}, expected True, False or "
                "None"
            )
        # All weights are trained in fp32 where that is asked for, adapters where it is not refused.
        in_fp32 = full_finetuning and bool(float32_mixed_precision)
        fast = FastInference(gpu_memory_utilization, max_lora_rank, not disable_log_stats)
        check_tiled(unsloth_tiled_mlp)
        check_scheme(qat_scheme)
        if qat_scheme is not None and not full_finetuning:
            raise ArgumentError(
                f"qat_scheme={qat_scheme!r} goes with full_finetuning=True here; to train adapters "
                "give it to get_peft_model"
            )
        _check_length(max_seq_length)
        adapter_start.check_seed(random_state)
        if not isinstance(model_name, str | os.PathLike):
            raise ArgumentError(f"model_name is {model_name!r}, expected a folder or a repository")
        residuals = choose_residuals(use_gradient_checkpointing)
        check_budget(memory_budget, residuals)
        device = choose_device(device_map)
        check_compute(compute, quantize, device)
        cache_dtype = check_cache(float8_kv_cache, device)
        hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        name, notes = os.fspath(model_name), list[str]()
        if prefer_prequantized:
            name, note = ready(name, quantize=quantize, revision=revision)
            notes.append(note)
        source = resolve(name, revision=revision, subfolder=subfolder, **hub)
        adapter = adapter_config.read_config(source.folder)
        base = source if adapter is None else _base(adapter, source, full_finetuning, hub)
        # What costs little is checked before weights are read.
        gguf = opened_in(base.folder)
        config = read_config(base.folder, gguf, text_only=text_only)
        config_file = base.folder / "config.json"
        family = family_of(config.fields, config_file)
        told = None if adapter is None else adapter_file.read_trained(source.folder, family.names)
        if told is not None:
            if rope_scaling is None and told.rope_scaling is not None:
                rope_scaling = told.rope_scaling
                notes.append(f"rope_scaling: {rope_scaling}, with which the adapter was trained")
            if (said := warn_of_precision(told.stored_as, quantize)) is not None:
                notes.append(said)
        has_tokenizer = any((source.folder / file).exists() for file in TOKENIZERS)
        tokenizer = _tokenizer(source.folder if has_tokenizer else base.folder, gguf)
        generation_config = _generation_config(base.folder, config)
        eos_ids = end_ids(None, generation_config, config, tokenizer)
        loaded = load_folder(
            base.folder,
            quantize=quantize,
            compute=compute,
            dtype=torch.float32 if in_fp32 else choose_dtype(dtype, device),
            device=device,
            quant_skip=quant_skip,
            overrides=rope_override.overrides(config, config_file, family, rope_scaling),
            text_only=text_only,
            progress=True,
            gguf=gguf,
        )
        if loaded.dequantized_from is not None:
            notes.append(f"the files store weights in {loaded.dequantized_from}; dequantized")
        if loaded.half is not None:
            notes.append(loaded.half)
        if loaded.left_out:
            notes.append(f"not loaded: {', '.join(loaded.left_out[:4])}")
        spec, params = loaded.spec, loaded.params
        if resize_model_vocab is not None:
            spec, params = resized(spec, params, loaded.config, resize_model_vocab)
        if told is not None and told.vocab > spec.vocab:
            notes.append(f"the adapter's vocabulary: embedding and head grew to {told.vocab} rows")
            spec, params = resized(spec, params, loaded.config, told.vocab)
        if max_seq_length is not None and max_seq_length > spec.max_positions:
            notes.append(
                f"max_seq_length {max_seq_length} is more than the model's context of "
                f"{spec.max_positions}: longer rows will raise unless a rope_scaling extends it"
            )
        if fix_tokenizer:
            spec, params = with_pad_token(tokenizer, eos_ids, spec, params, loaded.config, notes)
        model = CausalLM(
            spec,
            params,
            config=loaded.config,
            generation_config=generation_config,
            origin=_origin(base, loaded, quantize, notes, rope_scaling),
            dtype=choose_dtype(dtype, device),
            max_seq_length=max_seq_length or spec.max_positions,
            train_all=full_finetuning,
            residuals=residuals,
            memory_budget=memory_budget,
            seed=random_state,
        )
        if float32_mixed_precision is False:
            model.adapter_dtype = model.dtype
        model.tile = spec.dim if unsloth_tiled_mlp else None
        model.cache_dtype = cache_dtype
        if fast_inference:
            fast.cache_blocks(model)
            model.fast_inference = fast
        if offload_embedding:
            model.keep_embedding_on_host()
        model.round_weights(qat_scheme)
        tokenizer.padding_side = "left"
        tokenizer.model_max_length = max(max_seq_length or 0, spec.max_positions)
        model.tokenizer = tokenizer
        if told is not None:
            base_mark.check(told.base, loaded.checkpoint, source.folder)
            adapters, trained, settings = adapter_file.read_adapter(
                source.folder, spec, loaded.family.names, params=params
            )
            model.set_adapters(
                tree.placed(adapters, device), tree.placed(trained, device), config=settings
            )
        model.eval()
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: CausalLM,
        r: int = 16,
        target_modules: list[str] | tuple[str, ...] | str = DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: str | list[str] | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = 2048,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        qat_scheme: str | None = None,
        target_parameters: list[str] | None = None,
        ensure_weight_tying: bool | None = None,
        finetune_last_n_layers: int | None = None,
        use_dora: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
    ) -> CausalLM:
        """The same model, now wearing fresh trainable adapters, in training mode.

        The arguments are peft's `LoraConfig`'s; see `peft_config`. The same random_state gives the
        same adapters on every device, and no global generator is touched. max_seq_length changes
        nothing. Raises ArgumentError.
        """
        _check_length(max_seq_length)
        if model.train_all:
            warnings.warn(
                "the model was loaded with full_finetuning=True and trains every weight; "
                "get_peft_model changes nothing",
                stacklevel=2,
            )
            return model
        residuals = choose_residuals(use_gradient_checkpointing)
        check_budget(model.memory_budget, residuals)
        return peft_config.apply(
            model,
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            residuals=residuals,
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            qat_scheme=qat_scheme,
            target_parameters=target_parameters,
            ensure_weight_tying=ensure_weight_tying,
            finetune_last_n_layers=finetune_last_n_layers,
            use_dora=use_dora,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
        )

    @staticmethod
    def for_inference(model: CausalLM) -> CausalLM:
        """Evaluation mode; returns the model."""
        return model.for_inference()

    @staticmethod
    def for_training(
        model: CausalLM, use_gradient_checkpointing: bool | str = "unsloth"
    ) -> CausalLM:
        """Training mode; returns the model."""
        return model.for_training(use_gradient_checkpointing)


def _check_length(max_seq_length: int | None) -> None:
    if max_seq_length is not None and (type(max_seq_length) is not int or max_seq_length < 1):
        raise ArgumentError(f"max_seq_length is {max_seq_length!r}, expected a positive integer")


def _base(
    adapter: dict[str, Any], source: Source, full_finetuning: bool, hub: dict[str, Any]
) -> Source:
    """The source of the model that an adapter folder was trained on."""
    if full_finetuning:
        raise ArgumentError("full_finetuning needs a whole model, found an adapter")
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "the adapter does not say which model it belongs to (base_model_name_or_path)",
            file=source.folder / "adapter_config.json",
        )
    return resolve(name, revision=adapter.get("revision"), subfolder=None, **hub)


def _origin(
    base: Source,
    loaded: Loaded,
    quantize: str | None,
    notes: list[str],
    rope_scaling: dict[str, Any] | None,
) -> Origin:
    return Origin(
        name=base.name,
        revision=base.revision,
        folder=base.folder,
        family=loaded.family,
        checkpoint=loaded.checkpoint,
        quantize=quantize,
        notes=tuple(notes),
        rope_scaling=rope_scaling,
    )


def _tokenizer(folder: Path, gguf: GGUF | None) -> Tokenizer:
    """The folder's tokenizer; of a GGUF file, or a folder that has no other, the one within."""
    if gguf is None or any((folder / name).exists() for name in TOKENIZERS):
        return Tokenizer.from_folder(folder)
    return read_tokenizer(gguf)


def _generation_config(folder: Path, config: Config) -> Config:
    if (folder / "generation_config.json").exists():
        return Config.from_folder(folder, "generation_config.json")
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    return Config({name: config.get(name) for name in kept if config.get(name) is not None})
