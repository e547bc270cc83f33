"""The error of every quantizer of weights, by block size, against the published table of it."""

from pathlib import Path

import pytest
import torch

from purelm.quant import fp8, int8
from purelm.quant.nf4 import dequantize, quantize

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TABLE = Path(__file__).parents[2] / "examples/measurements/quantizers.md"


def weights(law: str, shape: tuple[int, int] = (512, 1024)) -> torch.Tensor:
    """Weights of variance 1: normal, or Student's t with three degrees of freedom."""
    g = torch.Generator().manual_seed(7)
    w = torch.randn(shape, generator=g)
    if law == "heavy":
        w /= torch.stack([torch.randn(shape, generator=g) for _ in range(3)]).square().sum(0).sqrt()
    return w


def errors(w: torch.Tensor, back: torch.Tensor) -> tuple[float, float]:
    """(mean |error|, sum of |error| over sum of |w|)."""
    error = (back - w).abs()
    return float(error.mean()), float(error.sum() / w.abs().sum())


def published() -> dict[tuple[str, int, str], tuple[float, ...]]:
    """(kind, block, law) -> the table's figures."""
    rows = [line.strip("|\n ").split("|") for line in TABLE.read_text().splitlines()]
    return {
        (row[0].strip(), int(row[1]), row[2].strip()): tuple(float(v) for v in row[3:])
        for row in rows
        if len(row) == 6 and row[1].strip().isdigit()
    }


def measured(kind: str, law: str, block: int) -> tuple[float, ...]:
    """(mean |error|, relative error, mean |error| with double quantization)."""
    w = weights(law)
    plain = quantize(w, block=block, double=False, kind=kind)
    double = quantize(w, block=block, double=True, kind=kind)
    return (*errors(w, dequantize(plain)), errors(w, dequantize(double))[0])


@pytest.mark.parametrize("law", ["normal", "heavy"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_table(kind, law):
    table = published()
    assert {key[1] for key in table if key[::2] == (kind, law)} == set(BLOCKS)
    for block in BLOCKS:
        # The last digit printed, and what a differently ordered sum may move.
        assert measured(kind, law, block) == pytest.approx(table[kind, block, law], rel=2e-3)


@pytest.mark.parametrize("law", ["normal", "heavy"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_never_worse_than_bitsandbytes(kind, law):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(law, (256, 512))
    for block in BLOCKS:
        for double in (False, True):
            ours = dequantize(quantize(w, block=block, double=double, kind=kind))
            with torch.compiler.set_stance("force_eager"):
                theirs = bnb.dequantize_4bit(
                    *bnb.quantize_4bit(
                        w.view(1, -1), blocksize=block, quant_type=kind, compress_statistics=double
                    )
                )
            assert errors(w, ours)[0] <= errors(w, theirs.view_as(w))[0]


EIGHT = {
    "int8, a row": lambda w: int8.dequantize(int8.quantize(w)),
    "fp8, a row": lambda w: fp8.dequantize(fp8.quantize(w)),
    "fp8, a block": lambda w: fp8.dequantize(fp8.quantize(w, blocks=True)),
}


@pytest.mark.parametrize("law", ["normal", "heavy"])
@pytest.mark.parametrize("kind", EIGHT)
def test_eight_bits(kind, law):
    rows = [line.strip("|\n ").split(" | ") for line in TABLE.read_text().splitlines()]
    (found,) = [row[2:] for row in rows if [cell.strip() for cell in row[:2]] == [kind, law]]
    w = weights(law)
    assert errors(w, EIGHT[kind](w)) == pytest.approx([float(v) for v in found], rel=2e-3)


if __name__ == "__main__":  # prints the table's rows
    for kind in ("nf4", "fp4"):
        for law in ("normal", "heavy"):
            for block in BLOCKS:
                row = " | ".join(f"{value:.5f}" for value in measured(kind, law, block))
                print(f"| {kind} | {block} | {law} | {row} |")
    for kind, through in EIGHT.items():
        for law in ("normal", "heavy"):
            row = " | ".join(f"{v:.5f}" for v in errors(weights(law), through(weights(law))))
            print(f"| {kind} | {law} | {row} |")
