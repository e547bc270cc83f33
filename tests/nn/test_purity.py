"""Public functions are pure: what they are given stays as it was, the same gives the same, and
nothing of the process is another afterwards.
"""

import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from purelm.convert.load import load_folder
from purelm.kernels.attention import attention
from purelm.kernels.cross_entropy import linear_cross_entropy
from purelm.kernels.dropout import dropped
from purelm.nn import cache, decode, decoder, layout, lora, loss, rope, several, tree
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE
from purelm.quant import fp8, int8, nf4


def process() -> list[Any]:
    """What of a process a library could leave behind."""
    flags = torch.backends
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        dict(os.environ),
        list(warnings.filters),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        flags.cudnn.benchmark,
        flags.cuda.matmul.allow_tf32,
        flags.mkldnn.enabled,
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny.save(tiny.hf_model("llama"), tmp_path_factory.mktemp("pure") / "llama")
    made = load_folder(folder, quantize="nf4", dtype=torch.float32, device=torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    adapters = lora.init(made.spec, rank=2, generator=g, dropout=0.1)
    for leaf in tree.leaves(adapters):
        leaf.b.normal_(generator=g)
    adapters = tree.map_tensors(lambda t: t.requires_grad_(), adapters)
    x = torch.randn(6, 64, generator=g)
    ids = torch.randint(4, 90, (2, 9), generator=g)
    heads = torch.randn(1, 9, 2, 8, generator=g)
    found = {"params": made.params, "adapters": adapters, "x": x, "ids": ids, "heads": heads}
    return {**found, "spec": made.spec, "w": torch.randn(96, 64, generator=g)}


def trained(policy: Any) -> Callable[[dict[str, Any]], Any]:
    def step(o: dict[str, Any]) -> Any:
        more = {"adapters": o["adapters"], "residuals": policy, "seed": 5}
        value = loss.loss(o["params"], o["spec"], o["ids"], o["ids"], **more)
        return [value, *torch.autograd.grad(value, tree.tensors(o["adapters"]))]

    return step


def decoded(o: dict[str, Any]) -> Any:
    own = cache.empty(o["spec"], 2, 12, padded=False, dtype=torch.float32, device="cpu")
    logits, own = decode.prefill(o["params"], o["spec"], o["ids"], own)
    return [logits, decode.decode(o["params"], o["spec"], logits.argmax(-1), own)[0]]


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "forward": lambda o: decoder.forward(o["params"], o["spec"], o["ids"], adapters=o["adapters"]),
    "loss, all by autograd": trained(None),
    "loss, kept": trained(KEEP),
    "loss, run again": trained(RECOMPUTE),
    "loss, sent away": trained(OFFLOAD),
    "debugging": lambda o: decoder.hidden(o["params"], o["spec"], o["ids"], debug=True),
    "decoding": decoded,
    "log-probabilities": lambda o: loss.token_logprobs(
        o["params"], o["spec"], decoder.hidden(o["params"], o["spec"], o["ids"]), o["ids"]
    ),
    "new adapters": lambda o: lora.init(o["spec"], generator=torch.Generator().manual_seed(3)),
    "merged": lambda o: lora.merge(o["params"], o["adapters"]),
    "adapters since": lambda o: lora.relative(o["adapters"], o["adapters"]),
    "adapters summed": lambda o: several.summed([o["adapters"], o["adapters"]]),
    "stronger adapters": lambda o: lora.rescale(o["adapters"], 0.5),
    "4 bits": lambda o: nf4.dequantize(nf4.quantize(o["w"]), torch.float32),
    "8 bits": lambda o: int8.dequantize(int8.quantize(o["w"]), torch.float32),
    "fp8": lambda o: fp8.dequantize(fp8.quantize(o["w"]), torch.float32),
    "attention": lambda o: attention(o["heads"], o["heads"], o["heads"], scale=0.3),
    "cross entropy": lambda o: linear_cross_entropy(o["x"], o["w"], o["ids"].flatten()[:6]),
    "dropout": lambda o: dropped(o["x"], 0.4, 7),
    "rotations": lambda o: rope.table(o["spec"].layers[0].attention.rope, torch.arange(9)[None]),
    "places": lambda o: layout.from_mask(o["ids"] > 9),
}


def values(made: Any) -> list[torch.Tensor]:
    if not isinstance(made, dict | list | tuple | torch.Tensor):
        made = [getattr(made, name) for name in made.__slots__ if hasattr(made, name)]
    return [t.detach().clone() for t in tree.tensors(made)]


@pytest.mark.parametrize("name", CALLS)
def test_a_public_function(given: dict[str, Any], name: str) -> None:
    inputs = {key: value for key, value in given.items() if key != "spec"}
    before, around = values(inputs), process()
    first, second = (values(CALLS[name](given)) for _ in range(2))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values(inputs), before, strict=True))
    assert all(t.grad is None for t in tree.tensors(inputs))
    assert process() == around
