"""A tiny model with int8 projections gives the logits of transformers with bitsandbytes' int8."""

import pytest
import tiny
import torch
from oracles import assert_rows

import purelm
from purelm.nn import decoder, tree
from purelm.quant.int8 import quantize


class Plain(torch.nn.Module):
    """LLM.int8 of bitsandbytes' codes in plain torch, in the dtype of its inputs."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, threshold: float) -> None:
        super().__init__()
        self.codes, self.scale, self.threshold = codes, scale, threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape, x.flatten(0, -2)
        weight = self.codes.to(x.dtype) * self.scale.to(x.dtype)[:, None] / 127
        big = x.abs() >= self.threshold if self.threshold else torch.zeros_like(x).bool()
        inner, apart = x.masked_fill(big, 0), x.masked_fill(~big.any(0), 0)
        scale = inner.abs().amax(1, keepdim=True)
        codes = torch.round(inner * 127 / scale).masked_fill(big.any(0), 0)
        return ((codes * scale / 127 + apart) @ weight.mT).view(*shape[:-1], -1)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_logits(tmp_path, threshold):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = tiny.hf_model("llama").half().eval()
    folder = tiny.save(theirs, tmp_path)
    spec, params = purelm.load(folder, quantize=None, dtype=torch.float16)
    tokens = torch.randint(99, (2, 12), generator=torch.Generator().manual_seed(0))

    def whole(path, leaf):
        inside = path.startswith("layers.") and path.endswith(".weight") and leaf.ndim == 2
        return quantize(leaf, threshold=threshold) if inside else leaf

    def replaced(model, make):
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, make(child).eval())
        return model

    def in_int8(child):
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
        return made.to("cpu")

    def in_plain_torch(child):
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(child.weight.data.half())
        return Plain(codes, scale, threshold)

    def plain(dtype):
        model = type(theirs).from_pretrained(folder, dtype=dtype).eval()
        return replaced(model, in_plain_torch)(tokens).logits

    ours = tree.map_with_path(whole, params)
    wide = tree.map(lambda leaf: leaf.float() if isinstance(leaf, torch.Tensor) else leaf, ours)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        exact = plain(torch.float64)
        # In fp32 no code turns, so that the rule holds to the last digits.
        assert_rows(decoder.forward(wide, spec, tokens), plain(torch.float32), exact)
        got = decoder.forward(ours, spec, tokens)
        want = replaced(theirs, in_int8)(tokens).logits
    # In fp16 the steps between turn some codes, in which row is chance: the rule, over means.
    error, yard = ((logits.double() - exact).abs().mean() for logits in (got, want))
    assert error <= 2 * yard + torch.finfo(torch.float16).eps * exact.abs().mean()
