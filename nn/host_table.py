"""Rows of a table that stays in host memory, for tokens on a device."""

import torch
import torch.nn.functional as F

from ..errors import ArgumentError


def looked_up(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """table [v, e] on the CPU and tokens [b, s] -> their rows [b, s, e] on the tokens' device.

    Each row that is used is copied once. Waits for the device where the tokens are on one. Raises
    ArgumentError for a table that is trained: no gradient comes back.
    """
    if table.requires_grad:
        raise ArgumentError(
            "the embedding is trained and in host memory: load without offload_embedding, or do "
            "not train it"
        )
    used, place = torch.unique(tokens.cpu(), return_inverse=True)
    device = tokens.device
    pinned = device.type == "cuda"
    rows = torch.empty((len(used), table.shape[1]), dtype=table.dtype, pin_memory=pinned)
    torch.index_select(table.detach(), 0, used, out=rows)
    return F.embedding(place.to(device), rows.to(device, non_blocking=pinned))


def rows(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rows [b, s, e] of a table [v, e] for tokens [b, s], wherever it is."""
    apart = elsewhere(table, tokens)
    return looked_up(table, tokens) if apart else F.embedding(tokens, table)


def elsewhere(table: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether the table is in host memory and the tokens are not."""
    return table.device.type == "cpu" and tokens.device.type != "cpu"
