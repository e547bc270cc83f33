"""Check every kernel on a CUDA machine; `purelm bench kernels` times them.

    python tests/kernels/gpu_check.py [--long] [--part=I/N] [--sweep] [--tiny] [KERNEL...]

Each is held to the tolerance rule of tests/oracles.py over random inputs with float64 as the truth.
Shapes that make Triton compile another variant come from short lists; `--long` draws them freely,
200 a kernel; `--part=I/N` is every N-th of them, for processes side by side. `--sweep` times other
launch configurations of the NF4 kernels; `--tiny` runs the whole on the CPU, under the interpreter,
with tiny shapes.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "src")]
TINY, LONG = "--tiny" in sys.argv, "--long" in sys.argv
if TINY:
    import shim

    shim.install()

import torch  # noqa: E402
from oracles import assert_elementwise, assert_rows  # noqa: E402

from purelm.bench._kernel_time import timed  # noqa: E402
from purelm.kernels import (  # noqa: E402
    clamped,
    cross_entropy,
    fp8,
    fp8_made,
    gated,
    launch,
    low_rank,
    nf4,
    nf4_launch,
    nf4_quantize_launch,
    rms_norm,
    rope,
    weighted_rows,
)
from purelm.quant import nf4 as leaf  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"
EXAMPLES = 4 if TINY else 200 if LONG else 16
PART, PARTS = next((map(int, a[7:].split("/")) for a in sys.argv if a[:7] == "--part="), (0, 1))
SEEDS = range(PART, EXAMPLES, PARTS)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    style = r.choice(
        [{}, {"offset": 1.0, "cast_first": False}, {"centered": True, "cast_first": False}]
    )
    dtype = r.choice(FLOATS)
    rows = r.randrange(1, 7)
    x, w = randn(rows, width, dtype=dtype), (randn(width, dtype=dtype) * 0.1 + 1).to(dtype)
    onto = (randn(rows, width, dtype=dtype),) if r.random() < 0.5 else ()

    def run(f: Callable[..., Any]) -> Callable[..., Any]:
        def called(x: torch.Tensor, w: torch.Tensor, *onto: torch.Tensor) -> Any:
            return f(x, w, 1e-5, **style, onto=onto[0] if onto else None)

        return called

    compare("rms_norm", run(rms_norm.rms_norm), run(rms_norm.rms_norm_reference), (x, w, *onto))
    dy, beside = randn(rows, width, dtype=dtype), onto[0] if onto else None
    pulled = rms_norm.rms_norm_pull(dy, x, w, 1e-5, **style, onto=beside)
    found = []
    for wide in (dtype, torch.float64):
        leaf = x.to(wide).requires_grad_()
        y = rms_norm.rms_norm_reference(leaf, w.to(wide), 1e-5, **style)
        (dx,) = torch.autograd.grad(y, leaf, dy.to(wide))
        found.append((dx if beside is None else dx + beside).cpu())
    assert_rows(pulled.cpu(), *found)


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


def check_normed_heads(r: random.Random) -> None:
    b, s, h, k = (r.randrange(1, n) for n in (3, 6, 10, 5))
    few = [(22, 5), (64, 0), (128, 0)]
    rot, rest = r.choice([(256, 0), (80, 48), (128, 0), (2, 14)] if LONG else few)
    dim, dtype, interleaved = rot + rest, r.choice(FLOATS), r.random() < 0.5
    offset, cast_first = r.choice([(0.0, True), (1.0, False)])
    angle = torch.rand(r.choice([1, b]), s, rot, device=DEVICE) * 100
    cos, sin = angle.cos(), angle.sin()
    weights = (1 - offset + randn(2, dim) * 0.2).to(dtype).unbind(0)
    trained = r.random() < 0.3

    def ours(q: torch.Tensor, k: torch.Tensor, *ws: torch.Tensor) -> Any:
        norm = rope.HeadNorm(*(ws or weights), 1e-6, offset, cast_first)
        return rope.rope_qk(q, k, cos, sin, interleaved=interleaved, norm=norm)

    def reference(q: torch.Tensor, k: torch.Tensor, *ws: torch.Tensor) -> list[torch.Tensor]:
        wide, made = torch.promote_types(q.dtype, torch.float32), []
        for x, w in zip((q, k), ws or weights, strict=True):
            y = rms_norm.rms_norm_reference(
                x, w.to(x.dtype), 1e-6, offset=offset, cast_first=cast_first
            )
            made += [rope.rope_reference(y, cos.to(wide), sin.to(wide), interleaved=interleaved)]
        return made

    q, keys = (randn(b, s, n, dim, dtype=dtype) for n in (h, k))
    compare("normed heads", ours, reference, (q, keys, *(weights if trained else ())))


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


def check_clamped(r: random.Random) -> None:
    dtype, shape = r.choice(FLOATS), (r.randrange(1, 6), r.randrange(1, 300 if TINY else 5000))
    alpha, limit = r.choice([1.702, 0.5]), r.choice([7.0, 1.0])
    compare(
        "clamped",
        lambda g, u: clamped.clamped(g, u, alpha, limit),
        lambda g, u: clamped.clamped_reference(g, u, alpha, limit),
        (randn(*shape, dtype=dtype) * 2, randn(*shape, dtype=dtype) * 2),
        flat=True,
    )


def check_cross_entropy(r: random.Random) -> None:
    n, v, e = r.randrange(2, 30), r.randrange(2, 300 if TINY else 20_000), r.choice([32, 64, 128])
    dtype = r.choice(FLOATS)
    # Each is another compilation: a few settings that have everything among them.
    kinds = ((None, 1.0, 0.0, 0.0), (10.0, 0.25, 0.0, 0.0), (None, 1.0, 0.1, 1e-3))
    kind = r.choice([*kinds, (10.0, 0.25, 0.1, 1e-3)])
    options = dict(zip(("softcap", "scale", "label_smoothing", "z_loss"), kind, strict=True))
    weights = torch.rand(n, device=DEVICE) * 2 if kind[2] else None
    labels = torch.randint(v, (n,), device=DEVICE)
    labels[torch.rand(n, device=DEVICE) < 0.3] = -100
    chunk = r.choice([None, 8])
    h, w = randn(n, e, dtype=dtype), randn(v, e, dtype=dtype) * 0.3
    low_rank = (randn(n, 4, dtype=dtype), randn(v, 4, dtype=dtype)) if r.random() < 0.5 else ()
    compare(
        "cross_entropy",
        lambda h, w, low=None, b=None: cross_entropy.linear_cross_entropy(
            h, w, labels, token_weights=weights, chunk=chunk, low=low, b=b, **options
        ),
        lambda h, w, low=None, b=None: cross_entropy.linear_cross_entropy_reference(
            h, w, labels, token_weights=weights, low=low, b=b, **options
        ),
        (h, w.to(dtype), *low_rank),
        flat=True,
    )


def check_fp8(r: random.Random) -> None:
    """To the bit: the casts, and NF4 straight to e4m3 in both directions."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return
    widths = [r.randrange(1, 300 if TINY else 20_000) for _ in range(r.randrange(1, 4))]
    rows, dtype = r.randrange(1, 5), r.choice(FLOATS)
    parts = [(randn(rows, w) ** r.choice([1, 3])).to(dtype) for w in widths]
    found = [(fp8.cast_rows(parts), fp8.cast_rows_reference([p.cpu() for p in parts]))]
    n, k = (16 * r.randrange(1, 8 if TINY else 40) for _ in range(2))
    w = leaf.quantize(randn(n, k), block=r.choice([32, 64, 128, 4096]), double=r.random() < 0.5)
    for turned in (False, True):
        dense = leaf.dequantize(w, torch.float32)
        want = fp8.cast_rows_reference([(dense.mT if turned else dense).cpu()])
        scale = want.scale.to(DEVICE)
        pieces = (w.packed, w.absmax, w.absmax_scale, w.absmax_offset, w.shape, w.block, scale)
        found.append((fp8.Rows(fp8.nf4_rows(*pieces, transposed=turned), scale), want))
    for got, want in found:
        assert torch.equal(got.scale.cpu(), want.scale), f"scales {widths} {n=} {k=}"
        same = torch.equal(got.codes.cpu().view(torch.uint8), want.codes.view(torch.uint8))
        assert same, f"codes {widths} {n=} {k=}"


def check_fp8_made(r: random.Random) -> None:
    """Values near the plain kernels', and to the bit the rows that are cast from them."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return
    width = r.randrange(1, 16384) if LONG else r.choice([40, 300] if TINY else [576, 14336])
    rows, dtype = r.randrange(1, 5), r.choice(FLOATS)
    x, gate, up, dh = (randn(rows, width, dtype=dtype) for _ in range(4))
    made = fp8_made.norm_rows(x, gate[0], 1e-5)
    exact = rms_norm.rms_norm_reference(x.double(), gate[0].double(), 1e-5)
    eager = rms_norm.rms_norm_reference(x, gate[0], 1e-5)
    assert_rows(made.value.cpu(), eager.cpu(), exact.cpu())
    found = [(made.rows, [made.value])]
    activation = r.choice(gated.ACTIVATIONS)
    made = fp8_made.gated_rows(gate, up, activation)
    found.append((made.rows, [made.value]))
    plain = gated.gated_pull(dh.clone(), gate, up, activation)
    *grads, cast = fp8_made.gated_pull_rows(dh.clone(), gate, up, activation)
    for ours, theirs in zip([*grads, made.value], [*plain, plain[0]], strict=True):
        wide = theirs.double().cpu()
        assert_rows(ours.cpu(), theirs.cpu(), wide)
    found.append((cast, grads[1:]))
    for got, values in found:
        want = fp8.cast_rows_reference([v.cpu() for v in values])
        same = torch.equal(got.codes.cpu().view(torch.uint8), want.codes.view(torch.uint8))
        assert same and torch.equal(got.scale.cpu(), want.scale), f"rows {width} {dtype}"


def check_low_rank(r: random.Random) -> None:
    m, n, rank = r.randrange(1, 100), r.randrange(1, 300 if TINY else 3000), r.randrange(1, 70)
    dtype = r.choice([torch.bfloat16, torch.float16])
    y, low, b = (randn(*shape, dtype=dtype) for shape in ((m, n), (m, rank), (rank, n)))
    exact = y.double() + low.double() @ b.double()
    eager = torch.addmm(y, low, b)
    got = low_rank.add_low_rank(y, low, b)
    assert_rows(got.cpu(), eager.cpu(), exact.cpu())


def check_weighted_rows(r: random.Random) -> None:
    dtype = r.choice(FLOATS)
    tokens, active, width = r.randint(1, 300), r.choice((1, 4, 8)), r.choice((24, 768, 2050))
    rows = randn(tokens * active, width, dtype=dtype)
    places = torch.randperm(len(rows), device=DEVICE).view(tokens, active)
    weights = torch.rand(places.shape, device=DEVICE) if r.random() < 0.7 else None
    wide = None if weights is None else weights.double()
    exact = weighted_rows.weighted_sum_reference(rows.double(), places, wide)
    each = rows[places]
    eager = (each if weights is None else each * weights[..., None]).sum(1).to(dtype)
    got = weighted_rows.weighted_sum(rows, places, weights)
    assert_rows(got.cpu(), eager.cpu(), exact.cpu())
    other = randn(*rows.shape, dtype=dtype)
    exact = weighted_rows.row_dots_reference(rows.double(), other.double())[None]
    eager = (rows.float() * other.float()).sum(-1)[None]
    got = weighted_rows.row_dots(rows, other)[None]
    assert_rows(got.cpu(), eager.cpu(), exact.cpu())


CHECKS = {
    "nf4": check_nf4,
    "rms_norm": check_rms_norm,
    "rope": check_rope,
    "normed_heads": check_normed_heads,
    "gated": check_gated,
    "clamped": check_clamped,
    "cross_entropy": check_cross_entropy,
    "fp8": check_fp8,
    "fp8_made": check_fp8_made,
    "low_rank": check_low_rank,
    "weighted_rows": check_weighted_rows,
}


def check(name: str) -> bool:
    start, bad = time.perf_counter(), 0
    for seed in SEEDS:
        torch.manual_seed(seed)
        try:
            CHECKS[name](random.Random(seed))
        except AssertionError as error:
            bad += 1
            if bad <= 3:
                print(f"  {name} seed {seed}: {error}", flush=True)
        except Exception:
            traceback.print_exc(limit=4)
            bad = len(SEEDS)
            break
    took = time.perf_counter() - start
    print(f"check {name}: {len(SEEDS) - bad} of {len(SEEDS)} right in {took:.0f} s", flush=True)
    return not bad


def report(kernel: str, shape: str, who: str, moved: float, f: Callable[[], Any]) -> None:
    try:
        t = timed(f, [()], torch.device(DEVICE), True).seconds
    except Exception as error:
        print(f"{kernel:26} {shape:18} {who:12} {type(error).__name__}: {error}"[:150], flush=True)
        return
    print(f"{kernel:26} {shape:18} {who:12} {t * 1e6:10.1f} us {moved / t / 1e9:8.0f} GB/s")


def sweep() -> None:
    """NF4 kernels over other launch configurations."""
    w = randn(14336 // (64 if TINY else 1), 4096 // (16 if TINY else 1), dtype=torch.bfloat16)
    x, n = leaf.quantize(w), w.numel()
    out, moved = torch.empty_like(w), w.numel() * 2.5 + w.numel() / 64
    for turns, warps in ((1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8)):
        with mock.patch.multiple(nf4_launch, TURNS=turns, WARPS=warps):
            report("nf4_dequantize double", f"{n}", f"{turns}/{warps}", moved,
                   lambda: leaf.dequantize(x, out=out))  # fmt: skip
        config = nf4_quantize_launch.Config(4 * warps, turns, warps)
        with mock.patch.object(nf4_quantize_launch, "quantize_config", lambda _, c=config: c):
            report("nf4_quantize", f"{n}", f"{turns}/{warps}", moved, lambda: nf4.quantize(w, 64))


def main() -> int:
    here = launch.interpreting() if TINY else contextlib.nullcontext()
    machine = "interpreter" if TINY else torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}", flush=True)
    with here:
        if "--sweep" in sys.argv:
            sweep()
        named = [name for name in CHECKS if name in sys.argv] or list(CHECKS)
        failed = [name for name in named if not check(name)]
    print("failed: " + ", ".join(failed) if failed else "all checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
