"""The half of the bridge that wears adapters: several by name, switched and mixed as peft does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..nn import several, tree
from ..nn.lora import LoRA
from ..quant.stack import Stack
from . import adapter_fit, named_adapters
from .adapter_check import MAGNITUDE
from .lora_config import PeftConfig
from .named_adapters import DEFAULT, Adapter
from .trained_base import LOFTQ, belong_to_it
from .trainee import Trainee

if TYPE_CHECKING:
    from .bridge import CausalLM

_PARTS = ("lora_A", "lora_B", MAGNITUDE, "lora_start")
# Combinations that make the same of one adapter alone.
_KINDS = ("linear", "cat", "svd")


class Wearing(Trainee):
    """Adapters by name. Those that are active act and are trained; the others lie beside.

    An adapter's parameters are `….lora_A.weight` and so on beside the weight they change; those of
    one with another name than "default" are in `….adapter_NAME`.
    """

    _worn: dict[str, Adapter]
    _active: tuple[str, ...]
    _disabled: bool
    adapter_dtype: torch.dtype | None

    # The trees.

    @property
    def worn(self) -> Mapping[str, Adapter]:
        """Every adapter by its name, live."""
        return dict(self._worn)

    @property
    def acting(self) -> tuple[Adapter, ...]:
        """The adapters that act now: the active ones, none inside `disable_adapter()`."""
        return () if self._disabled else tuple(self._worn[name] for name in self._active)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act and are trained."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list where there is not just one."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The settings of each adapter that has some."""
        return {name: one.config for name, one in self._worn.items() if one.config is not None}

    @property
    def params(self) -> tree.Tree:
        """The live tree of params, trained copies of modules in place of the frozen ones."""
        trained = self.trained
        return tree.combine(trained, self._params) if trained else self._params

    @property
    def base_params(self) -> tree.Tree:
        """The live tree of params without anybody's trained copies."""
        return self._params

    @property
    def adapters(self) -> tree.Tree:
        """The live tree of adapters as they act on `params`; empty without any.

        Adapters that began inside the weights (PiSSA, OLoRA) act by their change since, several
        active ones as one of summed rank.
        """
        return named_adapters.acting(self.acting, training=self.training)

    @property
    def trained(self) -> tree.Tree:
        """The live tree of trained copies of frozen params (`modules_to_save`, biases)."""
        return named_adapters.trained(self.acting)

    # Putting on and taking off.

    def set_adapters(
        self,
        adapters: tree.Tree,
        trained: tree.Tree | None = None,
        start: tree.Tree | None = None,
        config: Any = None,
    ) -> None:
        """Wear `adapters` (and trained copies of params) in place of all that were worn before.

        start: what adapters began with that act by their change since (`nn.lora.relative`).
        """
        self._check_rank(adapters)
        for name in list(self._worn):
            self._take_off(name)
        self._activate(())
        if tree.leaves(adapters) or tree.leaves(trained):
            self.wear(DEFAULT, Adapter(adapters, trained or {}, start or {}, config))
            self.set_adapter(DEFAULT)

    def wear(self, name: str, adapter: Adapter) -> None:
        """Put `adapter` beside the others under a new name: it does not act, and is frozen.

        Raises ArgumentError for a name that is taken or cannot be one, and with `fast_inference`
        for a rank over `max_lora_rank`.
        """
        self._check_rank(adapter.adapters)
        if self.adapter_dtype is not None:
            parts = (adapter.adapters, adapter.trained, adapter.start)
            # What several share they share still.
            cast = {id(t): t.to(self.adapter_dtype) for t in tree.tensors(parts)}
            adapters, trained, start = tree.map_tensors(lambda t: cast[id(t)], parts)
            adapter = Adapter(adapters, trained, start, adapter.config)
        within = "" if named_adapters.check_name(name, list(self._worn)) == DEFAULT else name
        made: dict[str, LoRA] = {}
        shared: dict[int, nn.Parameter] = {}
        for path, leaf in tree.items(adapter.adapters):
            # An A that several have is one parameter, as it is where peft adapts them as one.
            a = shared.setdefault(id(leaf.a), nn.Parameter(leaf.a, False))
            b = nn.Parameter(leaf.b, False)
            m = None if leaf.magnitude is None else nn.Parameter(leaf.magnitude, False)
            worn = {"lora_A": a, "lora_B": b, **({} if m is None else {MAGNITUDE: m})}
            for key, value in worn.items():
                child = nn.Module()
                child.register_parameter("weight", value)
                self._place(path, within).add_module(key, child)
            made[path] = replace(leaf, a=a, b=b, magnitude=m)
        begun: dict[str, LoRA] = {}
        for path, leaf in tree.items(adapter.start):
            child = nn.Module()
            child.register_parameter("A", nn.Parameter(leaf.a, requires_grad=False))
            child.register_parameter("B", nn.Parameter(leaf.b, requires_grad=False))
            self._place(path, within).add_module("lora_start", child)
            begun[path] = LoRA(child.A, child.B, leaf.scale)  # type: ignore[arg-type]
        copies = self._wear(adapter.trained, lambda path: False, "trained_", within)
        self._worn[name] = Adapter(
            tree.from_items(made), copies, tree.from_items(begun), adapter.config
        )

    def _check_rank(self, adapters: tree.Tree) -> None:
        if (fast := getattr(self, "fast_inference", None)) is not None:
            fast.check_rank(adapters)

    def _take_off(self, name: str) -> None:
        one = self._worn.pop(name)
        modules = {path for part in (one.adapters, one.start) for path, _ in tree.items(part)}
        modules |= {path.rpartition(".")[0] for path, _ in tree.items(one.trained)}
        for path in modules:
            node = self._place(path)
            if name != DEFAULT:
                node._modules.pop(f"adapter_{name}", None)
                continue
            for key in _PARTS:
                node._modules.pop(key, None)
            for key in [key for key in node._parameters if key.startswith("trained_")]:
                del node._parameters[key]

    def _place(self, path: str, within: str = "") -> nn.Module:
        """The module that holds the tensors of our `path`, or those of an adapter there."""
        name = self.origin.family.names.module_to_hf(path)
        return self._node(f"{name}.adapter_{within}" if within else name)

    def _wear(
        self, params: tree.Tree, trained: Callable[[str], bool], prefix: str = "", within: str = ""
    ) -> Any:
        """Register every tensor under its checkpoint name; the tree with the registered ones."""

        def register(path: str, leaf: Any) -> Any:
            module, _, name = path.rpartition(".")
            node = self._place(module, within)
            if isinstance(leaf, Stack):
                return replace(leaf, inner=register(path, leaf.inner))
            if not isinstance(leaf, torch.Tensor):  # quantized: its tensors, the codes first
                parts = {
                    field.name: nn.Parameter(value, requires_grad=False)
                    for field in fields(leaf)
                    if isinstance(value := getattr(leaf, field.name), torch.Tensor)
                }
                for i, (key, value) in enumerate(parts.items()):
                    node.register_parameter(f"{name}_{key}" if i else name, value)
                return replace(leaf, **parts)
            value = nn.Parameter(leaf, requires_grad=trained(path))
            node.register_parameter(prefix + name, value)
            return value

        return tree.map_with_path(register, params)

    def _activate(self, names: tuple[str, ...], trained: bool = True) -> None:
        self._active = names
        for name, one in self._worn.items():
            for tensor in tree.tensors((one.adapters, one.trained)):
                tensor.requires_grad_(trained and name in names)
        # What was planned for other ranks is planned anew.
        self.plans.clear()

    # By peft's names.

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose changes add up, the active ones; others are frozen.

        inference_mode: freeze the active ones too. Raises ArgumentError for unknown names, and for
        several of which two replace one module, have DoRA, or in training different dropout.
        """
        names = named_adapters.chosen(adapter_name, list(self._worn))
        worn = [self._worn[name] for name in names]
        named_adapters.trained(worn)
        named_adapters.acting(worn)
        self._activate(names, not inference_mode)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any = None,
        *,
        random_state: int = 3407,
        **arguments: Any,
    ) -> None:
        """Put a fresh adapter beside the others; `set_adapter` makes it act.

        peft_config: a `PeftConfig` or peft's `LoraConfig`; else the arguments of `get_peft_model`
        that say what an adapter is. Raises what `peft_config.configure` and `plan` raise.
        """
        from .peft_config import begun

        named_adapters.check_name(adapter_name, list(self._worn))
        model: CausalLM = self  # type: ignore[assignment]
        made, notes = begun(model, peft_config, random_state, **arguments)
        self.wear(adapter_name, made)
        self.origin = replace(self.origin, notes=(*self.origin.notes, *notes))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        check_base: bool = True,
    ) -> None:
        """Put an adapter from a folder or hub repository beside the others; `set_adapter` makes it
        act. is_trainable: train it from now on all the same, where it acts. check_base: refuse one
        that says it was trained on other weights, laid out as the model's.

        Raises AdapterError for one that is not of this model, SourceError where there is none.
        """
        from .adapter_load import load
        from .hub import resolve

        named_adapters.check_name(adapter_name, list(self._worn))
        source = resolve(
            model_id,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model: CausalLM = self  # type: ignore[assignment]
        self.wear(adapter_name, load(model, source.folder, check_base=check_base))
        worn = self._worn[adapter_name]
        for tensor in tree.tensors((worn.adapters, worn.trained)):
            tensor.requires_grad_(is_trainable)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. If it alone was active, the first that is left becomes so, with a
        warning. Raises ArgumentError for an unknown name.
        """
        named_adapters.chosen(adapter_name, list(self._worn))
        self._take_off(adapter_name)
        rest = tuple(name for name in self._active if name != adapter_name)
        if rest != self._active and not rest and self._worn:
            rest = tuple(self._worn)[:1]
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {rest[0]!r} is active now",
                stacklevel=2,
            )
        if rest != self._active:
            self._activate(rest)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the base alone computes, without trained copies either."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: several.Combination = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Put the weighted mix of some adapters beside them, as `nn.several.mixed` makes it.

        Raises ArgumentError for names, weights and combinations that cannot be, and for adapters
        with trained copies of modules, of which there is no mix.
        """
        named_adapters.check_name(adapter_name, list(self._worn))
        names = named_adapters.chosen(adapters, list(self._worn))
        worn = [self._worn[name] for name in names]
        for name, one in zip(names, worn, strict=True):
            if tree.leaves(one.trained):
                raise ArgumentError(
                    f"adapter {name!r} has trained copies of modules (modules_to_save or bias), "
                    "which cannot be mixed; leave it out"
                )
        kind = "linear" if len(names) == 1 and combination_type in _KINDS else combination_type
        trees = [named_adapters.acting([one]) for one in worn]
        made = several.mixed(trees, weights, kind, svd_rank)
        config = adapter_fit.fitted(
            worn[0].config or PeftConfig(),
            made,
            {},
            self.spec,
            self.origin.family.names,
        )
        # A mix with a part of LoftQ's belongs beside the quantized weights, as that does.
        start = LOFTQ if belong_to_it(worn) else config.init_lora_weights
        config = replace(config, inference_mode=False, init_lora_weights=start)
        self.wear(adapter_name, Adapter(made, config=config))
