"""The tensors of a GGUF file: their names, shapes and types, and how each is made.

One tensor is in memory at a time, or one stack of experts.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import ArgumentError, SaveError
from ..nn import stacks, tree
from ..nn.spec import ModelSpec, MoESpec, RopeSpec
from . import gguf_folded, gguf_latent, gguf_layers, gguf_shapes, merge_plan
from .gguf_architecture import Architecture
from .gguf_fields import architecture_of
from .gguf_file import library
from .gguf_names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, to_ggml
from .gguf_values import divisors, main_rope
from .registry import Family

# The method: the type of matrices, of the embedding and the head (which suffer most from few
# bits), and the number that llama.cpp has for files like that.
METHODS = {
    "f32": ("F32", "F32", 0),
    "f16": ("F16", "F16", 1),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q5_1": ("Q5_1", "Q8_0", 9),
    "q5_0": ("Q5_0", "Q8_0", 8),
    "q4_1": ("Q4_1", "Q8_0", 3),
    "q4_0": ("Q4_0", "Q8_0", 2),
}


@dataclass(frozen=True)
class Planned:
    """One tensor to write: `kind` is its ggml type, `make` gives it in fp32."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], torch.Tensor]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        gguf = library()
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)

    @property
    def nbytes(self) -> int:
        """How many bytes it has in the file."""
        return math.prod(self.stored)


def plan(
    tensors: Sequence[merge_plan.Tensor], method: str, spec: ModelSpec, family: Family
) -> list[Planned]:
    """What a file of the model's `tensors` holds, in its order.

    Raises ConfigError for a family that is not written, ArgumentError for widths that are not whole
    blocks; making one raises SaveError for values that are not finite.
    """
    matrix, outer, _ = METHODS[method]
    architecture = architecture_of(family.model_type)
    known = dict(tree.items(stacks.each_spec(spec)))
    made: list[Planned] = []
    experts: dict[str, list[merge_plan.Tensor]] = {}
    for tensor in tensors:
        theirs = to_ggml(tensor.name, architecture, family.names, known)
        for index, name in enumerate(theirs):
            shape, make = tensor.shape, _maker(tensor, architecture, name, spec)
            if family.names.is_transposed(tensor.name):
                shape, make = (*shape[:-2], shape[-1], shape[-2]), _turner(make)
            if "_exps." in name and ".experts.*." in _NUMBER.sub("*", tensor.name):
                experts.setdefault(name, []).append(tensor)
                if len(experts[name]) > 1:
                    continue
                mixture = next(x.mlp for x in spec.layers if isinstance(x.mlp, MoESpec))
                shape, make = (mixture.experts, *shape), _stacker(experts[name])
            elif "_exps." in name and len(theirs) > 1:
                shape = (shape[0], shape[1] // len(theirs), *shape[2:])
                make = _slicer(make, index, len(theirs), family.names.in_turn)
            elif name.split(".")[-2] in gguf_latent.STACKS:
                shape, make = gguf_latent.stack(name, next(spec.attentions()), make)
            elif len(theirs) > 1:
                shape = (shape[0] // len(theirs), *shape[1:])
                make = _cutter(make, index, len(theirs))
            shape = gguf_shapes.stored(name, shape, spec)
            made.append(Planned(name, shape, _kind(name, shape, matrix, outer), make))
            _check_width(made[-1], tensor.name)
    # In front, so that they are there when the header is checked.
    return [*_of_rope(main_rope(spec)), *made]


def _of_rope(rope: RopeSpec | None) -> list[Planned]:
    """The divisors of a scaled rotation."""
    found: dict[str, torch.Tensor] = {}
    if rope is not None and rope.kind == "llama3":
        found[ROPE_FREQS] = divisors(rope)
    if rope is not None and rope.kind == "proportional":
        found[ROPE_FREQS] = gguf_layers.divisors(rope)
    if rope is not None and rope.kind == "longrope":
        found[ROPE_LONG] = torch.tensor(rope.long_factors)
        found[ROPE_SHORT] = torch.tensor(rope.short_factors)
    return [
        Planned(name, tuple(tensor.shape), "F32", partial(torch.Tensor.float, tensor))
        for name, tensor in found.items()
    ]


def _kind(name: str, shape: tuple[int, ...], matrix: str, outer: str) -> str:
    """The ggml type of a tensor: norms, biases, routers and short filters are always F32."""
    wide = name.endswith((".bias", "norm.weight", *gguf_shapes.WIDE)) or "ffn_gate_inp" in name
    if len(shape) == 1 or wide:
        return "F32"
    return outer if name in _OUTER else matrix


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OUTER = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")


def _check_width(tensor: Planned, name: str) -> None:
    gguf = library()
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]][0]
    if tensor.shape[-1] % block:
        raise ArgumentError(
            f"{name} is {tensor.shape[-1]} wide, and {tensor.kind} stores blocks of {block}; "
            "take quantization_method 'bf16', 'f16' or 'f32'"
        )


def _stacker(experts: list[merge_plan.Tensor]) -> Callable[[], torch.Tensor]:
    """The matrices of all experts, in the order of their numbers."""

    def make() -> torch.Tensor:
        def number(tensor: merge_plan.Tensor) -> int:
            return int(re.findall(r"\.experts\.(\d+)\.", tensor.name)[0])

        return torch.stack([_dense(tensor) for tensor in sorted(experts, key=number)])

    return make


def _slicer(
    make: Callable[[], torch.Tensor], index: int, count: int, in_turn: bool
) -> Callable[[], torch.Tensor]:
    """The `index`-th of `count` matrices (or biases) that each expert's rows hold, one above the
    other or `in_turn` row by row.
    """

    def one() -> torch.Tensor:
        made = make()
        if in_turn:
            return made[:, index::count].contiguous()
        return made.view(len(made), count, -1, *made.shape[2:])[:, index].contiguous()

    return one


def _cutter(make: Callable[[], torch.Tensor], index: int, count: int) -> Callable[[], torch.Tensor]:
    """The `index`-th of `count` matrices that lie one above the other."""
    return lambda: make().chunk(count)[index]


def _turner(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """[..., in, out] as [..., out, in]."""
    return lambda: make().mT.contiguous()


def _dense(tensor: merge_plan.Tensor) -> torch.Tensor:
    """The tensor with its change, fp32; raises SaveError for values that are not finite."""
    made = merge_plan.dense(tensor, torch.float32)
    if not bool(made.isfinite().all()):
        raise SaveError(f"{tensor.name} has values that are not finite")
    return made


def _maker(
    tensor: merge_plan.Tensor, architecture: Architecture, name: str, spec: ModelSpec
) -> Callable[[], torch.Tensor]:
    """What makes the tensor as llama.cpp wants it."""
    heads = 0
    if architecture.permuted and (".attn_q." in name or ".attn_k." in name):
        attention = next(spec.attentions())
        heads = attention.heads if ".attn_q." in name else attention.kv_heads
    factor = gguf_folded.factor(name, spec) if architecture.folded else 1.0

    def make() -> torch.Tensor:
        made = _dense(tensor)
        if name.endswith("norm.weight") and not name.endswith(gguf_shapes.PLAIN):
            made = made + architecture.offset
        if name.endswith(gguf_shapes.DECAYS):
            made = -made.exp()
        made = made * factor
        if heads:
            # llama.cpp turns neighbouring features: the halves of each head are interleaved.
            made = made.view(heads, 2, -1, *made.shape[1:]).transpose(1, 2).reshape(made.shape)
        return made

    return make
