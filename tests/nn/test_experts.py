"""Experts on sorted tokens against every expert on every token, and what has no tokens."""

from typing import Any

import pytest
import torch

from purelm.nn import experts, tree
from purelm.nn.lora import LoRA
from purelm.nn.params import param_specs
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec, NormSpec
from purelm.quant import nf4

E, X = 16, 6
F64 = torch.float64  # in which both ways agree closely
SPECS = [
    MoESpec(X, 2, MLPSpec(24), normalise=False),
    MoESpec(X, 3, MLPSpec(24, "gelu", gated=False), router="top_softmax"),
    MoESpec(X, 2, MLPSpec(24), router="sigmoid", groups=3, active_groups=2, scale=2.5),
    MoESpec(X, 1, MLPSpec(24), shared=MLPSpec(8), shared_gate=True),
]
specs = pytest.mark.parametrize("spec", SPECS, ids=["softmax", "top", "groups", "shared"])


def drawn(spec: MoESpec, seed: int = 0) -> Any:
    """Params [x, e] etc. of one layer's mixture."""
    norm = NormSpec(1e-6)
    layer = LayerSpec(norm, AttentionSpec(1, 1, 4, 1.0, None), spec)
    shapes = param_specs(ModelSpec(7, E, (layer,), norm, 8))["layers"][0]["mlp"]
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=F64) * 0.4, shapes)


def adapters() -> Any:
    generator = torch.Generator().manual_seed(5)
    down = [
        LoRA(*(torch.randn(s, generator=generator, dtype=F64) for s in ((3, 24), (E, 3))), 0.1)
    ] * X
    return {"experts": [{"down": leaf} for leaf in down]}


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
    experts.moe(x, p, own, spec)
    assert ran == [1, 1]
    own = {
        "experts": [
            {"down": LoRA(leaf["down"].a.clone().requires_grad_(), leaf["down"].b)}
            for leaf in own["experts"]
        ]
    }
    given = [leaf["down"].a for leaf in own["experts"]]
    grads = torch.autograd.grad(experts.moe(x, p, own, spec).sum(), given)
    assert sorted(bool(g.any()) for g in grads) == [False] * 4 + [True] * 2


def test_4_bit_experts_are_what_they_dequantize_to() -> None:
    spec, p, x = SPECS[0], tree.map(lambda t: t.float(), drawn(SPECS[0])), tokens().float()
    p["experts"] = tree.map(nf4.quantize, p["experts"])
    dense = {**p, "experts": tree.map(nf4.dequantize, p["experts"])}
    x.requires_grad_()
    ours, want = (experts.moe(x, q, None, spec) for q in (p, dense))
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, want)))
