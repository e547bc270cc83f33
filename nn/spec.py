"""What a model is: frozen, hashable values without tensors.

Letters used throughout: b batch, s sequence, t packed tokens, h query heads, k kv heads, d head
dim, e model dim, f mlp dim, v vocabulary, r rank, x experts.

Everything that differs between families is a field here; nothing below `convert` knows a family.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu", "clamped"]
Router = Literal["softmax", "top_softmax", "sigmoid", "sparse_mixer", "top_sigmoid"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]

# Constants of xIELU (arXiv 2411.13010, sec. 4).
XIELU_BETA, XIELU_EPS = 0.5, -1e-6


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset), statistics in fp32.

    `cast_first`: cast to the input's dtype before the product with the weight (Llama); else the
    product is fp32 too (Gemma). `kind` "layer" is LayerNorm: the mean is subtracted first, all of
    it is fp32, and a `bias` may be added; cast_first means nothing there. Without a `weight` it
    only normalises.
    """

    eps: float
    offset: float = 0.0
    cast_first: bool = True
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    weight: bool = True


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` features of a head (arXiv 2104.09864).

    `kind` and the scaling fields follow transformers' `modeling_rope_utils`. `interleaved`: feature
    2i is turned with 2i + 1 (GPT-J, Cohere), else i with i + dim / 2. "longrope" divides the
    frequencies by `long_factors` once a row is longer than `original_positions`, else by
    `short_factors`; `long_magnitude` or `short_magnitude` is then what cos and sin are multiplied
    with, where they are given. "proportional" turns the first `turned` pairs of features, by the
    frequencies they have among all, and leaves the others (Gemma 4's p-RoPE). `query_beta` b:
    rotated queries at position i are multiplied with
    1 + b log(1 + floor((i + `query_shift`) / `original_positions`)) (Llama 4's temperature tuning);
    with `dim` 0 nothing is rotated, and this is all.
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
    interleaved: bool = False
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_magnitude: float | None = None
    long_magnitude: float | None = None
    turned: int = 0
    query_beta: float = 0.0
    query_shift: int = 0


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent attention's narrow inputs (DeepSeek-V2, arXiv 2405.04434, sec. 2.1).

    Keys and values are made of a latent of `kv_rank` features, normalised, which is what a cache
    holds, with one rotated key for all heads. Queries are made of a latent of `q_rank` features,
    or of x itself (None). A head of q and k ends with the rotated features; one of v has
    `value_dim`.
    """

    kv_rank: int
    q_rank: int | None
    value_dim: int
    norm: NormSpec


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention.

    `window`: key j is visible from query i when 0 <= i - j < window (None: no limit). `chunk` c:
    when i // c == j // c, counted from the start of their document. `rope` None: no positions at
    all. `softcap` c: scores are c * tanh(score / c). `qk_norm` acts on each "head" with one weight
    [d] for all, on each of the "heads" with its own (weight [h, d]), or over the whole "width" of
    the projection (weight [h * d]), by `qk_norm_over`, before the rotation or `qk_norm_after` it.
    `clip` c: what q, k and v projections make is clamped to [-c, c].
    `latent`: q, k and v are made another way, and `qkv_bias` is of the latents' projections.
    `in_scale` and `out_scale` multiply what goes in and what comes out.
    `sinks`: the softmax's denominator has exp of a trained logit per head as another term.
    `alibi`: scores get `alibi.bias` times this factor.
    `gated`: q's projection makes a gate of each head too, behind its query; what a head gives is
    multiplied with the gate's sigmoid.
    `v_norm` acts on each head of v, without a weight. `keys_as_values`: there is no v projection;
    v is what k's makes. `kv_from`: keys and values are those of the layer of this number, an
    earlier one that `lends` its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm_over: Literal["head", "heads", "width"] = "head"
    qk_norm_after: bool = False
    clip: float | None = None
    chunk: int | None = None
    latent: LatentSpec | None = None
    in_scale: float = 1.0
    out_scale: float = 1.0
    sinks: bool = False
    alibi: float | None = None
    gated: bool = False
    v_norm: NormSpec | None = None
    keys_as_values: bool = False
    kv_from: int | None = None
    lends: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Which of q, k and v the layer projects itself."""
        if self.kv_from is not None:
            return ("q",)
        return ("q", "k") if self.keys_as_values else ("q", "k", "v")

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """Heads and their width of the two things that a cache holds for each token: keys and
        values, or the latent and the rotated key. None where another layer holds them.
        """
        if self.kv_from is not None:
            return ()
        if self.latent is not None:
            assert self.rope is not None
            return (1, self.latent.kv_rank), (1, self.rope.dim)
        return ((self.kv_heads, self.head_dim),) * 2

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def widths(self) -> tuple[int, int]:
        """Features of all query heads, and of all kv heads."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """A gated causal convolution over the last `kernel` tokens, feature by feature (LFM2).

    b, c, x = in(input), `dim` features each; out(c * conv(b * x)). `bias`: of all three.
    """

    dim: int
    kernel: int
    bias: bool = False

    @property
    def inputs(self) -> dict[str, int]:
        """The projection of the mixer's input, and what it makes."""
        return {"in": 3 * self.dim}


@dataclass(frozen=True, slots=True)
class Mamba2Spec:
    """A state-space mixer (Mamba 2, arXiv 2405.21060): `heads` of `head_dim` features, each with a
    state of `state` features more, which come in `groups` of heads with one input and output.

    A convolution over the last `kernel` tokens with `activation` comes before. `limits` bound a
    token's step. What is read out is gated, and normalised by `norm` in each group, before the gate
    if `norm_first`. `scales` multiply the parts of the input projection (gate, x, b, c, steps),
    `in_scale` and `out_scale` what goes into it and what comes out of the mixer.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    activation: Activation = "silu"
    in_bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    norm: NormSpec | None = None
    norm_first: bool = False
    limits: tuple[float, float] = (0.0, float("inf"))
    in_scale: float = 1.0
    scales: tuple[float, float, float, float, float] = (1.0,) * 5
    out_scale: float = 1.0

    @property
    def dim(self) -> int:
        """Features of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Features that the convolution mixes: x, b and c."""
        return self.dim + 2 * self.groups * self.state

    @property
    def inputs(self) -> dict[str, int]:
        """The projection of the mixer's input, and what it makes: gates, x, b and c, steps."""
        return {"in": self.dim + self.channels + self.heads}


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """A gated delta net (arXiv 2412.06464): `value_heads`, each with a state of `key_dim` times
    `value_dim` features, of which equal groups share the query and the key of one of `key_heads`.

    A convolution over the last `kernel` tokens with `activation` comes before, of queries, keys
    and values. What is read out is normalised in each head and gated. `by_key_head`: one projection
    makes query, key, values and gates of each key head in turn, another rates and decays; else
    there are four, of queries, keys and values, of gates, of rates, and of decays.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: NormSpec
    activation: Activation = "silu"
    by_key_head: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """Features of all keys, and of all values."""
        return self.key_heads * self.key_dim, self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Features that the convolution mixes: queries, keys and values."""
        keys, values = self.widths
        return 2 * keys + values

    @property
    def inputs(self) -> dict[str, int]:
        """The projections of the mixer's input, and what they make."""
        values, heads = self.widths[1], self.value_heads
        if self.by_key_head:
            return {"qkv_gate": self.channels + values, "beta_decay": 2 * heads}
        return {"qkv": self.channels, "gate": values, "beta": heads, "decay": heads}


# Mixers that carry a state of fixed size from token to token, in place of keys and values.
RecurrentSpec = ShortConvSpec | Mamba2Spec | DeltaNetSpec


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """down(activation(gate(x)) * up(x)) with hidden width `dim` (f); without a gate,
    down(activation(up(x))). "xielu" has two scalars of its own and no gate. "clamped" (gpt-oss)
    joins g = min(gate(x), `limit`) and u = up(x), clamped to +-`limit`, to g sigmoid(`alpha` g)
    (u + 1). What gate and down make is multiplied with `gate_scale` and `down_scale`.
    """

    dim: int
    activation: Activation = "silu"
    bias: bool = False
    gated: bool = True
    gate_scale: float = 1.0
    down_scale: float = 1.0
    alpha: float = 1.0
    limit: float = float("inf")


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture: of `experts` MLPs each token passes `active`, chosen and weighed by a router.

    The router's logits are x W^T [x], plus a bias where `router_bias`, in x's dtype (in fp32 where
    `wide_router`), all that follows is fp32. By `router`,
    "softmax": the largest of softmax(logits) are taken, and are the weights; "sigmoid": of their
    sigmoids. With `choice_bias` those are taken whose weight plus a bias (a trained [x]) is
    largest; with `groups` those within the `active_groups` best of these equal groups, of which
    each counts with the sum of its `group_best` largest. "top_softmax": the largest logits are
    taken, the weights are their softmax; "top_sigmoid": are their sigmoids; "sparse_mixer": the
    largest logits are taken one after the other, and the weight of each is its share of the softmax
    over those not taken before it and within `tolerance` of it (SparseMixer, arXiv 2409.12136,
    without the noise of its training). `normalise`: the weights are divided by their sum plus
    `normalise_eps`; then they are multiplied with `scale`. `shared` is an MLP that every token
    passes, times sigmoid(x w^T) where `shared_gate`. `weigh_inputs`: weights multiply what goes
    into the experts, not what comes out.

    `norms`: the input is not normalised yet; experts and `shared` each have a norm of their own for
    it, and one for what they make. `router_norm`, without a weight: the router reads the input
    normalised by this, times a trained [e] and e^-1/2, and weights are multiplied with a trained
    number of their expert (Gemma 4).
    """

    experts: int
    active: int
    expert: MLPSpec
    router: Router = "softmax"
    router_bias: bool = False
    wide_router: bool = False
    choice_bias: bool = False
    normalise: bool = True
    normalise_eps: float = 0.0
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    group_best: int = 2
    tolerance: float = 0.0
    weigh_inputs: bool = False
    shared: MLPSpec | None = None
    shared_gate: bool = False
    norms: NormSpec | None = None
    router_norm: NormSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerInputSpec:
    """A vector of `dim` features p for each token and layer (Gemma 4's per-layer embeddings).

    p = (table(token) sqrt(dim) + norm(project(embedding) e^-1/2)) / sqrt(2), of a table of `vocab`
    rows for all layers together. A layer adds norm(out(activation(gate(x)) * p)) to its output x.
    """

    dim: int
    vocab: int
    norm: NormSpec
    activation: Activation = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    The mixer is `attention`, or `recurrent`, or the sum of both, which read the same norm(x).
    `pre_norm`: each branch's input is normalised; `post_norm`: its output is, before it is added.
    `parallel`: mixer and MLP both read x and are added to it; they share one norm of it, or
    have `own_norms`.
    `residual_scale` multiplies what a branch adds. `inputs`: what is added last, see there; of all
    layers of a model, or of none. `scaled`: the layer's output is multiplied with a trained number.
    """

    norm: NormSpec
    attention: AttentionSpec | None
    mlp: MLPSpec | MoESpec
    recurrent: RecurrentSpec | None = None
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    own_norms: bool = False
    residual_scale: float = 1.0
    inputs: LayerInputSpec | None = None
    scaled: bool = False

    @property
    def rope(self) -> RopeSpec | None:
        """What turns queries and keys, if anything does."""
        return None if self.attention is None else self.attention.rope

    @property
    def mlp_normed(self) -> bool:
        """Whether the MLP reads a normalised input; a mixture may normalise it itself."""
        return self.pre_norm and (isinstance(self.mlp, MLPSpec) or self.mlp.norms is None)

    @property
    def kv_from(self) -> int | None:
        """The layer whose keys and values attention reads in place of its own."""
        return None if self.attention is None else self.attention.kv_from

    @property
    def lends(self) -> bool:
        """Whether other layers read the keys and values of this one."""
        return self.attention is not None and self.attention.lends

    @property
    def sight(self) -> tuple[int | None, int | None]:
        """The window and the chunk of what attention sees, as far as there are any."""
        return (
            (None, None)
            if self.attention is None
            else (self.attention.window, self.attention.chunk)
        )

    @property
    def mlps(self) -> tuple[MLPSpec, ...]:
        """The MLPs that one token passes."""
        if isinstance(self.mlp, MLPSpec):
            return (self.mlp,)
        return (self.mlp.expert,) * self.mlp.active + (
            (self.mlp.shared,) if self.mlp.shared else ()
        )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding, layers, final norm, head (the embedding's matrix if `tied`), with a
    bias if `head_bias`.

    Embeddings are multiplied with `embed_scale`, which is rounded to their dtype first where
    `embed_scale_rounded`. Logits are multiplied with `logit_scale`, then capped at c =
    `logit_softcap`: c * tanh(logit / c). With `learned_positions` each of the `max_positions` has a
    row of its own, which is added to the embedding.
    """

    vocab: int
    dim: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_positions: int
    tied: bool = False
    init_std: float = 0.02
    embed_scale: float = 1.0
    embed_scale_rounded: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    learned_positions: bool = False

    @property
    def inputs(self) -> LayerInputSpec | None:
        """The layers' further inputs, if they have any."""
        return self.layers[0].inputs

    def attentions(self) -> Iterator[AttentionSpec]:
        """The attention of every layer that has one."""
        yield from (layer.attention for layer in self.layers if layer.attention is not None)

    def ropes(self) -> Iterator[RopeSpec]:
        """The distinct rotary embeddings, in the order of their first layer."""
        ropes = (attention.rope for attention in self.attentions())
        yield from dict.fromkeys(rope for rope in ropes if rope is not None)
