"""What `purelm bench kernels` runs: every kernel at the shapes of some models, as data.

A case has inputs, our call, a check against the kernel's reference, and what the call must at least
move and compute. Operations of products are exact; those of elementwise kernels are nominal
(products and sums a value), as they only place a point in the roofline's picture.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import clamped, cross_entropy, gated, low_rank, rms_norm, rope
from . import (
    _kernel_cases_attention,
    _kernel_cases_experts,
    _kernel_cases_fp8,
    _kernel_cases_mixers,
    _kernel_cases_nf4,
)
from ._kernel_case import CHECKED_ROWS, EPS, SHAPES, Case, Shape, backward, forward, normal
from ._kernel_check import Function, against, close


def norming(shape: Shape, device: torch.device) -> Iterator[Case]:
    style: dict[str, Any] = {"offset": 1.0, "cast_first": False} if shape.gemma else {}
    values = shape.tokens * shape.hidden

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, w, EPS, **style)

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm.rms_norm_reference(x, w, EPS, **style)

    def inputs() -> Any:
        x, dy = (normal(device, shape.tokens, shape.hidden) for _ in range(2))
        return (x, 1 + normal(device, shape.hidden, std=0.1) - float(shape.gemma)), (dy,)

    for name, wanted, of in (("", (), 4), (" dx", (0,), 6), (" dx dw", (0, 1), 6)):
        yield Case(
            "rms_norm" + name,
            f"{shape.tokens}x{shape.hidden}",
            of * values,
            (4.0 if not wanted else 8.0) * values,
            inputs,
            backward(ours, wanted) if wanted else forward(ours),
            against(ours, reference, wanted),
            {"gemma": shape.gemma, "wanted": wanted},
        )

    def onto(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, w, EPS, **style, onto=beside)

    def onto_reference(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
        return rms_norm.rms_norm_reference(x, w, EPS, **style, onto=beside)

    def pull(x: Tensor, w: Tensor, beside: Tensor, dy: Tensor) -> Tensor:
        return rms_norm.rms_norm_pull(dy, x, w, EPS, **style, onto=beside)

    def pull_reference(x: Tensor, w: Tensor, beside: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(reference(x, w), x, dy)[0] + beside

    def more(count: int) -> Any:
        (x, w), _ = inputs()
        return (x, w, *(normal(device, shape.tokens, shape.hidden) for _ in range(count))), ()

    for name, f, plain, count, of in (
        ("norm onto a residual", onto, onto_reference, 1, 6),
        ("norm dx onto a residual", pull, pull_reference, 2, 8),
    ):
        yield Case(
            name,
            f"{shape.tokens}x{shape.hidden}",
            of * values,
            4.0 * count * values,
            partial(more, count),
            forward(f),
            against(f, plain),
        )


def gating(shape: Shape, device: torch.device) -> Iterator[Case]:
    def ours(gate: Tensor, up: Tensor) -> Tensor:
        return gated.gated(gate, up, shape.activation)

    def reference(gate: Tensor, up: Tensor) -> Tensor:
        return gated.gated_reference(gate, up, shape.activation)

    settings = {"activation": shape.activation}
    return _gates(
        f"gated {shape.activation}", ours, reference, (5.0, 12.0), shape, device, settings
    )


def clamping(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The clamped SwiGLU of gpt-oss, with its numbers."""

    def ours(gate: Tensor, up: Tensor) -> Tensor:
        return clamped.clamped(gate, up, 1.702, 7.0)

    def reference(gate: Tensor, up: Tensor) -> Tensor:
        return clamped.clamped_reference(gate, up, 1.702, 7.0)

    return _gates("clamped", ours, reference, (8.0, 16.0), shape, device, {})


def _gates(
    name: str,
    ours: Function,
    reference: Function,
    operations: tuple[float, float],
    shape: Shape,
    device: torch.device,
    settings: dict[str, Any],
) -> Iterator[Case]:
    """A gate's forward and backward, of so many operations a value."""
    values = shape.tokens * shape.mlp

    def inputs() -> Any:
        gate, up, dh = (normal(device, shape.tokens, shape.mlp) for _ in range(3))
        return (gate, up), (dh,)

    forwards, backwards = operations
    for end, wanted, of, each in (("", (), 6, forwards), (" backward", (0, 1), 10, backwards)):
        yield Case(
            name + end,
            f"{shape.tokens}x{shape.mlp}",
            of * values,
            each * values,
            inputs,
            backward(ours, wanted) if wanted else forward(ours),
            against(ours, reference, wanted),
            {**settings, "wanted": wanted},
        )


def rotating(shape: Shape, device: torch.device) -> Iterator[Case]:
    b, s, d = shape.batch, shape.tokens // shape.batch, shape.head_dim
    values = shape.tokens * (shape.heads + shape.kv_heads) * d
    angles = torch.rand(1, s, d // 2, device=device).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()

    def ours(q: Tensor, k: Tensor) -> Any:
        return rope.rope_qk(q, k, cos, sin)

    def reference(q: Tensor, k: Tensor) -> Any:
        wide = torch.promote_types(q.dtype, torch.float32)
        return [rope.rope_reference(x, cos.to(wide), sin.to(wide)) for x in (q, k)]

    def normed(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Any:
        return rope.rope_qk(q, k, cos, sin, norm=rope.HeadNorm(wq, wk, EPS, 0.0, True))

    def normed_reference(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Any:
        norm = rms_norm.rms_norm_reference
        return reference(norm(q, wq, EPS), norm(k, wk, EPS))

    def inputs(norms: bool) -> Any:
        q, dq = (normal(device, b, s, shape.heads, d) for _ in range(2))
        k, dk = (normal(device, b, s, shape.kv_heads, d) for _ in range(2))
        ws = tuple(1 + normal(device, d, std=0.1) for _ in range(2)) if norms else ()
        return (q, k, *ws), (dq, dk)

    for norms in (False, True) if shape.qk_norm else (False,):
        f, plain = (normed, normed_reference) if norms else (ours, reference)
        for name, wanted in (("", ()), (" backward", (0, 1))):
            yield Case(
                ("norm and rope" if norms else "rope") + name,
                f"{shape.tokens}x{shape.heads + shape.kv_heads}x{d}",
                (6.0 if norms and wanted else 4.0) * values,
                (8.0 if norms else 3.0) * values,
                partial(inputs, norms),
                backward(f, wanted) if wanted else forward(f),
                against(f, plain, wanted),
                {"wanted": wanted, "cos": cos, "sin": sin, "norms": norms},
            )


def losing(shape: Shape, device: torch.device) -> Iterator[Case]:
    n, e, v = shape.tokens, shape.hidden, shape.vocab
    options: dict[str, Any] = {"softcap": shape.softcap}

    def inputs() -> Any:
        labels = torch.randint(v, (n,), device=device)
        one = torch.ones((), device=device)
        return (normal(device, n, e), normal(device, v, e, std=0.02), labels), (one,)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy.linear_cross_entropy(hidden, weight, labels, **options)

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaf = hidden.detach().requires_grad_()
        loss = ours(leaf, weight, labels)
        return torch.autograd.grad(loss, leaf)

    def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy.linear_cross_entropy_reference(hidden, weight, labels, **options)

    def check(args: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
        hidden, weight, labels = args
        some = slice(0, CHECKED_ROWS)
        against(ours, reference, (0,))((hidden[some], weight, labels[some]), ups)

    yield Case(
        "cross entropy" + " softcap" * (shape.softcap is not None),
        f"{n}x{e}x{v}",
        4.0 * n * e + 2.0 * v * e,
        4.0 * n * e * v,
        inputs,
        forward(whole, graph=False),
        check,
        options,
    )


RANK = 16


def adding(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A low-rank term onto a product that stands in memory."""
    m, n = shape.tokens, shape.mlp

    def run(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        return low_rank.add_low_rank(y, low, b)

    def check(args: Sequence[Tensor], _: Any) -> None:
        y, low, b = args
        exact = torch.addmm(*(t.double() for t in args))
        close("sum", run(y.clone(), low, b), torch.addmm(y, low, b), exact)

    yield Case(
        "low-rank term",
        f"{m}x{RANK}x{n}",
        4.0 * m * n + 2.0 * RANK * (m + n),
        2.0 * m * n * RANK,
        lambda: (tuple(normal(device, *of) for of in ((m, n), (m, RANK), (RANK, n))), ()),
        forward(run),
        check,
    )


KERNELS: dict[str, Callable[[Shape, torch.device], Iterator[Case]]] = {
    "nf4-quantize": _kernel_cases_nf4.quantizing,
    "nf4-dequantize": _kernel_cases_nf4.dequantizing,
    "nf4-product": _kernel_cases_nf4.multiplying,
    "nf4-pair": _kernel_cases_nf4.pairing,
    "low-rank": adding,
    "experts": _kernel_cases_experts.choosing,
    "experts-dense": _kernel_cases_experts.choosing_dense,
    "routing": _kernel_cases_experts.combining,
    "rms-norm": norming,
    "fp8": _kernel_cases_fp8.rounding,
    "gated": gating,
    "clamped": clamping,
    "rope": rotating,
    "cross-entropy": losing,
    "decode-attention": _kernel_cases_attention.decoding,
    "head-step": _kernel_cases_attention.storing,
    "attention": _kernel_cases_attention.attending,
    "attention-softcap": _kernel_cases_attention.capping,
    "short-conv": _kernel_cases_mixers.convolving,
    "scan": _kernel_cases_mixers.scanning,
    "gated-norm": _kernel_cases_mixers.norming_gated,
    "state-step": _kernel_cases_mixers.stepping,
}


def cases(kernel: str, model: str, device: torch.device) -> Iterator[Case]:
    """Those of a family of kernels at a model's sizes; none where the model is run without it."""
    shape = SHAPES[model]
    if not shape.only or kernel in shape.only:
        yield from KERNELS[kernel](shape, device)
