"""Which residuals to keep, send away or run again, chosen to fill a memory budget: pure arithmetic.

A training step's memory is what is there before it (weights, gradients, optimizer), the residuals
of the layers run so far, and what the layer or the head at work needs beside them. From the policy
that needs least, residuals are kept one by one, in the order of seconds saved per byte, as long as
the step's peak stays within the budget. The order does not depend on the budget, so a larger one
never keeps less.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from ..errors import ArgumentError
from ..kernels.cross_entropy import chunk_rows
from .decoder import uncovered
from .recurrent import working_bytes
from .residuals import KEEP, Fate, Policy, bytes_per_token
from .spec import LayerSpec, ModelSpec

# Rates of a large GPU, of which only the ratios matter here: products and attention in FLOP/s,
# copies to or from the host in bytes/s, and the fixed cost of one layer's copies in seconds.
_PRODUCTS, _ATTENTION, _COPY, _COPY_START = 5e14, 3.5e14, 5e10, 9e-5

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's shape: rows, tokens in a row, bytes of an element. `offload`: whether there is a
    host to send residuals to; `scores`: whether attention writes its scores out; `ranks`: the ranks
    of a layer's adapters summed, whose narrow products are kept throughout; `tile`: how many tokens
    the MLP runs on at a time. Of what makes every layer run through autograd: `masked`: whether
    the batch needs a mask, `dora`: whether adapters have magnitudes, `trained`: whether the
    layers' weights are trained.
    """

    batch: int
    length: int
    itemsize: int
    offload: bool = True
    scores: bool = False
    ranks: int = 0
    tile: int | None = None
    masked: bool = False
    dora: bool = False
    trained: bool = False

    @property
    def by_autograd(self) -> str | None:
        """What of it makes every layer run through autograd."""
        found = {"a mask": self.masked, "DoRA": self.dora, "trained weights": self.trained}
        return " and ".join(why for why, is_so in found.items() if is_so) or None

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy for each layer, the bytes the step needs at its peak, and the budget they fit."""

    policies: tuple[Policy, ...]
    peak: int
    budget: int
    shape: Shape

    def __str__(self) -> str:
        parts = []
        if self.shape.by_autograd is not None:
            parts = [f"each layer keeps its input and runs again, for {self.shape.by_autograd}"]
            return self._line(parts)
        numbered = list(enumerate(self.policies))
        for policy, some in groupby(numbered, key=lambda pair: pair[1]):
            places = [i for i, _ in some]
            where = f"s {places[0]}-{places[-1]}" if len(places) > 1 else f" {places[0]}"
            parts.append(f"layer{where}: {_words(policy)}")
        return self._line(parts)

    def _line(self, parts: list[str]) -> str:
        return (
            f"{self.shape.batch} x {self.shape.length} tokens, {self.peak / GIB:.2f} GiB planned "
            f"of a budget of {self.budget / GIB:.2f} GiB; {'; '.join(parts)}"
        )


def plan(spec: ModelSpec, shape: Shape, *, budget: int, fixed: int) -> Plan:
    """The plan that keeps most within `budget` bytes of which `fixed` are taken throughout.

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
            policies[i] = before
            break
        planned = grown
    return Plan(tuple(policies), planned, budget, shape)


def peak(spec: ModelSpec, shape: Shape, policies: tuple[Policy, ...], fixed: int) -> int:
    """Bytes at the most demanding moment of a step: the head, or some layer's backward."""
    on_device = 0
    largest = 0
    away = [_away(layer, spec, shape, p) for layer, p in zip(spec.layers, policies, strict=True)]
    for i, (layer, policy) in enumerate(zip(spec.layers, policies, strict=True)):
        # What is sent away is there while this layer and the next one below it are at work.
        passing = away[i] + (away[i - 1] if i else 0)
        on_device += _resident(layer, spec, shape, policy)
        largest = max(largest, on_device + passing + _working(layer, spec, shape, policy))
    passing = sum(away[-2:])
    # A mask is there from the first layer to the last: of booleans, and as what scores are added.
    if shape.masked:
        fixed += shape.batch * shape.length**2 * (1 + shape.itemsize)
    return fixed + max(largest, on_device + passing + _head(spec, shape))


def _least(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> Policy:
    """The policy with the fewest bytes on the device; between equal ones the fastest."""
    if _by_autograd(layer, shape):  # keeps the input and runs all again, whatever is asked
        return Policy(gate_up="recompute", tile=shape.tile) if shape.tile else KEEP
    if not shape.offload:
        return Policy(qkv="recompute", out="recompute", gate_up="recompute", tile=shape.tile)
    sent = _size(layer, spec, shape, "out") * 2 / _COPY
    again = _recompute_seconds(layer, spec, shape, "out")
    out: Fate = "offload" if _hidden_copies(layer, spec, shape) or sent < again else "recompute"
    mid: Literal["keep", "offload"] = "offload" if _size(layer, spec, shape, "mid") else "keep"
    return Policy("offload", "recompute", out, mid, "recompute", shape.tile)


def _order(spec: ModelSpec, shape: Shape, policies: list[Policy]) -> list[tuple[int, str]]:
    """(layer, residual) in the order in which to keep them: by seconds saved per byte, then the
    last layers first, whose backward comes soonest.
    """
    found: list[tuple[float, int, str]] = []
    for i, layer in enumerate(spec.layers):
        if _by_autograd(layer, shape):
            continue
        for name in bytes_per_token(layer, spec.dim, shape.itemsize):
            size = _size(layer, spec, shape, name)
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
    size = _size(layer, spec, shape, name)
    # A hidden copy costs only the bandwidth that it takes from others.
    return 2 * size / _COPY * (0.01 if _hidden_copies(layer, spec, shape) else 1.0)


def _recompute_seconds(layer: LayerSpec, spec: ModelSpec, shape: Shape, name: str) -> float:
    a = layer.attention
    if name == "out":
        if a is None:
            return 0.0
        seen = shape.length / 2 if a.window is None else min(a.window, shape.length / 2)
        return 4 * shape.tokens * seen * a.heads * a.head_dim / _ATTENTION
    width = _size(layer, spec, shape, name) / shape.itemsize  # tokens times the output's width
    return 2 * spec.dim * width / _PRODUCTS


def _hidden_copies(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> bool:
    """Whether sending x, out and mid takes no longer than the layer's forward."""
    sent = sum(_size(layer, spec, shape, name) for name in ("x", "out", "mid"))
    q, kv = layer.attention.widths if layer.attention is not None else (0, 0)
    weights = spec.dim * (2 * q + 2 * kv + sum((2 + mlp.gated) * mlp.dim for mlp in layer.mlps))
    forward = 2 * shape.tokens * weights / _PRODUCTS
    forward += _recompute_seconds(layer, spec, shape, "out")
    return _COPY_START + sent / _COPY <= forward


def _kept(policy: Policy, name: str) -> Policy:
    return replace(policy, **{name: "keep"})  # type: ignore[arg-type]


def _size(layer: LayerSpec, spec: ModelSpec, shape: Shape, name: str) -> int:
    return shape.tokens * bytes_per_token(layer, spec.dim, shape.itemsize)[name]


def _sum(
    layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy, taken: Callable[[str], bool]
) -> int:
    sizes = bytes_per_token(layer, spec.dim, shape.itemsize)
    return shape.tokens * sum(n for name, n in sizes.items() if taken(getattr(policy, name)))


def _resident(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes that a layer's residuals take on the device until its backward."""
    if _by_autograd(layer, shape):
        return _size(layer, spec, shape, "x")
    narrow = shape.tokens * shape.ranks * shape.itemsize
    return narrow + _sum(layer, spec, shape, policy, lambda fate: fate == "keep")


def _away(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes that go to the host and come back."""
    if _by_autograd(layer, shape):
        return 0
    return _sum(layer, spec, shape, policy, lambda fate: fate == "offload")


def _working(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes beside the residuals while a layer's backward is at work.

    MLP: gate and up, whose gradients take the place of what is recomputed of them, and one of the
    hidden product and its gradient, in one place too; without a kernel for that, all of these.
    Attention: q, k and v as projected and as rotated, their gradients twice over (fp32 in some
    backends), the output's gradient. Both: some hidden states and two dequantized weights.
    """
    a, f = layer.attention, max(mlp.dim for mlp in layer.mlps)
    q, kv = a.widths if a is not None else (0, 0)
    sizes = bytes_per_token(layer, spec.dim, shape.itemsize)
    by_autograd = _by_autograd(layer, shape)

    def again(name: str) -> int:
        fate = "recompute" if by_autograd else getattr(policy, name)
        return sizes[name] if fate == "recompute" else 0

    gated = all(mlp.gated for mlp in layer.mlps) and not by_autograd and shape.offload
    hidden = sum(mlp.dim if gated else (3 + mlp.gated) * mlp.dim for mlp in layer.mlps)
    mlp = hidden * shape.itemsize + (sizes["gate_up"] if gated else again("gate_up"))
    if policy.tile is not None:  # in each of the tiles that share this memory
        mlp = mlp * min(policy.tile, shape.tokens) // shape.tokens
    if len(layer.mlps) > 1:  # each expert's copy of its tokens, what it makes of them, weighed
        mlp += len(layer.mlps) * spec.dim * (2 * shape.itemsize + 4)
    attention = (3 * (q + 2 * kv) + 2 * q) * shape.itemsize + q * 4
    attention += again("qkv") + again("out")
    # Expanded heads' gradients of k and v, which some backends make before they sum groups.
    attention += 2 * q * shape.itemsize
    if layer.recurrent is not None:
        attention += working_bytes(layer.recurrent, shape.itemsize)
    states = 6 * spec.dim * shape.itemsize
    total = shape.tokens * (max(mlp + again("qkv") + again("out"), attention) + states)
    total += 2 * spec.dim * max(f, q) * shape.itemsize
    if shape.dora:  # lengths of a weight's rows, in fp32: of the weight, its change and their sum
        total += 3 * spec.dim * max(f, q) * 4
    if shape.trained:  # a layer's gradients, before they are added to what is there of them
        weights = sum((1 + mlp.gated + 1) * mlp.dim for mlp in layer.mlps) + 2 * q + 2 * kv
        total += spec.dim * weights * shape.itemsize
    # Our own kernels, which have caps, sinks and biases, serve 16 bits on a GPU.
    special = a is not None and (a.softcap is not None or a.sinks or a.alibi is not None)
    if a is not None and (
        shape.scores or (special and not (shape.offload and shape.itemsize == 2))
    ):
        total += 4 * shape.batch * a.heads * shape.length**2 * 4
    return total


def _by_autograd(layer: LayerSpec, shape: Shape) -> bool:
    """Whether a layer runs through autograd, which keeps its input and runs it again."""
    return uncovered(layer) is not None or shape.by_autograd is not None


def _head(spec: ModelSpec, shape: Shape) -> int:
    """Bytes beside the residuals while the loss is computed: a chunk of logits, the final hidden
    states before and after their norm, and their gradient.
    """
    rows = min(shape.tokens, chunk_rows(spec.vocab, spec.dim, shape.itemsize))
    return (rows * spec.vocab + 4 * shape.tokens * spec.dim) * shape.itemsize


def _words(policy: Policy) -> str:
    names = ("x", "qkv", "out", "mid", "gate_up")
    if policy == KEEP:
        return "all kept"
    fates = {fate: [n for n in names if getattr(policy, n) == fate] for fate in _FATES}
    return ", ".join(f"{_FATES[fate]} {' '.join(some)}" for fate, some in fates.items() if some)


_FATES = {"keep": "keep", "offload": "send away", "recompute": "run again"}
