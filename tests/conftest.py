"""What every test shares: the interpreter's switch, hypothesis profiles."""

import shim  # isort: skip  (sets TRITON_INTERPRET before anything can import triton)

import os

import hypothesis
import pytest
import torch
from hypothesis import Phase

del shim

# The workers share the cores.
torch.set_num_threads(1)

_common = {
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("quick", max_examples=30, **_common)
hypothesis.settings.register_profile("full", max_examples=300, **_common)


def pytest_configure(config: pytest.Config) -> None:
    """The full lane (-m full) draws ten times as many examples; the GPU's (-m gpu) compiles."""
    chosen = str(config.getoption("-m") or "").split()
    full = "full" in chosen and "not full" not in " ".join(chosen)
    hypothesis.settings.load_profile("full" if full else "quick")
    if chosen == ["gpu"]:
        # A process interprets or compiles, never both, and triton is not imported yet.
        os.environ["TRITON_INTERPRET"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available():
        return
    unfit = pytest.mark.skip(reason="needs a GPU and a run of its own, pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(unfit)
