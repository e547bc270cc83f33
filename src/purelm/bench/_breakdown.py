"""What a step's time on a GPU goes to, and the operations it does."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# The first that matches a kernel's name (ours, PyTorch's, cuDNN's, bitsandbytes', Liger's).
KINDS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("dequantize", r"dequant|nf4_kernel|nf4_rows"),
    ("optimizer", r"optimizer|adam|multi_tensor|lpnorm"),
    ("loss", r"cross_entropy|row_step|softmax"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|grouped|xmma"),
)
REST, GAPS = "elementwise", "host gaps"


class Span(NamedTuple):
    """One kernel or copy on the device, in microseconds."""

    name: str
    start: float
    end: float


def kind(name: str) -> str:
    """The kind that a kernel's name says."""
    return next((k for k, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), REST)


def split(spans: Iterable[Span], wall: float) -> dict[str, float]:
    """Milliseconds of each kind of `spans`, and of `wall` microseconds in which none ran.

    Kinds that run beside each other (copies beside products) each count in full.
    """
    found: dict[str, float] = {}
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        name = kind(span.name)
        found[name] = found.get(name, 0.0) + span.end - span.start
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    found[GAPS] = max(0.0, wall - busy)
    return {name: round(us / 1e3, 2) for name, us in found.items()}


def breakdown(step: Callable[[], object], wall: float) -> dict[str, float]:
    """`split` of one profiled `step`, of which an unprofiled one takes `wall` seconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if str(event.device_type).endswith("CUDA")
    ]
    return split(spans, wall * 1e6)


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of one `step`'s matrix products and attention, whatever is run
    again included (masked scores are counted too)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    # torch's own formulas refuse fewer heads of keys than of queries, and none counts `addmm_`.
    own: dict[Any, Callable[..., int]] = {aten.addmm_: _added_in_place}
    own |= {
        forward: _attention
        for forward in (
            aten._scaled_dot_product_cudnn_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_flash_attention_for_cpu,
        )
    }
    own |= {
        backward: _attention_backward
        for backward in (
            aten._scaled_dot_product_cudnn_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step()
    return int(counter.get_total_flops())


def _added_in_place(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    """The product of a [m, k] and b [k, n], by their shapes."""
    return 2 * a[0] * a[1] * b[1]


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """The two products of q [b, h, s, d], k [b, k, t, d] and v [b, k, t, e], by their shapes."""
    b, h, s, d = q
    return 2 * b * h * s * k[2] * (d + v[3])


def _attention_backward(
    _: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **__: Any
) -> int:
    """Scores again, and the gradients of weights, values, queries and keys."""
    b, h, s, d = q
    return 2 * b * h * s * k[2] * (3 * d + 2 * v[3])
