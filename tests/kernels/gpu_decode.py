"""Check what a step of decoding is made of on a CUDA machine: `python tests/kernels/gpu_decode.py`.

Packed products against float64 over random shapes, and the fused layer against the general one with
float64 as the truth, with the pieces of the tests: it needs pytest and hypothesis. `--tiny` runs
it on the CPU, under the interpreter.
"""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parents[1] / "src"), str(HERE.parent / "nn")]
TINY = "--tiny" in sys.argv
import shim  # noqa: E402

if TINY:
    shim.install()
else:
    import os

    del os.environ["TRITON_INTERPRET"]

import test_decode_layer as layers  # noqa: E402
import test_nf4_products as parts  # noqa: E402
import torch  # noqa: E402
from oracles import assert_rows  # noqa: E402

from purelm.kernels import launch  # noqa: E402
from purelm.kernels.nf4_products import products  # noqa: E402
from purelm.nn import decode_layer, tree  # noqa: E402
from purelm.nn.spec import MLPSpec  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"


def check_products(r: random.Random) -> None:
    """One launch of random weights."""
    runs = r.choice((3, 5, 16) if TINY else (3, 16, 17, 64, 224))
    rows, activation = r.choice((1, 3, 8, 9, 16, 17, 40, 64)), r.choice((None, "silu", "gelu"))
    count = 2 if activation else r.choice((1, 2, 3))
    outputs = (
        [r.choice((16, 40, 77))] * 2 if activation else [r.randint(1, 99) for _ in range(count)]
    )
    rank, bias = r.choice((0, 8)), r.random() < 0.5
    dtype = r.choice((torch.float16, torch.bfloat16))
    block, double = r.choice((32, 64, 128)), r.random() < 0.7
    kind, seed = r.choice(("nf4", "fp4")), r.randrange(2**31)
    width = runs * min(block, 64)
    x, weights, low = parts.drawn(
        rows, outputs, width, block, double, kind, dtype, rank, bias, seed
    )
    args = weights, block, kind, low, activation, None, 1.0
    eager, exact = parts.dense(x, *args), parts.dense(x.double(), *args)
    there = [
        type(w)(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in w)) for w in weights
    ]
    low = None if low is None else low.to(DEVICE)
    ours = products(x.to(DEVICE), there, block, kind, low=low, activation=activation)
    assert_rows(ours.cpu(), eager, exact)


def check_layers(kind: str) -> None:
    """Two steps of a small model, fused and not."""
    spec, made = layers.model(layers.PLAIN[kind], 1)
    exact = layers.steps_of(spec, tree.map(layers.wide, made), None, torch.float64)
    made = tree.map(lambda t: t.to(DEVICE), made)
    ours = layers.steps_of(spec, made, None, torch.bfloat16, DEVICE)
    covers, decode_layer.covers = decode_layer.covers, lambda *_: decode_layer.Fused(False, False)
    try:
        general = layers.steps_of(spec, made, None, torch.bfloat16, DEVICE)
    finally:
        decode_layer.covers = covers
    assert_rows(ours.cpu(), general.cpu(), exact)


def main() -> int:
    """All checks; they raise where one fails."""
    r = random.Random(0)
    layers.PLAIN["wide"] = replace(layers.LAYER, mlp=MLPSpec(192, "gelu"))
    with launch.interpreting() if TINY else contextlib.nullcontext():
        for _ in range(4 if TINY else 60):
            check_products(r)
        for kind in layers.PLAIN:
            check_layers(kind)
    print("packed products and fused layers keep to the tolerance rule")
    return 0


if __name__ == "__main__":
    sys.exit(main())
