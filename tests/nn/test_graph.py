"""What is captured is replayed on what its inputs then hold; what cannot be captured is told of."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from purelm.nn import graph
from purelm.nn.graph import Pool, capture


class Cuda:
    """Captures nothing, and remembers what was asked; `broken`: the first capture cannot end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.broken = False
        stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
        fakes: dict[str, Any] = {"CUDAGraph": self.graph, "stream": nullcontext}
        fakes |= {"current_stream": lambda device: stream, "empty_cache": lambda: None}
        fakes |= {"graph_pool_handle": lambda: (0, len(self.asked))}
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            fake = partial(lambda name, index, pool: self.asked.append((name, pool)), name)
            patch.setattr(torch._C, name, fake, raising=False)
        patch.setattr(graph, "capture_stream", lambda index: stream)

    def graph(self) -> Any:
        def end() -> None:
            self.asked.append("end")
            if self.broken and self.asked.count("end") == 1:
                raise RuntimeError("the capture was invalidated")

        def begin(pool: Any = None, **_: Any) -> None:
            self.asked.append(("begin", pool))

        return SimpleNamespace(capture_begin=begin, capture_end=end)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.mark.parametrize("broken", [False, True])
def test_what_cannot_be_captured_is_told(
    cuda: Cuda, broken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What it began is ended, where the driver says that it is broken too."""

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda.broken, pool = broken, Pool()
    first = pool.handle
    assert capture(step, torch.device("cpu"), pool=pool) is None
    assert "without a CUDA graph" in caplog.text and "not permitted" in caplog.text
    ended = [("_cuda_endAllocateToPool", first), ("_cuda_releasePool", first)]
    again = [*ended, ("begin", None), "end"]
    assert cuda.asked == [("begin", first), "end", *(again if broken else [])]
    assert (pool.handle == first) is not broken


def test_other_errors_of_a_step_stay(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        raise KeyError("defect")

    for _ in range(2):  # the first leaves no capture under way
        with pytest.raises(KeyError, match="defect"):
            capture(step, torch.device("cpu"))
    assert not caplog.text and cuda.asked.count("end") == 2


@pytest.mark.gpu
def test_a_replay_reads_its_inputs_anew() -> None:
    """A forward with its backward, of two graphs that share memory."""
    device, pool = torch.device("cuda"), Pool()
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
def test_a_step_that_waits_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Its pool serves others, the generator draws, and memory that is free is given back."""
    device, pool = torch.device("cuda"), Pool()
    x = torch.ones(64, device=device)
    assert capture(lambda: (x * 2).sum().item(), device, pool=pool) is None
    assert "without a CUDA graph" in caplog.text and "occupied" not in caplog.text
    replay = capture(lambda: x.sum(), device, pool=pool)
    assert replay is not None and replay().item() == 64
    assert torch.rand(8, device=device).unique().numel() > 1
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = torch.ones(1 << 26, device=device)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


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
