"""A token's rows summed by weight, and inner products of rows, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels.weighted_rows import (
    row_dots,
    row_dots_reference,
    weighted_sum,
    weighted_sum_reference,
)

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(
    tokens=st.integers(0, 9),
    active=st.integers(1, 5),
    width=st.sampled_from([1, 24, 1024, 1030]),
    dtype=dtypes,
    weighed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sums_of_rows(tokens, active, width, dtype, weighed, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens * active + 3, width, generator=g).to(dtype)
    places = torch.randint(0, len(rows), (tokens, active), generator=g)
    weights = torch.rand(tokens, active, generator=g) if weighed else None
    wide = None if weights is None else weights.double()
    exact = weighed_by_hand(rows.double(), places, wide)
    eager = weighed_by_hand(rows, places, weights).to(dtype)
    for made in (f(rows, places, weights) for f in (weighted_sum, weighted_sum_reference)):
        assert made.dtype == dtype
        assert_rows(made, eager, exact)


def weighed_by_hand(rows, places, weights):
    each = rows[places]
    return (each if weights is None else each * weights[..., None]).sum(1)


@given(
    rows=st.integers(1, 20),
    width=st.sampled_from([1, 24, 256, 300]),
    dtype=dtypes,
    seed=st.integers(0, 2**31),
)
def test_inner_products_of_rows(rows, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, width + 8, generator=g).to(dtype)
    a, b = wide[:, :width], torch.randn(rows, width, generator=g).to(dtype)
    exact = (a.double() * b.double()).sum(-1)
    for made in (row_dots(a, b), row_dots_reference(a, b)):
        assert made.dtype == torch.float32
        # What rounding each product and each sum comes to at most.
        limit = width * torch.finfo(torch.float32).eps * (a.double() * b.double()).abs().sum(-1)
        assert ((made.double() - exact).abs() <= limit).all()


def test_bad_input():
    rows, places = torch.ones(4, 6), torch.zeros(3, 2, dtype=torch.int64)
    for bad in ((rows[0], places), (rows, places.int()), (rows, places, torch.ones(3, 1))):
        with pytest.raises(KernelError, match="expected"):
            weighted_sum(*bad)
    for pair in ((rows, rows[:2]), (rows, rows.half()), (rows[0], rows[0])):
        with pytest.raises(KernelError, match="expected"):
            row_dots(*pair)
