"""The launcher: triton waits for a launch, the path is picked by device, ops are well formed."""

import subprocess
import sys

import pytest
import torch

from purelm.errors import KernelError
from purelm.kernels import cross_entropy, gated, launch, nf4, rms_norm, rope  # noqa: F401  (registers their ops)
from purelm.quant.linear import linear
from purelm.quant.nf4 import quantize


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernel_files_import_and_run_without_triton():
    out = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from purelm.kernels import cross_entropy, gated, nf4, rms_norm, rope\n"
        "from purelm.quant.linear import linear\n"
        "from purelm.quant.nf4 import quantize\n"
        "x = torch.ones(2, 64, requires_grad=True)\n"
        "linear(x, quantize(torch.ones(4, 64))).sum().backward()\n"
        "print(float(x.grad[0, 0]))\n"
    )
    assert out == "4.0\n"


def test_cpu_work_does_not_import_triton():
    out = python(
        "import sys, torch\n"
        "from purelm.kernels import cross_entropy, gated, nf4, rms_norm, rope\n"
        "rms_norm.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)\n"
        "nf4.quantize(torch.ones(64))\n"
        "print('triton' in sys.modules)\n"
    )
    assert out == "False\n"


def test_the_path_is_picked_by_device_and_dtype():
    x = torch.ones(2)
    assert not launch.on_gpu(x)
    with launch.interpreting():
        assert launch.on_gpu(x, None)
        assert not launch.on_gpu(x.double())
    assert not launch.on_gpu(x)
    with pytest.raises(KernelError, match="cpu, meta"):
        launch.on_gpu(x, x.to("meta"))


def test_ops_have_right_schemas_and_fakes(interpreted):
    ops = torch.ops.purelm
    x, w = torch.randn(3, 5, 16), torch.randn(16)
    y, rstd = ops.rms_norm(x, w, None, 1e-6, 0.0, True)
    q, k, angle = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.rand(1, 3, 8)
    packed, absmax = ops.nf4_quantize(torch.randn(500), 64)
    parts = (packed, *ops.nf4_quantize_absmax(absmax))
    labels = torch.tensor([1, -100, 3])
    for op, args in [
        (ops.rms_norm, (x, w, x.transpose(0, 1).contiguous().transpose(0, 1), 1e-6, 0.0, True)),
        (ops.rms_norm_dx, (y, x, w, rstd, None, 1e-6, 0.0, True)),
        (ops.rms_norm_dx, (y, x, w, None, y, 1e-6, 0.0, True)),
        (ops.rms_norm_backward, (y, x, w, rstd, 1e-6, 0.0, True)),
        (ops.rope, (q.transpose(1, 2).contiguous().transpose(1, 2), angle, angle, False, False)),
        (ops.rope_qk, (q, k, angle, angle, True, True)),
        (ops.norm_rope_qk, (q, k, w[:8], w[8:], angle, angle, 1e-6, 0.0, True, False)),
        (
            ops.norm_rope_qk_dx,
            (q, k, q, k, w[:8], w[8:], angle, angle, 1e-6, 0.0, True, False),
        ),
        (ops.gated, (x, x.transpose(0, 1).contiguous().transpose(0, 1), "silu")),
        (ops.gated_backward, (x, x, x, "gelu")),
        (ops.nf4_quantize, (torch.randn(500), 64)),
        (ops.nf4_quantize_absmax, (absmax,)),
        (ops.nf4_dequantize, (*parts, 500, 64, torch.bfloat16)),
        (ops.nf4_dequantize_into, (*parts, torch.empty(500), 64)),
        (
            ops.linear_cross_entropy,
            (
                torch.randn(3, 8),
                torch.randn(9, 8),
                torch.randn(3, 2),
                torch.randn(9, 2),
                labels,
                torch.rand(3),
                -100,
                None,
                1.0,
                0.1,
                1e-4,
            )
            + (2, True, True, False, True, True),
        ),
    ]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# The compiler itself makes an instance of autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("on", [True, False], ids=["launch", "torch"])
def test_gradients_survive_compile(interpreted, on):
    """A compiled function is one graph, launches and all, and gives the same numbers."""
    w, leaf = torch.randn(16), quantize(torch.randn(16, 16))
    labels = torch.tensor([1, 2, 3, -100])

    def f(x):
        x = rms_norm.rms_norm(linear(x, leaf), w, 1e-6)
        x = gated.gated(x, x + 1, "silu")
        return cross_entropy.linear_cross_entropy(x, torch.ones(9, 16), labels)

    x = torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with launch.interpreting(on):
        (want,) = torch.autograd.grad(f(x), x)
        (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, want)


def test_empty_tensors_launch_nothing(interpreted):
    x = torch.ones(0, 8, requires_grad=True)
    y = rms_norm.rms_norm(x, torch.ones(8), 1e-6)
    assert y.shape == (0, 8) and torch.autograd.grad(y.sum(), x)[0].shape == (0, 8)
    assert gated.gated(x, x, "silu").shape == (0, 8)
    loss = cross_entropy.linear_cross_entropy(x, torch.ones(5, 8), torch.ones(0, dtype=torch.int64))
    assert loss == 0


def test_helpers():
    assert [launch.power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert launch.ceil_div(7, 2) == 4 and launch.ceil_div(0, 2) == 0
    assert nf4.BLOCKS == (32, 64, 128, 256, 512, 1024, 2048, 4096)
