"""Recurrent mixers with a hand-written backward around the scan, which autograd runs again."""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.fp8 import Rows
from . import recurrent, tree
from .half import Residuals
from .linear import scaled
from .products import products
from .pulling import Found, Lows, Puller, picked
from .residuals import Policy
from .spec import RecurrentSpec

# What the input projections make, whose fate is that of raw heads.
MADE = "recurrent_made"


@dataclass(frozen=True, slots=True)
class FastRecurrent:
    """A `half.Function`: what `recurrent.mix` is without a state, for frozen params. Convolution,
    scan and gated norm have backwards of their own, of which autograd makes one; the projections
    are not run again where what they make is kept, and that of the outputs never is.
    """

    spec: RecurrentSpec
    starts: torch.Tensor | None
    policy: Policy

    def reads(self, p: tree.Tree, residuals: Residuals | None = None) -> list[Any]:
        made = residuals is not None and MADE in residuals
        if made or recurrent.scales(self.spec)[0] != 1.0:
            return []
        return [p[name]["weight"] for name in self.spec.inputs]

    def forward(
        self,
        inner: torch.Tensor,
        p: tree.Tree,
        adapters: tree.Tree,
        seed: int | None,
        rounded: Rows | None = None,
    ) -> tuple[torch.Tensor, Residuals]:
        before, after = recurrent.scales(self.spec)
        first, last = recurrent.seeds(self.spec, seed)
        own = picked(p, adapters, tuple(self.spec.inputs))
        made, low_in = products(scaled(inner, before), *own, first, None, rounded)
        with torch.no_grad():
            y = recurrent.core(made, p, self.spec, self.starts)
        residuals: Residuals = {"low_recurrent_in": low_in}
        if self.policy.qkv != "recompute":
            residuals[MADE] = made
        del made
        (out,), residuals["low_recurrent_out"] = products(y, *picked(p, adapters, ("out",)), last)
        return scaled(out, after), residuals

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
        found, names = Found(), tuple(self.spec.inputs)
        before, after = recurrent.scales(self.spec)
        first, last = recurrent.seeds(self.spec, seed)
        out = Puller(p, adapters, ("out",), last, found)
        into = Puller(p, adapters, names, first, found)
        inner = scaled(inner, before)
        low_in: Lows = residuals.pop("low_recurrent_in")
        made = residuals.pop(MADE, None)
        if made is None:
            made, _ = products(inner, *picked(p, adapters, names), first, low_in, rounded)
        made = [t.detach().requires_grad_() for t in made]
        with torch.enable_grad():
            y = recurrent.core(made, p, self.spec, self.starts)
        dy = out.input((scaled(dout, after),))
        assert dy is not None
        out.weights(y.detach(), residuals.pop("low_recurrent_out"))
        dmade = torch.autograd.grad(y, made, dy.view(y.shape))
        del y, dy
        dinner = into.input(dmade, need_inner)
        into.weights(inner, low_in, [t.detach() for t in made] if into.folded else None)
        return None if dinner is None else scaled(dinner, before), found
