"""The dense MLP with a hand-written backward, over what its activation reads."""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.fp8 import Rows
from ..quant.fp8_product import computes
from ..quant.linear import rounds
from . import tree
from .activation import activated, activated_rows, inputs, pull_rows
from .activation import pull as pull_activated
from .half import Residuals
from .linear import scaled, seed_after
from .products import products
from .pulling import Found, Lows, Puller, picked
from .residuals import Policy
from .spec import MLPSpec


@dataclass(frozen=True, slots=True)
class FastMLP:
    """A `half.Function`: what `mlp.mlp` is for frozen params."""

    spec: MLPSpec
    policy: Policy

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        if residuals is not None and "gate_up" in residuals:
            return []
        return [p[name]["weight"] for name in inputs(self.spec)]

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        residuals = Residuals()
        gate_up, residuals["low_gate_up"] = self._gate_up(inner, p, adapters, seed, rounded)
        rows = None
        if rounds(gate_up[0], p["down"]["weight"]):  # of as many rows as what down reads
            hidden, rows = activated_rows(gate_up, self.spec, p)
        else:
            hidden = activated(gate_up, self.spec, p)
        if self.policy.gate_up != "recompute":
            residuals["gate_up"] = gate_up
        del gate_up
        (down,), residuals["low_down"] = products(
            hidden, *picked(p, adapters, ("down",)), seed_after(seed, 2), rows=rows
        )
        return scaled(down, self.spec.down_scale), residuals

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
        down = Puller(p, adapters, ("down",), seed_after(seed, 2), found)
        wide = Puller(p, adapters, inputs(self.spec), seed, found)
        gate_up, low_gate_up = residuals.pop("gate_up", None), residuals.pop("low_gate_up", None)
        # DoRA reads gate and up beside their gradients.
        spend, dora = gate_up is None and not wide.folded, wide.folded
        if gate_up is None:
            gate_up, _ = self._gate_up(inner, p, adapters, seed, rounded, low_gate_up)
        dhidden = down.input((scaled(dout, self.spec.down_scale),))
        assert dhidden is not None
        rows = None
        reads = [p[name]["weight"] for name in inputs(self.spec)]
        plain = self.spec.gate_scale == 1.0
        if need_inner and plain and not dora and all(map(computes, reads)):
            hidden, dgate_up, rows = pull_rows(dhidden, gate_up, self.spec, p, spend=spend)
        else:
            hidden, dgate_up = pull_activated(dhidden, gate_up, self.spec, p, spend=spend)
        made = gate_up if dora and plain else None
        del gate_up, dhidden
        down.weights(hidden, residuals.pop("low_down", None))
        del hidden
        dgate, *dup = dgate_up
        dinner = wide.input((scaled(dgate, self.spec.gate_scale), *dup), need_inner, rows)
        wide.weights(inner, low_gate_up, made)
        return dinner, found

    def _gate_up(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None,
        lows: Lows | None = None,
    ) -> tuple[list[torch.Tensor], Lows]:
        """What the activation reads."""
        own = picked(p, adapters, inputs(self.spec))
        (gate, *up), lows = products(inner, *own, seed, lows, rounded)
        return [scaled(gate, self.spec.gate_scale), *up], lows
