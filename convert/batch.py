"""What a batch given to the bridge must be, and where its tokens stand."""

from itertools import pairwise
from typing import Any

import torch

from ..errors import InputError
from ..kernels.attention import Documents
from ..nn import layout as layouts
from ..nn import loss
from ..nn.layout import Layout
from ..nn.spec import ModelSpec

_INTEGERS = (torch.int64, torch.int32)


def check_ids(ids: Any, spec: ModelSpec) -> None:
    """Raise InputError unless `ids` is [b, s] of tokens of the vocabulary."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0:
        found = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InputError(f"input_ids is {found}, expected a tensor [batch, length] with tokens")
    if ids.dtype not in _INTEGERS:
        raise InputError(f"input_ids are {ids.dtype}, expected int64 or int32")
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= spec.vocab:
        raise InputError(f"input_ids lie in {low}..{high}, the vocabulary is 0..{spec.vocab - 1}")


def check_labels(labels: torch.Tensor, layout: Layout, spec: ModelSpec, count: Any) -> None:
    """Raise InputError unless `labels` [b, s] has something to learn, out of the vocabulary."""
    if labels.shape != layout.positions.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, input_ids {tuple(layout.positions.shape)}"
        )
    if labels.dtype not in _INTEGERS:
        raise InputError(f"labels are {labels.dtype}, expected int64 or int32")
    # Read where the labels live: on the CPU that waits for no GPU.
    near = labels.device == layout.positions.device
    target = loss.shift(labels, layout if near else None)
    counted = target != loss.IGNORE
    ends = torch.where(counted, target, 0).aminmax()
    found, low, high = torch.stack([counted.sum(), *ends]).tolist()
    if not found:
        raise InputError(
            "no label counts: each is -100, or the first of its row or document, so this batch "
            "has nothing to learn from"
        )
    if low < 0 or high >= spec.vocab:
        raise InputError(
            f"labels lie in {low}..{high}, expected -100 or the vocabulary 0..{spec.vocab - 1}"
        )
    if isinstance(count, int | float) and not count > 0:
        raise InputError(f"num_items_in_batch is {count}, expected how many labels count")


def layout_of(
    input_ids: torch.Tensor,
    spec: ModelSpec,
    device: torch.device,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Layout:
    """Where the tokens of input_ids [b, s] stand; see `CausalLM.forward`.

    Raises InputError for shapes that do not fit and rows longer than the context.
    """
    b, s = input_ids.shape
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {(b, s)}"
        )
    longest = s
    if cu_seqlens is not None:
        longest = _longest_document(cu_seqlens, b, s)
        layout = layouts.from_cu_seqlens(cu_seqlens.to(device), s, longest)
    elif position_ids is not None:
        longest = _last_position(position_ids, b, s) + 1
        documents = _documents(position_ids.reshape(-1), device) if b == 1 else None
        layout = layouts.from_positions(position_ids.to(device).expand(b, s), documents)
        if attention_mask is not None:
            layout = _masked(layout, attention_mask.to(device))
    elif attention_mask is not None:
        layout = layouts.from_mask(attention_mask, device)
        if s > spec.max_positions:  # only then is it worth waiting for the device
            longest = int(attention_mask.bool().sum(-1).max())
    else:
        layout = layouts.dense(b, s, device=device)
    if longest > spec.max_positions:
        raise InputError(
            f"a row of {longest} tokens is longer than the model's context of "
            f"{spec.max_positions}; shorten it or load with a longer rope_scaling"
        )
    return layout


def _masked(layout: Layout, mask: torch.Tensor) -> Layout:
    """With the padding of `mask` in a segment of its own, which nothing real sees."""
    segments = layout.segments
    if segments is None:
        segments = torch.zeros_like(layout.positions)
    return Layout(layout.positions, torch.where(mask.bool(), segments + 1, 0))


def _documents(positions: torch.Tensor, device: torch.device) -> Documents | None:
    """The documents of a row of position ids [s] that each count 0, 1, 2...; else None."""
    starts = (positions == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in pairwise([*starts, len(positions)])]
    if not starts or starts[0] != 0:
        return None
    counted = torch.cat([torch.arange(n, device=positions.device) for n in lengths])
    if not torch.equal(counted, positions.long()):
        return None
    return Documents(
        torch.tensor([*starts, len(positions)], dtype=torch.int32).to(device), max(lengths)
    )


def _longest_document(cu_seqlens: torch.Tensor, b: int, s: int) -> int:
    if b != 1:
        raise InputError(f"cu_seqlens needs one packed row, found a batch of {b}")
    ends: list[int] = (
        cu_seqlens.tolist() if cu_seqlens.ndim == 1 and cu_seqlens.dtype in _INTEGERS else []
    )
    lengths = [end - start for start, end in pairwise(ends)]
    if not lengths or ends[0] != 0 or ends[-1] > s or min(lengths) < 0:
        raise InputError(
            f"cu_seqlens is {ends[:8] or tuple(cu_seqlens.shape)}, expected integers that rise "
            f"from 0 to at most the row's {s} tokens"
        )
    return max(lengths)


def _last_position(position_ids: torch.Tensor, b: int, s: int) -> int:
    shape = tuple(position_ids.shape)
    if shape not in ((s,), (1, s), (b, s)) or position_ids.dtype not in _INTEGERS:
        raise InputError(f"position_ids are {position_ids.dtype} {shape}, expected int64 {(b, s)}")
    low, high = torch.stack(position_ids.aminmax()).tolist()
    if low < 0:
        raise InputError(f"position_ids lie in {low}..{high}, expected none below 0")
    return int(high)
