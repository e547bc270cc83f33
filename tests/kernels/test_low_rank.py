"""The low-rank sum against float64, in place and within its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import low_rank
from purelm.kernels.low_rank import add_low_rank

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


@given(
    m=st.integers(1, 80),
    n=st.integers(1, 300),
    rank=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_against_float64(m, n, rank, dtype, turned, seed):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(m, n + 8, generator=g).to(dtype)
    y, beside = wide[:, :n], wide[:, n:].clone()
    low = torch.randn(m, rank, generator=g).to(dtype)
    b = torch.randn(rank, n, generator=g).to(dtype)
    if turned:  # what a transpose gives
        b = b.mT.contiguous().mT
    exact = y.double() + low.double() @ b.double()
    eager = torch.addmm(y, low, b)
    made = add_low_rank(y, low, b)
    assert made is y and torch.equal(wide[:, n:], beside)
    assert_rows(made, eager, exact)


def test_bad_input():
    y, low, b = torch.ones(4, 6), torch.ones(4, 2), torch.ones(2, 6)
    for bad in ((y, low[:3], b), (y, low, b[:1]), (y, low, b[:, :5]), (y[0], low, b)):
        with pytest.raises(KernelError, match="expected"):
            add_low_rank(*bad)
    with pytest.raises(KernelError, match="dtypes"):
        add_low_rank(y, low.half(), b)


@pytest.mark.parametrize(("major", "most"), [(8, 128), (9, 256), (10, 256)])
def test_older_gpus_launch_for_fewer_inputs(
    monkeypatch: pytest.MonkeyPatch, major: int, most: int
) -> None:
    """Whose shared memory the tiles of more would not fit into, as the compile lane shows."""
    low_rank.most_rank.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert low_rank.most_rank(torch.device("cuda", 0)) == most
    low_rank.most_rank.cache_clear()
    assert low_rank.most_rank(torch.device("cpu")) == low_rank.MOST_RANK
