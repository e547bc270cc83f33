"""Prompts of generation: checked, their padding moved to the front, and where their tokens stand.

Rows with padding on either side give what each row gives alone: their tokens are moved against the
end of the batch, positions count real tokens only, and padding is in no token's sight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ArgumentError, InputError
from . import cache as kv
from . import tree
from .decode import prefill
from .layout import Layout, dense
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompts ids [b, s], their padding in front, and how answers end.

    real [b, s] bool: what is no padding (None: all); eos [n]: the ids that end a row, which is then
    filled with `pad_id`.
    """

    ids: torch.Tensor
    real: torch.Tensor | None
    eos: torch.Tensor
    pad_id: int


def prepared(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int | None,
) -> Prompt:
    """tokens [b, s] with the mask [b, s], checked, on the device of the params.

    Raises ArgumentError and InputError as `check` does. pad_id None: the first of eos_ids, else 0.
    """
    real = check(spec, tokens, mask, max_new_tokens)
    device = tree.tensors(params["layers"][0])[0].device
    ids, real = against_the_end(tokens.to(device), real)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    return Prompt(ids, real, eos, next(iter(eos_ids), 0) if pad_id is None else pad_id)


def empty_cache(
    params: tree.Tree,
    spec: ModelSpec,
    prompt: Prompt,
    capacity: int,
    columns: torch.dtype | None,
) -> kv.Cache:
    """A cache for the prompt's rows, of `capacity` tokens each; columns: as in `cache.empty`."""
    return kv.empty(
        spec,
        len(prompt.ids),
        capacity,
        padded=prompt.real is not None,
        dtype=params["embed"]["weight"].dtype,
        columns=columns,
        device=prompt.ids.device,
    )


def read(
    params: tree.Tree,
    spec: ModelSpec,
    ids: torch.Tensor,
    real: torch.Tensor | None,
    cache: kv.Cache,
    *,
    adapters: tree.Tree,
) -> tuple[torch.Tensor, kv.Cache]:
    """Run prompts ids [b, s] into an empty cache, of which real [b, s] is no padding: the logits
    [b, v] of what follows the last, and the cache.
    """
    return prefill(params, spec, ids, cache, layout=layout_of(ids, real), adapters=adapters)


def check(
    spec: ModelSpec, tokens: torch.Tensor, mask: torch.Tensor | None, new: int
) -> torch.Tensor | None:
    """Raise ArgumentError or InputError for what cannot be run with `new` tokens after it; the
    mask [b, s] as bool, None where it hides nothing.
    """
    if isinstance(new, bool) or not isinstance(new, int):
        raise ArgumentError(f"max_new_tokens is {new!r}, expected a whole number")
    if new < 1:
        raise ArgumentError(f"max_new_tokens is {new}, expected at least 1")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(
            f"the prompt has shape {list(tokens.shape)}, expected [batch, length] with tokens"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"the prompt has dtype {tokens.dtype}, expected token ids in torch.int64")
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= spec.vocab:
        raise InputError(f"token ids lie in {low}..{high}, the vocabulary is 0..{spec.vocab - 1}")
    longest, real = tokens.shape[1], None
    if mask is not None:
        if mask.shape != tokens.shape:
            raise InputError(
                f"attention_mask has shape {list(mask.shape)}, the prompt {list(tokens.shape)}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("attention_mask has values other than 0 (padding) and 1 (real)")
        lengths = mask.bool().sum(-1).tolist()
        if min(lengths) == 0:
            raise InputError(f"row {lengths.index(0)} of the prompt is empty: all of it is padding")
        longest = max(lengths)
        real = None if min(lengths) == tokens.shape[1] else mask.bool()
    if longest > spec.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens is longer than the model's context of "
            f"{spec.max_positions}; shorten it, or load with a rope_scaling that extends it"
        )
    if longest + new > spec.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {new} new ones make {longest + new}, more than the "
            f"model's context of {spec.max_positions}; ask for at most "
            f"{spec.max_positions - longest} new ones, or load with a rope_scaling that extends it"
        )
    return real


def against_the_end(
    tokens: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move padding [b, s] to the front and cut off what no row needs; None: no padding is left.

    With the real tokens of a row next to each other, distances in the cache are distances in the
    text, and the last column is every row's last token.
    """
    if real is None:
        return tokens, None
    longest = int(real.sum(-1).max())
    real = real.to(tokens.device)
    order = real.long().argsort(dim=-1, stable=True)[:, -longest:]
    tokens, real = tokens.gather(1, order), real.gather(1, order)
    return tokens, None if bool(real.all()) else real


def so_far(
    ids: torch.Tensor, real: torch.Tensor | None, vocab: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts and answers, with pads the model need not know made harmless; what is real of it."""
    ids = ids.clamp(max=vocab - 1)
    if real is None:
        return ids, None
    new = real.new_ones(ids.shape[0], ids.shape[1] - real.shape[1])
    return ids, torch.cat([real, new], 1)


def unpadded(ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """ids [b, m] with -1 for the padding before a prompt."""
    if real is None:
        return ids
    return torch.cat([ids[:, : real.shape[1]].masked_fill(~real, -1), ids[:, real.shape[1] :]], 1)


def tokens_seen(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Which tokens of the vocabulary each row of ids [b, m] holds, -1 aside: bool [b, v]."""
    # Padding is written to one column past the vocabulary, which is then cut off.
    kept = torch.where((ids < 0) | (ids >= vocab), vocab, ids)
    seen = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, kept.long(), True)[:, :vocab]


def layout_of(prompt: torch.Tensor, real: torch.Tensor | None) -> Layout:
    """Where the tokens of the prompt stand."""
    if real is None:
        return dense(*prompt.shape, device=prompt.device)
    return Layout((real.long().cumsum(-1) - 1).clamp(min=0), real.long())


def layout_from(ids: torch.Tensor, real: torch.Tensor | None, begin: int) -> Layout:
    """Where the tokens of rows ids [b, m] stand from column `begin` on; real [b, s] of prompts."""
    if real is None:
        return dense(ids.shape[0], ids.shape[1] - begin, start=begin, device=ids.device)
    answer = real.new_ones(ids.shape[0], ids.shape[1] - real.shape[1])
    whole = layout_of(ids, torch.cat([real, answer], 1))
    assert whole.segments is not None
    return Layout(whole.positions[:, begin:], whole.segments[:, begin:])


def raise_if_broken(broken: torch.Tensor) -> None:
    """InputError if any row of broken [b] bool had logits from which no token can be chosen."""
    if bool(broken.any()):
        raise InputError(
            f"the model's logits for row {broken.tolist().index(True)} are not finite: its weights "
            "or adapters hold NaN or infinite values, its dtype is too narrow for it, or the rules "
            "of sampling leave no token"
        )
