"""Attention: each backend against plain torch in float64, packed rows against documents alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from purelm.errors import KernelError
from purelm.kernels.attention import (
    Documents,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    backend_for,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def drawn(b, s, h, k, d, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, s, n, d, generator=g).to(dtype) for n in (h, k, k)]


def with_gradients(f, q, k, v, dout):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = f(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def torchs(scale):
    """Torch's own formula, with every query head its own keys."""

    def f(q, k, v):
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2)

    return f


@given(
    b=st.integers(1, 2),
    s=st.integers(3, 20),
    k=st.integers(1, 3),
    groups=st.integers(1, 3),
    d=st.sampled_from([8, 24]),
    cut=st.booleans(),
    window=st.none() | st.integers(2, 24),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_forward_and_backward(b, s, k, groups, d, cut, window, dtype, seed):
    documents = Documents(torch.tensor([0, s // 2, s], dtype=torch.int32), s) if cut else None
    q, key, v = drawn(b, s, k * groups, k, d, seed, dtype)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)

    def ours(q, k, v):
        return attention(q, k, v, scale=0.4, documents=documents, window=window)

    def reference(q, k, v):
        return attention_reference(q, k, v, scale=0.4, documents=documents, window=window)[0]

    mine = with_gradients(ours, q, key, v, dout)
    eager = with_gradients(reference if cut or window else torchs(0.4), q, key, v, dout)
    exact = with_gradients(reference, q.double(), key.double(), v.double(), dout)

    def errors(found):
        pairs = zip(found, exact, strict=True)
        return [float((a.double() - x).abs().max() / x.abs().max()) for a, x in pairs]

    # The yardstick is eager's worst of the four: one of few values may be right by luck.
    limit = 2 * max(errors(eager)) + torch.finfo(dtype).eps
    assert all(error <= limit for error in errors(mine)), (errors(mine), errors(eager))
    assert all(a.dtype == dtype for a in mine)


def test_one_token_is_its_value():
    q, k, v = drawn(2, 1, 4, 2, 8, 0, torch.float32)
    mine = with_gradients(lambda *x: attention(*x, scale=0.3), q, k, v, torch.ones_like(q))
    assert torch.equal(mine[0], v.repeat_interleave(2, 2))
    torch.testing.assert_close(mine[3], torch.full_like(v, 2.0))


def test_reference_is_torchs():
    q, k, v = drawn(2, 9, 4, 2, 8, 0)
    dout = torch.ones_like(q)
    mine = with_gradients(lambda *x: attention_reference(*x, scale=0.3)[0], q, k, v, dout)
    for a, b in zip(mine, with_gradients(torchs(0.3), q, k, v, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    _, lse = attention_reference(q, k, v, scale=0.3)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.3
    first = scores[..., :1, :1].squeeze(-1)  # the first query sees one key
    torch.testing.assert_close(lse[..., :1], first)


def test_documents_do_not_see_each_other():
    q, k, v = drawn(1, 12, 4, 2, 8, 1)
    ends = [0, 1, 5, 12]
    documents = Documents(torch.tensor(ends, dtype=torch.int32), 7)
    dout = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    packed = with_gradients(lambda *x: attention(*x, scale=0.3, documents=documents), q, k, v, dout)
    for begin, end in zip(ends, ends[1:], strict=False):
        part = [t[:, begin:end] for t in (q, k, v, dout)]
        for a, b in zip(packed, with_gradients(torchs(0.3), *part), strict=True):
            torch.testing.assert_close(a[:, begin:end], b, rtol=1e-12, atol=1e-12)


def test_a_window_hides_what_lies_further_back():
    q, k, v = drawn(2, 9, 4, 2, 8, 6)
    out = attention(q, k, v, scale=0.3, window=3)
    for i in range(9):
        part = [t[:, max(0, i - 2) : i + 1] for t in (q, k, v)]
        torch.testing.assert_close(out[:, i], torchs(0.3)(*part)[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [False, True])
def test_the_two_functions_are_the_differentiable_one(cut):
    q, k, v = drawn(1, 10, 4, 2, 8, 3, torch.float32)
    documents = Documents(torch.tensor([0, 4, 10], dtype=torch.int32), 6) if cut else None
    dout = torch.ones_like(q)
    saved = attention_forward(q, k, v, scale=0.3, documents=documents)
    grads = attention_backward(dout, q, k, v, saved, scale=0.3, documents=documents)
    want = with_gradients(lambda *x: attention(*x, scale=0.3, documents=documents), q, k, v, dout)
    for a, b in zip((saved.out, *grads), want, strict=True):
        assert torch.equal(a, b)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cut", [False, True])
def test_transforms(cut, window):
    documents = Documents(torch.tensor([0, 2, 5], dtype=torch.int32), 3) if cut else None
    q, k, v = drawn(3, 5, 4, 2, 8, 4)
    q, k, v = q[:, None], k[:, None], v[:, None]

    def ours(q, k, v):
        return attention(q, k, v, scale=0.3, documents=documents, window=window).pow(3).sum()

    def plain(q, k, v):
        given = {"documents": documents, "window": window}
        return attention_reference(q, k, v, scale=0.3, **given)[0].pow(3).sum()

    def length(f):
        return lambda *x: sum(g.square().sum() for g in torch.func.grad(f, (0, 1, 2))(*x))

    for make in (
        lambda f: torch.func.grad(f, (0, 1, 2))(q[0], k[0], v[0]),
        lambda f: torch.func.vmap(f)(q, k, v),
        lambda f: torch.func.vmap(f, (0, None, None))(q, k[0], v[0]),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1, 2)))(q, k, v),
        lambda f: torch.func.grad(lambda q: torch.func.vmap(f)(q, k, v).sum())(q),
        lambda f: torch.func.grad(length(f), (0, 1, 2))(q[0], k[0], v[0]),
    ):
        torch.testing.assert_close(make(ours), make(plain), rtol=1e-11, atol=1e-11)


def test_backends():
    q = torch.empty(1, 4, 2, 64)
    assert backend_for(q) == "flash_cpu"
    assert backend_for(q, Documents(torch.tensor([0, 4]), 4)) == "reference"
    assert backend_for(q, window=3) == "reference"
    assert backend_for(q.to("meta")) == "reference"


def test_bad_input():
    q, k, v = drawn(1, 4, 4, 3, 8, 5)
    with pytest.raises(KernelError, match="multiple"):
        attention(q, k, v, scale=1.0)
    q, k, v = drawn(1, 4, 4, 2, 8, 5)
    with pytest.raises(KernelError, match="belong together"):
        attention(q, k, v[:, :3], scale=1.0)
    with pytest.raises(KernelError, match="belong together"):
        attention(q[:, :3], k, v, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("s", "k", "d", "cut", "window", "backend"),
    [
        (300, 2, 64, False, None, "cudnn"),
        (257, 4, 128, False, None, "cudnn"),
        (300, 2, 64, False, 50, "flash"),
        (300, 2, 128, True, None, "flash"),
        (300, 2, 128, True, 50, "flash"),
        (200, 1, 256, False, None, "flash"),
        (200, 4, 256, False, 64, "flash"),
        (200, 2, 80, True, 1000, "flash"),
    ],
)
def test_gpu_backends(s, k, d, cut, window, backend, dtype):
    """The backend that was meant, within its own rounding of the formula in float64."""
    ends = torch.tensor([0, 1, s // 3, s], dtype=torch.int32, device="cuda")
    documents = Documents(ends, s - s // 3) if cut else None
    tensors = [t.cuda() for t in drawn(1 if cut else 2, s, 8, k, d, 7, dtype)]
    assert backend_for(tensors[0], documents, window) == backend
    dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(8)).cuda()
    given = {"scale": d**-0.5, "documents": documents, "window": window}

    def ours(*x):
        return attention(*x, **given)

    def reference(*x):
        return attention_reference(*x, **given)[0]

    mine = with_gradients(ours, *tensors, dout)
    eager = with_gradients(reference, *tensors, dout)
    exact = with_gradients(reference, *(t.double() for t in tensors), dout)
    for a, b, x in zip(mine, eager, exact, strict=True):
        error, yard = ((y.double() - x).abs().max() / x.abs().max() for y in (a, b))
        assert error <= 2 * yard + torch.finfo(dtype).eps
