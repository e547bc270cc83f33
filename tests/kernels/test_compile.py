"""Every kernel compiles for every GPU it is meant for, without spilling; no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory one program may have.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# The few that may spill, by the start of their name, and how many bytes: a program that sums the
# weight's gradient over rows this wide holds more than its registers, as do products of so many
# rows in fp32, which quant/linear.py does not choose, and some of the packed products.
SPILLS = {
    "rms_norm_backward e=16384 torch.": 208,
    "rms_norm_backward e=16384 torch.bfloat16 gemma=False layer=True": 240,
    # Two results of a row this wide in fp32, of which no GPU makes a product in fp8.
    "fp8_gated_pull_rows torch.float32 14336": 216,
    "nf4_matvec ": 8,
    "grouped_dense 65536": 8,
    "nf4_products ": 8,
    # Attention's cuts are those that were fastest on a GPU: larger tiles that spill some registers
    # beat smaller ones that spill none.
    "flash ": 16,
    "flash_dq": 320,
    "flash_dk": 1024,
    "flash_dv": 208,
    "decode_attention 8x4x64 torch.float32": 8,
    "decode_attention 8x4x128 torch.float32": 8,
    "decode_attention 1x7x80 torch.float32": 8,
    # The backward of Mamba 2's scan holds its pairs of tokens beside a head's features.
    "ssd_dx": 200,
    "ssd_dbc": 256,
    "gated_norm 1x3072": 8,
    "nf4_quantize block=4096 torch.float16": 16,
    # Likewise that of the delta rule, and its states, which stay in registers from chunk to chunk.
    "delta_states": 256,
    "delta_pulls": 256,
    "delta_dk": 512,
}
REPOSITORY = Path(__file__).parents[2]


def compiled(arch: int, cache: Path, *flags: str) -> list[list[str]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY / "src"), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_lane.py"), str(arch), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split(",") for line in done.stdout.splitlines()]


def check(rows: list[list[str]], arch: int) -> None:
    assert len(rows) > 50
    for name, registers, stack, shared, widest, fused in rows:
        kind = name.removeprefix("ones: ")
        allowed = max((n for start, n in SPILLS.items() if kind.startswith(start)), default=0)
        spilled = f"{name} spills: {registers} registers, {stack} bytes of stack"
        assert int(stack) <= allowed, spilled
        # Attention's smaller cuts are for every GPU of capability 8, not for 8.0 alone.
        most = 101_376 if arch < 90 and name.startswith("flash") else SHARED[arch]
        assert int(shared) <= most, f"{name} wants {shared} bytes of shared memory"
        assert fused == "0", f"{name} fuses a product and a sum that must be rounded apart"
        if name != kind:  # whose accesses no alignment is known of
            continue
        assert int(widest) >= 4, name
        if name.startswith(("gated", "clamped", "rms_norm e=4096", "rms_norm_backward e=4096")):
            assert widest == "16", f"{name}: accesses of {widest} bytes"
        if name.startswith(("nf4_quantize block=64", "nf4_dequantize block=64")):
            assert widest == "16", f"{name}: accesses of {widest} bytes"


@pytest.mark.timeout(600)
def test_hopper(tmp_path):
    """Of each kernel a few configurations; `test_all` has them all."""
    check(compiled(90, tmp_path, "--few"), 90)


@pytest.mark.full
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all(tmp_path, arch):
    check(compiled(arch, tmp_path, "--all"), arch)
