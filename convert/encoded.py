"""Weights that a quantizer stored in parts of its own, each seen as the tensor it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from .safetensors_file import TensorInfo
from .shards import Checkpoint


@dataclass(frozen=True)
class Encoded(TensorInfo):
    """A weight of `shape` that `decode(*parts)` makes, in fp32, of what is stored.

    Name, shape and dtype are those of the 16-bit weight that it stands for; place and `nbytes` are
    the first part's and all parts'. `leaf(*parts, dtype)` makes the quantized leaf that holds the
    same codes, where there is one: it is taken if the quantization asked for is one of `kept_as`.
    `by_matrix`: of a stack, `decode` makes some matrices of their share of each part.
    """

    parts: tuple[TensorInfo, ...]
    decode: Callable[..., torch.Tensor]
    kept_as: tuple[str, ...] = ()
    leaf: Callable[..., Any] | None = None
    by_matrix: bool = False

    def kept(self, quantize: str | None) -> Callable[..., Any] | None:
        """What makes the leaf where that is of the quantization asked for, else None."""
        return self.leaf if quantize in self.kept_as else None


@dataclass(frozen=True)
class Format:
    """A way to store quantized weights.

    marks: how names of its parts end that no plain weight has.
    is_of(quantization_config, file): whether it is stored so; ConfigError for a variant of it that
    is not read. find(tensors, quantization_config): the encoded weights, and the names of what
    belongs to them beside their parts; CheckpointError for parts that do not fit.
    """

    name: str
    marks: tuple[str, ...]
    is_of: Callable[[Mapping[str, Any], Path], bool]
    find: Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], Found]


Found = tuple[list[Encoded], set[str]]

# What scales are stored in.
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def encoded(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    parts: Sequence[TensorInfo],
    decode: Callable[..., torch.Tensor],
    **kept: Any,
) -> Encoded:
    """An `Encoded` at the place of its first part."""
    first, size = parts[0], sum(part.nbytes for part in parts)
    return Encoded(
        name, first.file, dtype, tuple(shape), first.offset, size, first.stamp,
        tuple(parts), decode, **kept,
    )  # fmt: skip


def seen(checkpoint: Checkpoint, stored: Mapping[str, Any], form: Format) -> Checkpoint:
    """The checkpoint, each encoded weight in place of its parts; CheckpointError without any."""
    made, further = form.find(checkpoint.tensors, stored)
    if not made:
        raise CheckpointError(
            f"quantization_config says that weights are stored in {form.name}, and none is; "
            "remove it",
            file=checkpoint.folder,
        )
    taken = further.union(part.name for weight in made for part in weight.parts)
    tensors = {n: info for n, info in checkpoint.tensors.items() if n not in taken}
    for weight in made:
        if weight.name in tensors:
            raise CheckpointError(
                f"the weight is stored twice, plainly and in {form.name}",
                tensor=weight.name[:200],
                file=weight.file,
            )
        tensors[weight.name] = weight
    where = {**checkpoint.placed, **{w.name: checkpoint.placed[w.parts[0].name] for w in made}}
    placed = MappingProxyType({name: where[name] for name in tensors})
    return replace(checkpoint, tensors=MappingProxyType(tensors), placed=placed)


def siblings(
    tensors: Mapping[str, TensorInfo], first: str, others: Sequence[str]
) -> list[tuple[str, list[TensorInfo]]]:
    """Every `module` that has a tensor `module.first`, with that and its `others`.

    Raises CheckpointError where one of them is missing.
    """
    made = []
    for name, info in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if leaf != first or not dot:
            continue
        missing = [other for other in others if f"{module}.{other}" not in tensors]
        if missing:
            raise wrong(info, f"{', '.join(missing)} of the same module missing")
        made.append((module, [info, *(tensors[f"{module}.{other}"] for other in others)]))
    return made


def expect(info: TensorInfo, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Raise CheckpointError for another shape or dtype."""
    if info.shape != tuple(shape) or info.dtype not in dtypes:
        raise wrong(
            info,
            f"found {info.dtype} {list(info.shape)}, expected {' or '.join(map(str, dtypes))} "
            f"{list(shape)}",
        )


def wrong(info: TensorInfo, message: str) -> CheckpointError:
    """The error of one stored tensor."""
    return CheckpointError(message, tensor=info.name[:200], file=info.file)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [n, m] -> their unsigned fields, lowest bit first: uint8 [n / w, 32 w / bits, m].

    Fields of a width that does not divide 32 run on from word to word, 32 of them in w = `bits` of
    those, of which n is a multiple; otherwise w is 1.
    """
    per = 1 if 32 % bits == 0 else bits
    grouped = words.view(-1, per, words.shape[1])
    fields = 32 * per // bits
    out = torch.empty(len(grouped), fields, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(fields):
        word, bit = divmod(bits * i, 32)
        field = grouped[:, word] >> bit
        if bit + bits > 32:
            # The shift brought copies of the sign where the next word's bits belong.
            field = (field & (2 ** (32 - bit) - 1)) | (grouped[:, word + 1] << (32 - bit))
        out[:, i] = field & (2**bits - 1)
    return out
