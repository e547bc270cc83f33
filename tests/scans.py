"""A mixer's chunked scan and its single steps against its recurrence, over drawn cases."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from purelm.nn import recurrent

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """Two rows of s tokens; heads: (of values, groups they share). documents: whether the first row
    has those of `segments`, and the second two. fresh: whether no state comes before.
    """

    s: int
    heads: tuple[int, int]
    chunk: int
    seed: int
    segments: list[int]
    documents: bool
    fresh: bool

    def starts(self) -> torch.Tensor | None:
        if not self.documents:
            return None
        rows = torch.tensor([sorted(self.segments[: self.s]), [1] * self.s])
        starts = recurrent.starts(rows, 0)
        assert starts is not None
        starts[1, self.s // 2] = True
        return starts


cases = st.builds(
    Case,
    s=st.integers(1, 13),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 99),
    segments=st.lists(st.integers(0, 4), min_size=13, max_size=13),
    documents=st.booleans(),
    fresh=st.booleans(),
)


def assert_is(
    recurrence: Scan, scan: Scan, step: Scan, drawn: tuple[torch.Tensor, ...], case: Case
) -> None:
    """`drawn`: the inputs of a scan, and the state before them."""
    *inputs, before = drawn
    starts = case.starts()
    state = torch.zeros_like(before) if case.fresh else before
    y, last = scan(*inputs, starts, None if case.fresh else before, case.chunk)
    want, want_last = recurrence(*inputs, starts, state)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, want_last)
    for t in range(case.s):
        at = slice(t, t + 1)
        mine = None if starts is None else starts[:, at]
        one, state = step(*(x[:, at] for x in inputs), mine, state)
        torch.testing.assert_close(one, want[:, at])
    torch.testing.assert_close(state, want_last)
