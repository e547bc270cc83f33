"""Parked residuals come back as they were, once."""

from typing import Any

import pytest
import torch

from purelm.errors import ArgumentError
from purelm.nn import lora, loss, params, pinned, rope, tree
from purelm.nn.fast_layer import Layer
from purelm.nn.offload import Offload
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Policy
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec

CPU = torch.device("cpu")


def small() -> tuple[ModelSpec, Any, Any, torch.Tensor]:
    attention = AttentionSpec(2, 1, 8, 8**-0.5, RopeSpec(8, 1e4))
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(24))
    spec = ModelSpec(30, 16, (layer,) * 3, NormSpec(1e-5), 64, init_std=0.3)
    g = torch.Generator().manual_seed(0)
    base = params.init(spec, generator=g)
    adapters = lora.init(spec, generator=g, rank=2, start="random")
    for t in tree.tensors(adapters):
        t.requires_grad_()
    ids = torch.randint(0, 30, (2, 7), generator=g)
    return spec, base, adapters, ids


def test_each_layer_comes_back_once() -> None:
    offload = Offload(CPU)
    parked = {i: {"x": torch.full((2,), float(i)), "rest": (None, 7)} for i in range(3)}
    for i, residuals in parked.items():
        offload.park(i, residuals)
    for i in (2, 1, 0):
        back = offload.fetch(i)
        assert back["x"] is parked[i]["x"] and back["rest"] == (None, 7)
    assert offload.fetch(3) is None
    with pytest.raises(ArgumentError, match="second backward"):
        offload.fetch(1)


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE, OFFLOAD], ids=["keep", "recompute", "offload"])
def test_a_second_backward(policy: Policy) -> None:
    """Gives the same gradients again, or says why it can't."""
    spec, base, adapters, ids = small()
    trained = tree.tensors(adapters)
    value = loss.loss(base, spec, ids, ids, adapters=adapters, residuals=policy)
    first = torch.autograd.grad(value, trained, retain_graph=True)
    if policy is OFFLOAD:
        with pytest.raises(ArgumentError, match="second backward"):
            torch.autograd.grad(value, trained)
    else:
        second = torch.autograd.grad(value, trained)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layers_below_the_first_adapter_keep_and_send_nothing() -> None:
    spec, base, adapters, ids = small()
    free = {"layers": [None, None, adapters["layers"][2]]}
    parked: list[int] = []

    class Watched(Offload):
        def park(self, layer: int, residuals: tree.Tree) -> None:
            parked.append(layer)
            super().park(layer, residuals)

    x = base["embed"]["weight"][ids]
    table = rope.table(spec.layers[0].attention.rope, torch.arange(ids.shape[1])[None])
    offload = Watched(CPU)
    for i, (layer, p) in enumerate(zip(spec.layers, base["layers"], strict=True)):
        fast = Layer(i, layer, None, OFFLOAD, offload, None)
        x = fast.run(x, p, free["layers"][i], table)
        assert x.requires_grad == (i == 2)
    assert parked == [2]


def test_the_fast_path_has_first_derivatives_only() -> None:
    spec, base, adapters, ids = small()
    trained = tree.tensors(adapters)
    value = loss.loss(base, spec, ids, ids, adapters=adapters, residuals=KEEP)
    grads = torch.autograd.grad(value, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (grads[0].sum() + trained[0].sum()).backward()


def test_memory_that_cannot_be_pinned_is_pageable_and_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = torch.empty_like

    def empty_like(t: torch.Tensor, *, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(t, **how)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    turned = torch.randn(3, 5, dtype=torch.bfloat16).T
    with pytest.warns(RuntimeWarning, match="no 30 bytes of host memory could be pinned"):
        host = pinned.like(turned)
    assert (host.shape, host.stride(), host.dtype) == (turned.shape, turned.stride(), turned.dtype)


@pytest.mark.gpu
def test_copies_keep_values_strides_and_place() -> None:
    device = torch.device("cuda", 0)
    offload = Offload(device)
    held: dict[int, Any] = {}
    for i in range(4):
        x = torch.randn(8, 512, 1024, device=device)
        leaves = {"x": x, "turned": x.transpose(0, 1), "none": x[:0], "seed": torch.tensor(5)}
        held[i] = {k: v.cpu() for k, v in leaves.items()}
        offload.park(i, leaves)
        del x, leaves
        torch.randn(8, 512, 1024, device=device)  # takes the memory that may be free too early
    for i in reversed(range(4)):
        back = offload.fetch(i)
        assert back["seed"].device == CPU
        for name, want in held[i].items():
            assert torch.equal(back[name].cpu(), want), (i, name)
        assert back["turned"].stride() == (1024, 512 * 1024, 1)
        assert back["x"].device == device and back["none"].device == device
        del back
        torch.randn(8, 512, 1024, device=device)
