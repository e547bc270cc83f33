"""What a case of `purelm bench kernels` is: sizes of models, inputs, a call, its check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..quant import nf4 as leaf
from ._kernel_check import Function

EPS = 1e-5
BLOCK = 64
# Weights and rows that a check looks at where all would take too much of float64.
CHECKED_WEIGHTS, CHECKED_ROWS = 1 << 20, 256


class Mixer(NamedTuple):
    """What a hybrid has in attention's place: heads whose states take groups of keys, behind a
    short convolution of some taps; or that alone.
    """

    kind: Literal["ssd", "delta", "conv"]
    channels: int  # of the convolution
    taps: int
    heads: int = 0
    head_dim: int = 0
    groups: int = 0
    state: int = 0


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
    mixers: tuple[Mixer, ...] = ()
    only: tuple[str, ...] = ()  # the families of kernels that are run (empty: all)


EXPERTS = ("experts", "experts-dense", "routing")
MIXERS = ("short-conv", "scan", "gated-norm", "state-step")
SHAPES = {
    "llama-1b": Shape(2048, 8192, 32, 8, 64, 128256),
    "llama-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 151936, qk_norm=True),
    "gemma-2-9b": Shape(3584, 14336, 16, 8, 256, 256000, "gelu_tanh", gemma=True, softcap=30.0),
    # For what they alone have.
    "qwen3-30b-a3b": Shape(2048, 768, 32, 4, 128, 151936, experts=(128, 8), only=EXPERTS),
    "qwen3-next": Shape(
        2048, 5632, 16, 2, 256, 151936, only=MIXERS,
        mixers=(Mixer("delta", 8192, 4, 32, 128, 16, 128),),
    ),
    "granite-4-h": Shape(
        1536, 4096, 12, 4, 128, 100352, only=MIXERS,
        mixers=(Mixer("ssd", 3328, 4, 48, 64, 1, 128),),
    ),
    "falcon-h1-3b": Shape(
        3072, 8192, 12, 2, 128, 65537, only=MIXERS,
        mixers=(Mixer("ssd", 4096, 4, 24, 128, 2, 256),),
    ),
    "lfm2": Shape(2048, 8192, 32, 8, 64, 65536, only=MIXERS, mixers=(Mixer("conv", 2048, 3),)),
    # For machines without a GPU.
    "tiny": Shape(
        128, 192, 4, 2, 32, 300, qk_norm=True, softcap=30.0,
        tokens=16, batch=2, caches=(48,), experts=(4, 2),
        mixers=(
            Mixer("ssd", 24, 4, 2, 16, 1, 16),
            Mixer("delta", 40, 2, 2, 16, 1, 16),
            Mixer("conv", 16, 3),
        ),
    ),
}  # fmt: skip


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
