"""Fixtures that let CPU tensors run the Triton launches, under the interpreter."""

from collections.abc import Iterator

import pytest
import shim
import torch

from purelm.kernels import launch


@pytest.fixture
def interpreted() -> Iterator[None]:
    """CPU tensors take the launch; stores are watched for races."""
    pytest.importorskip("triton")
    shim.install()
    with launch.interpreting(), shim.checking(race=True):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor is NaN (90 where integer), so that an unwritten output shows."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 90)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
