"""The chunked cross entropy head: loss and gradients against all logits at once."""

import pytest
import shim
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows

from purelm.errors import KernelError
from purelm.kernels import cross_entropy, launch
from purelm.kernels.cross_entropy import (
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def drawn(n, vocabulary, dim, seed, dtype, ignored=0.3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=g).to(dtype)
    weight = torch.randn(vocabulary, dim, generator=g).to(dtype)
    labels = torch.randint(vocabulary, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, labels


def weights_for(labels, seed):
    """Weights of every size and both signs, zero among them."""
    g = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(labels.shape, generator=g) * 2
    return torch.where(torch.rand(labels.shape, generator=g) < 0.2, 0.0, weights)


def low_rank(n, vocabulary, rank, seed, dtype):
    """low and b by their names; nothing of rank 0."""
    g = torch.Generator().manual_seed(seed + 2)
    low, b = torch.randn(n, rank, generator=g).to(dtype), torch.randn(vocabulary, rank, generator=g)
    return {"low": low, "b": b.to(dtype)} if rank else {}


def run(f, hidden, weight, labels, factor=1.0, low_rank=None, **options):
    """The loss and the gradients to hidden, weight and those of `low_rank`."""
    leaves = {"hidden": hidden, "weight": weight, **(low_rank or {})}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    loss = f(labels=labels, **leaves, **options)
    grads = torch.autograd.grad(loss * factor, tuple(leaves.values()))
    return loss.detach(), *grads


@pytest.mark.parametrize("on", [True, False], ids=["launch", "torch"])
@given(
    n=st.integers(2, 20),
    vocabulary=st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 4097])),
    dim=st.integers(32, 96),
    chunk=st.sampled_from([None, 1, 4, 7]),
    softcap=st.sampled_from([None, 5.0, 0.5]),
    scale=st.sampled_from([1.0, 0.25]),
    smoothing=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.0, 1e-4, 0.3]),
    weighted=st.booleans(),
    rank=st.sampled_from([0, 0, 1, 5]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients(
    interpreted,
    poisoned,
    on,
    n,
    vocabulary,
    dim,
    chunk,
    softcap,
    scale,
    smoothing,
    z_loss,
    weighted,
    rank,
    dtype,
    seed,
):
    hidden, weight, labels = drawn(n, vocabulary, dim, seed, dtype)
    options = {"softcap": softcap, "scale": scale, "label_smoothing": smoothing, "z_loss": z_loss}
    weights = weights_for(labels, seed) if weighted else None
    more = low_rank(n, vocabulary, rank, seed, dtype)
    with launch.interpreting(on):
        ours = run(
            linear_cross_entropy,
            *(hidden, weight, labels),
            chunk=chunk,
            token_weights=weights,
            low_rank=more,
            **options,
        )

    def in_pieces(hidden, weight, labels, low=None, b=None, **options):
        # A product of one row is another routine of the BLAS, with other errors than that of
        # many.
        size = chunk or n
        ws = [None] * len(labels.split(size)) if weights is None else weights.split(size)
        lows = [None] * len(ws) if low is None else low.split(size)
        parts = zip(hidden.split(size), labels.split(size), ws, lows, strict=True)
        return sum(
            linear_cross_entropy_reference(h, weight, y, token_weights=w, low=one, b=b, **options)
            for h, y, w, one in parts
        )

    eager = run(in_pieces, hidden, weight, labels, low_rank=more, **options)
    exact = run(
        linear_cross_entropy_reference,
        *(hidden.double(), weight.double(), labels),
        token_weights=None if weights is None else weights.double(),
        low_rank={name: t.double() for name, t in more.items()},
        **options,
    )
    assert len(ours) == 3 + len(more) and ours[0].dtype == torch.float32
    # Eager logits in 16 bits carry the rounding of one product each, which a sum over few rows
    # may hide.
    sizes = [x.double().norm(dim=1).max() for x in (hidden, weight, *more.values())]
    slack = torch.finfo(dtype).eps * n * (sizes[0] * sizes[1] + sum(sizes[2:]) ** 2 / 2)
    assert (ours[0].double() - exact[0]).abs() <= 2 * (eager[0] - exact[0]).abs() + slack
    # The logits are [hidden, low] times [weight, b] transposed: one gradient for each side. That of
    # low alone is of so few values that eager's largest error says little.
    for side in (slice(1, None, 2), slice(2, None, 2)):
        assert_rows(*(torch.cat(made[side], 1).reshape(1, -1) for made in (ours, eager, exact)))


@pytest.mark.parametrize("size", [0.1, 0.5, 3.0])
def test_row_step_of_capped_logits(interpreted, poisoned, size):
    """Each row's loss and gradient alone, from where tanh is its series to where it is flat."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.rand(8, 50, generator=g) * 2 - 1) * size
    labels = torch.randint(50, (8,), generator=g)

    def step(f, logits):
        return f(logits, labels, None, -100, 5.0, 1.0, 0.0, 0.0, True), logits

    ours = step(cross_entropy.row_step, logits.clone())
    eager = step(cross_entropy.row_step_reference, logits.clone())
    exact = step(cross_entropy.row_step_reference, logits.double())
    for three in zip(ours, eager, exact, strict=True):
        assert_rows(*three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_all_logits_at_once(dtype):
    hidden, weight, labels = drawn(40, 300, 16, 0, dtype)
    ours = run(linear_cross_entropy, hidden, weight, labels, factor=0.5, chunk=7)
    want = run(linear_cross_entropy_reference, hidden, weight, labels, factor=0.5)
    for mine, theirs in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_factor_is_not_rounded_to_the_dtype_of_the_gradients():
    hidden, weight, labels = drawn(60, 200, 64, 0, torch.bfloat16)
    _, *whole = run(linear_cross_entropy, hidden, weight, labels)
    _, *third = run(linear_cross_entropy, hidden, weight, labels, factor=1 / 3)
    for a, b in zip(whole, third, strict=True):
        a, b = a.double(), b.double()
        assert abs(float((a * b).sum() / (a * a).sum()) * 3 - 1) < 2e-4


def test_only_wanted_gradients_are_made(interpreted, poisoned, monkeypatch):
    hidden, weight, labels = drawn(9, 50, 8, 1, torch.float32)
    made = []
    step = cross_entropy.row_step
    monkeypatch.setattr(
        cross_entropy, "row_step", lambda *args: made.append(args[-1]) or step(*args)
    )
    linear_cross_entropy(hidden, weight, labels)
    assert made == [False]
    linear_cross_entropy(hidden.requires_grad_(), weight, labels).backward()
    assert made == [False, True] and weight.grad is None
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert made == [False, True, False]


def test_all_rows_ignored(interpreted, poisoned):
    hidden, weight, labels = drawn(5, 20, 8, 1, torch.float32, ignored=2.0)
    loss, dhidden, dweight = run(linear_cross_entropy, hidden, weight, labels)
    assert loss == 0 and not dhidden.any() and not dweight.any()


def test_huge_logits(interpreted, poisoned):
    hidden, weight, labels = drawn(6, 300, 8, 1, torch.float32)
    ours = run(linear_cross_entropy, hidden * 1e4, weight, labels)
    want = run(linear_cross_entropy_reference, hidden * 1e4, weight, labels)
    for mine, theirs in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_label_outside_the_vocabulary(interpreted):
    hidden, weight, labels = drawn(6, 30, 8, 1, torch.float32)
    labels[2] = 30
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    with launch.interpreting(False), pytest.raises(KernelError, match="label 30 in row 2"):
        linear_cross_entropy(hidden, weight, labels)


def test_order_of_programs_does_not_matter(interpreted):
    hidden, weight, labels = drawn(9, 50, 8, 1, torch.float32)
    ours = run(linear_cross_entropy, hidden, weight, labels)
    with shim.checking(race=True, reverse=True):
        again = run(linear_cross_entropy, hidden, weight, labels)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)


def test_transforms(interpreted):
    hidden, weight, labels = drawn(5, 30, 8, 3, torch.float32)
    many = torch.stack([hidden, hidden + 1, hidden * 2])

    def loss(f):
        return lambda hidden, weight: f(hidden, weight, labels, softcap=3.0)

    for make in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(hidden, weight),
        lambda f: torch.func.vmap(f, (0, None))(many, weight),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None))(many, weight),
        lambda f: torch.func.grad(lambda many: torch.func.vmap(f, (0, None))(many, weight).sum())(
            many
        ),
    ):
        ours, want = make(loss(linear_cross_entropy)), make(loss(linear_cross_entropy_reference))
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("on", [True, False], ids=["launch", "torch"])
def test_transforms_of_every_option(interpreted, on):
    """Gradients to hidden, weight and token weights, whole and per sample."""
    hidden, weight, labels = drawn(5, 30, 8, 3, torch.float32)
    weights = weights_for(labels, 0)
    many = torch.stack([hidden, hidden + 1, hidden * 2])
    each = torch.stack([weights, weights + 1, -weights])

    def loss(f):
        options = {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.1}
        return lambda hidden, weight, w: f(hidden, weight, labels, token_weights=w, **options)

    def made(f):
        grad = torch.func.grad(f, argnums=(0, 1, 2))
        batched = torch.func.vmap(grad, (0, None, 0))(many, weight, each)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, weights)]
        reverse = torch.autograd.grad(f(*leaves) * 0.5, leaves)
        alone = weights.clone().requires_grad_()
        (only,) = torch.autograd.grad(f(hidden, weight, alone), alone)
        return grad(hidden, weight, weights), batched, reverse, only

    with launch.interpreting(on):
        ours = made(loss(linear_cross_entropy))
    torch.testing.assert_close(ours, made(loss(linear_cross_entropy_reference)))


@pytest.mark.parametrize("on", [True, False], ids=["launch", "torch"])
def test_a_low_rank_change_is_a_change_of_the_head(interpreted, on):
    """Gradients to hidden states and factors are those of the head b a + weight made whole, under
    every transform.
    """
    hidden, weight, labels = drawn(9, 30, 8, 3, torch.float64)
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=g).double() for shape in ((3, 8), (30, 3)))
    options = {"softcap": 3.0, "scale": 0.7, "label_smoothing": 0.2, "z_loss": 0.1}
    options |= {"token_weights": weights_for(labels, 0).double()}
    many = torch.stack([hidden, hidden + 1, hidden * 2])

    def ours(hidden, a, b):
        return linear_cross_entropy(
            hidden, weight, labels, low=hidden @ a.T, b=b, chunk=4, **options
        )

    def whole(hidden, a, b):
        return linear_cross_entropy_reference(hidden, weight + b @ a, labels, **options)

    def made(f):
        grad = torch.func.grad(f, argnums=(0, 1, 2))
        leaves = [t.clone().requires_grad_() for t in (hidden, a, b)]
        reverse = torch.autograd.grad(f(*leaves) * 0.5, leaves)
        batched = torch.func.vmap(grad, (0, None, None))(many, a, b)
        return f(hidden, a, b), grad(hidden, a, b), reverse, batched

    with launch.interpreting(on):
        found = made(ours)
    torch.testing.assert_close(found, made(whole))


def test_of_a_low_rank_change_nothing_has_the_size_of_the_head():
    """The largest tensors are a chunk of logits and the factor b."""
    hidden, weight, labels = drawn(12, 500, 64, 1, torch.float32)
    leaves = {k: t.requires_grad_() for k, t in low_rank(12, 500, 4, 1, torch.float32).items()}
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            made = f(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in torch.utils._pytree.tree_leaves(made)
                if t is not None
                and isinstance(t, torch.Tensor)
                and t.data_ptr() != weight.data_ptr()
            )
            return made

    with Watch():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk=4, **leaves)
        loss.backward()
    assert max(sizes) == 500 * 4 and leaves["b"].grad.any() and leaves["low"].grad.any()


def test_options_by_their_definition():
    """In float64, written out."""
    hidden, weight, labels = drawn(9, 40, 8, 5, torch.float64)
    w = weights_for(labels, 5).double()
    z = hidden @ weight.T
    lse = z.logsumexp(-1)
    own = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    rows = lse - 0.7 * own - 0.3 * z.mean(-1) + 0.01 * lse**2
    want = (torch.where(labels == -100, 0.0, rows) * w).sum()
    options = {"label_smoothing": 0.3, "z_loss": 0.01, "token_weights": w}
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **options), want)


def test_options_that_are_off_change_no_bit(interpreted):
    hidden, weight, labels = drawn(9, 4100, 16, 1, torch.bfloat16)
    plain = run(linear_cross_entropy, hidden, weight, labels)
    ones = torch.ones(9)
    off = {"label_smoothing": 0.0, "z_loss": 0.0, "token_weights": ones}
    for a, b in zip(plain, run(linear_cross_entropy, hidden, weight, labels, **off), strict=True):
        assert torch.equal(a, b)


def test_second_derivative_raises():
    hidden, weight, labels = drawn(5, 30, 8, 3, torch.float32)
    first = torch.func.grad(lambda h: linear_cross_entropy(h, weight, labels))
    with pytest.raises(KernelError, match="first derivatives only"):
        torch.func.grad(lambda h: first(h).sum())(hidden)


def test_chunk_rows():
    assert chunk_rows(128256, 2048, 2) == 1024
    assert chunk_rows(128256, 4096, 2) == chunk_rows(128256, 8192, 2) == 512
    assert chunk_rows(256000, 3584, 2) == 512
    assert chunk_rows(32000, 512, 2) == 4096
    assert chunk_rows(2**31, 8, 4) == 16


def test_bad_input():
    hidden, weight, labels = drawn(5, 30, 8, 3, torch.float32)
    for args, message in [
        ((hidden[0], weight, labels), "expected"),
        ((hidden, weight[:, :4], labels), "expected"),
        ((hidden, weight, labels[:3]), "labels"),
        ((hidden, weight, labels.int()), "labels"),
        ((hidden, weight.half(), labels), "one dtype"),
    ]:
        with pytest.raises(KernelError, match=message):
            linear_cross_entropy(*args)
    for options, message in [
        ({"chunk": 0}, "chunk"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"z_loss": -1e-4}, "z_loss"),
        ({"z_loss": float("inf")}, "z_loss"),
        ({"token_weights": torch.ones(3)}, r"expected torch.float32 \[5\]"),
        ({"token_weights": torch.ones(5).half()}, "token_weights torch.float16"),
        ({"low": torch.ones(5, 2)}, "low and b"),
        ({"low": torch.ones(5, 2), "b": torch.ones(30, 3)}, r"expected both, .*\[30, r\]"),
        ({"low": torch.ones(5, 2), "b": torch.ones(30, 2).half()}, "expected both, torch.float32"),
    ]:
        with pytest.raises(KernelError, match=message):
            linear_cross_entropy(hidden, weight, labels, **options)
