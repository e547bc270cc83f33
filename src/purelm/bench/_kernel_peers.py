"""Other libraries' calls for the cases of `purelm bench kernels`, where they are installed.

Each peer maps a case to calls by name, and is imported when first asked. Unsloth is a black
box: its public functions are called, and as importing it changes
other libraries, it runs only when named.
"""

import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import nf4
from ..kernels.cross_entropy import chunk_rows
from ._kernel_case import BLOCK, EPS, Call, Case, backward, forward, parts

Calls = dict[str, Call]


def torch_itself(case: Case) -> Calls:
    """What plain torch offers: the products alone, dense products, SDPA."""
    kernel = case.kernel
    if kernel == "nf4 product":
        out, inner = case.options["shape"]

        def dense(x: Tensor, *tensors: Tensor) -> Tensor:
            w = nf4.dequantize(*parts(tensors), out * inner, BLOCK, torch.bfloat16)
            return F.linear(x, w.view(out, inner))

        return {"dequantize + cuBLAS": forward(dense)}
    if kernel == "fp8 product":

        def bf16(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
            return F.linear(x, w)

        def widened(args: Sequence[Tensor], _: Any) -> Sequence[Any]:
            return args[0], args[1].to(torch.bfloat16), args[2]

        return {"bf16 cuBLAS": Call(widened, bf16)}
    if kernel == "experts":
        groups, outputs, width = case.options["shape"]

        def at_once(x: Tensor, offsets: Tensor, *tensors: Tensor) -> Tensor:
            w = x.new_empty(groups, outputs, width)
            for i, some in enumerate(zip(*tensors, strict=True)):
                nf4.dequantize(*parts(some), outputs * width, BLOCK, out=w[i])
            return torch._grouped_mm(x, w.mT, offs=offsets[1:])

        return {"dequantize + torch._grouped_mm": forward(at_once)}
    if kernel == "experts in bf16":

        def grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
            return torch._grouped_mm(x, w.mT, offs=offsets[1:])

        return {"torch._grouped_mm": forward(grouped)}
    if kernel == "low-rank term":
        return {"addmm_": forward(lambda y, low, b: y.addmm_(low, b))}
    if kernel.startswith("cross entropy"):

        def products(hidden: Tensor, weight: Tensor, _: Tensor) -> Tensor:
            rows = chunk_rows(weight.shape[0], weight.shape[1], 2)
            logits = hidden.new_empty(min(rows, len(hidden)), len(weight))
            grad = torch.empty_like(hidden)
            for start in range(0, len(hidden), rows):
                some = hidden[start : start + rows]
                torch.mm(some, weight.t(), out=logits[: len(some)])
                torch.mm(logits[: len(some)], weight, out=grad[start : start + rows])
            return grad

        return {"the two products alone": forward(products, graph=False)}
    if kernel == "decode attention":

        def one_query(q: Tensor, keys: Tensor, values: Tensor, *_: Tensor) -> Tensor:
            return _flash(q[:, None], keys, values, False)

        return {"SDPA flash": forward(one_query)}
    if kernel.startswith("attention") and case.options["softcap"] is None:
        wanted = case.options["wanted"]
        return {"SDPA flash": backward(_flash, wanted) if wanted else forward(_flash)}
    return {}


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
            1, 2
        )


def _bnb_weight(args: Sequence[Tensor], double: bool, shape: tuple[int, int]) -> tuple[Any, Any]:
    """The weight that our parts stand for, as bitsandbytes quantizes it."""
    functional = import_module("bitsandbytes.functional")
    w = nf4.dequantize(*parts(args), shape[0] * shape[1], BLOCK, torch.bfloat16).view(shape)
    packed, state = functional.quantize_4bit(
        w, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    return packed, state


def bitsandbytes(case: Case) -> Calls:
    functional = import_module("bitsandbytes.functional")
    options, name = case.options, "bitsandbytes"
    if case.kernel.startswith("nf4 quantize"):

        def made(w: Tensor) -> Any:
            return functional.quantize_4bit(
                w, blocksize=BLOCK, quant_type="nf4", compress_statistics=options["double"]
            )

        return {name: forward(made, graph=False)}
    if case.kernel.startswith("nf4 dequantize"):
        shape, double = options["shape"], options["double"]
        return {
            name: Call(lambda args, _: _bnb_weight(args, double, shape), functional.dequantize_4bit)
        }
    if case.kernel == "nf4 product":
        multiply = import_module("bitsandbytes").matmul_4bit

        def prepare(args: Sequence[Tensor], _: Any) -> Sequence[Any]:
            x, *tensors = args
            packed, state = _bnb_weight(tensors, True, options["shape"])
            return (x[None] if len(x) == 1 else x), packed, state

        if options["rows"] == 1:
            return {name: Call(prepare, lambda x, w, s: functional.gemv_4bit(x, w.t(), state=s))}
        return {name: Call(prepare, lambda x, w, s: multiply(x, w.t(), quant_state=s))}
    return {}


def liger(case: Case) -> Calls:
    f = import_module("liger_kernel.transformers.functional")
    options, kernel = case.options, case.kernel
    wanted = options.get("wanted", ())

    def either(run: Callable[..., Any]) -> Calls:
        return {"Liger": backward(run, wanted) if wanted else forward(run)}

    if kernel.startswith("rms_norm"):
        style = (1.0, "gemma") if options["gemma"] else (0.0, "llama")
        # Its backward makes the weight's gradient in any case.
        return either(lambda x, w: f.liger_rms_norm(x, w, EPS, *style))
    if kernel.startswith("gated"):
        run = {"silu": f.liger_swiglu, "gelu_tanh": f.liger_geglu}.get(options["activation"])
        return {} if run is None else either(run)
    if kernel.startswith("rope"):
        cos, sin = (options[name].to(torch.bfloat16) for name in ("cos", "sin"))

        def turned(q: Tensor, k: Tensor) -> Any:
            return tuple(
                x.transpose(1, 2)
                for x in f.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            )

        return either(turned)
    if kernel.startswith("cross entropy"):

        def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
            leaf = hidden.detach().requires_grad_()
            loss = f.liger_fused_linear_cross_entropy(
                leaf, weight, labels, reduction="sum", softcap=options["softcap"]
            )
            return torch.autograd.grad(loss, leaf)

        return {"Liger": forward(whole, graph=False)}
    return {}


def cut_cross_entropy(case: Case) -> Calls:
    if not case.kernel.startswith("cross entropy"):
        return {}
    f = import_module("cut_cross_entropy").linear_cross_entropy

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        leaf = hidden.detach().requires_grad_()
        softcap = case.options["softcap"]
        loss = f(leaf, weight, labels, reduction="sum", softcap=softcap)
        return torch.autograd.grad(loss, leaf)

    return {"cut-cross-entropy": forward(whole, graph=False)}


def unsloth(case: Case) -> Calls:
    import_module("unsloth")
    kernels = import_module("unsloth.kernels")
    low = import_module("unsloth.kernels.utils")
    options, name = case.options, "Unsloth"
    if case.kernel.startswith("nf4 dequantize"):
        shape, double = options["shape"], options["double"]
        return {name: Call(lambda args, _: _bnb_weight(args, double, shape), low.fast_dequantize)}
    if case.kernel == "nf4 product" and options["rows"] == 1:

        def prepare(args: Sequence[Tensor], _: Any) -> Sequence[Any]:
            x, *tensors = args
            return x[None], *_bnb_weight(tensors, True, options["shape"])

        return {name: Call(prepare, low.fast_gemv)}
    if case.kernel == "rms_norm" and not options["gemma"]:

        def norm(x: Tensor, w: Tensor) -> Any:
            layer = SimpleNamespace(weight=w, variance_epsilon=EPS)
            return kernels.fast_rms_layernorm(layer, x[None])

        return {name: forward(norm)}
    if case.kernel == "gated silu":
        return {name: forward(lambda g, u: kernels.swiglu_fg_kernel(g[None], u[None]))}
    return {}


# By the name of what must be installed.
PEERS: dict[str, Callable[[Case], Calls]] = {
    "torch": torch_itself,
    "bitsandbytes": bitsandbytes,
    "liger_kernel": liger,
    "cut_cross_entropy": cut_cross_entropy,
    "unsloth": unsloth,
}


def installed() -> list[str]:
    """The peers that run unasked: all that are installed, Unsloth left out."""
    return [name for name in PEERS if name != "unsloth" and importlib.util.find_spec(name)]
