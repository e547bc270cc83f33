"""Several adapters at once, and mixed into one, against their changes added up in float64."""

import pytest
import torch

from purelm.errors import ArgumentError
from purelm.nn import lora, several, tree
from purelm.nn.lora import LoRA

SHAPES = {"layers.0.attn.q": (24, 16), "layers.2.mlp.experts.up": (3, 8, 16)}


def drawn(seed: int, rank: int, paths: tuple[str, ...] = tuple(SHAPES), **fields) -> tree.Tree:
    """An adapter of normal a and b at `paths`, its scale not 1."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        path: LoRA(
            torch.randn(*SHAPES[path][:-2], rank, SHAPES[path][-1], generator=generator),
            torch.randn(*SHAPES[path][:-1], rank, generator=generator),
            0.5 + seed,
            **fields,
        )
        for path in paths
    }
    return tree.from_items(leaves)


def exact(trees, weights) -> dict[str, torch.Tensor]:
    """path -> the weighted sum of the changes, float64."""
    made: dict[str, torch.Tensor] = {}
    for one, weight in zip(trees, weights, strict=True):
        for path, leaf in tree.items(one):
            change = weight * leaf.scale * (leaf.b.double() @ leaf.a.double())
            made[path] = made[path] + change if path in made else change
    return made


def close(mixed: tree.Tree, want: dict[str, torch.Tensor]) -> None:
    found = dict(tree.items(mixed))
    assert found.keys() == want.keys()
    for path, leaf in found.items():
        off = (lora.delta(leaf) - want[path]).abs().max() / want[path].abs().max()
        assert off < 2e-6, (path, off)


TREES = (drawn(0, 4), drawn(1, 3, ("layers.0.attn.q",)), drawn(2, 2))


def test_changes_at_once_are_their_sum() -> None:
    both = several.summed(TREES)
    close(both, exact(TREES, (1, 1, 1)))
    assert tree.at(both, "layers.0.attn.q").rank == 9
    assert several.summed(TREES[:1]) is TREES[0]


def test_every_adapter_gets_its_gradient() -> None:
    ours = [tree.map_tensors(lambda t: t.clone().requires_grad_(), one) for one in TREES]
    summed = dict(tree.items(several.summed(ours)))
    leaf = summed["layers.0.attn.q"]
    (leaf.scale * leaf.b @ leaf.a).pow(2).sum().backward()
    theirs = [tree.map_tensors(lambda t: t.double().requires_grad_(), one) for one in TREES]
    exact(theirs, (1, 1, 1))["layers.0.attn.q"].pow(2).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        a, b = tree.at(mine, "layers.0.attn.q"), tree.at(other, "layers.0.attn.q")
        for one, want in ((a.a.grad, b.a.grad), (a.b.grad, b.b.grad)):
            assert (one - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_mixes_that_are_exact(kind: str) -> None:
    weights = (0.7, -1.3, 2.0)
    close(several.mixed(TREES, weights, kind, 9 if kind == "svd" else None), exact(TREES, weights))


def test_svd_is_the_best_of_its_rank() -> None:
    weights = (1.0, 1.0, 0.5)
    made = dict(tree.items(several.mixed(TREES, weights)))
    for path, want in exact(TREES, weights).items():
        left = torch.linalg.svdvals(want)[..., 4:].square().sum().sqrt()
        off = (lora.delta(made[path]) - want).square().sum().sqrt()
        assert made[path].rank == 4
        assert torch.isclose(off, left, rtol=1e-4)


def test_experts_gate_and_up_meet_those_of_each() -> None:
    a, b = torch.randn(2, 3, 16), torch.randn(2, 10, 3)
    both = tree.from_items({"layers.0.mlp.experts.gate_up": LoRA(a, b)})
    gate = tree.from_items({"layers.0.mlp.experts.gate": LoRA(a + 1, b[:, :5] + 1)})
    found = dict(tree.items(several.summed([both, gate])))
    up = found["layers.0.mlp.experts.up"]
    assert torch.equal(lora.delta(up), b[:, 5:] @ a)
    made = lora.delta(found["layers.0.mlp.experts.gate"])
    assert torch.allclose(made, b[:, :5] @ a + (b[:, :5] + 1) @ (a + 1), atol=1e-5)


@pytest.mark.parametrize(
    ("trees", "weights", "kind", "rank", "message"),
    [
        (TREES, (1, 1), "cat", None, "3 adapters and 2 weights"),
        ((), (), "cat", None, "0 adapters"),
        (TREES, (1, 1, float("nan")), "cat", None, "finite"),
        (TREES, (1, 1, "1"), "cat", None, "expected a number"),
        (TREES, (1, 1, 1), "ties", None, "linear, cat, svd"),
        (TREES, (1, 1, 1), "linear", None, "ranks 4, 3, 2"),
        (TREES, (1, 1, 1), "svd", 0, "at least 1"),
        ((drawn(0, 2, magnitude=torch.ones(24)), TREES[0]), (1, 1), "cat", None, "DoRA"),
    ],
)
def test_mixes_that_cannot_be(trees, weights, kind, rank, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        several.mixed(trees, weights, kind, rank)


def test_sums_that_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="different dropout, 0.0, 0.1"):
        several.summed([TREES[0], drawn(1, 2, dropout=0.1)])
    with pytest.raises(ArgumentError, match="DoRA"):
        several.summed([TREES[0], drawn(1, 2, magnitude=torch.ones(24))])
