"""Which backend runs the gated delta rule, and that what it is given means what ours means."""

import sys
import warnings

import pytest
import torch

from purelm.errors import KernelError
from purelm.kernels import delta_rule, delta_rule_reference


def forgotten():
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        del sys.modules[name]
    delta_rule._chunked.cache_clear()


@pytest.fixture
def fresh():
    """As in a process that has not looked for flash-linear-attention yet, before and after.

    transformers takes what is imported: its models, other tests' oracles, would run it on a CPU.
    """
    forgotten()
    yield
    forgotten()


def package(folder, version, rule):
    (folder / "fla/ops/gated_delta_rule").mkdir(parents=True)
    (folder / "fla/__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "fla/ops/__init__.py").write_text("")
    (folder / "fla/ops/gated_delta_rule/__init__.py").write_text(rule)


def triton_on(monkeypatch, major, version, tilelang=False):
    """A GPU of a compute capability, and what is installed beside."""
    delta_rule._differentiates.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(delta_rule.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(delta_rule.importlib.util, "find_spec", lambda name: tilelang or None)


@pytest.mark.parametrize(
    "major, version, tilelang",
    [(8, "3.6.0", False), (10, "3.6.0", False), (9, "3.3.1", False), (9, "3.7.1", False)]
    + [(9, "3.10.0+git1", False), (9, "3.6.0", True)],
)
def test_their_gradients_are_taken(monkeypatch, major, version, tilelang):
    triton_on(monkeypatch, major, version, tilelang)
    monkeypatch.setattr(delta_rule, "_chunked", lambda: print)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert delta_rule.backend_for(*on_cuda(), trains=True) == "fla"


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0"])
def test_wrong_gradients_are_not(monkeypatch, version):
    """They would raise: our launches train, and what needs no gradients is theirs."""
    triton_on(monkeypatch, 9, version)
    monkeypatch.setattr(delta_rule, "_chunked", lambda: print)
    monkeypatch.setattr(delta_rule.delta_check, "passes", lambda *_: True)
    assert delta_rule.backend_for(*on_cuda(), trains=True) == "triton"
    assert delta_rule.backend_for(*on_cuda()) == "fla"


def on_cuda(dtype=torch.bfloat16, width=128):
    """Enough of queries and values on a GPU for the choice."""

    class Tensor:
        is_cuda = True
        device = torch.device("cuda", 0)
        shape = (1, 64, 16, width)

    Tensor.dtype = dtype
    return Tensor(), Tensor()


def test_backends(monkeypatch):
    plain = torch.zeros(1, 4, 2, 8).bfloat16()
    assert delta_rule.backend_for(plain, plain) == "reference"
    passing = [True]
    monkeypatch.setattr(delta_rule.delta_check, "passes", lambda *_: passing[0])
    monkeypatch.setattr(delta_rule, "_chunked", lambda: None)
    assert delta_rule.backend_for(*on_cuda()) == "triton"
    assert delta_rule.backend_for(*on_cuda(width=192)) == "reference"
    passing[0] = False
    assert delta_rule.backend_for(*on_cuda()) == "reference"
    monkeypatch.setattr(delta_rule, "_chunked", lambda: print)
    assert delta_rule.backend_for(*on_cuda()) == "fla"
    assert delta_rule.backend_for(*on_cuda(torch.float32)) == "reference"
    assert delta_rule.backend_for(*on_cuda(width=512)) == "reference"
    seen = []
    torch.func.grad(lambda x: seen.append(delta_rule.backend_for(*on_cuda())) or x)(torch.ones(()))
    assert seen == ["reference"]


def test_none_is_silent(monkeypatch, fresh):
    monkeypatch.setattr(delta_rule.importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert delta_rule._chunked() is None


def test_installed(monkeypatch, fresh, tmp_path):
    package(tmp_path, "0.10.2", "def chunk_gated_delta_rule(): return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    rule = delta_rule._chunked()
    assert rule is not None and rule() == 7


@pytest.mark.parametrize(
    "version, rule, said",
    [
        ("0.6.0", "raise RuntimeError('no such symbol')", "RuntimeError: no such symbol"),
        ("0.6.0", "import a_module_that_is_missing", "a_module_that_is_missing"),
        ("0.5.1", "chunk_gated_delta_rule = print", "version 0.5.1"),
        ("dev", "chunk_gated_delta_rule = print", "version dev"),
    ],
)
def test_broken_says_so_once(monkeypatch, fresh, tmp_path, version, rule, said):
    package(tmp_path, version, rule)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=said):
        assert delta_rule._chunked() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert delta_rule._chunked() is None


@pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")
@pytest.mark.parametrize("documents", [False, True])
def test_their_rule_is_ours(fresh, monkeypatch, documents):
    """Of flash-linear-attention's own recurrence in plain torch, by the names of its chunks."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    g = torch.Generator().manual_seed(0)
    b, s, groups, heads, n, p = 2, 9, 2, 4, 8, 6
    q, k = (torch.randn(b, s, groups, n, generator=g) for _ in "qk")
    v, before = torch.randn(b, s, heads, p, generator=g), torch.randn(b, heads, n, p, generator=g)
    beta = torch.rand(b, s, heads, generator=g)
    decay = -torch.rand(b, s, heads, generator=g)
    starts = torch.rand(b, s, generator=g) < 0.3 if documents else None

    def theirs(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
        assert use_qk_l2norm_in_kernel
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q, k = (x.repeat_interleave(heads // groups, 2) for x in (q, k))
        return naive.naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, initial_state=initial_state, output_final_state=output_final_state
        )

    want = delta_rule.delta_rule(q, k, v, beta, decay, starts, before)
    monkeypatch.setattr(delta_rule, "backend_for", lambda *_: "fla")
    monkeypatch.setattr(delta_rule, "_chunked", lambda: theirs)
    torch.testing.assert_close(delta_rule.delta_rule(q, k, v, beta, decay, starts, before), want)
    alone, none = delta_rule.delta_rule(q, k, v, beta, decay, starts, None)
    assert none is None
    unit = [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    torch.testing.assert_close(
        alone,
        delta_rule_reference.scan(unit[0] * n**-0.5, unit[1], v, beta, decay, starts, None)[0],
    )


def test_starts_on_another_device_raise(interpreted):
    q, v, rate = (torch.ones(1, 5, *of, dtype=torch.bfloat16) for of in ((1, 8), (2, 8), (2,)))
    starts = torch.zeros(1, 5, dtype=torch.bool, device="meta")
    with pytest.raises(KernelError, match="different devices"):
        delta_rule.delta_rule(q, q, v, rate.float(), -rate.float(), starts, None)
