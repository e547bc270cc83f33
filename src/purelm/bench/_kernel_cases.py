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

from ..kernels import attention as attention_kernel
from ..kernels import (
    clamped,
    cross_entropy,
    decode_attention,
    gated,
    nf4,
    nf4_matvec,
    rms_norm,
    rope,
)
from ..quant import nf4 as leaf
from . import _kernel_cases_fp8
from ._kernel_case import Case, Shape, backward, forward, normal
from ._kernel_check import Function, against, close, same

EPS = 1e-5
BLOCK = 64
# Rows of x in the products with packed weights.
FEW = (1, 2, 8, 16, 64)
# Weights, rows and sequences that a check looks at where all would take too much of float64.
CHECKED_WEIGHTS, CHECKED_ROWS = 1 << 22, 256


def quantizing(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def made(w: Tensor, double: bool) -> tuple[Tensor, ...]:
        # Without the look at one number by which quant.nf4 refuses weights that are not finite.
        packed, absmax = nf4.quantize(w, BLOCK)
        return (packed, *nf4.quantize_absmax(absmax)) if double else (packed, absmax)

    def check(args: Sequence[Tensor], _: Any, double: bool) -> None:
        w = args[0].view(-1)
        some = min(len(w), CHECKED_WEIGHTS)
        packed, absmax = nf4.quantize(w, BLOCK)
        want = nf4.quantize_reference(w[:some].cpu(), BLOCK)
        same("codes", packed[: some // 2], want[0])
        same("absmax", absmax[: some // BLOCK], want[1])
        if double:
            codes, scale, offset = nf4.quantize_absmax(absmax)
            # A GPU's torch divides by a number as it multiplies by its reciprocal.
            want = nf4.quantize_absmax_reference(absmax.cpu(), offset.cpu())
            same("codes of absmax", codes, want[0])
            same("scales of absmax", scale, want[1])

    for double in (False, True):
        yield Case(
            "nf4 quantize" + " double" * double,
            f"{shape.mlp}x{shape.hidden}",
            n * 2.5 + n / BLOCK * (1 if double else 4),
            8.0 * n,
            lambda: ((normal(device, shape.mlp, shape.hidden, std=0.02),), ()),
            forward(partial(made, double=double)),
            partial(check, double=double),
            {"double": double},
        )


def weights(shape: Shape, device: torch.device, double: bool) -> tuple[Tensor, ...]:
    made = leaf.quantize(normal(device, shape.mlp, shape.hidden, std=0.02), double=double)
    return made.tensors


def parts(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    packed, absmax, *double = tensors
    scale, offset = double or (None, None)
    return packed, absmax, scale, offset


def dequantizing(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def run(*tensors: Tensor) -> Tensor:
        return nf4.dequantize(*parts(tensors), n, BLOCK, torch.bfloat16)

    def check(args: Sequence[Tensor], _: Any) -> None:
        want = nf4.dequantize_reference(*parts(args), n, BLOCK, torch.bfloat16)
        same("weights", run(*args), want)

    for double in (False, True):
        yield Case(
            "nf4 dequantize" + " double" * double,
            f"{shape.mlp}x{shape.hidden}",
            n * 2.5 + n / BLOCK * (1 if double else 4),
            float(n),
            partial(lambda double: (weights(shape, device, double), ()), double),
            forward(run),
            check,
            {"double": double, "shape": (shape.mlp, shape.hidden)},
        )


def multiplying(shape: Shape, device: torch.device) -> Iterator[Case]:
    n = shape.mlp * shape.hidden

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return nf4_matvec.matvec(x, *parts(tensors), shape.mlp, BLOCK)

    def check(args: Sequence[Tensor], _: Any) -> None:
        x, *tensors = args
        dense = nf4.dequantize(*parts(tensors), n, BLOCK, torch.bfloat16).view(shape.mlp, -1)
        exact = nf4_matvec.matvec_reference(x.double(), *parts(tensors), shape.mlp, BLOCK)
        close("product", run(*args), torch.nn.functional.linear(x, dense), exact)

    for rows in FEW:
        yield Case(
            "nf4 product",
            f"{rows}x{shape.hidden}->{shape.mlp}",
            n / 2 + n / BLOCK + rows * (shape.hidden + shape.mlp) * 2,
            2.0 * rows * n,
            partial(
                lambda rows: (
                    (normal(device, rows, shape.hidden), *weights(shape, device, True)),
                    (),
                ),
                rows,
            ),
            forward(run),
            check,
            {"rows": rows, "shape": (shape.mlp, shape.hidden)},
        )


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


def decoding(shape: Shape, device: torch.device) -> Iterator[Case]:
    h, k, d = shape.heads, shape.kv_heads, shape.head_dim

    def run(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor) -> Tensor:
        return decode_attention.decode_attention(q, keys, values, first, end, scale=d**-0.5)

    def reference(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor) -> Tensor:
        return decode_attention.decode_attention_reference(
            q, keys, values, first, end, scale=d**-0.5
        )

    def inputs(b: int, length: int) -> Any:
        keys, values = (normal(device, b, length, k, d) for _ in range(2))
        span = (torch.full((b,), at, device=device) for at in (0, length))
        return (normal(device, b, h, d), keys, values, *span), ()

    for b, length in [(1, n) for n in shape.caches] + [(shape.batch, shape.caches[0])]:
        yield Case(
            "decode attention",
            f"{b}x{length}x{k}x{d}",
            4.0 * b * length * k * d,
            4.0 * b * length * h * d,
            partial(inputs, b, length),
            forward(run),
            against(run, reference),
        )


def attending(shape: Shape, device: torch.device) -> Iterator[Case]:
    b, s, d = shape.batch, shape.tokens // shape.batch, shape.head_dim
    products = 2.0 * b * shape.heads * s * s * d  # two, of which causality leaves half
    size = 2.0 * shape.tokens * d
    moved = size * (2 * shape.heads + 2 * shape.kv_heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_kernel.attention(q, k, v, scale=d**-0.5)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_kernel.attention_reference(q, k, v, scale=d**-0.5)[0]

    def inputs() -> Any:
        q, dout = (normal(device, b, s, shape.heads, d) for _ in range(2))
        return (q, *(normal(device, b, s, shape.kv_heads, d) for _ in range(2))), (dout,)

    def check(args: Sequence[Tensor], ups: Sequence[Tensor], wanted: Sequence[int]) -> None:
        # The first token's gradients are zeros but for rounding: a tensor is one row.
        held = against(ours, reference, wanted, flat=True)
        held([t[:1] for t in args], [t[:1] for t in ups])

    for name, wanted in (("", ()), (" backward", (0, 1, 2))):
        yield Case(
            "attention" + name,
            f"{b}x{s}x({shape.heads}+{shape.kv_heads})x{d}",
            moved * (2 if wanted else 1),
            products * (2.5 if wanted else 1),
            inputs,
            backward(ours, wanted) if wanted else forward(ours),
            partial(check, wanted=wanted),
            {"wanted": wanted},
        )


KERNELS: dict[str, Callable[[Shape, torch.device], Iterator[Case]]] = {
    "nf4-quantize": quantizing,
    "nf4-dequantize": dequantizing,
    "nf4-product": multiplying,
    "rms-norm": norming,
    "fp8": _kernel_cases_fp8.rounding,
    "gated": gating,
    "clamped": clamping,
    "rope": rotating,
    "cross-entropy": losing,
    "decode-attention": decoding,
    "attention": attending,
}
