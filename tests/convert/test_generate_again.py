"""`model.generate` again and again: what one call captured, the next replays over new values."""

import copy
from collections.abc import Callable
from typing import Any

import embedded_model
import pytest
import torch

from purelm import FastLanguageModel
from purelm.nn import generate as generation
from purelm.nn import prompt_pass

PROMPT = torch.tensor([[3, 17, 29], [5, 40, 8]])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on a GPU; which steps were captured, those of prompts aside. What is replayed is the step
    as it was then.
    """
    made: list[Any] = []

    def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        made.append(step)
        return step

    monkeypatch.setattr(generation, "capture", capture)
    monkeypatch.setattr(generation, "replayable", lambda device: True)
    monkeypatch.setattr(prompt_pass, "capture", lambda step, device: step)
    return made


def test_training_in_between(captures: list[Any]) -> None:
    model, _ = embedded_model.load()
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False).eval()

    def answer(**how: Any) -> tuple[list[Any], int]:
        """The ids, which are those of eager steps, and how many captures they took."""
        how = {"max_new_tokens": 12, "eos_token_id": []} | how
        before = len(captures)
        ids = model.generate(PROMPT, **how).tolist()
        made = len(captures) - before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "replayable", lambda device: False)
            assert ids == model.generate(PROMPT, **how).tolist()
        return ids, made

    bare, made = answer()
    assert made == 1 and answer() == (bare, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=40.0)
    for _ in range(2):
        # In evaluation mode, as a loop may train that samples all the time.
        model(PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()
    trained, made = answer()
    assert made == 0 and trained != bare
    with model.disable_adapter():
        assert answer() == (bare, 1)
    assert answer() == (trained, 0)
    assert len(copy.deepcopy(model).kept_steps) == 0
    model.train()
    assert len(model.kept_steps) == 0
    assert answer() == (trained, 1)
    # What is made of several adapters is made anew by every call.
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter(["default", "second"])
    assert [answer()[1], answer()[1]] == [1, 1]
