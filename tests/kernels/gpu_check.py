"""Check and time every kernel on a CUDA machine.

    python tests/kernels/gpu_check.py [--long] [--sweep] [--tiny]

Each kernel is timed at the shapes of Llama 1B and 8B beside a measured copy rate, bitsandbytes and
Liger where they are installed, and held to the tolerance rule of tests/oracles.py over random
inputs with float64 as the truth. Shapes that make Triton compile another variant come from short
lists, so that a run takes about 100 s; `--long` draws them freely, 200 a kernel. Times go to
stdout and, with OUT set, to $OUT/kernels.csv, before the checks begin. `--sweep` times other launch
configurations of the NF4 kernels; `--tiny` runs the whole on the CPU, under the interpreter, with
tiny shapes.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]
TINY, LONG = "--tiny" in sys.argv, "--long" in sys.argv
if TINY:
    import shim

    shim.install()

import torch  # noqa: E402
from oracles import assert_elementwise, assert_rows  # noqa: E402

from purelm.kernels import (  # noqa: E402
    cross_entropy,
    gated,
    launch,
    nf4,
    nf4_launch,
    rms_norm,
    rope,
)
from purelm.quant import nf4 as leaf  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"
TIMINGS = 2 if TINY else 40
EXAMPLES = 4 if TINY else 200 if LONG else 16
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
rows: list[dict[str, Any]] = []


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def both(f: Callable[..., Any], *inputs: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Outputs of `f` and its gradients against a fixed upstream gradient."""
    inputs = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
    out = f(*inputs)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    g = torch.Generator().manual_seed(seed)
    ups = [torch.randn(o.shape, generator=g).to(o.device, torch.float32).to(o.dtype) for o in outs]
    wanted = [t for t in inputs if t.requires_grad]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, wanted, ups))


def compare(
    name: str,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: tuple[torch.Tensor, ...],
    *,
    elementwise: bool = False,
    flat: bool = False,
) -> None:
    """Ours against the reference in float64; the same-dtype reference is the yardstick."""
    mine = both(ours, *inputs)
    eager = both(reference, *inputs)
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    exact = both(reference, *wide)
    for a, b, c in zip(mine, eager, exact, strict=True):
        a, b, c = a.cpu(), b.to(a.dtype).cpu(), c.cpu()
        if elementwise:
            assert_elementwise(a, b, c)
        else:
            assert_rows(*((t.reshape(1, -1) for t in (a, b, c)) if flat else (a, b, c)))


def check_nf4(r: random.Random) -> None:
    count = r.choice([1, 7, 64, 65, 4097, r.randrange(1, 300 if TINY else 300_000)])
    block, dtype = r.choice(nf4.BLOCKS if LONG else (32, 64, 4096)), r.choice(FLOATS)
    w = randn(count, dtype=dtype) * 10 ** r.uniform(-6, 3)
    packed, absmax = nf4.quantize(w, block)
    want = nf4.quantize_reference(w.cpu(), block)
    assert torch.equal(packed.cpu(), want[0]), f"codes {count=} {block=} {dtype}"
    assert torch.equal(absmax.cpu(), want[1]), f"absmax {count=} {block=} {dtype}"
    codes, scale, offset = nf4.quantize_absmax(absmax)
    codes_, scale_ = nf4.quantize_absmax_reference(absmax.cpu(), offset.cpu())
    assert torch.equal(codes.cpu(), codes_) and torch.equal(scale.cpu(), scale_), "double"
    for parts in ((packed, absmax, None, None), (packed, codes, scale, offset)):
        for out in FLOATS:
            got = nf4.dequantize(*parts, count, block, out)
            cpu = (None if p is None else p.cpu() for p in parts)
            assert torch.equal(got.cpu(), nf4.dequantize_reference(*cpu, count, block, out)), (
                f"values {count=} {block=} {out}"
            )


def check_rms_norm(r: random.Random) -> None:
    few = [128, 300] if TINY else [128, 300, 4096, 16384]
    width = r.choice([16, 64, 128, 300, 576, 2048, 4096, 5120, 8192, 16384] if LONG else few)
    style = r.choice([{}, {"offset": 1.0, "cast_first": False}])
    dtype = r.choice(FLOATS)
    x, w = randn(r.randrange(1, 7), width, dtype=dtype), randn(width, dtype=dtype) * 0.1 + 1
    compare(
        "rms_norm",
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5, **style),
        lambda x, w: rms_norm.rms_norm_reference(x, w, 1e-5, **style),
        (x, w.to(dtype)),
    )


def check_rope(r: random.Random) -> None:
    b, s = r.randrange(1, 3), r.randrange(2, 6)
    if LONG:
        h, k, rot = r.randrange(1, 10), r.randrange(1, 5), 2 * r.randrange(1, 65)
        rest = r.choice([0, 0, 8, 5])
    else:
        h, k, rot, rest = r.choice([(9, 3, 22, 5), (32, 8, 64, 0), (5, 1, 128, 0)])
    dim, dtype, style = rot + rest, r.choice(FLOATS), r.random() < 0.5
    angle = torch.rand(r.choice([1, b]), s, rot, device=DEVICE) * 100
    cos, sin = angle.cos(), angle.sin()

    def reference(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        c, n = cos.to(wide), sin.to(wide)
        return [rope.rope_reference(t, c, n, interleaved=style) for t in (q, k)]

    compare(
        "rope",
        lambda q, k: rope.rope_qk(q, k, cos, sin, interleaved=style),
        reference,
        (randn(b, s, h, dim, dtype=dtype), randn(b, s, k, dim, dtype=dtype)),
        elementwise=True,
    )


def check_gated(r: random.Random) -> None:
    activation, dtype = r.choice(gated.ACTIVATIONS), r.choice(FLOATS)
    shape = r.randrange(1, 6), r.randrange(1, 300 if TINY else 5000)
    compare(
        "gated",
        lambda g, u: gated.gated(g, u, activation),
        lambda g, u: gated.gated_reference(g, u, activation),
        (randn(*shape, dtype=dtype) * 2, randn(*shape, dtype=dtype)),
        flat=True,
    )


def check_cross_entropy(r: random.Random) -> None:
    n, v, e = r.randrange(2, 30), r.randrange(2, 300 if TINY else 20_000), r.choice([32, 64, 128])
    dtype = r.choice(FLOATS)
    options = {"softcap": r.choice([None, 10.0]), "scale": r.choice([1.0, 0.25])}
    labels = torch.randint(v, (n,), device=DEVICE)
    labels[torch.rand(n, device=DEVICE) < 0.3] = -100
    chunk = r.choice([None, 8])
    h, w = randn(n, e, dtype=dtype), randn(v, e, dtype=dtype) * 0.3
    compare(
        "cross_entropy",
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, labels, chunk=chunk, **options),
        lambda h, w: cross_entropy.linear_cross_entropy_reference(h, w, labels, **options),
        (h, w.to(dtype)),
        flat=True,
    )


CHECKS = {
    "nf4": check_nf4,
    "rms_norm": check_rms_norm,
    "rope": check_rope,
    "gated": check_gated,
    "cross_entropy": check_cross_entropy,
}


def check(name: str) -> bool:
    start, bad = time.perf_counter(), 0
    for seed in range(EXAMPLES):
        torch.manual_seed(seed)
        try:
            CHECKS[name](random.Random(seed))
        except AssertionError as error:
            bad += 1
            if bad <= 3:
                print(f"  {name} seed {seed}: {error}", flush=True)
        except Exception:
            traceback.print_exc(limit=4)
            bad = EXAMPLES
            break
    took = time.perf_counter() - start
    print(f"check {name}: {EXAMPLES - bad} of {EXAMPLES} right in {took:.0f} s", flush=True)
    return not bad


def seconds(f: Callable[[], Any]) -> float:
    """Median time of a call, caches cold: more than the L2 cache holds is written before each."""
    for _ in range(3):
        f()
    if TINY:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    times = []
    for _ in range(TIMINGS):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Work for the GPU to be busy with while the host gets its launches out.
        torch.cuda._sleep(400_000)
        start.record()
        f()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def report(kernel: str, shape: str, who: str, moved: float, f: Callable[[], Any]) -> None:
    try:
        t = seconds(f)
    except Exception as error:
        print(f"{kernel:26} {shape:18} {who:12} {type(error).__name__}: {error}"[:150], flush=True)
        return
    row = {"kernel": kernel, "shape": shape, "who": who, "us": t * 1e6, "GB/s": moved / t / 1e9}
    rows.append(row)
    print(f"{kernel:26} {shape:18} {who:12} {t * 1e6:10.1f} us {row['GB/s']:8.0f} GB/s", flush=True)


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def time_nf4(scale: int) -> None:
    bnb = peer("bitsandbytes.functional")
    for out, inner in ((14336, 4096), (4096, 4096), (1024, 4096), (8192, 2048), (128256, 2048)):
        shape = out // scale, inner // scale
        w = randn(*shape, dtype=torch.bfloat16)
        n, label = w.numel(), f"{shape[0]}x{shape[1]}"
        moved = n * 2.5 + n / 64
        single, double = leaf.quantize(w, double=False), leaf.quantize(w)
        buffer = torch.empty_like(w)
        report("copy", label, "torch", 4 * n, lambda w=w, b=buffer: b.copy_(w))
        report("nf4_quantize", label, "purelm", moved, lambda w=w: nf4.quantize(w, 64))
        report("nf4_quantize double", label, "purelm", moved, lambda w=w: leaf.quantize(w))
        for kind, x in (("", single), (" double", double)):
            report(
                f"nf4_dequantize{kind}", label, "purelm", moved,
                lambda x=x, b=buffer: leaf.dequantize(x, out=b),
            )  # fmt: skip
        if bnb and not TINY:
            for kind, nested in (("", False), (" double", True)):
                made = lambda w=w, nested=nested: bnb.quantize_4bit(  # noqa: E731
                    w, blocksize=64, quant_type="nf4", compress_statistics=nested
                )
                packed, state = made()
                report(f"nf4_quantize{kind}", label, "bitsandbytes", moved, made)
                report(
                    f"nf4_dequantize{kind}", label, "bitsandbytes", moved,
                    lambda p=packed, s=state: bnb.dequantize_4bit(p, s),
                )  # fmt: skip


def time_rms_norm(scale: int) -> None:
    liger = peer("liger_kernel.ops.rms_norm")
    for width in (2048, 4096, 5120):
        n, e = 16384 // scale, width // min(scale, 16)
        x, w, dy = (randn(*s, dtype=torch.bfloat16) for s in ((n, e), (e,), (n, e)))
        label, size = f"{n}x{e}", n * e * 2.0
        ours = {"purelm": lambda x, w: rms_norm.rms_norm(x, w, 1e-5)}
        if liger and not TINY:
            ours["liger"] = lambda x, w: liger.LigerRMSNormFunction.apply(
                x, w, 1e-5, 0.0, "llama", False
            )
        for who, f in ours.items():
            report("rms_norm", label, who, 2 * size, lambda f=f, x=x, w=w: f(x, w))
            leaf_x = x.clone().requires_grad_()
            y = f(leaf_x, w)
            report(
                "rms_norm dx", label, who, 3 * size,
                lambda y=y, leaf_x=leaf_x, dy=dy: torch.autograd.grad(
                    y, leaf_x, dy, retain_graph=True
                ),
            )  # fmt: skip
            leaf_w = w.clone().requires_grad_()
            y = f(leaf_x, leaf_w)
            report(
                "rms_norm dx dw", label, who, 3 * size,
                lambda y=y, leaf_x=leaf_x, leaf_w=leaf_w, dy=dy: torch.autograd.grad(
                    y, (leaf_x, leaf_w), dy, retain_graph=True
                ),
            )  # fmt: skip


def time_rope(scale: int) -> None:
    for h, k, d in ((32, 8, 64), (32, 8, 128)):
        b, s = 8, 2048 // scale
        q, key = (randn(b, s, n, d, dtype=torch.bfloat16) for n in (h, k))
        angle = torch.rand(1, s, d, device=DEVICE)
        cos, sin = angle.cos(), angle.sin()
        moved = 2.0 * (q.numel() + key.numel()) * 2
        label = f"{b * s}x({h}+{k})x{d}"
        for kind in (False, True):
            report(
                f"rope_qk{' interleaved' if kind else ''}", label, "purelm", moved,
                lambda kind=kind, q=q, key=key, cos=cos, sin=sin: rope.rope_qk(
                    q, key, cos, sin, interleaved=kind
                ),
            )  # fmt: skip


def time_gated(scale: int) -> None:
    liger = peer("liger_kernel.ops.swiglu")
    for f in (8192, 14336):
        n, width = 16384 // scale, f // min(scale, 16)
        gate, up, dh = (randn(n, width, dtype=torch.bfloat16) for _ in range(3))
        size, label = n * width * 2.0, f"{n}x{width}"
        for activation in ("silu", "gelu_tanh"):
            report(
                f"gated {activation}", label, "purelm", 3 * size,
                lambda a=activation, g=gate, u=up: gated.gated(g, u, a),
            )  # fmt: skip
            report(
                f"gated_backward {activation}", label, "purelm", 5 * size,
                lambda a=activation, d=dh, g=gate, u=up: torch.ops.purelm.gated_backward(
                    d, g, u, a
                ),
            )  # fmt: skip
        if liger and not TINY:
            report(
                "gated silu", label, "liger", 3 * size,
                lambda g=gate, u=up: liger.LigerSiLUMulFunction.apply(g, u),
            )  # fmt: skip


def time_cross_entropy(scale: int) -> None:
    liger = peer("liger_kernel.ops.fused_linear_cross_entropy")
    for e, v in ((2048, 128256), (4096, 128256)):
        n, e_, v_ = 16384 // scale, e // min(scale, 16), v // scale
        h = randn(n, e_, dtype=torch.bfloat16).requires_grad_()
        w = randn(v_, e_, dtype=torch.bfloat16) * 0.02
        labels = torch.randint(v_, (n,), device=DEVICE)
        flops = 4.0 * n * e_ * v_
        label = f"{n}x{e_}x{v_}"
        for chunk in (1024, 2048, 4096):
            report(
                f"linear_ce chunk {chunk} (FLOP)", label, "purelm", flops,
                lambda h=h, w=w, y=labels, c=chunk: cross_entropy.linear_cross_entropy(
                    h, w, y, chunk=c
                ).backward(),
            )  # fmt: skip
        logits = randn(min(n, 2048), v_, dtype=torch.bfloat16)
        some = labels[: len(logits)]
        report(
            "cross_entropy row step", f"{len(logits)}x{v_}", "purelm", 4.0 * logits.numel(),
            lambda z=logits, y=some: cross_entropy._row_step(
                z, y, -100, None, 1.0, True
            ),
        )  # fmt: skip
        if liger and not TINY:
            report(
                "linear_ce (FLOP)", label, "liger", flops,
                lambda h=h, w=w, y=labels: liger.LigerFusedLinearCrossEntropyFunction.apply(
                    h, w, y
                )[0].backward(),
            )  # fmt: skip


def sweep() -> None:
    """NF4 kernels over other launch configurations."""
    w = randn(14336 // (64 if TINY else 1), 4096 // (16 if TINY else 1), dtype=torch.bfloat16)
    x, n = leaf.quantize(w), w.numel()
    out, moved = torch.empty_like(w), w.numel() * 2.5 + w.numel() / 64
    plain = nf4_launch.quantize_config, nf4_launch.dequantize_config
    for tile, turns, warps in (
        (16, 1, 1), (32, 1, 1), (16, 4, 1), (32, 1, 2), (64, 1, 2), (64, 1, 4), (64, 2, 4),
        (128, 1, 4), (128, 1, 8), (256, 1, 8), (16, 8, 4),
    ):  # fmt: skip
        config = nf4_launch.Config(tile, turns, warps)
        nf4_launch.dequantize_config = lambda block, config=config: config
        report("nf4_dequantize double", f"{n}", f"{tile}/{turns}/{warps}", moved,
               lambda: leaf.dequantize(x, out=out))  # fmt: skip
    for tile, warps in ((8, 1), (16, 1), (16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)):
        config = nf4_launch.Config(tile, 1, warps)
        nf4_launch.quantize_config = lambda block, config=config: config
        report("nf4_quantize", f"{n}", f"{tile}/1/{warps}", moved, lambda: nf4.quantize(w, 64))
    nf4_launch.quantize_config, nf4_launch.dequantize_config = plain


def write(machine: str) -> None:
    """The times as $OUT/kernels.csv."""
    with open(Path(os.environ["OUT"]) / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine", "torch"])
        writer.writeheader()
        writer.writerows({**row, "machine": machine, "torch": torch.__version__} for row in rows)


def main() -> int:
    here = launch.interpreting() if TINY else contextlib.nullcontext()
    scale = 256 if TINY else 1
    machine = "interpreter" if TINY else torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}", flush=True)
    with here:
        for timer in (time_nf4, time_rms_norm, time_rope, time_gated, time_cross_entropy):
            timer(scale)
        if "--sweep" in sys.argv:
            sweep()
        if os.environ.get("OUT"):
            write(machine)
        failed = [name for name in CHECKS if not check(name)]
    print("failed: " + ", ".join(failed) if failed else "all checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
