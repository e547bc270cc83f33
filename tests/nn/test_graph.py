"""What is captured is replayed on what its inputs then hold; what cannot be captured is told of."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from purelm.nn import graph
from purelm.nn.graph import capture


@pytest.fixture
def cuda_that_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("the capture was invalidated")

    captured = SimpleNamespace(capture_begin=lambda pool, **_: None, capture_end=broken)
    stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
    fakes: dict[str, Any] = {"CUDAGraph": lambda: captured, "stream": nullcontext}
    fakes |= {"current_stream": lambda device: stream, "empty_cache": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graph, "capture_stream", lambda index: stream)


@pytest.mark.usefixtures("cuda_that_captures_nothing")
def test_what_cannot_be_captured_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert capture(step, torch.device("cpu")) is None
    assert "without a CUDA graph" in caplog.text and "not permitted" in caplog.text


@pytest.mark.usefixtures("cuda_that_captures_nothing")
def test_other_errors_of_a_step_stay(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        raise KeyError("defect")

    for _ in range(2):  # the first leaves no capture under way
        with pytest.raises(KeyError, match="defect"):
            capture(step, torch.device("cpu"))
    assert not caplog.text


@pytest.mark.gpu
def test_a_replay_reads_its_inputs_anew() -> None:
    """A forward with its backward, of two graphs that share memory."""
    device, pool = torch.device("cuda"), torch.cuda.graph_pool_handle()
    x, w = (torch.ones(64, 64, device=device) for _ in range(2))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = w.detach().requires_grad_()
        value = (x @ leaf).square().sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    step()
    graphs = [capture(step, device, pool=pool) for _ in range(2)]
    for i, replay in enumerate((*graphs, *graphs)):
        assert replay is not None
        x.fill_(i + 1)
        w.fill_(2 * i - 3)
        assert all(torch.equal(a, b) for a, b in zip(replay(), step(), strict=True))
    kept = [g.result[0].item() for g in graphs if g is not None]
    assert kept[0] != kept[1] and kept[1] == step()[0].item()


@pytest.mark.gpu
def test_a_step_that_waits_leaves_the_memory_to_others(caplog: pytest.LogCaptureFixture) -> None:
    device, pool = torch.device("cuda"), torch.cuda.graph_pool_handle()
    x = torch.ones(64, device=device)
    assert capture(lambda: x.sum().item(), device, pool=pool) is None
    assert "without a CUDA graph" in caplog.text
    replay = capture(lambda: x.sum(), device, pool=pool)
    assert replay is not None and replay().item() == 64


@pytest.mark.gpu
def test_draws_go_on_from_replay_to_replay() -> None:
    device = torch.device("cuda")
    draws = []
    for draw in (lambda: torch.rand(8, device=device), None):
        replay = capture(lambda: torch.rand(8, device=device), device) if draw is None else draw
        assert replay is not None
        torch.cuda.manual_seed(3)
        draws += [replay().clone() for _ in range(2)]
    assert not torch.equal(draws[0], draws[1])
    assert all(torch.equal(a, b) for a, b in zip(draws[:2], draws[2:], strict=True))
    other = torch.Generator(device).manual_seed(3)
    assert capture(lambda: torch.rand(8, device=device, generator=other), device) is None
