"""Which residuals to keep, send away or run again, chosen to fill a memory budget: pure arithmetic.

A training step's memory is what is there before it (weights, gradients, optimizer), the residuals
of the layers run so far, and what the layer or the head at work needs beside them. From the policy
that needs least, residuals are kept one by one, in the order of seconds saved per byte, as long as
the step's peak stays within the budget. The order does not depend on the budget, so a larger one
never keeps less. What is left when all are kept goes to weights: those of the last layers stay
dequantized (`dense_weights`), which saves an eighth as much a byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ..errors import ArgumentError
from .halves import PARTS, WHOLE
from .residuals import KEEP, Fate, Policy
from .spec import LayerSpec, MLPSpec, ModelSpec
from .step_memory import peak, residual_bytes
from .step_shape import Shape, again

# Rates of a large GPU, of which only the ratios matter here: products and attention in FLOP/s,
# copies to or from the host in bytes/s, and the fixed cost of one layer's copies in seconds.
_PRODUCTS, _ATTENTION, _COPY, _COPY_START = 5e14, 3.5e14, 5e10, 9e-5

# In steps of more tokens, weights that stay dequantized save little: of captured steps of an 8B
# model's layers on an H100 16 % at 1024 tokens, 5 % at 4096, nothing at 16384.
FEW_TOKENS = 8192

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy for each layer, the bytes the step needs at its peak, and the budget they fit.

    again: for each layer what autograd runs again of it, in words. room: of how many layers, the
    last ones, the weights fit beside that dequantized; dense: their bytes.
    """

    policies: tuple[Policy, ...]
    peak: int
    budget: int
    shape: Shape
    again: tuple[str | None, ...]
    room: int = 0
    dense: int = 0

    @property
    def gains(self) -> bool:
        """Whether dequantized weights would save time worth their memory."""
        return self.room > 0 and self.shape.tokens <= FEW_TOKENS

    def __str__(self) -> str:
        told = [
            _words(policy) if again is None else again.format(_words(policy))
            for policy, again in zip(self.policies, self.again, strict=True)
        ]
        parts = []
        for words, some in groupby(enumerate(told), key=lambda pair: pair[1]):
            places = [i for i, _ in some]
            where = f"s {places[0]}-{places[-1]}" if len(places) > 1 else f" {places[0]}"
            parts.append(f"layer{where}: {words}")
        if self.gains:
            size = f"{self.dense / GIB:.2f} GiB more"
            parts.append(f"weights of the last {self.room} layers kept dequantized, {size}")
        return (
            f"{self.shape.batch} x {self.shape.length} tokens, {self.peak / GIB:.2f} GiB planned "
            f"of a budget of {self.budget / GIB:.2f} GiB; {'; '.join(parts)}"
        )


def plan(
    spec: ModelSpec, shape: Shape, *, budget: int, fixed: int, dense: Sequence[int] = ()
) -> Plan:
    """The plan that keeps most within `budget` bytes of which `fixed` are taken throughout. dense:
    bytes of each layer's weights dequantized, if any may be kept so.

    Raises ArgumentError, saying the least possible, where even that is more than the budget.
    """
    policies = [_least(layer, spec, shape) for layer in spec.layers]
    least = peak(spec, shape, tuple(policies), fixed)
    if least > budget:
        raise ArgumentError(
            f"a memory budget of {budget:,} bytes is too small for a step of {shape.batch} x "
            f"{shape.length} tokens: the least possible is {least:,} bytes ({least / GIB:.2f} "
            f"GiB), {fixed:,} of them weights, gradients and optimizer; raise memory_budget, or "
            "lower the batch size or the rows' length"
        )
    planned = least
    for i, name in _order(spec, shape, policies):
        before = policies[i]
        policies[i] = _kept(before, name)
        grown = peak(spec, shape, tuple(policies), fixed)
        if grown > budget:
            policies[i], dense = before, ()
            break
        planned = grown
    room, taken = 0, 0
    for size in reversed(dense):
        if not size or planned + taken + size > budget:
            break
        room, taken = room + 1, taken + size
    told = tuple(_again(layer, shape) for layer in spec.layers)
    return Plan(tuple(policies), planned, budget, shape, told, room, taken)


def _least(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> Policy:
    """The policy with the fewest bytes on the device; between equal ones the fastest."""
    if WHOLE in again(layer, shape):
        # Keeps the input and runs all again, whatever is asked.
        return Policy(gate_up="recompute", tile=shape.tile) if shape.tile else KEEP
    sizes = residual_bytes(layer, spec, shape)
    tile = shape.tile if isinstance(layer.mlp, MLPSpec) else None
    if not shape.offload:
        policy = Policy(qkv="recompute", out="recompute", gate_up="recompute", tile=tile)
    else:
        sent = sizes["out"] * 2 / _COPY
        saved = _recompute_seconds(layer, spec, shape, "out")
        out: Fate = "offload" if _hidden_copies(layer, spec, shape) or sent < saved else "recompute"
        policy = Policy("offload", "recompute", out, "offload", "recompute", tile)
    # What there is none of.
    absent = [
        name for name, size in sizes.items() if not size and (name != "gate_up" or tile is None)
    ]
    for name in absent:
        policy = _kept(policy, name)
    return policy


def _order(spec: ModelSpec, shape: Shape, policies: list[Policy]) -> list[tuple[int, str]]:
    """(layer, residual) in the order in which to keep them: by seconds saved per byte, then the
    last layers first, whose backward comes soonest.
    """
    found: list[tuple[float, int, str]] = []
    for i, layer in enumerate(spec.layers):
        if WHOLE in again(layer, shape):
            continue
        for name, size in residual_bytes(layer, spec, shape).items():
            if name == "gate_up" and policies[i].tile is not None:
                continue
            if size and getattr(policies[i], name) != "keep":
                saved = _saved(layer, spec, shape, policies[i], name)
                found.append((-saved / size, -i, name))
    return [(-i, name) for _, i, name in sorted(found)]


def _saved(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy, name: str) -> float:
    """Seconds that keeping a residual saves."""
    if getattr(policy, name) == "recompute":
        return _recompute_seconds(layer, spec, shape, name)
    size = residual_bytes(layer, spec, shape)[name]
    # A hidden copy costs only the bandwidth that it takes from others.
    return 2 * size / _COPY * (0.01 if _hidden_copies(layer, spec, shape) else 1.0)


def _recompute_seconds(layer: LayerSpec, spec: ModelSpec, shape: Shape, name: str) -> float:
    a = layer.attention
    if name == "out":
        if a is None:
            return 0.0
        seen = shape.length / 2 if a.window is None else min(a.window, shape.length / 2)
        return 4 * shape.tokens * seen * a.heads * a.head_dim / _ATTENTION
    values = residual_bytes(layer, spec, shape)[name] / shape.itemsize
    return 2 * spec.dim * values / _PRODUCTS


def _hidden_copies(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> bool:
    """Whether sending x, out and mid takes no longer than the layer's forward."""
    sizes = residual_bytes(layer, spec, shape)
    sent = sizes["x"] + sizes["out"] + sizes["mid"]
    q, kv = layer.attention.widths if layer.attention is not None else (0, 0)
    weights = spec.dim * (2 * q + 2 * kv + sum((2 + mlp.gated) * mlp.dim for mlp in layer.mlps))
    forward = 2 * shape.tokens * weights / _PRODUCTS
    forward += _recompute_seconds(layer, spec, shape, "out")
    return _COPY_START + sent / _COPY <= forward


def _kept(policy: Policy, name: str) -> Policy:
    return replace(policy, **{name: "keep"})  # type: ignore[arg-type]


def _again(layer: LayerSpec, shape: Shape) -> str | None:
    """What is said of a layer that autograd runs again in part, of its policy's words."""
    parts = again(layer, shape)
    if WHOLE in parts:
        return f"its input kept and all run again, for {parts[WHOLE]}"
    told = [f"{PARTS[part]} run again, for {why}" for part, why in parts.items()]
    return ", ".join(["{}", *told]) if told else None


def _words(policy: Policy) -> str:
    names = ("x", "qkv", "out", "mid", "gate_up")
    if policy == KEEP:
        return "all kept"
    fates = {fate: [n for n in names if getattr(policy, n) == fate] for fate in _FATES}
    return ", ".join(f"{_FATES[fate]} {' '.join(some)}" for fate, some in fates.items() if some)


_FATES = {"keep": "keep", "offload": "send away", "recompute": "run again"}
