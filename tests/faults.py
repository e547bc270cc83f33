"""Ways to spoil what a reader is given, drawn by hypothesis, and the bounds that it must keep."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from hypothesis import strategies as st
from stored_bases import Stored

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.bool,
)  # fmt: skip
VALUES = st.sampled_from(
    [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 5e-324, "", "nf4",
     "x" * 5000, "../..", [], [1], [[]] * 3, {}, {"a": 1}, ["model"], {"rope_type": "yarn"}]
)  # fmt: skip


@contextmanager
def bounded() -> Iterator[None]:
    """What runs inside takes at most 2 s and 200 MB."""
    start = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024


def spoilt_value(draw: Any) -> Any:
    """A value that a JSON file could hold where nobody expects it."""
    return deepcopy(draw(VALUES))


def spoilt_tensor(draw: Any, t: torch.Tensor) -> torch.Tensor:
    """The tensor in another shape or dtype, or with other values."""
    t = t.contiguous()
    how = draw(st.sampled_from("turn flat one-more cut none double dtype value bytes".split()))
    if how == "turn":
        return t.movedim(0, -1) if t.ndim else t
    if how == "flat":
        return t.reshape(-1)
    if how == "one-more":
        return t[None]
    if how == "cut" and t.ndim:
        return t[:-1]
    if how == "none" and t.ndim:
        return t[:0]
    if how == "double" and t.ndim:
        return torch.cat([t.view(torch.uint8), t.view(torch.uint8)]).view(t.dtype)
    if how == "dtype":
        return t.to(draw(st.sampled_from(DTYPES)))
    if how == "value":
        values = [0.0, -1.0, 3.0, 127.0, 1e30]
        values += [float("nan"), float("inf")] if t.is_floating_point() else []
        return torch.full(t.shape, draw(st.sampled_from(values))).to(t.dtype)
    out = t.clone().reshape(-1).view(torch.uint8)
    if len(out) and t.dtype != torch.bool:
        out[draw(st.integers(0, len(out) - 1))] = draw(st.integers(0, 255))
    return out.view(t.dtype).reshape(t.shape)


def spoil_json(draw: Any, fields: dict[str, Any]) -> None:
    """One field somewhere within replaced, removed or added."""
    inner = [name for name, value in fields.items() if isinstance(value, dict)]
    if inner and draw(st.booleans()):
        return spoil_json(draw, fields[draw(st.sampled_from(inner))])
    name = draw(st.sampled_from([*sorted(fields), "surplus"]))
    if draw(st.integers(0, 4)) == 0:
        fields.pop(name, None)
    else:
        fields[name] = spoilt_value(draw)
    return None


def spoil(draw: Any, stored: Stored) -> None:
    """One to three things of a checkpoint's config and tensors."""
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 2)) == 0:
            spoil_json(draw, stored.config)
            continue
        name = draw(st.sampled_from(sorted(stored.tensors)))
        what = draw(st.integers(0, 9))
        if what == 0 and len(stored.tensors) > 1:
            del stored.tensors[name]
        elif what == 1:
            end = draw(st.sampled_from(["2", ".weight", "_scale", ".SCB"]))
            stored.tensors[name + end] = stored.tensors.pop(name)
        else:
            stored.tensors[name] = spoilt_tensor(draw, stored.tensors[name])
