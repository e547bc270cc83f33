"""What becomes of a layer's residuals between its forward and its backward.

A backward needs a layer's input x, the raw q, k and v (of a recurrent mixer all that its input is
projected to), the attention output with its log-sum-exp, the middle residual, and gate and up, of
every expert that a token passes; each is kept, sent to the host and brought back, or recomputed.
Nothing runs the output projections (o, out, down) again: their results are not needed, or, where a
norm or a gate follows them, share the fate of the middle residual. What is narrow is kept: latents,
adapters' narrow products, the places of experts' rows. A part that autograd runs again
(`halves.runs_again`) has none of these, but the half's input.
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError
from .spec import LayerSpec, MoESpec

Fate = Literal["keep", "offload", "recompute"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The fate of each residual; x and mid (hidden states before attention and MLP) cannot be
    recomputed, out is the attention output with its log-sum-exp. tile: how many tokens the MLP
    runs on at a time, forward and backward, where those of a batch are more; it then keeps neither
    gate nor up, which gate_up must say.
    """

    x: Literal["keep", "offload"] = "keep"
    qkv: Fate = "keep"
    out: Fate = "keep"
    mid: Literal["keep", "offload"] = "keep"
    gate_up: Fate = "keep"
    tile: int | None = None

    def __post_init__(self) -> None:
        for name in ("x", "qkv", "out", "mid", "gate_up"):
            fate, fates = getattr(self, name), ["keep", "offload"]
            if name not in ("x", "mid"):
                fates.append("recompute")
            if fate not in fates:
                expected = ", ".join(map(repr, fates))
                raise ArgumentError(f"{name} is {fate!r}: expected one of {expected}")
        if self.tile is not None and (self.tile < 1 or self.gate_up != "recompute"):
            raise ArgumentError(
                f"tile is {self.tile} with gate_up={self.gate_up!r}: expected at least one token, "
                'and gate_up="recompute", for tiles keep neither gate nor up'
            )

    @property
    def offloads(self) -> bool:
        return "offload" in (self.x, self.qkv, self.out, self.mid, self.gate_up)


# One policy for all layers, or one for each.
Residuals = Policy | tuple[Policy, ...]

KEEP = Policy()
RECOMPUTE = Policy(qkv="recompute", gate_up="recompute")
OFFLOAD = Policy(x="offload", qkv="recompute", out="offload", mid="offload", gate_up="recompute")


def bytes_per_token(spec: LayerSpec, dim: int, itemsize: int) -> dict[str, int]:
    """Bytes that each residual of one layer takes for one token; `dim` is the model's width."""
    a = spec.attention
    heads, q, kv = (a.heads, *a.widths) if a is not None else (0, 0, 0)
    made = 0 if a is None or a.lends else (len(a.projections) - 1) * kv
    if a is not None and a.latent is not None and a.rope is not None:
        made = a.heads * (a.head_dim - a.rope.dim + a.value_dim)
    mixed = 0 if spec.recurrent is None else sum(spec.recurrent.inputs.values())
    within = 0  # what experts and a shared MLP make, for norms or a gate after them
    if isinstance(spec.mlp, MoESpec):
        normed = spec.mlp.norms is not None
        within = normed + (spec.mlp.shared_gate or (normed and spec.mlp.shared is not None))
    return {
        "x": dim * itemsize,
        "qkv": (q * (2 if a is not None and a.gated else 1) + made + mixed) * itemsize,
        "out": q * itemsize + heads * 4,
        "mid": ((not spec.parallel) + 2 * spec.post_norm + within) * dim * itemsize,
        "gate_up": sum((1 + mlp.gated) * mlp.dim for mlp in spec.mlps) * itemsize,
    }


def per_layer(residuals: Residuals, layers: int) -> tuple[Policy, ...]:
    """One policy for each of `layers` layers; raises ArgumentError for another number of them."""
    if isinstance(residuals, Policy):
        return (residuals,) * layers
    if len(residuals) != layers:
        raise ArgumentError(
            f"residuals has {len(residuals)} policies, expected one, or one for each of the "
            f"{layers} layers"
        )
    return residuals
