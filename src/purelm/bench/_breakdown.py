"""What a step's time on a GPU goes to, and the operations it does."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

# The first that matches a kernel's name (ours, PyTorch's, cuDNN's, bitsandbytes', Liger's).
KINDS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("dequantize", r"dequant|nf4_kernel|nf4_turned|nf4_rows"),
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
    again included (torch counts masked scores too)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
