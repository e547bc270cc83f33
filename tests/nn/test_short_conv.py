"""The causal convolution against torch's own, document by document and piece by piece."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.nn import recurrent
from purelm.nn.short_conv import causal_conv, conv_state

CHANNELS = 3


def alone(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """torch's convolution of one document [s, c]."""
    kernel = p["weight"].shape[-1]
    wide = F.pad(x.T[None], (kernel - 1, 0))
    return F.conv1d(wide, p["weight"], p.get("bias"), groups=CHANNELS)[0].T


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    kernel=st.integers(1, 5),
    bias=st.booleans(),
    padding=st.integers(0, 4),
    cuts=st.sets(st.integers(1, 20), max_size=4),
)
def test_documents_in_pieces(
    lengths: list[int], kernel: int, bias: bool, padding: int, cuts: set[int]
) -> None:
    """However a row of documents is cut into calls, each document has what it has alone."""
    generator = torch.Generator().manual_seed(kernel)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    p = {"weight": draw(CHANNELS, 1, kernel)} | ({"bias": draw(CHANNELS)} if bias else {})
    documents = [draw(n, CHANNELS) for n in lengths]
    row = torch.cat([draw(padding, CHANNELS), *documents])[None]
    segments = [0] * padding + [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    state = {"conv": conv_state(CHANNELS, kernel, 1, torch.float64, "cpu")}
    bounds = [0, *sorted(c for c in cuts if c < row.shape[1]), row.shape[1]]
    parts = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        starts = recurrent.starts(torch.tensor([segments[:end]]), begin)
        parts.append(causal_conv(row[:, begin:end], p, starts, state))
    want = torch.cat([alone(document, p) for document in documents])
    torch.testing.assert_close(torch.cat(parts, 1)[0, padding:], want)
    whole = causal_conv(row, p, recurrent.starts(torch.tensor([segments]), 0))
    torch.testing.assert_close(whole[0, padding:], want)


def test_sums_in_fp32() -> None:
    """In bf16 the taps are summed in fp32 and rounded once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, CHANNELS, generator=generator).bfloat16()
    p = {"weight": torch.randn(CHANNELS, 1, 4, generator=generator).bfloat16()}
    wide = {"weight": p["weight"].float()}
    want = torch.stack([alone(row.float(), wide) for row in x]).bfloat16()
    assert torch.equal(causal_conv(x, p, None), want)
