"""Projections and rematerialised functions: derivatives of derivatives, parts that need none.

Their first derivatives are in test_lora.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from purelm.nn.linear import linear, project, project_reference
from purelm.nn.lora import LoRA
from purelm.nn.remat import remat

Loss = Callable[..., torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


INPUTS = (drawn(2, 6), drawn(5, 2), drawn(3, 6))  # a, b, x
WEIGHT, BIAS = drawn(5, 6), drawn(5)


def cubes(f: Any, seed: int | None) -> Loss:
    def loss(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        adapters = [LoRA(a, b, 0.5, 0.3), None]
        ys = f(x, [{"weight": WEIGHT, "bias": BIAS}, {"weight": WEIGHT}], adapters, seed)
        total: torch.Tensor = ys[0].pow(3).sum() + (ys[0] * ys[1]).sum()
        return total

    return loss


def twice_by_function(loss: Loss) -> tuple[torch.Tensor, ...]:
    """The gradient of the gradient's squared length."""

    def length(*inputs: torch.Tensor) -> torch.Tensor:
        grads = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
        return torch.stack([g.square().sum() for g in grads]).sum()

    found: tuple[torch.Tensor, ...] = torch.func.grad(length, argnums=(0, 1, 2))(*INPUTS)
    return found


def twice_by_graph(loss: Loss) -> tuple[torch.Tensor, ...]:
    inputs = [t.clone().requires_grad_() for t in INPUTS]
    grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), inputs)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("twice", [twice_by_function, twice_by_graph])
@pytest.mark.parametrize("again", [False, True], ids=["project", "remat"])
def test_second_derivatives(
    seed: int | None, twice: Callable[[Loss], tuple[torch.Tensor, ...]], again: bool
) -> None:
    loss = cubes(project, seed)
    got, want = twice(remat(loss) if again else loss), twice(cubes(project_reference, seed))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_what_is_trained_gets_a_gradient() -> None:
    a, b, x = (t.clone() for t in INPUTS)
    for one in (a, b, x):
        one.requires_grad_()
        loss = linear(x, {"weight": WEIGHT}, LoRA(a, b)).pow(2).sum()
        (got,) = torch.autograd.grad(loss, one)
        want = project_reference(x, [{"weight": WEIGHT}], [LoRA(a, b)])[0].pow(2).sum()
        torch.testing.assert_close(got, torch.autograd.grad(want, one)[0])
        one.requires_grad_(False)


def test_inputs_are_left_alone() -> None:
    """Sums in place fall on fresh memory only: nothing that was given changes."""
    a, b, x = INPUTS
    weight, bias = WEIGHT.clone(), BIAS.clone()
    given = [a, b, x, weight, bias]
    before = [t.clone() for t in given]
    x_ = x.clone().requires_grad_()
    y = linear(x_, {"weight": weight, "bias": bias}, LoRA(a, b))
    dy = torch.ones_like(y)
    torch.autograd.grad(y, x_, dy)
    with torch.no_grad():
        linear(x, {"weight": weight, "bias": bias}, LoRA(a, b))
    assert torch.equal(dy, torch.ones_like(dy))
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
