"""A mixture of experts with a hand-written backward, over what the experts' activations read.

Nothing runs the experts' down projections again: the gradient of the weight w of an expert's output
W h is <dy, W h> = <W^T dy, h>, of which the left side is needed in any case. All else is linear in
w, which is therefore left out of the wide gradients and multiplied where they have become narrow.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.fp8 import Rows
from ..kernels.weighted_rows import row_dots, weighted_sum
from . import expert_products as grouped
from . import tree
from .activation import activated, inputs
from .activation import pull as pull_activated
from .dispatch import Places, places, spread
from .fast_mlp import FastMLP
from .half import Residuals
from .linear import linear, scaled
from .lora import LoRA
from .norm import norm
from .norm import pull as pull_norm
from .pulling import Found, picked
from .residuals import Policy
from .router import route
from .spec import MoESpec
from .stacks import BOTH, KEY, separated

DOWN = ("down",)
# Residuals that the shared MLP has too.
_BOTH_HAVE = ("gate_up", "low_gate_up", "low_down")


@dataclass(frozen=True, slots=True)
class FastExperts:
    """A `half.Function`: what `experts.moe` is for frozen params, where the experts of a projection
    are multiplied at once (`experts.waits_for`).
    """

    spec: MoESpec
    policy: Policy

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        return []

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        x = inner.reshape(-1, inner.shape[-1])
        own = _of_experts(adapters)
        weights, chosen = route(x, p["router"], self.spec)
        where = places(chosen, self.spec.experts)
        rows = self._rows(self._normed(x, p, "norm"), weights, where)
        gate_up, low_gate_up = self._gate_up(rows, where, p, own)
        del rows
        hidden = activated(gate_up, self.spec.expert, {})
        residuals: Residuals = {"places": where, "low_gate_up": {KEY: low_gate_up}}
        if self.policy.gate_up != "recompute":
            residuals["gate_up"] = {KEY: gate_up}
        del gate_up
        (down,), low_down = grouped.products(hidden, where, *picked(p[KEY], own, DOWN))
        del hidden
        residuals["low_down"] = {KEY: low_down}
        down = scaled(down, self.spec.expert.down_scale)
        shares = None if self.spec.weigh_inputs else weights
        out = weighted_sum(down, where.back.view(weights.shape), shares)
        if self.spec.norms is not None:
            residuals[KEY] = out
        out = self._normed(out, p, "post_norm")
        if self.spec.shared is not None:
            out = out + self._shared_forward(x, p, adapters, seed, residuals)
        return out.view(inner.shape), residuals

    def backward(
        self,
        dout: torch.Tensor,
        inner: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        need_inner: bool,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor | None, Found]:
        found = Found()
        # What all of it makes of this x is added up here: the router and a gate by autograd.
        x = inner.reshape(-1, inner.shape[-1]).detach().requires_grad_()
        dy = dout.reshape(x.shape)
        parts = []
        if self.spec.shared is not None:
            parts.append(
                self._shared_backward(dy, x, residuals, p, adapters, seed, need_inner, found)
            )
        parts.append(self._experts_backward(dy, x, residuals, p, adapters, need_inner, found))
        dx: torch.Tensor | None = None
        for part in parts:
            dx = part if dx is None or part is None else dx.add_(part)
        return None if dx is None else dx.view(inner.shape), found

    def _experts_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        need_inner: bool,
        found: Found,
    ) -> torch.Tensor | None:
        spec, own = self.spec.expert, _of_experts(adapters)
        dy = self._pull(dy, residuals.pop(KEY, None), p, "post_norm")
        taken = self._normed(x.detach(), p, "norm")
        where: Places = residuals.pop("places")
        low_gate_up = residuals.pop("low_gate_up")[KEY]
        low_down = residuals.pop("low_down")[KEY]
        gate_up = residuals.pop("gate_up", {}).get(KEY)
        with torch.enable_grad():
            weights, _ = route(x, p["router"], self.spec)
        column = None
        if not self.spec.weigh_inputs:
            column = weights.detach().flatten().index_select(0, where.order)[:, None]
        again = gate_up is None
        if gate_up is None:
            rows = self._rows(taken, weights.detach(), where)
            gate_up, _ = self._gate_up(rows, where, p, own, low_gate_up)
            del rows
        dy = scaled(dy, spec.down_scale)
        drows = spread(dy, where, self.spec.active)
        down, own_down = picked(p[KEY], own, DOWN)
        dlows = grouped.pull_lows([drows], where, own_down)
        dhidden = grouped.pull_rows([drows], where, down, own_down, dlows)
        hidden = activated(gate_up, spec, {})
        dots = row_dots(dhidden, hidden) if column is not None and need_inner else None
        grads = grouped.pull_weights(hidden, where, own_down, [drows], dlows, low_down, column)
        _note(found, own, DOWN, grads)
        del hidden, drows, grads
        dfirst, *dup = pull_activated(dhidden, gate_up, spec, {}, spend=again)[1]
        dparts = [scaled(dfirst, spec.gate_scale), *dup]
        del gate_up, dhidden, dfirst, dup
        wide, own_wide = picked(p[KEY], own, inputs(spec))
        dlows = grouped.pull_lows(dparts, where, own_wide)
        if dlows:
            rows = self._rows(taken, weights.detach(), where)
            grads = grouped.pull_weights(rows, where, own_wide, dparts, dlows, low_gate_up, column)
            _note(found, own, inputs(spec), grads)
            del rows, grads
        _joined(found, adapters)
        if not need_inner:
            return None
        drows = grouped.pull_rows(dparts, where, wide, own_wide, dlows)
        dx = weighted_sum(drows, where.back.view(weights.shape), weights.detach())
        if self.spec.weigh_inputs:
            dots = row_dots(drows, spread(taken, where, self.spec.active))
        assert dots is not None
        dweights = dots.index_select(0, where.back).view(weights.shape)
        if column is not None and "bias" in p[KEY]["down"]:
            every = dy @ p[KEY]["down"]["bias"].to(dy.dtype).mT
            chosen = where.ids.index_select(0, where.back).view(weights.shape)
            dweights = dweights + every.gather(1, chosen)
        dx = self._pull(dx, x.detach(), p, "norm")
        return dx.add_(torch.autograd.grad(weights, x, dweights.to(weights.dtype))[0])

    def _normed(self, x: torch.Tensor, p: tree.Tree, name: str) -> torch.Tensor:
        """x through the mixture's own norm of this name, if it has any."""
        return x if self.spec.norms is None else norm(x, p[name], self.spec.norms)

    def _pull(self, dy: torch.Tensor, x: Any, p: tree.Tree, name: str) -> torch.Tensor:
        """The backward of `_normed`; x is read only with a norm."""
        return dy if self.spec.norms is None else pull_norm(dy, x, p[name], self.spec.norms)

    def _rows(self, x: torch.Tensor, weights: torch.Tensor, where: Places) -> torch.Tensor:
        """What the experts read."""
        rows = spread(x, where, self.spec.active)
        if not self.spec.weigh_inputs:
            return rows
        return (rows * weights.flatten().index_select(0, where.order)[:, None]).to(x.dtype)

    def _gate_up(
        self,
        rows: torch.Tensor,
        where: Places,
        p: tree.Tree,
        own: tree.Tree,
        lows: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the experts' activation reads."""
        spec = self.spec.expert
        (first, *rest), lows = grouped.products(
            rows, where, *picked(p[KEY], own, inputs(spec)), lows
        )
        return [scaled(first, spec.gate_scale), *rest], lows

    def _shared_forward(
        self,
        x: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        residuals: Residuals,
    ) -> torch.Tensor:
        assert self.spec.shared is not None
        mlp = FastMLP(self.spec.shared, self.policy)
        taken = self._normed(x, p, "shared_norm")
        made, own = mlp.forward(taken, p["shared"], tree.get(adapters, "shared"), seed)
        for name, value in own.items():
            residuals[name] = {**residuals[name], "shared": value}
        if self.spec.norms is not None or self.spec.shared_gate:
            residuals["shared"] = made
        if not self.spec.shared_gate:
            return self._normed(made, p, "shared_post_norm")
        return linear(x, p["shared_gate"]).sigmoid() * made

    def _shared_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        residuals: Residuals,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        need_inner: bool,
        found: Found,
    ) -> torch.Tensor | None:
        assert self.spec.shared is not None
        mlp = FastMLP(self.spec.shared, self.policy)
        own = {name: residuals[name].pop("shared") for name in _BOTH_HAVE if name in residuals}
        dgate: torch.Tensor | None = None
        shared = residuals.pop("shared", None)
        if self.spec.shared_gate:
            with torch.enable_grad():
                gate = linear(x, p["shared_gate"]).sigmoid()
            made = row_dots(dy, shared)[:, None].to(dy.dtype)
            if need_inner:
                (dgate,) = torch.autograd.grad(gate, x, made)
            dy = gate.detach() * dy
        else:
            dy = self._pull(dy, shared, p, "shared_post_norm")
        taken = self._normed(x.detach(), p, "shared_norm")
        given = p["shared"], tree.get(adapters, "shared"), seed, need_inner
        dx, grads = mlp.backward(dy, taken, own, *given)
        found.update({f"shared.{path}": grad for path, grad in grads.items()})
        if dx is None:
            return None
        dx = self._pull(dx, x.detach(), p, "shared_norm")
        return dx if dgate is None else dx.add_(dgate)


def _of_experts(adapters: tree.Tree) -> tree.Tree:
    """The experts' adapters, one of gate and up together as one of each."""
    return tree.get(separated({KEY: tree.get(adapters, KEY)}), KEY)


def _note(found: Found, own: tree.Tree, names: tuple[str, ...], grads: list[Any]) -> None:
    """Put the gradients of the adapted ones of these projections where they belong."""
    adapted = [name for name in names if tree.get(own, name) is not None]
    found.update({f"{KEY}.{name}": g for name, g in zip(adapted, grads, strict=True)})


def _joined(found: Found, adapters: tree.Tree) -> None:
    """Those of gate and up as one, where their adapter is one."""
    both: LoRA | None = tree.get(adapters, KEY, BOTH)
    if both is None:
        return
    (a, b), (a_up, b_up) = found.pop(f"{KEY}.gate"), found.pop(f"{KEY}.up")
    found[f"{KEY}.{BOTH}"] = (a + a_up, torch.cat([b, b_up], -2))
