"""Recurrent mixers over the launches, on the CPU by the interpreter: prompts, steps, gradients."""

from collections.abc import Iterator
from typing import Any

import hybrids
import pytest
import shim
import torch
from oracles import assert_rows

from purelm.kernels import launch
from purelm.nn import recurrent, tree

# The launches that a prompt, a step and a backward take, by mixer.
TAKEN = {
    "conv": {"short_conv", "short_conv_step", "short_conv_backward"},
    "mamba2": {"short_conv", "short_conv_step", "short_conv_backward"}
    | {"gated_norm", "gated_norm_backward", "ssd", "ssd_backward", "ssd_step"},
    "delta": {"short_conv", "short_conv_step", "short_conv_backward"}
    | {"gated_norm", "gated_norm_backward", "delta_rule", "delta_rule_backward", "delta_step"},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the launches that run."""
    pytest.importorskip("triton")
    shim.install()
    names: set[str] = set()

    def noted(name: str, op: Any) -> Any:
        def call(*args: Any) -> Any:
            names.add(name)
            return op(*args)

        return call

    for name, op in vars(launch.ops).copy().items():
        monkeypatch.setattr(launch.ops, name, noted(name, op))
    with launch.interpreting(), shim.checking(race=True):
        yield names


def run(spec: Any, p: Any, x: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    """A prompt and single tokens after it, then the gradient of the whole without a state."""
    state = recurrent.empty(spec, x.shape[0], x.dtype, "cpu")
    with torch.no_grad():
        parts = [recurrent.mix(x[:, :5], p, None, spec, starts[:, :5], state)]
        for t in range(5, x.shape[1]):
            parts.append(recurrent.mix(x[:, t : t + 1], p, None, spec, None, state))
    leaf = x.clone().requires_grad_()
    y = recurrent.mix(leaf, p, None, spec, starts)
    (dx,) = torch.autograd.grad(y.float().square().sum(), leaf)
    return [torch.cat(parts, 1), y.detach(), dx, *state.values()]


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")
def test_launches_are_the_mixer(kind: str, taken: set[str]) -> None:
    spec, tree_ = hybrids.small(kind)
    mixer = spec.layers[1].recurrent
    assert mixer is not None
    p = tree.map(torch.Tensor.bfloat16, tree_["layers"][1]["recurrent"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, spec.dim, generator=g).bfloat16()
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 3] = True
    ours = run(mixer, p, x, starts)
    # Queries and keys are made as long as 1 by the norm's, whose names are no matter of this.
    assert {name for name in taken if not name.startswith("rms_norm")} == TAKEN[kind]
    taken.clear()
    with launch.interpreting(False):
        eager = run(mixer, p, x, starts)
        wide = tree.map(torch.Tensor.double, p)
        exact = run(mixer, wide, x.double(), starts)
    assert not taken
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_rows(*(t.bfloat16().reshape(1, -1) for t in (mine, theirs)), truth.reshape(1, -1))
