"""Time a step of a mixture of experts on a CUDA machine: all experts in one launch, and one by one.

    python tests/kernels/gpu_mixture.py [--tiny]

Layers of Qwen3-30B-A3B's shape in NF4 with adapters on every projection: losses and gradients of
both ways beside each other, the times of a step under each policy and its peak memory, then tokens
decoded by CUDA graph against tokens decoded step by step.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]

import torch  # noqa: E402

from purelm.nn import experts, generate, lora, loss, params, stacks, tree  # noqa: E402
from purelm.nn.decode import waits_for  # noqa: E402
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Policy  # noqa: E402
from purelm.nn.spec import (  # noqa: E402
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
)
from purelm.quant import nf4  # noqa: E402

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
WAYS = {
    "one by one": RECOMPUTE,
    "all kept": KEEP,
    "qkv, gate and up run again": RECOMPUTE,
    "sent to the host": OFFLOAD,
}
EXPERTS, ACTIVE, WIDE, NARROW, LAYERS = (4, 2, 64, 64, 2) if TINY else (128, 8, 2048, 768, 4)


def model() -> tuple[ModelSpec, Any, Any]:
    norm = NormSpec(1e-6)
    heads = (4, 2, 16) if TINY else (32, 4, 128)
    attention = AttentionSpec(*heads, heads[2] ** -0.5, RopeSpec(heads[2], 1e6))
    layer = LayerSpec(norm, attention, MoESpec(EXPERTS, ACTIVE, MLPSpec(NARROW)))
    spec = ModelSpec(1000, WIDE, (layer,) * LAYERS, norm, 4096)
    g = torch.Generator(DEVICE).manual_seed(0)
    made = params.init(spec, generator=g, dtype=torch.bfloat16, device=DEVICE)
    for p in made["layers"]:
        for module in p["attn"].values():
            if module["weight"].dim() == 2:
                module["weight"] = nf4.quantize(module["weight"])
        p["mlp"]["experts"] = stacks.joined(
            tree.map(nf4.quantize, stacks.apart(p["mlp"]["experts"]))
        )
    adapters = lora.init(spec, rank=16, generator=torch.Generator().manual_seed(1), device=DEVICE)
    for leaf in tree.leaves(adapters):
        leaf.b.normal_(0, 0.01)
    for t in tree.tensors(adapters):
        t.requires_grad_()
    return spec, made, adapters


def one_by_one() -> Any:
    return mock.patch.object(experts, "waits_for", lambda *_: "measured beside")


def main() -> None:
    torch.manual_seed(0)
    spec, made, adapters = model()
    for rows, length in ((1, 9),) if TINY else ((8, 2048), (1, 2048)):
        ids = torch.randint(0, 1000, (rows, length), device=DEVICE)
        found = {}
        for name, policy in WAYS.items():
            step = partial(step_of, spec, made, adapters, ids, policy)
            with one_by_one() if name == "one by one" else nullcontext():
                times, peak = timed(step)
                value, grads = step()
            if name in ("one by one", "all kept"):
                found[name] = grads
            del grads
            rate = "" if TINY else f", {rows * length / times * 1e3:,.0f} tokens/s"
            print(
                f"{rows}x{length} {name}: loss {value.item():.5f}, {times:.1f} ms{rate}, "
                f"{peak:.2f} GiB"
            )
            if name == "all kept":
                print(f"{rows}x{length} least cosine of an adapter's gradients: {least(found)}")
                found.clear()
    step = partial(step_of, spec, made, adapters, ids, RECOMPUTE)
    print("a decoding step waits for:", waits_for(made, spec, adapters))
    if not TINY:
        graphed(step)
    decoded(spec, made, adapters)


def step_of(
    spec: ModelSpec, made: Any, adapters: Any, ids: torch.Tensor, policy: Policy
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    total = loss.loss(made, spec, ids, ids, adapters=adapters, residuals=policy)
    return total.detach(), torch.autograd.grad(total, tree.tensors(adapters))


def least(found: dict[str, Any]) -> str:
    """The least cosine between the gradients of two ways."""
    a, b = ([g.flatten().float() for g in grads] for grads in found.values())
    pairs = zip(a, b, strict=True)
    return f"{min(torch.cosine_similarity(x, y, dim=0).item() for x, y in pairs):.6f}"


def timed(f: Any) -> tuple[float, float]:
    if TINY:
        f()
        return 0.0, 0.0
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated() / 2**30


def graphed(step: Any) -> None:
    """The step captured: no part of it may wait for the device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = step()[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        value, _ = step()
    times, _ = timed(graph.replay)
    print(f"captured step: loss {value.item():.5f} (eager {want.item():.5f}), {times:.1f} ms")


def decoded(spec: ModelSpec, made: Any, adapters: Any) -> None:
    new = 4 if TINY else 64
    for rows, worn in ((1, None), (8, None), (1, adapters)):
        ids = torch.randint(0, 1000, (rows, 16), device=DEVICE)
        outs, rates = [], []
        for graph in (False, True) if not TINY else (False,):
            given: dict[str, Any] = {"adapters": worn, "max_new_tokens": new, "graphs": graph}
            with torch.no_grad():
                generate.generate(made, spec, ids, **given)
                begin = time.perf_counter()
                outs.append(generate.generate(made, spec, ids, **given))
                rates.append(rows * new / (time.perf_counter() - begin))
        same = all(torch.equal(outs[0], out) for out in outs)
        shown = " / ".join(f"{rate:.0f}" for rate in rates)
        print(
            f"{rows} rows, adapters {worn is not None}: {shown} tokens/s eager / graph, same {same}"
        )


if __name__ == "__main__":
    main()
    if not TINY:
        print(torch.cuda.get_device_name(), torch.__version__)
