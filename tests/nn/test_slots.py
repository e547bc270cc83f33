"""Rows that come and go in one cache, of models whose layers carry other states too."""

import pytest
import torch
from hybrids import MIXERS, prompt, small

from purelm.nn import decoder, slots


@pytest.mark.parametrize("kind", list(MIXERS))
def test_rows_come_and_go(kind: str) -> None:
    """Each row's logits are those it has alone, whoever joins or leaves."""
    spec, params = small(kind)
    texts = [prompt(i, 1, n) for i, n in enumerate((3, 7, 1))]
    parts = [slots.prefill(params, spec, text)[1] for text in texts]
    rows = slots.join(spec, parts[:2])
    running = texts[:2]

    def step(seed: int) -> None:
        nonlocal rows, running
        new = prompt(seed, len(running), 1)
        logits, rows = slots.decode(params, spec, new, rows)
        running = [torch.cat([r, n[None]], 1) for r, n in zip(running, new, strict=True)]
        for row, got in zip(running, logits, strict=True):
            want = decoder.forward(params, spec, row)[0, -1]
            torch.testing.assert_close(got, want)

    step(11)
    rows = slots.join(spec, [rows, parts[2]])
    running = [*running, texts[2]]
    step(12)
    rows, running = slots.keep(spec, rows, [2, 1]), [running[2], running[1]]
    step(13)
    assert rows.lengths == (3, 10)
