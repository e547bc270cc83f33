"""What the arguments of `get_peft_model` mean for a model."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError
from ..nn import stacks
from ..nn.residuals import RECOMPUTE, Residuals
from ..nn.spec import ModelSpec
from . import adapter_start, peft_targets
from .adapter_config import parse
from .arguments import Auto, check_scheme
from .lora_config import DEFAULT_TARGETS, PeftConfig, check_texts, checked_mapping, wrong
from .named_adapters import DEFAULT, Adapter
from .names import Names
from .peft_targets import Plan, plan
from .trained_base import LOFTQ, originals

if TYPE_CHECKING:
    from .bridge import CausalLM

__all__ = ["DEFAULT_TARGETS", "PeftConfig", "Plan", "apply", "configure", "plan"]

# The fields of a config that are arguments of `configure`.
_SETTINGS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "bias"),
    *("use_rslora", "use_dora", "init_lora_weights", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "target_parameters", "rank_pattern", "alpha_pattern"),
)
_EMBEDDINGS = ("embed", "head")
_FROM_DATA = ("eva", "corda", "lora_ga", "mica")
_STARTS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora", LOFTQ)


def configure(
    spec: ModelSpec,
    names: Names,
    *,
    r: int = 16,
    target_modules: Iterable[str] | str | None = DEFAULT_TARGETS,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: Iterable[int] | int | None = None,
    layers_pattern: Iterable[str] | str | None = None,
    finetune_last_n_layers: int | None = None,
    use_rslora: bool = False,
    modules_to_save: Iterable[str] | None = None,
    init_lora_weights: bool | str = True,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Iterable[str] | str | None = None,
    use_dora: bool = False,
    loftq_config: Mapping[str, Any] | None = None,
    target_parameters: Iterable[str] | None = None,
    ensure_weight_tying: bool | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
) -> tuple[PeftConfig, tuple[str, ...]]:
    """The `PeftConfig` that these arguments mean for a model, and notes for its report.

    target_modules: names or endings of names, a regular expression for whole names, or
    "all-linear". Embedding and head listed there are trained whole (`modules_to_save`) instead, but
    the head gets an adapter, as in peft, if rank_pattern says its rank: target_modules=["q_proj",
    "lm_head"], rank_pattern={"lm_head": 8}; an embedding that is the head too stays as it is.
    finetune_last_n_layers: as layers_to_transform with the last n. modules_to_save: endings of the
    names of embedding, head and norms, as peft matches them. target_parameters: names or endings of
    parameters that hold all experts of a layer ("mlp.experts.gate_up_proj"), in which each expert
    gets an adapter of its own, of gate and up together; target_modules then means no expert, as in
    peft over transformers 5. init_lora_weights="loftq", for a model in 4 bits: adapters start from
    the leading part of what its quantized weights lost of those in its files (peft's
    `replace_lora_weights_loftq`, with the adapters' strength taken into account), and merge into
    what is quantized, not into the files; loftq_config may say so: {"loftq_bits": 4, "loftq_iter":
    1}. ensure_weight_tying: True says what holds in any case: an embedding
    that is the head too is trained as one matrix with it.

    Raises ArgumentError for values that cannot be used, and NotImplementedError, with name and
    value, for what is not there yet.
    """
    start = _start(init_lora_weights)
    _check_loftq(loftq_config, start)
    whole = _frozen(target_parameters) or None
    ranks = dict(checked_mapping("rank_pattern", rank_pattern or {}))
    targets, saved, notes = _targets(
        target_modules, modules_to_save, ranks, spec, names, may_be_none=whole is not None
    )
    _check_tying(ensure_weight_tying, saved, spec, names)
    layers = _layers(layers_to_transform, finetune_last_n_layers, len(spec.layers))
    config = PeftConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=targets,
        exclude_modules=_frozen(exclude_modules),
        lora_dropout=lora_dropout,
        bias=bias,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=start,
        modules_to_save=saved or None,
        layers_to_transform=layers,
        layers_pattern=_frozen(layers_pattern),
        target_parameters=whole,
        rank_pattern=ranks,
        alpha_pattern=dict(checked_mapping("alpha_pattern", alpha_pattern or {})),
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
    )
    if use_dora and str(config.init_lora_weights).startswith(("pissa", "olora", LOFTQ)):
        raise NotImplementedError(
            f"use_dora=True with init_lora_weights={config.init_lora_weights!r} is not implemented"
        )
    _check_patterns(config)
    head = names.module_to_hf("head")
    if layers is not None and not isinstance(targets, str) and peft_targets.matches(targets, head):
        raise ArgumentError(
            f"target_modules has {head}, which is in none of the layers that are chosen; leave it "
            "or the choice of layers out, or name it in modules_to_save"
        )
    return config, tuple(notes)


def apply(
    model: "CausalLM",
    *,
    residuals: Residuals | Auto = RECOMPUTE,
    random_state: int = 3407,
    qat_scheme: str | None = None,
    **arguments: Any,
) -> "CausalLM":
    """Put fresh adapters on `model`: `arguments` are those of `configure`.

    qat_scheme: train for being stored so after merging; the weight with its adapter is rounded.

    A model that already wears adapters which these arguments would give keeps them, trained or
    reloaded as they are. Raises ArgumentError for other adapters, and what `configure` and `plan`
    raise.
    """
    check_scheme(qat_scheme)
    names = model.origin.family.names
    config, notes = configure(
        model.spec,
        names,
        base_model_name_or_path=model.origin.name,
        revision=model.origin.revision,
        **arguments,
    )
    if qat_scheme is not None and config.use_dora:
        raise NotImplementedError(
            f"use_dora=True with qat_scheme={qat_scheme!r} is not implemented"
        )
    if qat_scheme is not None and config.lora_dropout:
        raise ArgumentError(
            f"lora_dropout={config.lora_dropout} acts on the adapter alone, which "
            f"qat_scheme={qat_scheme!r} rounds as one with its weight; use lora_dropout=0"
        )
    found = plan(config, model.spec, names)
    worn = model.peft_config.get(DEFAULT)
    if worn is not None and (plan(worn, model.spec, names), worn.lora_dropout, worn.use_dora) != (
        found,
        config.lora_dropout,
        config.use_dora,
    ):
        # What the settings mean is compared: a reloaded adapter's may be worded another way.
        raise ArgumentError(
            "the model already wears adapters with other settings; load it again without them, "
            f"or give the settings they have: {worn.to_dict()}"
        )
    notes += _of_experts(config, found)
    # What can fail comes before the model changes.
    fresh = _fresh(model, config, found, random_state) if worn is None else None
    model.round_weights(qat_scheme)
    if fresh is not None:
        model.wear(DEFAULT, fresh)
        model.set_adapter(DEFAULT)
        model.origin = replace(model.origin, notes=(*model.origin.notes, *notes))
    model.residuals = residuals
    model.train()
    return model


def begun(
    model: "CausalLM", given: Any, random_state: int, **arguments: Any
) -> tuple[Adapter, tuple[str, ...]]:
    """A fresh adapter of `model` as a value, and notes for its report.

    given: a `PeftConfig` or peft's `LoraConfig`, or None, where `arguments` are those of
    `configure`.
    """
    names = model.origin.family.names
    if given is not None:
        if arguments:
            raise ArgumentError(
                f"peft_config says it all, found also {', '.join(sorted(arguments))}"
            )
        arguments = _arguments(given, names)
    arguments |= {
        "base_model_name_or_path": model.origin.name,
        "revision": model.origin.revision,
    }
    config, notes = configure(model.spec, names, **arguments)
    found = plan(config, model.spec, names)
    notes += _of_experts(config, found)
    return _fresh(model, config, found, random_state), notes


def _of_experts(config: PeftConfig, found: Plan) -> tuple[str, ...]:
    """A note, where peft will not load what is trained."""
    if not config.use_dora or not any(stacks.place(path) for path in found.adapted):
        return ()
    return ("peft has no DoRA of experts over transformers 5: merge them for other libraries",)


def _fresh(model: "CausalLM", config: PeftConfig, found: Plan, random_state: int) -> Adapter:
    names, params = model.origin.family.names, model.base_params

    def original(path: str) -> torch.Tensor:
        return read()(path)

    @functools.cache
    def read() -> Callable[[str], torch.Tensor]:
        return originals(model)

    return adapter_start.begin(config, found, params, model.spec, names, random_state, original)


def _arguments(given: Any, names: Names) -> dict[str, Any]:
    """The arguments of `configure` that a config stands for; what it cannot say raises."""
    if not hasattr(given, "to_dict"):
        raise ArgumentError(
            f"peft_config is a {type(given).__name__}, expected a PeftConfig or peft's LoraConfig"
        )
    settings = {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in given.to_dict().items()
    }
    config = parse(settings, Path("peft_config"))
    found = {name: getattr(config, name) for name in _SETTINGS}
    # In a config a head among the targets has an adapter.
    head, ranks = names.module_to_hf("head"), config.rank_pattern
    if peft_targets.is_target(config, head):
        found["rank_pattern"] = {**ranks, head: peft_targets.by_pattern(ranks, (head,), config.r)}
    return found


def _targets(
    target_modules: Any,
    modules_to_save: Any,
    ranks: Mapping[str, int],
    spec: ModelSpec,
    names: Names,
    *,
    may_be_none: bool = False,
) -> tuple[tuple[str, ...] | str, tuple[str, ...], list[str]]:
    """Targets that are adapted, modules trained whole, and notes on what was moved."""
    if target_modules is None:
        target_modules = DEFAULT_TARGETS
    targets: Any = _frozen(target_modules)
    check_texts("target_modules", targets)
    short = peft_targets.short_names(spec, names)
    refused = [name for name in short if name in names.peft_refuses]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = tuple(name for name in short if name not in refused)
    if isinstance(modules_to_save, str):
        raise wrong("modules_to_save", modules_to_save, "a list of names")
    saved = list(_frozen(modules_to_save) or ())
    check_texts("modules_to_save", tuple(saved), optional=True)
    every = peft_targets.modules(spec, names)
    for name in saved:
        found = [path for path, known in every.items() if known.endswith(name)]
        if not found or not all(p in _EMBEDDINGS or p.endswith("norm") for p in found):
            trainable = {n.rpartition(".")[2] for p, n in every.items() if p.endswith("norm")}
            raise ArgumentError(
                f"modules_to_save has {name!r}; what can be trained whole is "
                f"{', '.join([every[p] for p in _EMBEDDINGS] + sorted(trainable))}"
            )
    moved = [every[path] for path in _EMBEDDINGS if _compiled_matches(targets, every[path])]
    low = _low_rank_head(moved, saved, ranks, spec, names)
    moved = [name for name in moved if name not in low]
    adapted = [name for name in refused if not isinstance(targets, str) and name in targets]
    notes = [
        f"peft takes no adapters on {name} of this family: merge them for other libraries"
        for name in adapted
    ]
    notes += [f"{name} is trained whole (modules_to_save), not by LoRA" for name in moved]
    last = [name.rpartition(".")[2] for name in moved]
    saved += [name for name in last if name not in saved]
    if not isinstance(targets, str):
        targets = tuple(name for name in targets if not _compiled_matches((name,), *moved))
        every_target = peft_targets.projections(spec, names).values()
        real = *low, *(name for known in every_target for name in known)
        unknown = [
            name
            for name in targets
            if name not in DEFAULT_TARGETS and not _compiled_matches((name,), *real)
        ]
        if unknown or not (targets or may_be_none):
            raise ArgumentError(
                f"target_modules has {', '.join(map(repr, unknown)) or 'no projection'}; this "
                f"model has {peft_targets.shown_names(spec, names)}"
            )
        missed = [
            name
            for name in short
            if name not in refused and not peft_targets.matches(targets, f".{name}")
        ]
        if targets == DEFAULT_TARGETS and missed:
            notes.append(
                f"target_modules leaves {', '.join(missed)} without adapters; 'all-linear' has them"
            )
    return targets, tuple(saved), notes


def _low_rank_head(
    meant: Iterable[str],
    saved: Iterable[str],
    ranks: Mapping[str, int],
    spec: ModelSpec,
    names: Names,
) -> tuple[str, ...]:
    """The head's name, if it is among the modules `meant` and is given a rank for an adapter."""
    embed, head = (names.module_to_hf(path) for path in _EMBEDDINGS)
    if head not in meant or peft_targets.is_saved(saved, head):
        return ()
    if peft_targets.by_pattern(ranks, (head,), None) is None:
        return ()
    if spec.tied and (embed in meant or peft_targets.is_saved(saved, embed)):
        raise ArgumentError(
            f"rank_pattern gives {head} an adapter, and {embed}, which is the same matrix in this "
            "model, is trained whole; leave one of the two out"
        )
    return (head,)


def _compiled_matches(wanted: tuple[str, ...] | str, *known: str) -> bool:
    try:
        return any(peft_targets.matches(wanted, name) for name in known)
    except re.error as problem:
        raise ArgumentError(
            f"target_modules {wanted!r} is no regular expression: {problem}"
        ) from None


def _check_tying(asked: bool | None, saved: tuple[str, ...], spec: ModelSpec, names: Names) -> None:
    """Tied matrices are trained as the one that they are, which peft does if asked to."""
    if asked not in (None, True, False) or isinstance(asked, int) and not isinstance(asked, bool):
        raise wrong("ensure_weight_tying", asked, "True, False or None")
    both = [names.module_to_hf(path) for path in _EMBEDDINGS]
    if asked is False and spec.tied and any(peft_targets.is_saved(saved, name) for name in both):
        raise ArgumentError(
            f"ensure_weight_tying=False: {both[0]} and {both[1]} are one matrix in this model, "
            "which is trained as one; leave it out, or untie them first"
        )


def _layers(given: Any, last: int | None, depth: int) -> tuple[int, ...] | int | None:
    if last is not None:
        if given is not None:
            raise ArgumentError("give layers_to_transform or finetune_last_n_layers, not both")
        if type(last) is not int or not 1 <= last <= depth:
            raise wrong("finetune_last_n_layers", last, f"1 to {depth}")
        return tuple(range(depth - last, depth))
    layers: tuple[int, ...] | int | None
    if given is None or isinstance(given, int):
        layers = given
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise wrong("layers_to_transform", given, "layer numbers")
    else:
        # An empty list is no restriction, as in peft.
        layers = tuple(given) or None
    outside = [n for n in _each(layers) if type(n) is not int or not 0 <= n < depth]
    if outside:
        raise wrong("layers_to_transform", given, f"layer numbers from 0 to {depth - 1}")
    return layers


def _each(layers: tuple[int, ...] | int | None) -> tuple[int, ...]:
    return (layers,) if isinstance(layers, int) else layers or ()


def _start(given: Any) -> bool | str:
    kind = given.lower() if isinstance(given, str) else given
    known = isinstance(kind, bool) or kind in _STARTS
    if not known and not (isinstance(kind, str) and re.fullmatch(r"pissa_niter_\d{1,4}", kind)):
        if kind in _FROM_DATA:
            raise ArgumentError(
                f"init_lora_weights={given!r} starts from passes over data, of which none is made "
                "here: begin with peft and save that as plain LoRA, which is loaded by its folder, "
                "or use 'pissa', 'olora' or, in 4 bits, 'loftq', which start from the weights"
            )
        raise wrong("init_lora_weights", given, ", ".join(map(repr, _STARTS)))
    result: bool | str = kind
    return result


def _check_loftq(config: Any, start: bool | str) -> None:
    """peft's LoftQConfig: 4 bits, and one round, for the quantized weight stays as it is."""
    given = dict(checked_mapping("loftq_config", config or {}))
    if given and start != LOFTQ:
        raise ArgumentError(
            f"loftq_config={given!r:.200} goes with init_lora_weights='loftq', found {start!r}"
        )
    for name, value in given.items():
        known = {"loftq_bits": 4, "loftq_iter": 1}.get(name)
        if known is None or type(value) is not int or value != known:
            raise ArgumentError(
                f"loftq_config has {name}={value!r:.60}; a model in 4 bits has loftq_bits=4, and "
                "loftq_iter=1, as its quantized weights are not made anew"
            )


def _check_patterns(config: PeftConfig) -> None:
    texts = [*config.rank_pattern, *config.alpha_pattern, *(config.layers_pattern or ())]
    if isinstance(config.exclude_modules, str):
        texts.append(config.exclude_modules)
    for text in texts:
        try:
            re.compile(text)
        except re.error as problem:
            raise ArgumentError(f"{text!r} is no regular expression: {problem}") from None


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, str) or not isinstance(value, Iterable):
        return value
    # A set has no order of its own; the same call must write the same file.
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
