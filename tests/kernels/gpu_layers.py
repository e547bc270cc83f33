"""Time layers of families, before and after: `python tests/kernels/gpu_layers.py OUT [--tiny]`.

Training steps of four layers of hybrids, in NF4 with LoRA of rank 16, whose recurrent mixers have a
backward of their own or are run again by autograd; and captured steps of decoding through eight
layers like Gemma's, fused and not. Medians; writes OUT/layers.json and prints a line each.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2] / "src")]
import torch  # noqa: E402

from purelm.nn import cache as kv  # noqa: E402
from purelm.nn import decode, decode_layer, decoder, halves, lora, params, tree  # noqa: E402
from purelm.nn.graph import capture  # noqa: E402
from purelm.nn.residuals import KEEP, RECOMPUTE  # noqa: E402
from purelm.nn.spec import (  # noqa: E402
    AttentionSpec,
    DeltaNetSpec,
    LayerInputSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
    ShortConvSpec,
)
from purelm.quant import nf4  # noqa: E402

TINY, BEGUN = "--tiny" in sys.argv, time.monotonic()
DEVICE = "cpu" if TINY else "cuda"
LIMIT = float(next((a[8:] for a in sys.argv if a.startswith("--limit=")), "120"))
NORM = NormSpec(1e-6)
GEMMA = NormSpec(1e-6, offset=1.0, cast_first=False)
FOUR = NormSpec(1e-6, cast_first=False)
# Name: the mixers, the model's width and its MLP's.
HYBRIDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "Granite 4": ({"recurrent": Mamba2Spec(48, 64, 1, 128, 4, norm=NORM)}, 1536, 4096),
    "Qwen3-Next": (
        {"recurrent": DeltaNetSpec(16, 32, 128, 128, 4, NORM, by_key_head=True)},
        2048,
        5632,
    ),
    "LFM2": ({"recurrent": ShortConvSpec(2048, 3)}, 2048, 8192),
    "Falcon-H1": (
        {
            "recurrent": Mamba2Spec(24, 128, 2, 256, 4),
            "attention": AttentionSpec(12, 2, 128, 128**-0.5, RopeSpec(128, 1e6)),
        },
        3072,
        8192,
    ),
}
if TINY:
    HYBRIDS = {"LFM2": ({"recurrent": ShortConvSpec(64, 3)}, 64, 64)}


def gemma(heads: int, kv_heads: int, width: int, mlp: int, norm: NormSpec, **how: Any) -> LayerSpec:
    attention = AttentionSpec(heads, kv_heads, width, width**-0.5, RopeSpec(width, 1e4), **how)
    return LayerSpec(norm, attention, MLPSpec(mlp, "gelu_tanh"), post_norm=True)


def decoders() -> dict[str, tuple[int, tuple[LayerSpec, ...]]]:
    """Name: the model's width, its layers."""
    if TINY:
        return {"Gemma 2": (64, (gemma(4, 2, 16, 64, GEMMA, softcap=50.0),))}
    four = gemma(8, 2, 256, 10240, FOUR, qk_norm=FOUR, v_norm=replace(FOUR, weight=False))
    four = replace(four, inputs=LayerInputSpec(256, 1024, FOUR), scaled=True)
    assert four.attention is not None
    lends = replace(four, attention=replace(four.attention, lends=True))
    reads = replace(four, attention=replace(four.attention, kv_from=3))
    return {
        "Gemma 2 9B": (3584, (gemma(16, 8, 256, 14336, GEMMA, softcap=50.0),) * 8),
        "Gemma 3 4B": (2560, (gemma(8, 4, 256, 10240, GEMMA, qk_norm=GEMMA, window=1024),) * 8),
        "Gemma 4 E4B": (2560, (*(four,) * 3, lends, *(reads,) * 4)),
    }


def drawn(spec: ModelSpec) -> tuple[Any, Any]:
    """Parameters in NF4 and bf16, and adapters."""
    g = torch.Generator(DEVICE).manual_seed(1)
    made = params.init(spec, generator=g, device=DEVICE, dtype=torch.bfloat16)

    def quantized(how: params.ParamSpec, t: torch.Tensor) -> Any:
        return nf4.quantize(t) if how.quantize else t

    made = tree.map(quantized, params.param_specs(spec), made)
    return made, lora.init(spec, rank=16, generator=g, device=DEVICE)


def median(call: Callable[[], Any], turns: int, each: int) -> float:
    """Milliseconds of a call."""
    call()
    if TINY:
        return 0.0
    call()
    spans = []
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(each):
            call()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) / each)
    return statistics.median(spans)


def train(name: str) -> dict[str, Any]:
    """A step's milliseconds and its peak memory, by hand and run again."""
    mixers, dim, mlp = HYBRIDS[name]
    layer = LayerSpec(NORM, mixers.get("attention"), MLPSpec(mlp), mixers["recurrent"])
    spec = ModelSpec(1024, dim, (layer,) * 4, NORM, max_positions=8192)
    made, adapters = drawn(spec)
    adapters = tree.map_tensors(lambda t: t.requires_grad_(), adapters)
    leaves = tree.tensors(adapters)
    rows, length = (1, 32) if TINY else (4, 2048)
    tokens = torch.randint(1024, (rows, length), device=DEVICE)
    dy = torch.randn(rows, length, dim, device=DEVICE, dtype=torch.bfloat16)
    hand = halves.runs_again
    found: dict[str, Any] = {}
    for policy, kept in ((KEEP, "all kept"), (RECOMPUTE, "recomputed")):

        def step(policy: Any = policy) -> Any:
            y = decoder.hidden(made, spec, tokens, adapters=adapters, residuals=policy)
            return torch.autograd.grad(y, leaves, dy)

        def again(*args: Any, **how: Any) -> dict[str, str]:
            return {"recurrent": "", **hand(*args, **how)}

        for way, how in (("by hand", hand), ("run again", again), ("by hand ", hand)):
            with mock.patch.object(halves, "runs_again", how):
                step()
                if not TINY:
                    torch.cuda.reset_peak_memory_stats()
                ms = median(step, 3, 3)
                gib = 0.0 if TINY else torch.cuda.max_memory_allocated() / 2**30
            found[f"{kept}, {way}"] = f"{ms:.2f} ms {gib:.2f} GiB"
    return found


def decode_steps(name: str) -> dict[str, Any]:
    """Microseconds of a captured step of one row and of eight over 1000 tokens, fused and not."""
    dim, layers = decoders()[name]
    spec = ModelSpec(1024, dim, layers, layers[0].norm, max_positions=2048)
    made, _ = drawn(spec)
    found = {}
    for rows in (1, 8):
        for way in ("fused", "not"):
            cache = kv.empty(spec, rows, 1024, padded=False, dtype=torch.bfloat16, device=DEVICE)
            cache.end.fill_(1000)
            token = torch.arange(rows, device=DEVICE)
            covers = decode_layer.covers
            if way == "not":
                covers = lambda *_: decode_layer.Fused(False, False)  # noqa: E731
            with torch.inference_mode(), mock.patch.object(decode_layer, "covers", covers):

                def step(cache: Any = cache, token: Any = token) -> Any:
                    return decode.decode(made, spec, token, cache)[0]

                step()
                replay = step if TINY else capture(step, torch.device(DEVICE))
                assert replay is not None
                found[f"{rows} rows {way}"] = round(median(replay, 5, 20) * 1000, 1)
    return found


def main() -> int:
    """All of them, as far as the time goes."""
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    out = Path(args[0])
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {} if TINY else {"device": torch.cuda.get_device_name()}
    work: list[tuple[str, Callable[[str], Any]]] = [(name, decode_steps) for name in decoders()]
    work += [(name, train) for name in HYBRIDS]
    for name, time_it in work:
        if time.monotonic() - BEGUN > LIMIT:
            print(f"{name}: no time left")
            continue
        try:
            results[name] = time_it(name)
        except Exception as problem:
            results[name] = repr(problem)[:500]
        print(f"{time.monotonic() - BEGUN:6.1f} {name}: {results[name]}", flush=True)
        (out / "layers.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
