"""Experts on sorted tokens against every expert on every token, and what has no tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import shim
import torch
from oracles import assert_rows

from purelm.errors import ArgumentError
from purelm.kernels import launch
from purelm.nn import dispatch, experts, stacks, tree
from purelm.nn.lora import LoRA
from purelm.nn.params import param_specs
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec, NormSpec
from purelm.quant import nf4
from purelm.quant.linear import weight_of

E, X = 16, 6
F64 = torch.float64  # in which both ways agree closely
SPECS = [
    MoESpec(X, 2, MLPSpec(24), normalise=False),
    MoESpec(X, 3, MLPSpec(24, "gelu", gated=False), router="top_softmax"),
    MoESpec(
        X, 2, MLPSpec(24), router="sigmoid", choice_bias=True, groups=3, active_groups=2, scale=2.5
    ),
    MoESpec(X, 1, MLPSpec(24), shared=MLPSpec(8), shared_gate=True),
]
specs = pytest.mark.parametrize("spec", SPECS, ids=["softmax", "top", "groups", "shared"])


def drawn(spec: MoESpec, seed: int = 0, dim: int = E) -> Any:
    """Params [x, e] etc. of one layer's mixture."""
    norm = NormSpec(1e-6)
    layer = LayerSpec(norm, AttentionSpec(1, 1, 4, 1.0, None), spec)
    shapes = param_specs(ModelSpec(7, dim, (layer,), norm, 8))["layers"][0]["mlp"]
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=F64) * 0.4, shapes)


def adapters() -> Any:
    generator = torch.Generator().manual_seed(5)
    pair = (torch.randn(s, generator=generator, dtype=F64) for s in ((X, 3, 24), (X, E, 3)))
    return {"experts": {"down": LoRA(*pair, 0.1)}}


def tokens(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randn(rows, length, E, generator=torch.Generator().manual_seed(1), dtype=F64)


@specs
def test_each_token_is_the_sum_over_its_experts(spec: MoESpec) -> None:
    """Under vmap every expert sees every token, which is the formula."""
    p, own, x = drawn(spec), adapters(), tokens()
    ours = experts.moe(x, p, own, spec)
    want = torch.vmap(lambda row: experts.moe(row[None], p, own, spec)[0])(x)
    torch.testing.assert_close(ours, want)
    alone = torch.cat([experts.moe(x[:, i : i + 1], p, own, spec) for i in range(x.shape[1])], 1)
    torch.testing.assert_close(ours, alone)


@specs
def test_gradients_are_those_of_the_formula(spec: MoESpec) -> None:
    p, own, x = drawn(spec), adapters(), tokens().requires_grad_()

    def f(x: torch.Tensor) -> torch.Tensor:
        return experts.moe(x, p, own, spec).square().sum()

    torch.testing.assert_close(torch.autograd.grad(f(x), x)[0], torch.func.grad(f)(x.detach()))


def test_groups_choose_as_the_definition_says() -> None:
    """Two best groups of two by the sum of their experts, then the two best experts in them."""
    spec = SPECS[2]
    router = {"weight": torch.eye(X), "bias": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.9])}
    weights, chosen = experts.route(torch.tensor([[2.0, -4, 1.5, 1.4, -3, -2]]), router, spec)
    # Sums: 0.88 + 0.02, 0.82 + 0.80, 0.05 + 1.02: the first expert is out with its group.
    assert chosen.sort().values.tolist() == [[2, 5]]
    picked = torch.tensor([1.5, -2.0]).sigmoid()
    want = (2.5 * picked / picked.sum()).sort().values
    torch.testing.assert_close(weights.sort().values, want[None])


def test_trained_experts_without_tokens_have_zero_gradients_and_frozen_ones_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, p, own = SPECS[0], drawn(SPECS[0]), adapters()
    x = tokens(1, 1)
    ran: list[int] = []
    real = experts.mlp
    monkeypatch.setattr(experts, "mlp", lambda x, *rest: ran.append(len(x)) or real(x, *rest))
    at_once = experts.moe(x, p, own, spec)
    monkeypatch.setattr(experts, "waits_for", lambda *_: "one by one, to be measured")
    torch.testing.assert_close(experts.moe(x, p, own, spec), at_once)
    ran.clear()
    experts.moe(x, p, own, spec)
    assert ran == [1, 1]
    leaf = own["experts"]["down"]
    a = leaf.a.clone().requires_grad_()
    own = {"experts": {"down": LoRA(a, leaf.b)}}
    (grad,) = torch.autograd.grad(experts.moe(x, p, own, spec).sum(), a)
    assert sorted(bool(g.any()) for g in grad) == [False] * 4 + [True] * 2


def test_4_bit_experts_are_what_they_dequantize_to() -> None:
    spec, p, x = SPECS[0], tree.map(lambda t: t.float(), drawn(SPECS[0])), tokens().float()
    each = tree.map(nf4.quantize, stacks.apart(p["experts"]))
    p["experts"] = stacks.joined(each)
    dense = {**p, "experts": stacks.joined(tree.map(nf4.dequantize, each))}
    x.requires_grad_()
    ours, want = (experts.moe(x, q, None, spec) for q in (p, dense))
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, want)))


def wide(leaf: Any) -> Any:
    """The leaf in float64; a 4-bit one as what it dequantizes to."""
    if isinstance(leaf, LoRA):
        return replace(leaf, a=leaf.a.detach().double(), b=leaf.b.detach().double())
    return weight_of(leaf, torch.float64).detach()


@pytest.fixture
def interpreted() -> Iterator[None]:
    pytest.importorskip("triton")
    shim.install()
    with launch.interpreting():
        yield


LAUNCHED = {
    "16 bits": (False, False, MoESpec(5, 2, MLPSpec(64))),
    "4 bits": (True, False, MoESpec(5, 2, MLPSpec(64))),
    "gate and up together": (True, True, MoESpec(5, 3, MLPSpec(64, "gelu"))),
    "inputs weighed": (False, True, MoESpec(5, 2, MLPSpec(64), "top_sigmoid", weigh_inputs=True)),
    "scaled": (False, False, MoESpec(5, 1, MLPSpec(64, gate_scale=0.7, down_scale=1.5), scale=2.0)),
}


@pytest.mark.parametrize(("four_bits", "both", "spec"), LAUNCHED.values(), ids=LAUNCHED)
def test_all_in_one_launch(interpreted: None, four_bits: bool, both: bool, spec: MoESpec) -> None:
    """Output and gradients of the grouped products against the experts one by one."""
    generator = torch.Generator().manual_seed(7)
    p = tree.map(lambda t: t.float(), drawn(spec, dim=64))
    if four_bits:
        p["experts"] = stacks.joined(tree.map(nf4.quantize, stacks.apart(p["experts"])))

    def pair(out: int, inp: int) -> LoRA:
        a, b = (torch.randn(s, generator=generator) * 0.2 for s in ((5, 3, inp), (5, out, 3)))
        return LoRA(a.requires_grad_(), b.requires_grad_(), 0.5)

    own = {"gate_up": pair(128, 64)} if both else {"gate": pair(64, 64), "up": pair(64, 64)}
    own["down"] = pair(64, 64)
    x = torch.randn(2, 7, 64, generator=generator).requires_grad_()
    router = p["router"]["weight"].requires_grad_()
    assert (
        experts.waits_for(p["experts"], stacks.separated({"experts": own})["experts"], spec) is None
    )

    def everything(x: Any, p: Any, own: Any, router: Any) -> list[torch.Tensor]:
        y = experts.moe(x, {**p, "router": {"weight": router}}, {"experts": own}, spec)
        pull = torch.ones_like(y).cumsum(1)
        return [y, *torch.autograd.grad(y, [x, router, *tree.tensors(own)], pull)]

    ours = everything(x, p, own, router)
    with launch.interpreting(False):
        eager = everything(x, p, own, router)
        exact_own = tree.map(lambda leaf: wide(leaf), own)
        for t in tree.tensors(exact_own):
            t.requires_grad_()
        exact = everything(
            x.detach().double().requires_grad_(),
            tree.map(wide, p),
            exact_own,
            router.detach().double().requires_grad_(),
        )
    for got, plain, truth in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.detach().reshape(1, -1) for t in (got, plain, truth)))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_dispatch_and_back(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread and combined, in chunks or not, against the sum over the choices; gradients too."""
    monkeypatch.setattr(dispatch, "CHUNK", 16)
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(rows, 7, generator=g).topk(3, -1).indices
    x, weights = torch.randn(rows, 4, generator=g, dtype=F64), torch.rand(rows, 3, dtype=F64)
    where = dispatch.places(chosen, 7)
    ids = chosen.flatten()[where.order]
    assert torch.equal(ids, where.ids) and torch.equal(ids, ids.sort().values)
    factors = torch.arange(1.0, 8.0, dtype=F64)

    def ours(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = dispatch.spread(x, where, 3) * factors[ids][:, None]
        return dispatch.combine(rows, weights, where)

    want = x * (factors[chosen] * weights).sum(-1, keepdim=True)
    torch.testing.assert_close(ours(x, weights), want)
    assert torch.autograd.gradcheck(ours, (x.requires_grad_(), weights.requires_grad_()))


def test_trees_of_stacks_and_of_experts_are_each_other() -> None:
    spec = SPECS[3]
    p, own = {"layers": [{"mlp": drawn(spec)}]}, {"layers": [None, {"mlp": adapters()}]}
    for whole in (p, own):
        each = stacks.one_by_one(whole)
        back = stacks.together(each)
        assert dict(tree.items(back)).keys() == dict(tree.items(whole)).keys()
        pairs = zip(tree.tensors(back), tree.tensors(whole), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    each = stacks.one_by_one(own)["layers"][1]["mlp"]["experts"]
    with pytest.raises(ArgumentError, match="differ in what they have"):
        stacks.joined([*each[:-1], {}])
    odd = replace(each[0]["down"], a=each[0]["down"].a[:2], b=each[0]["down"].b[:, :2])
    with pytest.raises(ArgumentError, match="do not make one stack"):
        stacks.joined([{"down": odd}, *each[1:]])
