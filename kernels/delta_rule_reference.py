"""The gated delta rule: a state that decays, and whose recall of each key a token corrects.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), sec. 3. Letters here: h
heads of values in g groups of r, which share keys and queries of n features, p features of a value,
c chunks of l tokens. A head's state [n, p] is

    old_t = exp(decay_t) state_(t-1),    state_t = old_t + beta_t k_t (v_t - k_t^T old_t)^T,
    y_t = q_t^T state_t

in fp32 (or wider): decay_t is at most 0, and q and k are normalised and scaled already.
"""

import torch
import torch.nn.functional as F

from . import decays

# Of the chunk's length the math does not depend: solving grows with it, the steps between chunks
# with its inverse.
CHUNK = 64


def scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    starts: torch.Tensor | None,
    before: torch.Tensor | None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [b, s, g, n], v [b, s, h, p], beta and decay [b, s, h] -> y [b, s, h, p], the last
    state [b, h, n, p].

    starts [b, s]: tokens before which the state is zero. before [b, h, n, p]: the state of the
    tokens before these (None: zeros). Differentiable in all but `starts`.

    What each token writes, u [l, p], solves (1 + A) u = beta (v - exp(sum) k^T before) in a chunk,
    A_ij = beta_i exp(sum_i - sum_j) k_i k_j below the diagonal (arXiv 2406.06484, sec. 3.2): with
    both sides solved at once, only the state goes from chunk to chunk.
    """
    rows, s, groups, n = k.shape
    heads, p = v.shape[2:]
    chunk = min(chunk, s)
    pad = -s % chunk
    # What is appended writes nothing, decays nothing and is of the last segment.
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
    beta, decay = (F.pad(t, (0, 0, 0, pad)) for t in (beta, decay))
    # In front of all [b, c, g]; then r, then l.
    q, k = (t.view(rows, -1, chunk, groups, n).transpose(2, 3) for t in (q, k))
    v = v.view(rows, -1, chunk, groups, heads // groups, p).permute(0, 1, 3, 4, 2, 5)
    beta, decay = (
        t.view(rows, -1, chunk, groups, heads // groups).permute(0, 1, 3, 4, 2)
        for t in (beta, decay)
    )
    high, low = decays.sums(decay, -1)
    within = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).tril()
    seen = torch.exp(high + low)
    to_end = torch.exp((high[..., -1:] - high) + (low[..., -1:] - low))
    if starts is not None:
        segment = F.pad(starts.long(), (0, pad)).cumsum(1).view(rows, -1, chunk)
        within = ((segment[..., :, None] == segment[..., None, :]) & within)[:, :, None, None]
        # Segment of the last token before each chunk: 0 before them all.
        old = F.pad(segment[:, :-1, -1], (1, 0))[..., None]
        seen = seen * (segment == old)[:, :, None, None]
        to_end = to_end * (segment == segment[..., -1:])[:, :, None, None]
    pairs = decays.between(high, low, within)
    system = (k @ k.mT)[:, :, :, None] * pairs * beta[..., None]
    wide_k = k[:, :, :, None]
    sides = torch.cat([v, wide_k * seen[..., None]], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    writes, recalls = solved.split_with_sizes([p, n], -1)
    state = writes.new_zeros(rows, *writes.shape[2:4], n, p)
    if before is not None:
        state = before.to(v.dtype).view(state.shape)
    ending, lasts = (wide_k * to_end[..., None]).mT, seen[..., -1, None, None]
    states, written = [], []
    for i in range(k.shape[1]):
        states.append(state)
        written.append(writes[:, i] - recalls[:, i] @ state)
        state = state * lasts[:, i] + ending[:, i] @ written[-1]
    y = (q[:, :, :, None] @ torch.stack(states, 1)) * seen[..., None]
    y = y + ((q @ k.mT)[:, :, :, None] * pairs) @ torch.stack(written, 1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, p)[:, :s]
    return y, state.reshape(rows, heads, n, p)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    starts: torch.Tensor | None,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` for one token a row."""
    each = v.shape[2] // k.shape[2]
    q, k = (t[:, 0].repeat_interleave(each, 1) for t in (q, k))
    factor = decay[:, 0].exp()
    if starts is not None:
        factor = factor * ~starts
    state = before * factor[..., None, None]
    recalled = torch.einsum("bhn,bhnp->bhp", k, state)
    change = (v[:, 0] - recalled) * beta[:, 0, :, None]
    state = state + k[..., None] * change[..., None, :]
    return torch.einsum("bhn,bhnp->bhp", q, state)[:, None], state
