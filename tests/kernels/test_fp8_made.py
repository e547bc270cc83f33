"""What is rounded to e4m3 where it is made: the value is the plain kernel's, its rows are what
`cast_rows` makes of it.
"""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import fp8, launch
from purelm.kernels.fp8_made import MAX_WIDTH, gated_pull_rows, gated_rows, norm_rows
from purelm.kernels.gated import ACTIVATIONS, gated, gated_pull, gated_reference
from purelm.kernels.rms_norm import rms_norm_reference

DRAWN = {
    "shape": st.sampled_from([(1,), (3,), (2, 3), (0,)]),
    "width": st.one_of(st.integers(1, 300), st.sampled_from([1024, 2049])),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "size": st.sampled_from([1.0, 1e-3, 1e2]),
    "seed": st.integers(0, 2**31),
}


def drawn(count, shape, width, dtype, size, seed):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(count, *shape, width, generator=g) * size).to(dtype)
    return made.unbind(0)


def assert_cast(rows: fp8.Rows, *values: torch.Tensor) -> None:
    want = fp8.cast_rows_reference([v.reshape(-1, v.shape[-1]) for v in values])
    assert torch.equal(rows.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(rows.scale, want.scale)


@given(**DRAWN, style=st.sampled_from([(0.0, True), (1.0, False), (1.0, True)]))
def test_norm(interpreted, poisoned, shape, width, dtype, size, seed, style):
    (x,) = drawn(1, shape, width, dtype, size, seed)
    weight = (drawn(1, (), width, torch.float32, 0.2, seed + 1)[0] + 1 - style[0]).to(dtype)
    how = {"offset": style[0], "cast_first": style[1]}
    made = norm_rows(x, weight, 1e-6, **how)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-6, **how)
    assert_rows(made.value, rms_norm_reference(x, weight, 1e-6, **how), exact)
    assert_cast(made.rows, made.value)


@given(**DRAWN, activation=st.sampled_from(ACTIVATIONS))
def test_gated(interpreted, poisoned, shape, width, dtype, size, seed, activation):
    gate, up = drawn(2, shape, width, dtype, size, seed)
    made = gated_rows(gate, up, activation)
    assert torch.equal(made.value, gated(gate, up, activation))
    assert_cast(made.rows, made.value)
    with launch.interpreting(False):
        plain = gated_rows(gate, up, activation)
    assert torch.equal(plain.value, gated_reference(gate, up, activation))
    assert_cast(plain.rows, plain.value)


@given(**DRAWN, activation=st.sampled_from(ACTIVATIONS), spend=st.booleans())
def test_pull(interpreted, poisoned, shape, width, dtype, size, seed, activation, spend):
    dh, gate, up = drawn(3, shape, width, dtype, size, seed)
    want = gated_pull(dh.clone(), gate, up, activation)
    given = dh.clone(), gate.clone(), up.clone()
    *found, rows = gated_pull_rows(*given, activation, spend=spend)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert_cast(rows, *found[1:])
    assert found[0] is given[0] and (found[1] is given[1]) == (found[2] is given[2]) == spend
    if not spend:
        assert torch.equal(given[1], gate) and torch.equal(given[2], up)


def test_rows_too_wide_for_a_program(interpreted, poisoned):
    gate, up = drawn(2, (1,), MAX_WIDTH + 1, torch.bfloat16, 1.0, 0)
    made = gated_rows(gate, up, "silu")
    assert_cast(made.rows, made.value)
    made = norm_rows(gate, up[0], 1e-6)
    assert_cast(made.rows, made.value)
    half = MAX_WIDTH // 2 + 1
    parts = gate[:, :half].clone(), gate[:, :half], up[:, :half]
    *found, rows = gated_pull_rows(*parts, "silu")
    assert_cast(rows, *found[1:])


def test_what_is_not_finite_stays_so(interpreted, poisoned):
    gate, up, dh = drawn(3, (3,), 40, torch.float32, 1.0, 0)
    up[1, 7] = float("nan")
    for rows in (
        norm_rows(up, gate[0], 1e-6).rows,
        gated_rows(gate, up, "silu").rows,
        gated_pull_rows(dh, gate, up, "silu")[3],
    ):
        assert rows.codes.float().isfinite().all(1).tolist() == [True, False, True]


def test_programs_in_any_order(interpreted, poisoned):
    gate, up, dh = drawn(3, (5,), 70, torch.bfloat16, 1.0, 1)
    found = []
    for reverse in (False, True):
        with shim.checking(race=True, reverse=reverse):
            *grads, rows = gated_pull_rows(dh.clone(), gate, up, "silu")
            made = (norm_rows(gate, up[0], 1e-6), gated_rows(gate, up, "silu"))
            found.append((*grads, *rows, *(t for m in made for t in (m.value, *m.rows))))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(*found, strict=True))


def test_bad_input():
    x = torch.ones(2, 16)
    with pytest.raises(KernelError, match=r"expected \[e\]"):
        norm_rows(x, x[0, :8], 1e-6)
    with pytest.raises(KernelError, match="'swish'"):
        gated_rows(x, x, "swish")
    with pytest.raises(KernelError, match="expected the same"):
        gated_pull_rows(x, x, x.half(), "silu")
    with pytest.raises(KernelError, match="one shape"):
        gated_pull_rows(x[:1], x, x, "silu")
