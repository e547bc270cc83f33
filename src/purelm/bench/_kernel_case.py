"""What a case of `purelm bench kernels` is: sizes of models, inputs, a call, its check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quant import nf4 as leaf
from ._kernel_check import Function

EPS = 1e-5
BLOCK = 64
# Weights and rows that a check looks at where all would take too much of float64.
CHECKED_WEIGHTS, CHECKED_ROWS = 1 << 22, 256


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that kernels see; how many tokens and cached keys they run on."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str = "silu"
    qk_norm: bool = False
    gemma: bool = False  # norms by 1 + w, rounded last
    softcap: float | None = None  # of the logits
    tokens: int = 16384
    batch: int = 8
    caches: tuple[int, ...] = (8192, 32768)
    experts: tuple[int, int] | None = None  # how many of `mlp` features, and how many a token


SHAPES = {
    "llama-1b": Shape(2048, 8192, 32, 8, 64, 128256),
    "llama-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 151936, qk_norm=True),
    "gemma-2-9b": Shape(3584, 14336, 16, 8, 256, 256000, "gelu_tanh", gemma=True, softcap=30.0),
    "qwen3-30b-a3b": Shape(2048, 768, 32, 4, 128, 151936, qk_norm=True, experts=(128, 8)),
    # For machines without a GPU.
    "tiny": Shape(
        128,
        192,
        4,
        2,
        32,
        300,
        qk_norm=True,
        softcap=30.0,
        tokens=32,
        batch=2,
        caches=(48,),
        experts=(4, 2),
    ),  # fmt: skip
}


class Call(NamedTuple):
    """What is timed is run(*prepare(args, ups)); `graph` says whether a CUDA graph can hold it."""

    prepare: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Any]]
    run: Function
    graph: bool = True


@dataclass(frozen=True)
class Case:
    """One kernel at one size: `inputs` makes (arguments, gradients of the outputs) anew."""

    kernel: str
    size: str
    moved: float  # bytes
    operations: float
    inputs: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    ours: Call
    check: Callable[[Sequence[Tensor], Sequence[Tensor]], None]
    options: dict[str, Any] = field(default_factory=dict)


def forward(f: Function, *, graph: bool = True) -> Call:
    return Call(lambda args, ups: args, f, graph)


def backward(f: Function, wanted: Sequence[int], *, graph: bool = True) -> Call:
    """The backward of `f` alone, to the arguments `wanted`; it may overwrite what it was given."""

    def prepare(args: Sequence[Tensor], ups: Sequence[Tensor]) -> Sequence[Any]:
        args = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(args)]
        found = f(*args)
        outs = [found] if isinstance(found, Tensor) else list(found)
        return outs, [args[i] for i in wanted], [t.clone() for t in ups]

    def run(outs: Any, leaves: Any, ups: Any) -> Any:
        return torch.autograd.grad(outs, leaves, ups, retain_graph=True)

    return Call(prepare, run, graph)


def normal(device: torch.device, *shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * std).to(torch.bfloat16)


def weights(shape: Shape, device: torch.device, double: bool) -> tuple[Tensor, ...]:
    made = leaf.quantize(normal(device, shape.mlp, shape.hidden, std=0.02), double=double)
    return made.tensors


def parts(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    packed, absmax, *double = tensors
    scale, offset = double or (None, None)
    return packed, absmax, scale, offset
