"""What an adapter starts from: random pairs (a, b), or the leading directions of a weight.

All is fp32. Random pairs are drawn on the generator's device and move no other generator.
"""

import math
from typing import Literal

import torch

from ..errors import ArgumentError

Start = Literal["kaiming", "gaussian", "orthogonal", "random"]
Pair = tuple[torch.Tensor, torch.Tensor]


def draw(
    shape: tuple[int, ...], rank: int, *, generator: torch.Generator, start: Start = "kaiming"
) -> Pair:
    """(a [r, in], b [out, r]) for a weight of `shape` [out, in], on the generator's device.

    kaiming: a uniform in +-1/sqrt(in), b zero (peft's default). gaussian: a normal with standard
    deviation 1/rank, b zero. orthogonal: a and b span orthogonal directions, so b @ a = 0 with
    neither zero; needs an even rank. random: both as torch.nn.Linear starts (peft's
    `init_lora_weights=False`).
    """
    out, inp = shape
    on = generator.device
    if start == "orthogonal":
        return _orthogonal(out, inp, rank, generator)
    a = torch.empty(rank, inp, device=on)
    b = torch.zeros(out, rank, device=on)
    if start == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
        return a, b
    # kaiming_uniform with a = sqrt(5), which is what torch.nn.Linear and peft start from.
    a.uniform_(-1 / math.sqrt(inp), 1 / math.sqrt(inp), generator=generator)
    if start == "random":
        b.uniform_(-1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator)
    return a, b


def _orthogonal(out: int, inp: int, rank: int, generator: torch.Generator) -> Pair:
    """Rows of one orthogonal matrix, even ones for a, odd ones for b (peft's "orthogonal")."""
    if rank % 2:
        raise ArgumentError(f"an orthogonal start needs an even rank, found {rank}")
    on = generator.device
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, device=on))
    a = torch.randn(inp, rank // 2, generator=generator, device=on) @ q[0::2] / 10.0
    b = torch.randn(out, rank // 2, generator=generator, device=on) @ q[1::2] / 10.0
    return a.T.contiguous(), b


def pissa(
    weight: torch.Tensor,
    rank: int,
    scale: float,
    *,
    rounds: int | None = None,
    generator: torch.Generator | None = None,
) -> Pair:
    """The `rank` leading singular directions of weight [out, in]: scale * b @ a is that part.

    PiSSA, arXiv 2404.02948. rounds: None for a full decomposition, else the number of power
    iterations of a randomized one (arXiv 0909.4061), which draws from `generator`.
    """
    weight = weight.float()
    if rounds is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        assert generator is not None
        u, s, vh = _randomized_svd(weight, rank, rounds, generator)
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def _randomized_svd(
    weight: torch.Tensor, rank: int, rounds: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.randn(weight.shape[1], rank, generator=generator, device=generator.device)
    basis, _ = torch.linalg.qr(weight @ drawn.to(weight.device))
    for _ in range(rounds):
        # Orthonormal again after each product: powers alone would lose the smaller directions.
        basis, _ = torch.linalg.qr(weight.T @ basis)
        basis, _ = torch.linalg.qr(weight @ basis)
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vh


def olora(weight: torch.Tensor, rank: int) -> Pair:
    """The first `rank` columns and rows of weight [out, in] = Q R (OLoRA, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].contiguous(), q[:, :rank].contiguous()
