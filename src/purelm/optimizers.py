"""Optimizers by name: torch's AdamW, and bitsandbytes' with state in 8 bits or paged to the host.
What a checkpoint keeps of each, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from .convert.bridge import CausalLM
from .errors import ArgumentError

# By transformers' names (`TrainingArguments.optim`); None is torch's own.
_KINDS: Mapping[str, str | None] = {
    "adamw_torch_fused": None,
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_8bit": "PagedLion8bit",
    "ademamix_8bit": "AdEMAMix8bit",
}
NAMES = tuple(_KINDS)

State = dict[str, torch.Tensor]


def optimizer(
    model: CausalLM,
    name: str = "adamw_torch_fused",
    *,
    lr: float = 2e-4,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """The optimizer `name` (one of NAMES) over what `model` trains; norms and biases do not decay.

    Those of bitsandbytes keep their moments in 8 bits, a scale per 256 values, of tensors of 4096
    values or more (arXiv 2110.02861); paged ones move them to the host where the GPU's memory runs
    short. Unlike bitsandbytes' own step this one does not wait for the GPU after every tensor.

    Raises ArgumentError for a model that trains nothing, a name as `check_name` does, a rate or
    decay that cannot be used, and paging without a GPU.
    """
    check_name(name)
    for what, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ArgumentError(f"{what} is {value}, expected 0 or more")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ArgumentError("the model has no trainable parameters; add adapters to it first")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    kind = _KINDS[name]
    if kind is None:
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if kind.startswith("Paged") and model.device.type != "cuda":
        raise ArgumentError(f"{name} pages a GPU's memory, and the model is on {model.device}")
    from bitsandbytes import optim

    theirs = getattr(optim, kind)
    if not kind.startswith("Paged"):  # those use their waits
        theirs = type(kind, (theirs,), {"step": _step})
    made: torch.optim.Optimizer = theirs(groups, lr=lr)
    return made


def check_name(name: str) -> None:
    """Raise ArgumentError for a name that is not of NAMES, or whose library is not installed."""
    if name not in _KINDS:
        raise ArgumentError(f"optimizer is {name!r}, expected one of {', '.join(NAMES)}")
    if _KINDS[name] is not None and find_spec("bitsandbytes") is None:
        raise ArgumentError(f"the optimizer {name} needs an extra: pip install 'purelm[bnb]'")


@torch.no_grad()
def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    """bitsandbytes' step from its own parts, without a wait after each: one stream keeps order."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if not self.initialized:
        self.check_overrides()
        self.to_gpu()
        self.initialized = True
    for g, group in enumerate(self.param_groups):
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                if not self.state[p]:
                    self.init_state(group, p, g, i)
                self.update_step(group, p, g, i)
    return loss


def kept(state: Mapping[str, Any]) -> State:
    """What a checkpoint must hold of one parameter's state: all but tables that never change;
    counts as int64 [].
    """
    return {
        key: value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for key, value in state.items()
        if not key.startswith("qmap")
    }


def blank_states(made: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """The state that each parameter of a new optimizer gets at its first step."""
    blank: dict[torch.Tensor, dict[str, Any]] = {}
    for g, group in enumerate(made.param_groups):
        for i, p in enumerate(group["params"]):
            if isinstance(made, torch.optim.AdamW):
                blank[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            else:
                made.init_state(group, p, g, i)  # type: ignore[attr-defined]
                blank[p] = made.state.pop(p)
    return blank


def put(made: torch.optim.Optimizer, p: torch.Tensor, blank: dict[str, Any], values: State) -> None:
    """Make `values`, as `kept` gave them, the state of `p`, in the place of its blank one."""
    for key, value in values.items():
        if isinstance(blank[key], torch.Tensor):
            blank[key].copy_(value)
        else:
            blank[key] = type(blank[key])(value.item())
    made.state[p] = blank
