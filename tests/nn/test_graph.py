"""A step that cannot be captured is told of, and is not taken for one that fails."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from purelm.nn.graph import capture


@pytest.fixture(autouse=True)
def cuda_that_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("the capture was invalidated")

    graph = SimpleNamespace(capture_begin=lambda **_: None, capture_end=broken)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes: dict[str, Any] = {"CUDAGraph": lambda: graph, "stream": nullcontext}
    fakes |= {"Stream": lambda device: stream, "current_stream": lambda device: stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_what_cannot_be_captured_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert capture(step, torch.device("cpu")) is None
    assert "without a CUDA graph" in caplog.text and "not permitted" in caplog.text


def test_other_errors_of_a_step_stay(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        capture(step, torch.device("cpu"))
    assert not caplog.text
