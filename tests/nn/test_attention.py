"""Sinks against transformers, ALiBi's slopes, steps and rows padded in front with any term."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssRotaryEmbedding,
)

from purelm.kernels.attention import attention
from purelm.nn import alibi, decoder, layout, mixer, rope
from purelm.nn.attention import needs_mask, visible
from purelm.nn.cache import empty
from purelm.nn.decode import decode, prefill
from purelm.nn.params import init
from purelm.nn.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec


def theirs(window):
    config = GptOssConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        sliding_window=window or 128,
        layer_types=["sliding_attention" if window else "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    config._attn_implementation = "eager"
    module = GptOssAttention(config, 0)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.normal_(generator=torch.Generator().manual_seed(i)).mul_(0.4)
    return config, module


def assert_same(got, want):
    """Within the measure of logits: of the largest value."""
    assert bool((got - want).abs().max() <= 5e-6 * want.abs().max())


@pytest.mark.parametrize("window", [None, 5])
def test_sinks_are_gpt_oss(window):
    config, module = theirs(window)
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(9))
    positions = torch.arange(11)[None]
    i, j = positions[0][:, None], positions[0][None]
    seen = (j <= i) & (i - j < (window or 11))
    mask = torch.zeros(11, 11).masked_fill(~seen, float("-inf"))[None, None]
    turned = GptOssRotaryEmbedding(config)(x, positions)
    want, _ = module(x, turned, mask)
    spec = AttentionSpec(
        4, 2, 16, 0.25, RopeSpec(16, 1e4), qkv_bias=True, out_bias=True, sinks=True, window=window
    )
    p = {n: dict(getattr(module, f"{n}_proj").named_parameters()) for n in "qkvo"}
    p["sinks"] = module.sinks
    table = rope.table(spec.rope, positions)
    got = mixer.attention(x, p, None, spec, table, None)
    assert_same(got, want)
    (wanted,) = torch.autograd.grad(want.pow(2).sum(), module.sinks)
    (found,) = torch.autograd.grad(got.pow(2).sum(), module.sinks)
    assert_same(found, wanted)
    # Under a mask the scores are written out: the same.
    again = mixer.attention(x, p, None, spec, table, seen[None, None])
    assert_same(again, want)


def test_slopes_are_the_papers():
    """Press et al. give 1/2 to 1/256 for 8 heads; bf16 rounds positions past 256."""
    bias = alibi.bias(8, 300, 1.0)
    assert bias[:, 1].tolist() == [2.0**-i for i in range(1, 9)]
    assert bias[0, 257] == 128.0 and bias[0, 258] == 129.0
    assert torch.equal(alibi.bias(8, 300, 0.25), bias / 4)
    # Between powers of two every other slope of the next one follows.
    assert torch.equal(alibi.bias(12, 2, 1.0)[8:], alibi.bias(16, 2, 1.0)[:8:2])


def model(attention):
    layer = LayerSpec(NormSpec(1e-5), attention, MLPSpec(48))
    spec = ModelSpec(60, 32, (layer,) * 2, NormSpec(1e-5), 64, init_std=0.3)
    return spec, init(spec, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(4, 2, 8, 0.3, RopeSpec(8, 1e4), sinks=True, window=6),
        AttentionSpec(4, 2, 8, 0.3, None, alibi=0.3),
        AttentionSpec(4, 2, 8, 0.3, RopeSpec(8, 1e4), softcap=2.0),
    ],
    ids=["sinks", "alibi", "soft-cap"],
)
def test_steps_and_padding(spec):
    """A step after a cache, and a row padded in front, give what the row gives alone."""
    spec, params = model(spec)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    padded = layout.from_mask(mask)
    whole = decoder.forward(params, spec, ids, layout=padded)
    alone = decoder.forward(params, spec, ids[:1, 4:])
    torch.testing.assert_close(whole[0, 4:], alone[0], rtol=1e-5, atol=1e-5)
    cache = empty(spec, 2, 20, padded=True, dtype=torch.float32, device="cpu")
    got, cache = prefill(params, spec, ids[:, :9], cache, layout=layout.from_mask(mask[:, :9]))
    for i in range(9, 12):
        torch.testing.assert_close(got, whole[:, i - 1], rtol=1e-5, atol=1e-5)
        got, cache = decode(params, spec, ids[:, i], cache)
    torch.testing.assert_close(got, whole[:, 11], rtol=1e-5, atol=1e-5)


def test_padding_in_front_is_documents(monkeypatch):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    padded = layout.from_mask(mask)
    assert padded.documents is not None and padded.documents.longest == 5
    assert padded.documents.cu_seqlens.tolist() == [0, 2, 5, 5, 10, 11, 15]
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 5, n, 8, generator=g) for n in (4, 2, 2))
    got = attention(q, k, v, scale=0.3, documents=padded.documents)
    seen = visible(padded, padded.segments, 0, torch.float32, None)
    assert isinstance(seen, torch.Tensor)  # no fused kernel here
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, want)
    # Gaps and padding behind are no documents.
    assert layout.from_mask(torch.tensor([[1, 0, 1]])).documents is None
    assert layout.from_mask(torch.tensor([[1, 1, 0]])).documents is None
    monkeypatch.setattr("purelm.nn.attention.fused", lambda *_: True)
    assert visible(padded, padded.segments, 0, torch.float32, None) is padded.documents


@pytest.mark.parametrize("chunk", [None, 3, 6])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_a_mask_gets_one(monkeypatch, chunk, window, dtype):
    """What plans of memory ask is what a pass does, where a kernel takes documents in 16 bits."""
    monkeypatch.setattr("purelm.nn.attention.fused", lambda _, dtype: dtype == torch.bfloat16)
    rows = {
        "full": layout.dense(2, 6, device="cpu"),
        "packed": layout.from_cu_seqlens(torch.tensor([0, 2, 6]), 6, 4),
        "front": layout.from_mask(torch.tensor([[0, 0, 1, 1, 1, 1]])),
        "gap": layout.from_mask(torch.tensor([[1, 1, 0, 1, 1, 1]])),
    }
    masked = set()
    for name, own in rows.items():
        seen = visible(own, own.segments, 0, dtype, window, chunk)
        assert isinstance(seen, torch.Tensor) == needs_mask(own, dtype, chunk)
        masked |= {name} if isinstance(seen, torch.Tensor) else set()
    some = {"gap"} if dtype == torch.bfloat16 else {"gap", "front", "packed"}
    assert masked == (set(rows) if chunk == 3 else some)
