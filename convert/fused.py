"""Stored matrices that are several of our projections, one above the other (Phi-3's qkv_proj),
their rows for each kv head in turn (GPT-NeoX's query_key_value), or row by row in turn (gpt-oss).

They are taken apart when a checkpoint is read and put together again when it is merged.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SaveError
from ..nn.lora import LoRA
from ..nn.params import ParamSpec
from .bnb_file import Entry, Packed
from .encoded import Encoded
from .merge_tensor import Change
from .names import Names
from .shards import TensorInfo


@dataclass(frozen=True)
class Turned:
    """A stored matrix [in, out], or a stack of them, seen as [out, in]."""

    whole: TensorInfo

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def file(self) -> Path:
        return self.whole.file

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-2], self.whole.shape[-1], self.whole.shape[-2])

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes


@dataclass(frozen=True)
class Part:
    """Some rows of each of the `groups` of equal size that a stored tensor consists of, rows of
    shape `row`: [in], or single numbers of a bias.
    """

    whole: TensorInfo | Turned
    rows: slice
    row: tuple[int, ...]
    groups: int = 1

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def file(self) -> Path:
        return self.whole.file

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        count = len(range(self.rows.start, self.rows.stop, self.rows.step or 1))
        return (self.groups * count, *self.row)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * math.prod(self.shape) // math.prod(self.whole.shape)


def parts(names: Names, name: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Our paths of the parts of the stored tensor `name`, in its order, where all are `known`.

    A stack [x, out, in] is read as one matrix [x * out, in]: each expert's rows follow the last's.
    """
    for paths in names.parts(name):
        if any("*" in path for path in paths):
            paths = _of_experts(paths, known)
        if paths and all(path in known for path in paths):
            return paths
    return ()


def _of_experts(paths: tuple[str, ...], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of every expert there is, one expert after the other."""
    every = itertools.takewhile(
        lambda made: made[0] in known,
        ([path.replace("*", str(i)) for path in paths] for i in itertools.count()),
    )
    return tuple(path for expert in every for path in expert)


def turned(info: Entry) -> Turned:
    """`info` seen transposed; raises CheckpointError for one in 4 bits."""
    if isinstance(info, Packed):
        raise CheckpointError(
            "a weight that is stored [in, out] is in 4 bits, which is not read; load the 16-bit "
            "original, which purelm quantizes while loading",
            tensor=info.name,
            file=info.file,
        )
    return Turned(info)


def turned_change(change: Change, stack: int = 1) -> Change:
    """The change of a weight [out, in] as that of its transpose; of a `stack` of so many, [x * out,
    in] as [x * in, out], where each of the adapter's ranks is of one of them alone (`joined`).

    Raises SaveError for DoRA.
    """
    if isinstance(change, LoRA):
        if change.magnitude is not None:
            raise SaveError(
                "weights that are stored [in, out] are not merged with DoRA, whose lengths are of "
                "the rows [out]; save the adapter"
            )
        b = change.b.view(stack, -1, change.rank)
        mine = (b != 0).any(1)  # [x, r]
        return LoRA(b.sum(0).T, (change.a.T * mine[:, None]).flatten(0, 1), change.scale)
    if change is None:
        return None
    return change.view(stack, -1, change.shape[-1]).mT.flatten(0, 1)


def split(
    info: Entry | Turned,
    paths: Sequence[str],
    want: Mapping[str, ParamSpec],
    groups: int = 1,
    turns: int = 1,
) -> dict[str, Part]:
    """Our paths -> their rows of `info`: one after the other, in each of `groups`; or each
    `turns` of them, of equal size, row by row in turn.

    Raises CheckpointError for another number of rows.
    """
    if isinstance(info, Packed):
        raise CheckpointError(
            "a weight that several projections share is stored in 4 bits, which is not read yet; "
            "load the 16-bit original, which purelm quantizes while loading",
            tensor=info.name,
            file=info.file,
        )
    made, begin, row = {}, 0, want[paths[0]].shape[1:]
    for i, path in enumerate(paths):
        end = begin + want[path].shape[0] // groups
        rows = slice(begin, end)
        if turns > 1:
            first = begin - i % turns * (end - begin)
            rows = slice(first + i % turns, first + turns * (end - begin), turns)
        made[path], begin = Part(info, rows, row, groups), end
    if math.prod(info.shape) != groups * begin * math.prod(row):
        raise CheckpointError(
            f"found shape {list(info.shape)}, config.json makes it {groups * begin} rows: "
            + ", ".join(f"{want[path].shape[0]} for {path}" for path in paths[:6]),
            tensor=info.name,
            file=info.file,
        )
    return made


def reader(
    read: Callable[[TensorInfo], torch.Tensor],
) -> Callable[[TensorInfo | Turned | Part], torch.Tensor]:
    """`read` for what is turned and for parts too; the last whole is remembered, so that parts in a
    row read it once. Of a quantized stack that is what is stored, and one matrix of it.
    """
    last: list[Any] = [None, None]
    codes: list[Any] = [None, []]

    def matrix(whole: Encoded, at: int) -> torch.Tensor:
        if codes[0] != whole:
            codes[:] = [whole, [read(part) for part in whole.parts]]
        return whole.decode(*(part[at : at + 1] for part in codes[1]))[0]

    def of(info: TensorInfo | Turned | Part) -> torch.Tensor:
        if isinstance(info, TensorInfo):
            return read(info)
        if isinstance(info, Turned):
            return read(info.whole).mT.contiguous()
        part, key = info.rows, (info.whole, 0)
        stored = info.whole.whole if isinstance(info.whole, Turned) else info.whole
        encoded = stored if isinstance(stored, Encoded) and stored.by_matrix else None
        if encoded is not None:
            each = info.whole.shape[-2]
            at = part.start // each
            part, key = _moved(part, -at * each), (info.whole, at)
        if last[0] != key:
            whole = of(info.whole) if encoded is None else matrix(encoded, key[1])
            if encoded is not None and isinstance(info.whole, Turned):
                whole = whole.mT
            last[:] = [key, whole.reshape(-1, *info.row)]
        rows: torch.Tensor = last[1]
        return rows.view(info.groups, -1, *rows.shape[1:])[:, part].flatten(0, 1).clone()

    return of


def joined(
    name: str, changes: Sequence[Change], rows: Sequence[int], groups: int = 1, turns: int = 1
) -> Change:
    """The parts' changes as one change of the whole, of which they have `rows`; see `split`.

    Adapters become one of the summed rank: A's above each other, B's along the diagonal. Raises
    SaveError where only some parts were trained whole.
    """
    if all(isinstance(change, torch.Tensor) for change in changes):
        above = torch.cat([change for change in changes if isinstance(change, torch.Tensor)])
        return above[_order(rows, groups, turns).to(above.device)]
    if any(isinstance(change, torch.Tensor) for change in changes):
        raise SaveError(
            f"{name} holds several projections, of which some were trained whole; train all of "
            "them whole, or none"
        )
    adapters = [change for change in changes if isinstance(change, LoRA)]
    if not adapters:
        return None
    a = torch.cat([leaf.a for leaf in adapters])
    b = adapters[0].b.new_zeros(sum(rows), a.shape[0])
    magnitudes = [leaf.magnitude for leaf in adapters if leaf.magnitude is not None]
    if magnitudes and len(magnitudes) < len(changes):
        raise SaveError(
            f"{name} holds several projections, of which only some are adapted with DoRA; adapt "
            "all of them, or none"
        )
    row = column = 0
    for change, count in zip(changes, rows, strict=True):
        if isinstance(change, LoRA):
            at = slice(column, column + change.rank)
            b[row : row + count, at] = change.b * change.scale
            column += change.rank
        row += count
    order = _order(rows, groups, turns).to(b.device)
    return LoRA(a, b[order], 1.0, 0.0, torch.cat(magnitudes)[order] if magnitudes else None)


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by, rows.step)


def _order(rows: Sequence[int], groups: int, turns: int) -> torch.Tensor:
    """Where each stored row lies when the parts are one above the other."""
    if turns > 1:
        return torch.arange(sum(rows)).view(-1, turns, rows[0]).mT.flatten()
    parts = torch.split(torch.arange(sum(rows)), list(rows))
    return torch.cat([part.view(groups, -1) for part in parts], 1).flatten()
