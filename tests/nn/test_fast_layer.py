"""The hand-written layer backward against plain autograd, under every fate of the residuals."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from purelm.errors import ArgumentError
from purelm.kernels import attention
from purelm.nn import (
    decoder,
    expert_products,
    fast_attention,
    layout,
    lora,
    loss,
    params,
    pulling,
    rope,
    tree,
)
from purelm.nn.fast_experts import FastExperts
from purelm.nn.fast_layer import Layer
from purelm.nn.halves import runs_again
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Policy, bytes_per_token
from purelm.nn.spec import (
    AttentionSpec,
    DeltaNetSpec,
    LatentSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RecurrentSpec,
    RopeSpec,
    ShortConvSpec,
)
from purelm.quant.nf4 import quantize
from purelm.quant.stack import stack

POLICIES = [
    Policy(*fates)
    for fates in product(
        ("keep", "offload"),
        ("keep", "offload", "recompute"),
        ("keep", "recompute"),
        ("keep",),
        ("keep", "recompute"),
    )
]
# (q/k norm, biases, dropout, activation)
KINDS = [(False, False, 0.0, "silu"), (True, True, 0.0, "gelu_tanh"), (True, False, 0.3, "silu")]


def build(
    kind: tuple[bool, bool, float, Any], dtype: torch.dtype, nf4: bool = True, **changes: Any
) -> tuple[ModelSpec, Any, Any]:
    qk_norm, bias, dropout, activation = kind
    attention = AttentionSpec(
        heads=4,
        kv_heads=2,
        head_dim=8,
        scale=0.35,
        rope=RopeSpec(8, 1e4),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=NormSpec(1e-6) if qk_norm else None,
    )
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(64, activation, bias))
    layer = replace(layer, **changes)
    spec = ModelSpec(100, 32, (layer,) * 3, NormSpec(1e-5), 64)
    g = torch.Generator().manual_seed(0)

    def draw(path: str, p: params.ParamSpec) -> Any:
        drawn = torch.randn(p.shape, generator=g) * 0.2 + float(p.init == "ones")
        if not (p.quantize and nf4):
            return drawn.to(dtype)
        if drawn.dim() == 3:
            return stack([quantize(t.to(dtype), block=32) for t in drawn])
        return quantize(drawn.to(dtype))

    base = tree.map_with_path(draw, params.param_specs(spec))
    adapters = lora.init(spec, generator=g, rank=4, dropout=dropout)
    for leaf in tree.leaves(adapters):
        leaf.b.normal_(generator=g)
    return spec, base, tree.map_tensors(lambda t: t.requires_grad_(), adapters)


def run(
    built: tuple[ModelSpec, Any, Any], policy: Policy | None, seed: int | None, **more: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    spec, base, adapters = built
    ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(3))
    value = loss.loss(base, spec, ids, ids, adapters=adapters, residuals=policy, seed=seed, **more)
    return value, list(torch.autograd.grad(value, tree.tensors(adapters)))


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "norm-bias-gelu", "norm-dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_policy(kind: tuple[bool, bool, float, Any], dtype: torch.dtype) -> None:
    built = build(kind, dtype)
    seed = 5 if kind[2] else None
    want, want_grads = run(built, None, seed)
    kept, kept_grads = run(built, KEEP, seed)
    assert torch.equal(kept, want)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for got, grad in zip(kept_grads, want_grads, strict=True):
        assert (got - grad).norm() <= limit * grad.norm()
    for policy in POLICIES if seed is None else POLICIES[::5]:
        value, grads = run(built, policy, seed)
        assert torch.equal(value, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True)), policy


ROTATED = AttentionSpec(4, 2, 8, 0.3, RopeSpec(8, 1e4))
LATENT = AttentionSpec(
    4, 4, 12, 0.3, RopeSpec(4, 1e4, interleaved=True), latent=LatentSpec(16, 24, 8, NormSpec(1e-6))
)
LAYERS: dict[str, dict[str, Any]] = {
    "sandwich": {"post_norm": True, "residual_scale": 0.3},
    "after": {"pre_norm": False, "post_norm": True},
    "parallel": {"parallel": True, "norm": NormSpec(1e-5, kind="layer")},
    "parallel-after": {"parallel": True, "post_norm": True, "residual_scale": 0.5},
    "no-gate": {"mlp": MLPSpec(64, "relu2", True, gated=False)},
    "no-positions": {"attention": AttentionSpec(4, 2, 8, 0.3, None)},
    "soft-cap": {"attention": replace(ROTATED, softcap=2.0, window=6), "post_norm": True},
    "sinks": {"attention": replace(ROTATED, sinks=True, window=9)},
    "alibi": {"attention": AttentionSpec(4, 2, 8, 0.3, None, alibi=0.3), "parallel": True},
    "gated": {"attention": replace(ROTATED, gated=True, qk_norm=NormSpec(1e-6))},
    "scaled": {
        "attention": replace(ROTATED, in_scale=1.2, out_scale=0.8),
        "mlp": MLPSpec(64, gate_scale=0.7, down_scale=1.3),
    },
    "latent": {"attention": LATENT},
    "latent-q": {
        "attention": replace(LATENT, latent=LatentSpec(16, None, 12, NormSpec(1e-6))),
        "parallel": True,
    },
    "width": {
        "attention": AttentionSpec(
            4,
            2,
            8,
            0.3,
            RopeSpec(4, 1e4, interleaved=True),
            qk_norm=NormSpec(1e-6),
            qk_norm_over="width",
        )
    },
}


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_layer(changes: dict[str, Any]) -> None:
    built = build(KINDS[2], torch.float32, **changes)
    assert not runs_again(built[0].layers[0]) and decoder.covers(built[1])
    want, want_grads = run(built, None, 5)
    _, kept = run(built, KEEP, 5)
    for got, grad in zip(kept, want_grads, strict=True):
        assert (got - grad).norm() <= 1e-5 * grad.norm()
    for policy in (KEEP, RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, 5)
        assert torch.equal(value, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), policy


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("tile", [5, 33])
def test_mlp_in_tiles(changes: dict[str, Any], tile: int) -> None:
    """Of 34 tokens: the loss and the gradients of the whole."""
    built = build(KINDS[1], torch.float32, **changes)
    want, want_grads = run(built, RECOMPUTE, None)
    for policy in (RECOMPUTE, OFFLOAD):
        value, grads = run(built, replace(policy, tile=tile), None)
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
        for got, grad in zip(grads, want_grads, strict=True):
            assert (got - grad).norm() <= 1e-5 * grad.norm()


def test_tiles_repeat_their_dropout() -> None:
    """What a tile's backward runs again drops what its forward dropped, and tiles differ."""
    built = build(KINDS[2], torch.float64, nf4=False)
    spec, base, adapters = built
    policy = replace(RECOMPUTE, tile=5)
    _, grads = run(built, policy, 5)
    leaf = next(iter(tree.leaves(adapters["layers"][0]["mlp"])))
    step = torch.randn(leaf.a.shape, generator=torch.Generator().manual_seed(2)).double() * 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf.a.add_(step, alpha=sign)
        ends.append(run(built, policy, 5)[0])
        with torch.no_grad():
            leaf.a.sub_(step, alpha=sign)
    at = next(i for i, t in enumerate(tree.tensors(adapters)) if t is leaf.a)
    slope = (grads[at] * step).sum()
    # Another dropout, a third of the features, would be another slope altogether.
    assert abs((ends[0] - ends[1]).detach() / 2 - slope) <= 1e-3 * abs(slope)


def test_a_tile_that_cannot_be() -> None:
    for fates in ({"gate_up": "keep", "tile": 4}, {"gate_up": "recompute", "tile": 0}):
        with pytest.raises(ArgumentError, match="tile is"):
            Policy(**fates)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fates", [{"x": "recompute"}, {"mid": "recompute"}, {"qkv": "kept"}, {"out": None}]
)
def test_a_fate_that_cannot_be(fates: Any) -> None:
    ((name, fate),) = fates.items()
    with pytest.raises(ArgumentError, match=f"{name} is {fate!r}: expected .*'offload'"):
        Policy(**fates)


def test_against_float64() -> None:
    """fp32 gradients of the fast path against float64 autograd on the same weights."""
    spec, base, adapters = build(KINDS[1], torch.float32, nf4=False)
    _, grads = run((spec, base, adapters), RECOMPUTE, None)
    wide = tree.map_tensors(lambda t: t.double(), base)
    wide_adapters = tree.map_tensors(lambda t: t.detach().double().requires_grad_(), adapters)
    _, exact = run((spec, wide, wide_adapters), None, None)
    for got, want in zip(grads, exact, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_a_path_for_everything() -> None:
    """Trained params and transforms run through autograd, with the same gradients."""
    spec, base, adapters = build(KINDS[0], torch.float32, nf4=False)
    assert not decoder.covers(tree.map_tensors(lambda t: t.clone().requires_grad_(), base))
    assert decoder.covers(base)
    ids = torch.arange(10)[None]

    def by_function(adapters: Any) -> torch.Tensor:
        return loss.loss(base, spec, ids, ids, adapters=adapters, residuals=RECOMPUTE)

    free = tree.map_tensors(lambda t: t.detach(), adapters)
    pulled = torch.func.grad(by_function)(free)
    value = by_function(adapters)
    for got, want_grad in zip(
        tree.tensors(pulled), torch.autograd.grad(value, tree.tensors(adapters)), strict=True
    ):
        assert (got - want_grad).norm() <= 1e-5 * want_grad.norm()


def with_magnitudes(adapters: Any) -> Any:
    """LoRA as DoRA."""
    g = torch.Generator().manual_seed(8)
    return tree.map(
        lambda leaf: replace(leaf, magnitude=torch.rand(len(leaf.b), generator=g).requires_grad_()),
        adapters,
    )


MIXTURE = MoESpec(6, 2, MLPSpec(32), shared=MLPSpec(8), shared_gate=True)
PARTS: dict[str, dict[str, Any]] = {
    "mlp": {"mlp": MIXTURE, "post_norm": True},
    "mlp-parallel": {"mlp": MIXTURE, "parallel": True},
    "attn-mask": {},
    "attn-mask-beside": {"recurrent": ShortConvSpec(32, 3)},
    "attn-mlp-dora": {},
    "attn-mlp-recurrent-dora": {"recurrent": ShortConvSpec(32, 3)},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_run_again(name: str) -> None:
    """By autograd, beside others by hand: the gradients of plain autograd, equal to the bit under
    every policy.
    """
    spec, base, adapters = build((False, False, 0.3, "silu"), torch.float32, **PARTS[name])
    more: dict[str, Any] = {}
    if "mask" in name:
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[0, 4:9] = 0
        more["layout"] = layout.from_mask(mask)
    if "dora" in name:
        adapters = with_magnitudes(adapters)
    waits = "dropout" if name.startswith("mlp") else None
    found = runs_again(spec.layers[0], adapters["layers"][0], masked="mask" in name, waits=waits)
    assert sorted(found) == [part for part in ("attn", "mlp", "recurrent") if part in name]
    built = spec, base, adapters
    want, want_grads = run(built, None, 5, **more)
    kept, kept_grads = run(built, KEEP, 5, **more)
    assert torch.equal(kept, want)
    for got, grad in zip(kept_grads, want_grads, strict=True):
        assert (got - grad).norm() <= 1e-5 * grad.norm()
    for policy in (RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, 5, **more)
        assert torch.equal(value, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True)), policy


RECURRENT: dict[str, RecurrentSpec] = {
    "conv": ShortConvSpec(32, 3, bias=True),
    "mamba2": Mamba2Spec(
        *(4, 8, 2, 5, 3),
        norm=NormSpec(1e-5),
        in_bias=True,
        in_scale=1.3,
        scales=(0.9, 1.2, 0.7, 1.4, 0.6),
        out_scale=0.5,
    ),
    "delta": DeltaNetSpec(2, 4, 6, 5, 3, NormSpec(1e-5)),
    "delta by head": DeltaNetSpec(2, 4, 6, 5, 3, NormSpec(1e-5), by_key_head=True),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_mixers(name: str, beside: bool) -> None:
    """By hand around their scans: the gradients of plain autograd, packed and with dropout or with
    DoRA, equal to the bit under every policy.
    """
    how: dict[str, Any] = {"recurrent": RECURRENT[name]}
    more: dict[str, Any] = {}
    if not beside:  # attention would need a mask
        how["attention"] = None
        places = torch.cat([torch.arange(6), torch.arange(11)]).expand(2, -1)
        more["layout"] = layout.from_positions(places)
    dropout = 0.0 if beside else 0.3
    # In fp64: what a delta net normalises may be next to nothing.
    kind = False, False, dropout, "silu"
    spec, base, adapters = build(kind, torch.float64, nf4=False, **how)
    if beside:
        adapters = with_magnitudes(adapters)
    assert runs_again(spec.layers[0], adapters["layers"][0]) == {}
    built = spec, base, adapters
    want, want_grads = run(built, None, 5, **more)
    kept, kept_grads = run(built, KEEP, 5, **more)
    torch.testing.assert_close(kept, want)
    for got, grad in zip(kept_grads, want_grads, strict=True):
        assert (got - grad).norm() <= 1e-5 * grad.norm()
    for policy in (RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, 5, **more)
        assert torch.equal(value, kept)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True)), policy


@pytest.mark.parametrize("masked", [False, True])
def test_layers_that_share_keys_and_values(masked: bool) -> None:
    """Their gradients reach the layer that lends them; under a mask all of these run again."""
    spec, base, adapters = build(KINDS[1], torch.float32)
    layer = spec.layers[0]
    assert layer.attention is not None
    lends, borrows = (
        replace(layer, attention=replace(layer.attention, **how))
        for how in ({"lends": True}, {"kv_from": 0})
    )
    spec = replace(spec, layers=(lends, borrows, borrows))
    for nodes in (base["layers"][1:], adapters["layers"][1:]):
        for node in nodes:
            node["attn"] = {k: v for k, v in node["attn"].items() if k in ("q", "q_norm", "o")}
    built = spec, base, adapters
    more: dict[str, Any] = {}
    if masked:
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[0, 4:9] = 0
        more["layout"] = layout.from_mask(mask)
    for own in spec.layers:
        assert sorted(runs_again(own, masked=masked)) == (["layer"] if masked else [])
    want, want_grads = run(built, None, None, **more)
    _, kept = run(built, KEEP, None, **more)
    for got, grad in zip(kept, want_grads, strict=True):
        assert grad.norm() > 0 and (got - grad).norm() <= 1e-5 * grad.norm()
    for policy in (RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, None, **more)
        assert torch.equal(value, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), policy


DORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent": {"attention": LATENT},
    "gated": {"attention": replace(ROTATED, gated=True)},
    "scaled": {"mlp": MLPSpec(64, gate_scale=0.7, down_scale=1.3), "parallel": True},
}


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
def test_dora(name: str, nf4: bool) -> None:
    """By hand, without dropout: the gradients of plain autograd, magnitudes' too, and equal to the
    bit under every policy.
    """
    kind = (False, "latent" not in name, 0.0, "silu")
    spec, base, adapters = build(kind, torch.float32, nf4, **DORA[name])
    g = torch.Generator().manual_seed(8)

    def dora(leaf: lora.LoRA) -> lora.LoRA:
        magnitude = torch.rand(len(leaf.b), generator=g) + 0.2
        magnitude[3] = 0.0  # of which a gradient can still come
        return replace(leaf, magnitude=magnitude.requires_grad_(), scale=0.7)

    built = spec, base, tree.map(dora, adapters)
    assert not runs_again(spec.layers[0], built[2]["layers"][0])
    want, want_grads = run(built, None, None)
    kept, kept_grads = run(built, KEEP, None)
    torch.testing.assert_close(kept, want, rtol=1e-5, atol=0)
    for got, grad in zip(kept_grads, want_grads, strict=True):
        assert grad.norm() > 0 and (got - grad).norm() <= 1e-5 * grad.norm()
        if grad.dim() == 1:
            torch.testing.assert_close(got[3], grad[3], rtol=1e-4, atol=1e-6 * float(grad.norm()))
    for policy in (RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, None)
        assert torch.equal(value, kept)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True)), policy


MIXTURES: dict[str, MoESpec] = {
    "softmax": MoESpec(6, 2, MLPSpec(32)),
    "shared": MoESpec(
        6, 2, MLPSpec(32, "gelu"), "sigmoid", choice_bias=True, shared=MLPSpec(8), scale=2.5
    ),
    "shared-gate": replace(MIXTURE, normalise=False),
    "inputs": MoESpec(6, 1, MLPSpec(32), "top_sigmoid", weigh_inputs=True, shared=MLPSpec(8)),
    "no-gate": MoESpec(6, 3, MLPSpec(32, "relu2", bias=True, gated=False), "top_softmax"),
    "clamped": MoESpec(
        6,
        2,
        MLPSpec(32, "clamped", bias=True, alpha=1.7, limit=7.0),
        "top_softmax",
        router_bias=True,
    ),
    "norms": MoESpec(
        6, 2, MLPSpec(32), shared=MLPSpec(16), norms=NormSpec(1e-6), router_norm=NormSpec(1e-6)
    ),
    "scaled": MoESpec(6, 2, MLPSpec(32, gate_scale=0.7, down_scale=1.3), "sparse_mixer"),
}


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name: str, nf4: bool) -> None:
    """By hand: as by autograd, and equal to the bit under every policy."""
    changes = {"mlp": MIXTURES[name], "post_norm": nf4}
    spec, base, adapters = build(KINDS[0], torch.float32, nf4, **changes)
    if name == "softmax":  # as files of stacked experts have them
        g = torch.Generator().manual_seed(4)
        for layer in adapters["layers"]:
            del layer["mlp"]["experts"]["gate"], layer["mlp"]["experts"]["up"]
            pair = (torch.randn(s, generator=g).requires_grad_() for s in ((6, 3, 32), (6, 64, 3)))
            layer["mlp"]["experts"]["gate_up"] = lora.LoRA(*pair, 0.3)
    if "no-gate" in name:  # one adapter of one projection
        for layer in adapters["layers"]:
            del layer["mlp"]["experts"]["up"]
    built = spec, base, adapters
    own = base["layers"][0], adapters["layers"][0]
    half = Layer(0, spec.layers[0], None, KEEP, None, None).bound(torch.float32, *own, None).mlp
    assert isinstance(half.functions["mlp"], FastExperts)
    want, want_grads = run(built, None, 5)
    kept, kept_grads = run(built, KEEP, 5)
    assert torch.equal(kept, want)
    for got, grad in zip(kept_grads, want_grads, strict=True):
        assert grad.norm() > 0 and (got - grad).norm() <= 1e-5 * grad.norm()
    for policy in (RECOMPUTE, OFFLOAD, POLICIES[-1]):
        value, grads = run(built, policy, 5)
        assert torch.equal(value, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept_grads, strict=True)), policy


def test_no_down_projection_of_an_expert_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, base, adapters = build(KINDS[0], torch.float32, nf4=False, mlp=MIXTURES["softmax"])
    down = [id(p["mlp"]["experts"]["down"]["weight"]) for p in base["layers"]]
    ran: list[tuple[int, bool]] = []
    real = expert_products.product

    def product(rows: Any, leaf: Any, *rest: Any, turned: bool = False) -> torch.Tensor:
        ran.append((id(leaf), turned))
        return real(rows, leaf, *rest, turned=turned)

    monkeypatch.setattr(expert_products, "product", product)
    run((spec, base, adapters), RECOMPUTE, None)
    assert all(ran.count((i, False)) == ran.count((i, True)) == 1 for i in down)
    assert len(ran) == 3 * (3 + 2 + 3)


def test_documents() -> None:
    """A packed row through the layer equals each document alone."""
    spec, base, adapters = build(KINDS[1], torch.float32)
    layer, p, adapter = spec.layers[0], base["layers"][0], adapters["layers"][0]
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2))
    packed = layout.from_cu_seqlens(torch.tensor([0, 5, 12]), 12, 7)
    assert packed.documents is not None
    table = rope.table(layer.attention.rope, packed.positions)
    y = Layer(0, layer, packed.documents, RECOMPUTE, None, None).run(x, p, adapter, table)
    (dx,) = torch.autograd.grad(y, x, dy)
    for begin, end in ((0, 5), (5, 12)):
        alone = x[:, begin:end].detach().requires_grad_()
        short = rope.table(layer.attention.rope, torch.arange(end - begin)[None])
        want = decoder.layer(alone, p, adapter, short, None, spec=layer)
        (want_dx,) = torch.autograd.grad(want, alone, dy[:, begin:end])
        for got, exact in ((y[:, begin:end], want), (dx[:, begin:end], want_dx)):
            assert (got - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("parallel", [False, True])
def test_no_gradient_of_an_input_that_needs_none(
    parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer with adapters: its gradients as ever, without q's, k's and v's products."""
    spec, base, adapters = build(KINDS[1], torch.float32, parallel=parallel)
    layer, p, adapter = spec.layers[0], base["layers"][0], adapters["layers"][0]
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2, 9, 32, generator=g) for _ in range(2))
    table = rope.table(layer.attention.rope, torch.arange(9)[None])
    needed: list[bool] = []
    real = pulling.pull_input

    def pull_input(*args: Any, **keywords: Any) -> Any:
        needed.append(keywords["need_x"])
        return real(*args, **keywords)

    monkeypatch.setattr(pulling, "pull_input", pull_input)
    found = []
    for x_needs in (True, False):
        given = x.clone().requires_grad_(x_needs)
        y = Layer(0, layer, None, RECOMPUTE, None, None).run(given, p, adapter, table)
        y.backward(dy)
        assert (given.grad is not None) == x_needs
        found.append([t.grad for t in tree.tensors(adapter)])
        for t in tree.tensors(adapter):
            t.grad = None
    # Of down, of gate and up, of o, then of q, k and v; a parallel layer's MLP reads its input too.
    assert needed == [True] * 5 + [not parallel, True, False]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_that_runs_out_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fast_attention, "attention_backward", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(build(KINDS[0], torch.float32), RECOMPUTE, None)
    assert "layer 2" in caught.value.__notes__[0] and "gate_up='recompute'" in str(
        caught.value.__notes__
    )


def test_bytes_per_token() -> None:
    """The plan's arithmetic is the size of the residuals themselves."""
    spec, base, adapters = build(KINDS[0], torch.float32)
    layer = spec.layers[0]
    x = torch.randn(2, 9, 32)
    table = rope.table(layer.attention.rope, torch.arange(9)[None])
    own = base["layers"][0], adapters["layers"][0]
    with torch.no_grad():
        bound = Layer(0, layer, None, KEEP, None, None).bound(x.dtype, *own, table)
        _, residuals = bound.forward(x)
    sizes = bytes_per_token(layer, spec.dim, 4)
    ranks = sum(leaf.rank for leaf in tree.leaves(adapters["layers"][0]))
    lows = [residuals.pop(name) for name in list(residuals) if name.startswith("low_")]
    assert tree.nbytes(lows) == ranks * 4 * 18
    assert set(sizes) == set(residuals)
    for name, value in residuals.items():
        assert tree.nbytes(value) == sizes[name] * 18, name


def test_backends_that_keep_numbers_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's forward returns absent tensors and lengths beside its seeds; all come back."""
    real_forward, real_backward = attention.attention_forward, attention.attention_backward
    rest = (None, 7, torch.arange(3), None)
    seen = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        return real_forward(*args, **kwargs)._replace(rest=rest)

    def backward(dout: Any, q: Any, k: Any, v: Any, saved: Any, **kwargs: Any) -> Any:
        seen.append(saved.rest)
        return real_backward(dout, q, k, v, saved._replace(rest=()), **kwargs)

    built = build(KINDS[0], torch.float32)
    want = [run(built, policy, None)[1] for policy in (None, KEEP)]
    for module in (attention, fast_attention):
        monkeypatch.setattr(module, "attention_forward", forward)
        monkeypatch.setattr(module, "attention_backward", backward)
    for policy, grads in zip((None, KEEP), want, strict=True):
        got = run(built, policy, None)[1]
        assert all(torch.equal(a, b) for a, b in zip(got, grads, strict=True))
    assert len(seen) == 6
    for kept in seen:
        assert kept[:2] == rest[:2] and torch.equal(kept[2], rest[2]) and kept[3] is None
