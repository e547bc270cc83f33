"""A tiny model with int8 projections gives the logits of transformers with bitsandbytes' int8."""

import pytest
import tiny
import torch

import purelm
from purelm.nn import decoder, tree
from purelm.quant.int8 import quantize


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_logits(tmp_path, threshold):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = tiny.hf_model("llama").half().eval()
    spec, params = purelm.load(tiny.save(theirs, tmp_path), quantize=None, dtype=torch.float16)
    tokens = torch.randint(99, (2, 12), generator=torch.Generator().manual_seed(0))

    def whole(path, leaf):
        inside = path.startswith("layers.") and path.endswith(".weight") and leaf.ndim == 2
        return quantize(leaf, threshold=threshold) if inside else leaf

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        plain = theirs(tokens).logits.float()
        for module in list(theirs.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    made = bnb.nn.Linear8bitLt(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        has_fp16_weights=False,
                        threshold=threshold,
                    )
                    made.weight = bnb.nn.Int8Params(
                        child.weight.data, has_fp16_weights=False, requires_grad=False
                    )
                    setattr(module, name, made.to("cpu").eval())
        want = theirs(tokens).logits.float()
        got = decoder.forward(tree.map_with_path(whole, params), spec, tokens).float()
    lost = (want - plain).abs().mean()
    assert lost > 0
    # The fp16 steps between round differently and so turn some 8-bit codes; losses that had nothing
    # in common would lie 1.4 times as far apart.
    assert (got - want).abs().mean() < 0.75 * lost
    assert (got - plain).abs().mean() < 1.1 * lost
