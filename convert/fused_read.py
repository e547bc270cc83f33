"""Tensors of a checkpoint that are read as others: transposed, or rows of one that is fused."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..kernels.nf4 import block_absmax
from ..nn import stacks
from ..quant import nf4
from ..quant.nf4 import NF4
from .bnb_file import Entry, Packed, read_leaf
from .encoded import Encoded
from .fused import Fused
from .shards import TensorInfo


@dataclass(frozen=True)
class Turned:
    """A stored matrix [in, out], or a stack of them, seen as [out, in]; or the other way round."""

    whole: TensorInfo | Packed

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
    """The `index`-th part of what `whole` stores."""

    whole: TensorInfo | Turned | Packed
    fused: Fused
    index: int

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
        return (self.fused.rows[self.index], *self.fused.row)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * self.fused.rows[self.index] // sum(self.fused.rows)


Stored = Entry | Turned | Part


def is_packed(info: Stored) -> bool:
    """Whether it is stored in 4 bits."""
    return isinstance(info.whole if isinstance(info, Part) else info, Packed)


def turned(info: Entry) -> TensorInfo | Turned | Packed:
    """`info`, stored [in, out], as [out, in], as which transformers has Conv1D in 4 bits."""
    return info if isinstance(info, Packed) else Turned(info)


def split(info: TensorInfo | Turned | Packed, fused: Fused) -> dict[str, Stored]:
    """Our paths -> their rows of `info`; raises CheckpointError for another shape than theirs."""
    count = sum(fused.rows)
    experts = {place[1] for path in fused.paths if (place := stacks.place(path)) is not None}
    shapes = [(count, *fused.row)]
    shapes += [(len(experts), count // len(experts), *fused.row)] if experts else []
    if info.shape not in shapes:
        of_each = zip(fused.rows[:6], fused.paths, strict=False)
        raise CheckpointError(
            f"found shape {list(info.shape)}, config.json makes it {count} rows: "
            + ", ".join(f"{rows} for {path}" for rows, path in of_each),
            tensor=info.name,
            file=info.file,
        )
    if len(fused.paths) == 1 and info.shape == (*fused.rows, *fused.row):
        return {fused.paths[0]: info}
    return {path: Part(info, fused, i) for i, path in enumerate(fused.paths)}


def reader(
    read: Callable[[TensorInfo], torch.Tensor],
) -> Callable[[Stored], torch.Tensor]:
    """`read` for what is turned and for parts too; the last whole is remembered, so that parts in a
    row read it once. Of a quantized stack that is what is stored, and one matrix of it.
    """
    last: list[Any] = [None, None]
    codes: list[Any] = [None, []]

    def matrix(whole: Encoded, number: int) -> torch.Tensor:
        if codes[0] != whole:
            codes[:] = [whole, [read(part) for part in whole.parts]]
        return whole.decode(*(part[number : number + 1] for part in codes[1]))[0]

    def of(info: Stored) -> torch.Tensor:
        if isinstance(info, TensorInfo):
            return read(info)
        if isinstance(info, Turned):
            assert isinstance(info.whole, TensorInfo)
            return read(info.whole).mT.contiguous()
        assert isinstance(info, Part)
        is_turned = isinstance(info.whole, Turned)
        stored = info.whole.whole if isinstance(info.whole, Turned) else info.whole
        assert not isinstance(stored, Packed)
        by_matrix = isinstance(stored, Encoded) and stored.by_matrix
        number, at = info.fused.share(info.index, info.whole.shape[-2] if by_matrix else None)
        key = (stored, number)
        if last[0] != key:
            whole = matrix(stored, number) if by_matrix else read(stored)  # type: ignore[arg-type]
            last[:] = [key, whole.mT if is_turned else whole]
        if by_matrix:
            return info.fused.cut(last[1], at).flatten(0, 1).contiguous()
        return info.fused.part(last[1], info.index)

    return of


def leaf_reader(
    read: Callable[[TensorInfo], torch.Tensor], dtype: torch.dtype
) -> Callable[[Stored, bool], Any]:
    """What reads a weight in 4 bits, or a part of one: as an NF4 leaf, or (False) dequantized."""
    last: list[Any] = [None, None]

    def of(info: Stored, keep: bool) -> Any:
        if isinstance(info, Packed):
            leaf = read_leaf(info, dtype, read)
            return leaf if keep else nf4.dequantize(leaf)
        assert isinstance(info, Part) and isinstance(info.whole, Packed)
        if last[0] != info.whole:
            last[:] = [info.whole, read_leaf(info.whole, dtype, read)]
        if keep:
            return _leaf_of_part(last[1], info)
        return info.fused.part(nf4.dequantize(last[1]), info.index)

    return of


def _leaf_of_part(leaf: NF4, part: Part) -> NF4:
    """The blocks of a part, whose maxima are kept in fp32: groups of those cross parts.

    Raises CheckpointError where blocks cross parts.
    """
    fused, (_, at) = part.fused, part.fused.share(part.index)
    width, group = math.prod(fused.row), sum(fused.rows) // fused.groups
    ends = [at.start * width, at.stop * width, group * width]
    if at.step != 1 or any(end % leaf.block for end in ends):
        raise CheckpointError(
            f"it holds several projections in 4 bits, of which {fused.paths[part.index]} does not "
            f"begin and end with a block of {leaf.block} values; load it with load_in_4bit=False, "
            "or the 16-bit original, which purelm quantizes while loading",
            tensor=part.name,
            file=part.file,
        )
    maxima = block_absmax(leaf.absmax, leaf.absmax_scale, leaf.absmax_offset)

    def of_part(values: torch.Tensor, each: int) -> torch.Tensor:
        """The part's share, where `each` of these values stands for one of the matrix."""
        rows = slice(ends[0] // each, ends[1] // each)
        return fused.cut(values, rows).flatten().contiguous()

    return replace(
        leaf,
        packed=of_part(leaf.packed, 2),
        absmax=of_part(maxima, leaf.block),
        absmax_scale=None,
        absmax_offset=None,
        shape=torch.Size(part.shape),
    )
