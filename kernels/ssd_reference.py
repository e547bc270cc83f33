"""The scan of Mamba 2: a state that decays and takes up each token, in chunks or token by token.

Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), sec. 6. Letters here: h heads in g groups of
r, p features of a head, n of its state, c chunks of l tokens. A head's state [p, n] is

    state_t = exp(decay_t) state_(t-1) + x_t b_t^T,    y_t = state_t c_t

in fp32 (or wider): decay_t = dt_t A is at most 0, and dt_t is a factor of x_t already.
"""

import torch
import torch.nn.functional as F

from . import decays

# Of the chunk's length the math does not depend. Memory grows with it in the chunks and with its
# inverse between them; the two are even at sqrt(p n), about 90 to 128 for what is published.
CHUNK = 128


def scan(
    x: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    starts: torch.Tensor | None,
    before: torch.Tensor | None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [b, s, h, p], decay [b, s, h], b and c [b, s, g, n] -> y [b, s, h, p], the last state.

    starts [b, s]: tokens before which the state is zero. before [b, h, p, n]: the state of the
    tokens before x (None: zeros). Differentiable in all but `starts`.
    """
    rows, s, heads, p = x.shape
    groups, n = b.shape[2:]
    chunk = min(chunk, s)
    pad = -s % chunk
    # What is appended adds nothing, decays nothing and is of the last segment.
    x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
    decay = F.pad(decay, (0, 0, 0, pad))
    x = x.view(rows, -1, chunk, groups, heads // groups, p)
    b, c = (t.view(rows, -1, chunk, groups, n) for t in (b, c))
    high, low = decays.sums(decay.view(rows, -1, chunk, groups, heads // groups), 2)
    within = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    between = within.new_ones(x.shape[1] + 1, x.shape[1] + 1).tril()
    segment = ends = None
    if starts is not None:
        segment = F.pad(starts.long(), (0, pad)).cumsum(1).view(rows, -1, chunk)
        # Segment of the last token before each chunk, and before what follows: 0 before them all.
        ends = F.pad(segment[:, :, -1], (1, 0))
        within = ((segment[..., :, None] == segment[..., None, :]) & within)[:, :, None, None]
        between = ((ends[:, :, None] == ends[:, None, :]) & between)[:, None, None]
    # Inside of a chunk, as attention: [b, c, g, r, l, l].
    high_, low_ = (t.permute(0, 1, 3, 4, 2) for t in (high, low))
    weights = decays.between(high_, low_, within)
    weights = weights * torch.einsum("bclgn,bcmgn->bcglm", c, b)[:, :, :, None]
    y = torch.einsum("bcgrlm,bcmgrp->bclgrp", weights, x)
    # What each chunk adds to the state at its end, behind what was there before the first.
    to_end = torch.exp((high[:, :, -1:] - high) + (low[:, :, -1:] - low))
    if segment is not None:
        to_end = to_end * (segment == segment[:, :, -1:])[..., None, None]
    added = torch.einsum("bclgn,bclgrp->bcgrpn", b, x * to_end[..., None])
    first = torch.zeros_like(added[:, :1])
    if before is not None:
        first = before.to(added.dtype).view(first.shape)
    added = torch.cat([first, added], 1)
    totals = F.pad((high + low)[:, :, -1], (0, 0, 0, 0, 1, 0))
    high_, low_ = (t.permute(0, 2, 3, 1) for t in decays.sums(totals, 1))
    weights = decays.between(high_, low_, between)
    states = torch.einsum("bgrcz,bzgrpn->bcgrpn", weights, added)
    # What the state before a chunk gives its tokens.
    seen = torch.exp(high + low)
    if segment is not None and ends is not None:
        seen = seen * (segment == ends[:, :-1, None])[..., None, None]
    y = y + torch.einsum("bclgn,bcgrpn->bclgrp", c, states[:, :-1]) * seen[..., None]
    y = y.reshape(rows, -1, heads, p)[:, :s]
    return y, states[:, -1].reshape(rows, heads, p, n)


def step(
    x: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    starts: torch.Tensor | None,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` for one token a row."""
    groups = b.shape[2]
    factor = decay[:, 0].exp()
    if starts is not None:
        factor = factor * ~starts
    b, c = (t[:, 0].repeat_interleave(x.shape[2] // groups, 1) for t in (b, c))
    state = before * factor[..., None, None] + x[:, 0, :, :, None] * b[:, :, None, :]
    return torch.einsum("bhpn,bhn->bhp", state, c)[:, None], state
