"""Check and time the mixers of hybrids on a CUDA machine.

    python tests/kernels/gpu_scans.py OUT [--checks] [--tiny]

Launches against float64 in plain torch, then mixers, layers and decoding steps three ways: in plain
torch, over our launches alone, and with flash-linear-attention's where that is installed. Writes
OUT/hybrids.json and prints a line each. `--checks` times nothing; `--tiny` runs all of it on the
CPU, in small.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TINY, WARM, BEGUN = "--tiny" in sys.argv, "--warm" in sys.argv, time.monotonic()
CHECKS = "--checks" in sys.argv
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "src")]

if TINY:
    sys.path[:0] = [str(HERE.parent)]
    import shim

    shim.install()
import torch  # noqa: E402

from purelm.kernels import (  # noqa: E402
    delta_check,
    delta_rule,
    gated_norm,
    launch,
    short_conv,
    ssd,
    state_step,
)
from purelm.nn import decoder, layout, lora, params, recurrent, tree  # noqa: E402
from purelm.nn.residuals import RECOMPUTE  # noqa: E402
from purelm.nn.spec import (  # noqa: E402
    DeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    ShortConvSpec,
)
from purelm.quant import nf4  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"
B, S = (1, 40) if TINY else (4, 2048)
LIMIT = 110.0  # seconds after which nothing more is begun
NORM = NormSpec(1e-6)
# Name: a mixer, the model's width, its MLP's.
SHAPES: dict[str, tuple[Any, int, int]] = {
    "Qwen3-Next": (DeltaNetSpec(16, 32, 128, 128, 4, NORM, by_key_head=True), 2048, 5632),
    "Granite-4": (Mamba2Spec(48, 64, 1, 128, 4, norm=NORM), 1536, 4096),
    "Falcon-H1": (Mamba2Spec(24, 128, 2, 256, 4), 3072, 8192),
    "LFM2": (ShortConvSpec(2048, 3), 2048, 8192),
}
if TINY:
    SHAPES = {
        "Qwen3-Next": (DeltaNetSpec(2, 4, 16, 16, 4, NORM, by_key_head=True), 64, 64),
        "Granite-4": (Mamba2Spec(4, 16, 1, 16, 4, norm=NORM), 64, 64),
    }
results: list[dict[str, Any]] = []


def say(**what: Any) -> None:
    results.append(what)
    print(f"{time.monotonic() - BEGUN:6.1f}", " ".join(f"{k}={v}" for k, v in what.items()))
    sys.stdout.flush()


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Inside, mixers run in plain torch, over our launches alone, or over the best there is."""
    kept = [(m, n, getattr(m, n)) for m, n in PATCHED]
    if name == "torch":
        for module, n in PATCHED[:-1]:
            setattr(module, n, lambda *_: False)
    if name == "torch":
        delta_rule.backend_for = lambda *_: "reference"
    if name == "ours":
        delta_rule.backend_for = lambda *_: "triton"
    try:
        yield
    finally:
        for module, n, function in kept:
            setattr(module, n, function)


PATCHED = [
    (short_conv, "on_gpu"),
    (gated_norm, "on_gpu"),
    (state_step, "on_gpu"),
    (ssd, "on_gpu"),
    (delta_rule, "backend_for"),
]


def median(call: Callable[[], Any], turns: int = 5, each: int = 3) -> float:
    """Milliseconds of a call."""
    call()
    if TINY or WARM:
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


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def mixer_of(name: str) -> tuple[Any, Any, int]:
    spec, dim, _ = SHAPES[name]
    layer = LayerSpec(NORM, None, MLPSpec(8), spec)
    model = ModelSpec(16, dim, (layer,), NORM, max_positions=S, init_std=0.02)
    made = params.init(model, generator=torch.Generator().manual_seed(1))
    p = tree.map(lambda t: t.to(DEVICE, torch.bfloat16), made["layers"][0]["recurrent"])
    return spec, p, dim


def starts_of(rows: int, s: int, every: int) -> torch.Tensor:
    starts = torch.zeros(rows, s, dtype=torch.bool, device=DEVICE)
    starts[:, ::every] = True
    starts[:, 3 * every // 2] = True
    return starts


def forward_backward(
    spec: Any, p: Any, x: torch.Tensor, dy: torch.Tensor, starts: torch.Tensor | None
) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = recurrent.mix(leaf, p, None, spec, starts)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def check(name: str) -> None:
    """A mixer's output and gradient: errors as shares of the largest value, beside those of plain
    torch, whose scans are fp32.
    """
    spec, p, dim = mixer_of(name)
    if isinstance(spec, DeltaNetSpec):
        kind = torch.bfloat16, spec.key_dim, spec.value_dim, spec.value_heads // spec.key_heads
        off = delta_check.differences(DEVICE, *kind)
        say(delta_check={name: f"{d:.1e}" for name, d in off.items()})
    s = 37 if TINY else 304
    x, dy = (drawn(2, s, dim, seed=i) for i in (2, 3))
    for starts in (None, starts_of(2, s, s // 3)):
        wide = tree.map(torch.Tensor.double, p)
        exact = forward_backward(spec, wide, x.double(), dy.double(), starts)
        for how in ("torch", "ours", "best"):
            with way(how):
                found = forward_backward(spec, p, x, dy, starts)
                state = recurrent.empty(spec, 2, x.dtype, DEVICE)
                with torch.no_grad():
                    cut = (
                        [recurrent.mix(x[:, : s - 2], p, None, spec, starts, state)]
                        if (starts is None)
                        else []
                    )
                    for t in (s - 2, s - 1) if cut else ():
                        cut.append(recurrent.mix(x[:, t : t + 1], p, None, spec, None, state))
            if cut:
                found.append(torch.cat(cut, 1))
            say(
                check=name, packed=starts is not None, way=how,
                errors=[
                    f"{float((a.double() - b).abs().max() / b.abs().max()):.1e}"
                    for a, b in zip(found, [*exact, exact[0]], strict=False)
                ],
            )  # fmt: skip


def time_mixer(name: str) -> None:
    spec, p, dim = mixer_of(name)
    for rows, s in ((B, S), (1, B * S)):
        x, dy = (drawn(rows, s, dim, seed=i) for i in (2, 3))
        starts = starts_of(rows, s, s // 8) if rows == 1 else None
        found = {}
        for how in ("torch", "ours", "best"):
            if how == "ours" and not isinstance(spec, DeltaNetSpec):
                continue
            with way(how):
                found[how] = median(lambda: forward_backward(spec, p, x, dy, starts))  # noqa: B023
                with torch.no_grad():
                    run = lambda: recurrent.mix(x, p, None, spec, starts)  # noqa: B023, E731
                    found[how + " forward"] = median(run)
        say(mixer=name, shape=f"{rows}x{s}", **{k: f"{v:.3f}" for k, v in found.items()})


def time_parts(name: str) -> None:
    """Forward and backward of the scan alone, with cuts of its launches; and of the convolution."""
    spec, p, _ = mixer_of(name)
    dt = torch.rand(B, S, spec.heads, device=DEVICE) * 0.1
    inputs = [
        drawn(B, S, spec.heads, spec.head_dim),
        dt,
        -dt,
        *(drawn(B, S, spec.groups, spec.state, seed=i) for i in (4, 5)),
        torch.ones(spec.heads, device=DEVICE),
    ]
    leaves = [t.requires_grad_() for t in inputs]
    dy = drawn(B, S, spec.heads, spec.head_dim, seed=6)

    def run() -> Any:
        return torch.autograd.grad(ssd.ssd(*leaves, None, None)[0], leaves, dy)

    plain, chunk, configs = ssd.configs_for, ssd.CHUNK, ssd.configs_for(spec.head_dim, spec.state)
    say(scan=name, cut="as chosen", ms=f"{median(run):.3f}", kernels=kernels_of(run))
    cuts: dict[str, tuple[int, Any]] = {
        "chunks of 128": (128, configs),
        "states n128": (chunk, configs._replace(states=configs.states._replace(n=128))),
        "states 8 warps": (chunk, configs._replace(states=configs.states._replace(num_warps=8))),
        "states p32": (chunk, configs._replace(states=configs.states._replace(p=32))),
        "out 8 warps": (chunk, configs._replace(out=configs.out._replace(num_warps=8))),
        "n32": (chunk, ssd.Configs(*(c._replace(n=32) for c in configs))),
        "one stage": (chunk, ssd.Configs(*(c._replace(num_stages=1) for c in configs))),
        "dbc n128": (chunk, configs._replace(dbc=configs.dbc._replace(n=128))),
        "dx 4 warps": (chunk, configs._replace(dx=configs.dx._replace(num_warps=4))),
    }
    for cut, (ssd.CHUNK, chosen) in () if TINY else cuts.items():
        if time.monotonic() - BEGUN > LIMIT:
            break
        ssd.configs_for = lambda p, n: chosen  # noqa: B023
        with contextlib.suppress(Exception):
            say(scan=name, cut=cut, ms=f"{median(run):.3f}", kernels=kernels_of(run))
    ssd.configs_for, ssd.CHUNK = plain, chunk


def kernels_of(run: Callable[[], Any]) -> dict[str, int]:
    """Microseconds of each of our kernels in a call."""
    if TINY or WARM:
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return {
        e.key.strip("_").removesuffix("_kernel"): round(e.self_device_time_total / e.count)
        for e in seen.key_averages()
        if e.key.startswith("_")
    }


def time_layer(name: str) -> None:
    """A training step of four layers in NF4 with LoRA, each run again in its backward."""
    mixer, dim, mlp = SHAPES[name]
    layer = LayerSpec(NORM, None, MLPSpec(mlp), mixer)
    spec = ModelSpec(1024, dim, (layer,) * (1 if TINY else 4), NORM, max_positions=B * S)
    specs = params.param_specs(spec)
    made = params.init(spec, generator=torch.Generator().manual_seed(1))
    made = tree.map(
        lambda how, t: nf4.quantize(t.to(DEVICE, torch.bfloat16)) if how.quantize
        else t.to(DEVICE, torch.bfloat16),
        specs, made,
    )  # fmt: skip
    adapters = tree.map_tensors(
        lambda t: t.to(DEVICE).requires_grad_(),
        lora.init(spec, rank=16, generator=torch.Generator().manual_seed(2)),
    )
    leaves = tree.tensors(adapters)
    for rows, s in ((B, S), (1, B * S)):
        tokens = torch.randint(1024, (rows, s), device=DEVICE)
        cu = torch.arange(0, B * S + 1, B * S // 8, device=DEVICE, dtype=torch.int32)
        packed = layout.from_cu_seqlens(cu, B * S, B * S // 8) if rows == 1 else None
        dy = drawn(rows, s, dim, seed=3)
        how_ = {"adapters": adapters, "residuals": RECOMPUTE, "layout": packed}

        def step(tokens: Any = tokens, dy: Any = dy, how_: Any = how_) -> Any:
            y = decoder.hidden(made, spec, tokens, **how_)
            return torch.autograd.grad(y, leaves, dy)

        found, memory = {}, {}
        for how in ("torch", "best"):
            if not TINY:
                torch.cuda.reset_peak_memory_stats()
            with way(how):
                found[how] = median(step, 3, 2)
            memory[how] = 0.0 if TINY else torch.cuda.max_memory_allocated() / 2**30
        say(
            layers=name, shape=f"{rows}x{s}",
            **{k: f"{v:.2f}ms {memory[k]:.1f}GiB" for k, v in found.items()},
        )  # fmt: skip


def time_step(name: str) -> None:
    """One token a row through a mixer, replayed from a graph."""
    spec, p, dim = mixer_of(name)
    for rows in (1, 8):
        found = {}
        x = drawn(rows, 1, dim)
        for how in ("torch", "best"):
            state = recurrent.empty(spec, rows, x.dtype, DEVICE)
            with way(how), torch.no_grad():
                run = lambda: recurrent.mix(x, p, None, spec, None, state)  # noqa: B023, E731
                run()
                if TINY:
                    continue
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(10):
                        run()
                found[how] = median(graph.replay, 5, 10) / 10
        say(step=name, rows=rows, **{k: f"{v * 1e3:.1f}us" for k, v in found.items()})


def warm(job: str) -> None:
    """Compile, for other processes to find: all that a job does, or a share of what
    flash-linear-attention tries.
    """
    kind, _, name = job.partition(" ")
    if kind != "fla":
        {"check": check, "parts": time_parts}[kind](name)
        return
    part, of = map(int, name.split("/"))
    from triton.runtime import autotuner

    def once(call: Callable[[], Any], **_: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    def some(self: Any, kwargs: Any, *_: Any, **__: Any) -> list[Any]:
        return self.configs[part::of] or self.configs[:1]

    autotuner.Autotuner.do_bench = property(lambda self: once)
    autotuner.Autotuner.prune_configs = some
    spec, p, dim = mixer_of("Qwen3-Next")
    x, dy = drawn(2, 304, dim), drawn(2, 304, dim, seed=1)
    forward_backward(spec, p, x, dy, None)
    with torch.no_grad():
        recurrent.mix(x, p, None, spec, None, recurrent.empty(spec, 2, x.dtype, DEVICE))


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    mamba = [name for name, (spec, *_) in SHAPES.items() if isinstance(spec, Mamba2Spec)]
    others = [name for name in SHAPES if name != "Qwen3-Next"]
    first = [f"check {name}" for name in others]
    first += [] if CHECKS else [f"parts {name}" for name in mamba]
    if importlib.util.find_spec("fla"):
        first += [f"fla {i}/10" for i in range(10)]
    warming = [] if TINY else [
        subprocess.Popen(
            [sys.executable, __file__, str(out), "--warm", job], stdout=subprocess.DEVNULL
        )
        for job in first
    ]  # fmt: skip
    for process in warming:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, 60 - (time.monotonic() - BEGUN)))
    say(warmed=[process.poll() for process in warming])
    if not TINY and importlib.util.find_spec("fla"):
        quickly()
    jobs: list[tuple[Callable[[str], None], str]] = [
        *((check, name) for name in SHAPES),
    ]
    jobs += [] if CHECKS else [
        *((time_mixer, name) for name in SHAPES),
        *((time_step, name) for name in SHAPES),
        *((time_layer, name) for name in ("Qwen3-Next", "Granite-4")),
        *((time_parts, name) for name in mamba),
    ]  # fmt: skip
    try:
        for job, name in jobs:
            if time.monotonic() - BEGUN > LIMIT:
                say(left_out=f"{job.__name__} {name}")
                continue
            try:
                job(name)
            except Exception as error:
                say(failed=f"{job.__name__} {name}", why=repr(error)[:600])
    finally:
        for process in warming:
            if process.poll() is None:
                process.kill()
        (out / "hybrids.json").write_text(json.dumps(results, indent=1))


def quickly() -> None:
    """Shorter trials of flash-linear-attention's cuts than Triton would give them."""
    import triton.testing
    from triton.runtime import autotuner

    def bench(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> Any:
        return triton.testing.do_bench(call, warmup=2, rep=8, quantiles=quantiles)

    autotuner.Autotuner.do_bench = property(lambda self: bench)


if __name__ == "__main__":
    torch.manual_seed(0)
    if WARM:
        warm(sys.argv[-1])
    else:
        say(gpu="none" if TINY else torch.cuda.get_device_name(), torch=torch.__version__)
        with launch.interpreting(TINY):
            main()
        os._exit(0)
