"""What a model is: frozen, hashable values without tensors.

Letters used throughout: b batch, s sequence, t packed tokens, h query heads, k kv heads, d head
dim, e model dim, f mlp dim, v vocabulary, r rank, x experts.

Everything that differs between families is a field here; nothing below `convert` knows a family.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset), statistics in fp32.

    `cast_first`: cast to the input's dtype before the product with the weight (Llama); else the
    product is fp32 too (Gemma).
    """

    eps: float
    offset: float = 0.0
    cast_first: bool = True


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` features of a head (arXiv 2104.09864).

    `kind` and the scaling fields follow transformers' `modeling_rope_utils`.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention.

    `window`: key j is visible from query i when 0 <= i - j < window (None: no limit).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """down(activation(gate(x)) * up(x)) with hidden width `dim` (f)."""

    dim: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    norm: NormSpec
    attention: AttentionSpec
    mlp: MLPSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding, layers, final norm, head (the embedding's matrix if `tied`)."""

    vocab: int
    dim: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_positions: int
    tied: bool = False
    init_std: float = 0.02

    def ropes(self) -> Iterator[RopeSpec]:
        """The distinct rotary embeddings, in the order of their first layer."""
        yield from dict.fromkeys(layer.attention.rope for layer in self.layers)
