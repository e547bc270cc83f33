"""Adapters as trees: what they start from, merging, and projections with their gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_rows
from torch.utils import _pytree

from purelm.errors import ArgumentError
from purelm.nn import decoder, lora, lora_init, loss, params, tree
from purelm.nn.linear import project, project_reference
from purelm.nn.lora import LoRA
from purelm.nn.residuals import KEEP, RECOMPUTE, Policy
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec
from purelm.quant import nf4


def spec(*, bias: bool = False, tied: bool = False, layers: int = 2) -> ModelSpec:
    attention = AttentionSpec(4, 2, 8, 8**-0.5, RopeSpec(8, 1e4), qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(NormSpec(1e-6), attention, MLPSpec(48, bias=bias))
    return ModelSpec(64, 32, (layer,) * layers, NormSpec(1e-6), 128, tied, init_std=0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=seeded(1))


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.1, 40),
    targets=st.sets(st.sampled_from(("q", "k", "v", "o", "gate", "up", "down")), min_size=1),
    bias=st.booleans(),
    tied=st.booleans(),
    quantized=st.booleans(),
)
def test_merging_is_adapting(
    rank: int, alpha: float, targets: set[str], bias: bool, tied: bool, quantized: bool
) -> None:
    model = spec(bias=bias, tied=tied)
    base = params.init(model, generator=seeded())
    if quantized:
        base = tree.map_with_path(
            lambda path, leaf: nf4.quantize(leaf) if ".attn.q.w" in path else leaf, base
        )
    adapters = lora.init(
        model, generator=seeded(2), rank=rank, alpha=alpha, targets=tuple(targets), start="random"
    )
    adapted = decoder.forward(base, model, tokens(), adapters=adapters)
    merged = decoder.forward(lora.merge(base, adapters), model, tokens())
    plain = decoder.forward(base, model, tokens())
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert not torch.allclose(plain, merged)
    none = lora.merge(base, lora.rescale(adapters, 0.0))
    assert torch.equal(decoder.forward(none, model, tokens()), plain)


def test_adapters_start_at_the_base_and_where_asked() -> None:
    model = spec()
    base = params.init(model, generator=seeded())
    adapters = lora.init(model, generator=seeded(), rank=4, targets=("q", "down"))
    assert {path.split(".", 2)[2] for path, _ in tree.items(adapters)} == {"attn.q", "mlp.down"}
    assert len(tree.leaves(adapters)) == 4
    want = decoder.forward(base, model, tokens())
    assert torch.equal(decoder.forward(base, model, tokens(), adapters=adapters), want)


def problem(
    dtype: torch.dtype, dropout: float, *, bias: bool = True, x_shape: tuple[int, ...] = (3, 5, 12)
) -> tuple[torch.Tensor, list[Any], list[Any]]:
    """x, three projections of it (one of them frozen in 4 bits) and their adapters (one absent)."""
    x = drawn(x_shape, 0, dtype)
    projections: list[Any] = [
        {"weight": drawn((7, 12), 1, dtype)},
        {"weight": drawn((4, 12), 2, dtype)},
    ]
    if bias:
        projections[0]["bias"] = drawn((7,), 3, dtype)
    projections.append({"weight": drawn((9, 12), 4, dtype)})
    adapters = [
        LoRA(drawn((3, 12), 5, dtype), drawn((7, 3), 6, dtype), 0.7, dropout),
        None,
        LoRA(drawn((2, 12), 7, dtype), drawn((9, 2), 8, dtype), 1.9, dropout),
    ]
    return x, projections, adapters


def run(f: Any, x: torch.Tensor, projections: Any, adapters: Any, seed: int | None) -> Any:
    """Outputs of `f` and the gradients of a fixed function of them."""
    flat, structure = _pytree.tree_flatten((x, projections, adapters))
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in flat
    ]
    x, projections, adapters = _pytree.tree_unflatten(leaves, structure)
    outputs = f(x, projections, adapters, seed)
    total = sum((y * drawn(tuple(y.shape), 20 + i, y.dtype)).sum() for i, y in enumerate(outputs))
    wanted = [t for t in leaves if isinstance(t, torch.Tensor)]
    grads = torch.autograd.grad(total, wanted)
    return [y.detach() for y in outputs], list(grads)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_project_is_its_reference(seed: int | None, dropout: float, bias: bool) -> None:
    """In float64, dropout included: outputs and the gradient of every tensor."""
    case = problem(torch.float64, dropout, bias=bias)
    for ours, want in zip(
        run(project, *case, seed), run(project_reference, *case, seed), strict=True
    ):
        for x, y in zip(ours, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_project_against_numerical_derivatives() -> None:
    x, projections, adapters = problem(torch.float64, 0.4, x_shape=(2, 12))
    flat, structure = _pytree.tree_flatten((x, projections, adapters))
    inputs = [t.requires_grad_() for t in flat if t is not None]

    def f(*leaves: torch.Tensor) -> Any:
        rest = iter(leaves)
        whole = [None if t is None else next(rest) for t in flat]
        return project(*_pytree.tree_unflatten(whole, structure), 5)

    assert torch.autograd.gradcheck(f, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_project_rounds_no_worse_than_eager(dtype: torch.dtype) -> None:
    case = problem(dtype, 0.0)
    exact_case = tree.map_tensors(lambda t: t.double(), case)
    ours, eager = run(project, *case, None), run(project_reference, *case, None)
    exact = run(project_reference, *exact_case, None)
    for mine, plain, truth in zip(sum(ours, []), sum(eager, []), sum(exact, []), strict=True):
        assert_rows(mine, plain, truth)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_adapters_keep_their_dtype(adapter_dtype: torch.dtype) -> None:
    x, projections, _ = problem(torch.bfloat16, 0.0)
    leaf = LoRA(drawn((3, 12), 5, adapter_dtype), drawn((7, 3), 6, adapter_dtype), 0.5)
    grad = torch.func.grad(lambda leaf: project(x, projections[:1], [leaf])[0].float().sum())(leaf)
    assert grad.a.dtype == grad.b.dtype == adapter_dtype
    assert project(x, projections[:1], [leaf])[0].dtype == torch.bfloat16


def test_four_bit_weights_are_frozen_but_let_gradients_through() -> None:
    weight = nf4.quantize(drawn((64, 64), 0, torch.float32))
    dense = {"weight": nf4.dequantize(weight)}
    leaf = LoRA(drawn((2, 64), 1, torch.float32), drawn((64, 2), 2, torch.float32), 0.5)
    x = drawn((5, 64), 3, torch.float32)

    def f(p: Any) -> Any:
        return lambda x, leaf: project(x, [p], [leaf])[0].pow(2).sum()

    ours = torch.func.grad(f({"weight": weight}), argnums=(0, 1))(x, leaf)
    want = torch.func.grad(f(dense), argnums=(0, 1))(x, leaf)
    for mine, theirs in zip(tree.tensors(ours), tree.tensors(want), strict=True):
        torch.testing.assert_close(mine, theirs)


def loss_of(model: ModelSpec, base: Any, ids: torch.Tensor, seed: int | None = None) -> Any:
    return lambda adapters: loss.loss(base, model, ids, ids, adapters=adapters, seed=seed)


def random_adapters(model: ModelSpec, seed: int = 4, dropout: float = 0.0) -> tree.Tree:
    return lora.init(model, generator=seeded(seed), rank=3, start="random", dropout=dropout)


def test_grad_and_value_over_adapters_is_autograd() -> None:
    model = spec(bias=True)
    base = params.init(model, generator=seeded())
    adapters = random_adapters(model)
    f = loss_of(model, base, tokens())
    grads, value = torch.func.grad_and_value(f)(adapters)
    assert [p for p, _ in tree.items(grads)] == [p for p, _ in tree.items(adapters)]
    live = tree.map_tensors(lambda t: t.clone().requires_grad_(), adapters)
    total = f(live)
    total.backward()
    assert torch.equal(total.detach(), value)
    for (path, g), (_, x) in zip(tree.items(grads), tree.items(live), strict=True):
        assert (g.scale, g.dropout) == (x.scale, x.dropout)
        for mine, want in ((g.a, x.a.grad), (g.b, x.b.grad)):
            assert want.norm() > 0, path
            assert (mine - want).norm() <= 1e-6 * want.norm(), path


def stacked(trees: list[tree.Tree]) -> tree.Tree:
    return tree.map(
        lambda *leaves: replace(
            leaves[0],
            a=torch.stack([leaf.a for leaf in leaves]),
            b=torch.stack([leaf.b for leaf in leaves]),
        ),
        *trees,
    )


def test_vmap_over_adapters() -> None:
    """One pass with several adapters is several passes with one."""
    model, ids = spec(), tokens()
    base = params.init(model, generator=seeded())
    several = [random_adapters(model, seed) for seed in (4, 5, 6)]

    def forward(adapters: Any) -> torch.Tensor:
        return decoder.forward(base, model, ids, adapters=adapters)

    together = torch.vmap(forward)(stacked(several))
    for ours, adapters in zip(together, several, strict=True):
        torch.testing.assert_close(ours, forward(adapters), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
def test_per_sample_gradients(seed: int | None) -> None:
    """vmap(grad) over rows is grad of each row."""
    model = spec()
    base = params.init(model, generator=seeded())
    adapters = random_adapters(model, dropout=0.2)

    def one(adapters: Any, row: torch.Tensor) -> torch.Tensor:
        return loss_of(model, base, row[None], seed)(adapters)

    rows = tokens(3)
    # The mask follows from the seed, so all rows drop the same features.
    batched = torch.vmap(torch.func.grad(one), in_dims=(None, 0), randomness="same")
    together = batched(adapters, rows)
    for i, row in enumerate(rows):
        alone = torch.func.grad(one)(adapters, row)
        for ours, want in zip(tree.tensors(together), tree.tensors(alone), strict=True):
            assert (ours[i] - want).norm() <= 1e-5 * want.norm()


def test_gradients_through_vmap() -> None:
    model, ids = spec(), tokens()
    base = params.init(model, generator=seeded())
    several = stacked([random_adapters(model, seed) for seed in (4, 5)])

    def total(adapters: Any) -> torch.Tensor:
        return torch.vmap(loss_of(model, base, ids))(adapters).sum()

    grads = torch.func.grad(total)(several)
    for i, seed in enumerate((4, 5)):
        alone = torch.func.grad(loss_of(model, base, tokens()))(random_adapters(model, seed))
        for ours, want in zip(tree.tensors(grads), tree.tensors(alone), strict=True):
            assert (ours[i] - want).norm() <= 1e-5 * want.norm()


def test_dropout_repeats_with_its_seed_and_is_unbiased() -> None:
    leaf = LoRA(drawn((3, 40), 1, torch.float32), drawn((8, 3), 2, torch.float32), 0.5, 0.3)
    x, p = drawn((6, 40), 3, torch.float32), [{"weight": torch.zeros(8, 40)}]
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    runs = torch.stack([project(x, p, [leaf], seed)[0] for seed in range(2000)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(project(x, p, [leaf], 7)[0], runs[7]) and not torch.equal(runs[7], runs[8])
    want = project(x, p, [leaf])[0]
    spread = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - want).abs() <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
def test_dropout_survives_recomputation(policy: Policy) -> None:
    """A layer that is run again in backward drops what it dropped in forward."""
    model = spec()
    base = params.init(model, generator=seeded())
    adapters = random_adapters(model, dropout=0.3)

    def grads(residuals: Policy | None) -> list[torch.Tensor]:
        live = tree.map_tensors(lambda t: t.clone().requires_grad_(), adapters)
        out = decoder.forward(base, model, tokens(), adapters=live, seed=11, residuals=residuals)
        out.square().sum().backward()
        return [t.grad for t in tree.tensors(live)]

    for want, ours in zip(grads(None), grads(policy), strict=True):
        assert (ours - want).norm() <= 1e-5 * want.norm()


def test_relative_is_the_change_since_the_start() -> None:
    model = spec()
    now, start = random_adapters(model, 4), random_adapters(model, 5)
    changed = lora.relative(now, start)
    for x, a, b in zip(*(tree.leaves(t) for t in (changed, now, start)), strict=True):
        assert x.rank == 6
        torch.testing.assert_close(lora.delta(x), lora.delta(a) - lora.delta(b))
    base = params.init(model, generator=seeded())
    f = loss_of(model, base, tokens())
    same = torch.func.grad(f)(lora.relative(now, {}))
    assert all(map(torch.equal, tree.tensors(same), tree.tensors(torch.func.grad(f)(now))))
    # The same gradient as with the start taken out of the base, which is how PiSSA says it.
    ours = torch.func.grad(lambda now: f(lora.relative(now, start)))(now)
    residual = lora.merge(base, lora.rescale(start, -1.0))
    want = torch.func.grad(loss_of(model, residual, tokens()))(now)
    for mine, theirs in zip(tree.tensors(ours), tree.tensors(want), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_leaf_is_a_pytree_node() -> None:
    leaf = LoRA(torch.ones(2, 3), torch.ones(4, 2), 0.5, 0.1)
    doubled = _pytree.tree_map(lambda t: t * 2, {"x": leaf})["x"]
    assert (doubled.scale, doubled.dropout, doubled.rank) == (0.5, 0.1, 2)
    assert torch.equal(doubled.a, leaf.a * 2) and torch.equal(doubled.b, leaf.b * 2)


def test_draws() -> None:
    """Each start's own distribution, from its own generator."""
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    a, b = lora_init.draw((30, 400), 64, generator=seeded())
    assert (
        not b.any() and a.abs().max() <= 0.05 and a.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    )
    a, b = lora_init.draw((30, 400), 64, generator=seeded(), start="gaussian")
    assert not b.any() and a.std() == pytest.approx(1 / 64, rel=0.02)
    a, b = lora_init.draw((300, 400), 64, generator=seeded(), start="random")
    assert b.abs().max() <= 1 / 8 and b.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    a, b = lora_init.draw((30, 40), 8, generator=seeded(), start="orthogonal")
    assert a.norm() > 0.1 and b.norm() > 0.1
    assert (b @ a).norm() <= 1e-6 * a.norm() * b.norm()
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ArgumentError, match="even rank, found 3"):
        lora_init.draw((30, 40), 3, generator=seeded(), start="orthogonal")


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_pissa_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    weight = drawn(shape, 0, torch.float32)
    values = torch.linalg.svdvals(weight)
    a, b = lora_init.pissa(weight, 5, 2.5)
    assert a.shape == (5, shape[1]) and b.shape == (shape[0], 5)
    left = float((weight - 2.5 * b @ a).norm())
    assert left == pytest.approx(float(values[5:].norm()), rel=1e-5)
    # Both factors take half of the singular values.
    torch.testing.assert_close(a.norm(dim=1), (values[:5] / 2.5).sqrt())
    torch.testing.assert_close(b.norm(dim=0), (values[:5] / 2.5).sqrt())
    # A randomized decomposition gets there with the rounds, the faster the steeper the spectrum.
    weight = weight * 0.8 ** torch.arange(shape[1])
    values = torch.linalg.svdvals(weight)
    left = float(values[5:].norm())
    errors = [
        float((weight - 2.5 * b @ a).norm() - left)
        for a, b in (
            lora_init.pissa(weight, 5, 2.5, rounds=n, generator=seeded()) for n in (0, 4, 40)
        )
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] <= 1e-3 * left


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_olora_is_the_front_of_a_qr_decomposition(shape: tuple[int, int]) -> None:
    weight = drawn(shape, 0, torch.float32)
    a, b = lora_init.olora(weight, 5)
    torch.testing.assert_close(b.T @ b, torch.eye(5))
    # q r restricted to its front reproduces the first columns of the weight exactly.
    torch.testing.assert_close((b @ a)[:, :5], weight[:, :5])
