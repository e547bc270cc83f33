"""A low-rank adapter of the head, in every function that makes logits, against the merged head."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from purelm.nn import cache, decode, decoder, lora, loss, params, prompt_pass, tree
from purelm.nn.passes import Passes
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "capped": {"logit_softcap": 3.0, "logit_scale": 0.7},
    "bias": {"head_bias": True},
}


def built(**changes: Any) -> tuple[ModelSpec, Any]:
    norm = NormSpec(1e-5)
    layer = LayerSpec(norm, AttentionSpec(4, 2, 8, 0.35, RopeSpec(8, 1e4)), MLPSpec(40))
    spec = replace(ModelSpec(50, 32, (layer,), norm, 64, init_std=0.3), **changes)
    generator = torch.Generator().manual_seed(0)
    return spec, params.init(spec, generator=generator, dtype=torch.float64)


def worn(spec: ModelSpec, *, dora: bool = False, dropout: float = 0.0) -> dict[str, Any]:
    """Adapters of q and the head in float64 that change much."""
    g = torch.Generator().manual_seed(3)
    how: dict[str, Any] = {"targets": ("q", "head"), "dropout": dropout, "start": "random"}
    made = lora.init(spec, generator=g, rank=3, alpha=9, dtype=torch.float64, **how)
    head = made["head"]
    assert head.a.shape == (3, spec.dim) and head.b.shape == (spec.vocab, 3)
    rows = torch.rand(spec.vocab, generator=g, dtype=torch.float64) + 0.5 if dora else None
    leaf = replace(head, b=head.b + 0.1, magnitude=rows)
    return {**made, "head": tree.map_tensors(lambda t: t.detach().requires_grad_(), leaf)}


def ids() -> torch.Tensor:
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_the_merged_heads(kind: str, dora: bool) -> None:
    spec, p = built(**KINDS[kind])
    adapters, tokens = worn(spec, dora=dora), ids()
    merged = lora.merge(p, {"head": adapters["head"]})
    own = {**adapters}
    del own["head"]
    # `merge` sums in fp32.
    how: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    got = decoder.forward(p, spec, tokens, adapters=adapters)
    want = decoder.forward(merged, spec, tokens, adapters=own)
    torch.testing.assert_close(got, want, **how)
    assert (got - decoder.forward(p, spec, tokens, adapters=own)).abs().max() > 0.1
    torch.testing.assert_close(
        loss.loss(p, spec, tokens, tokens, adapters=adapters),
        loss.loss(merged, spec, tokens, tokens, adapters=own),
        **how,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_logits(kind: str, dora: bool, dropout: float) -> None:
    """With the same features dropped; and so are the gradients to all that is trained."""
    spec, p = built(**KINDS[kind])
    adapters, tokens = worn(spec, dora=dora, dropout=dropout), ids()
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *tree.tensors(adapters["head"])]
    got = loss.next_token(p, spec, x, tokens, adapters=adapters, seed=11)
    z = decoder.logits(p, spec, x, adapters=adapters, seed=11)[:, :-1]
    want = torch.nn.functional.cross_entropy(z.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(got, want)
    pairs = [torch.autograd.grad(one, leaves) for one in (got, want)]
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs)
    other = loss.next_token(p, spec, x, tokens, adapters=adapters, seed=12)
    assert (other == got) == (dropout == 0)
    if not dropout:
        found = loss.token_logprobs(p, spec, x, tokens, adapters=adapters)
        torch.testing.assert_close(-found.sum() / 24, got)
        (grad,) = torch.autograd.grad(-found.sum() / 24, adapters["head"].b)
        torch.testing.assert_close(grad, pairs[0][2])


@torch.no_grad()
def test_every_pass_over_a_cache() -> None:
    spec, p = built()
    adapters, tokens = worn(spec), ids()
    want = decoder.forward(p, spec, tokens, adapters=adapters)
    device = torch.device("cpu")

    def empty() -> cache.Cache:
        how: Any = {"padded": False, "dtype": torch.float64, "columns": None, "device": device}
        return cache.empty(spec, 3, 16, **how)

    first, kept = decode.prefill(p, spec, tokens[:, :8], empty(), adapters=adapters)
    torch.testing.assert_close(first, want[:, 7])
    then, _ = decode.decode(p, spec, tokens[:, 8], kept, adapters=adapters)
    torch.testing.assert_close(then, want[:, 8])
    passes = Passes(empty(), widest=4)
    passes.begin(p, spec, None, limit=16, adapters=adapters)
    torch.testing.assert_close(passes.run(tokens, 5), want[:, :5])
    torch.testing.assert_close(passes.run(tokens, 9, last=True), want[:, 8:])
    prompt = prompt_pass.PromptPass(p, spec, 3, 12, device=device)
    prompt.read(tokens, None)
    torch.testing.assert_close(prompt.run(p, spec, adapters, graphs=False), want[:, 8])
