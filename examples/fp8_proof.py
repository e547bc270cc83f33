"""Does computing in fp8 cost anything? Gradients in units of 4 bits' own error, and loss curves.

python examples/fp8_proof.py MODEL TEXT [--warm N] [--steps N] [--batch N] [--length N]

MODEL is first trained whole for `warm` steps in 16 bits, so that its weights lie on no quantizer's
grid. Then the adapters' gradients are compared: those of fp8 products with those of 16-bit products
on the same 4-bit weights, in units of what the 4 bits change themselves; and adapters are trained
for `steps` steps from several seeds in 16 bits and in fp8, on the same text in the same order.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import purelm
from purelm.nn import lora, tree
from purelm.nn.loss import loss
from purelm.nn.params import param_specs
from purelm.nn.residuals import KEEP
from purelm.quant import nf4
from purelm.quant.fp8_product import computing


def blocks(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    """The text as rows [n, length] of tokens."""
    ids = torch.tensor(tokenizer(text)["input_ids"]).view(-1)
    return ids[: len(ids) // length * length].view(-1, length)


def quantized(params: tree.Tree, spec: Any) -> tree.Tree:
    """The projections of the layers in NF4."""
    return tree.map(
        lambda p, leaf: nf4.quantize(leaf.detach()) if p.quantize else leaf.detach(),
        param_specs(spec),
        params,
    )


def trainer(value: Callable[..., Any], trained: list[Any], rate: float) -> Callable[..., Any]:
    """A function from tokens [b, s] to the loss before a step of AdamW on them.

    On a GPU the step is captured once as a CUDA graph and replayed.
    """
    cuda = trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=cuda, capturable=cuda)

    def step(ids: torch.Tensor) -> torch.Tensor:
        out = value(ids)
        for tensor, grad in zip(trained, torch.autograd.grad(out, trained), strict=True):
            tensor.grad = grad
        optimizer.step()
        return out.detach()

    if not cuda:
        return step
    before = [t.detach().clone() for t in trained]
    static: dict[str, Any] = {}

    def replayed(ids: torch.Tensor) -> torch.Tensor:
        if not static:
            static["ids"], stream = ids.clone(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(static["ids"])
            torch.cuda.synchronize()
            with torch.no_grad():  # the warm-up's steps never were
                for tensor, old in zip(trained, before, strict=True):
                    tensor.copy_(old)
                for state in optimizer.state.values():
                    for kept in state.values():
                        kept.zero_()
            graph = static["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static["loss"] = step(static["ids"])
        static["ids"].copy_(ids)
        static["graph"].replay()
        out: torch.Tensor = static["loss"].clone()
        return out

    return replayed


def adapters_of(spec: Any, seed: int, device: torch.device, start: Any = "kaiming") -> tree.Tree:
    made = lora.init(
        spec, rank=16, generator=torch.Generator().manual_seed(seed), start=start, device=device
    )
    return tree.map_tensors(lambda t: t.requires_grad_(), made)


def gradients(params: tree.Tree, spec: Any, adapters: tree.Tree, rows: Any) -> list[torch.Tensor]:
    """Of every adapter tensor, summed over the batches."""
    tensors = tree.tensors(adapters)
    total = [torch.zeros_like(t) for t in tensors]
    for ids in rows:
        value = loss(params, spec, ids, labels=ids, adapters=adapters, residuals=KEEP)
        for kept, grad in zip(total, torch.autograd.grad(value, tensors), strict=True):
            kept += grad
    return total


def apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> list[float]:
    """1 - cosine of each pair."""
    pairs = zip(some, others, strict=True)
    return [1 - float(torch.cosine_similarity(a.ravel(), b.ravel(), 0)) for a, b in pairs]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--warm", type=int, default=300)
    parser.add_argument("--warm-rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-4)
    args = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    model, tokenizer = purelm.FastLanguageModel.from_pretrained(
        args.model,
        load_in_16bit=True,
        dtype=torch.bfloat16 if cuda else torch.float32,
        fix_tokenizer=False,
        max_seq_length=None,
    )
    spec, device = model.spec, model.device
    rows = blocks(tokenizer, args.text.read_text(), args.length).to(device)
    held, rows = rows[-2 * args.batch :], rows[: -2 * args.batch]
    batches = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(device)
    batches = batches[: len(batches) // args.batch * args.batch].view(-1, args.batch)

    def batch(i: int) -> torch.Tensor:
        return rows[batches[i % len(batches)]]

    # Steps too small for 16 bits are kept in fp32; what is computed is in the model's dtype.
    whole = tree.map_tensors(lambda t: t.detach().float().clone().requires_grad_(), model.params)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(model.dtype)

    def warm(ids: torch.Tensor) -> Any:
        return loss(tree.map_tensors(cast, whole), spec, ids, labels=ids)

    step = trainer(warm, tree.tensors(whole), args.warm_rate)
    warmed = [step(batch(i)) for i in range(args.warm)]
    exact = tree.map_tensors(lambda t: cast(t.detach()), whole)
    four = quantized(exact, spec)
    kinds = {"exact": exact, "bf16": four, "fp8": tree.map(computing, four)}

    adapters = adapters_of(spec, 0, device, "random")
    some = [held[: args.batch], held[args.batch :]]
    found = {name: gradients(p, spec, adapters, some) for name, p in kinds.items()}
    off = apart(found["fp8"], found["bf16"])
    unit = apart(found["bf16"], found["exact"])
    ratios = [a / b for a, b in zip(off, unit, strict=True)]
    names = [f"{path}.{part}" for path, _ in tree.items(adapters) for part in ("a", "b")]
    worst = sorted(zip(ratios, names, off, unit, strict=True), reverse=True)[:8]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, emulated",
        "torch": torch.__version__,
        "losses, trained whole": [round(float(v), 4) for v in (*warmed[:1], *warmed[-1:])],
        "adapter tensors": len(off),
        "1 - cosine, NF4 to exact": {"median": statistics.median(unit), "least": min(unit)},
        "1 - cosine, fp8 to bf16": {"median": statistics.median(off), "most": max(off)},
        "ratio": {"median": statistics.median(ratios), "most": max(ratios)},
        "ratio above 1/4": sum(r > 0.25 for r in ratios),
        "largest ratios": [f"{n} {r:.3f} ({a:.4f} / {b:.4f})" for r, n, a, b in worst],
    }
    for name in ("bf16", "fp8") if args.steps else ():
        finals, ends = [], []
        for seed in range(args.seeds):
            params, adapters = kinds[name], adapters_of(spec, seed, device)

            def value(ids: torch.Tensor, params: Any = params, adapters: Any = adapters) -> Any:
                return loss(params, spec, ids, labels=ids, adapters=adapters, residuals=KEEP)

            step = trainer(value, tree.tensors(adapters), args.rate)
            losses = [step(batch(args.warm + i)) for i in range(args.steps)]
            ends.append(float(torch.stack(losses[-50:]).mean()))
            with torch.no_grad():  # judged by the product in 16 bits, whichever it was trained in
                judged = [loss(four, spec, ids, labels=ids, adapters=adapters) for ids in some]
            finals.append(float(torch.stack(judged).mean()))
            curve = [round(float(v), 4) for v in losses[:: max(1, args.steps // 10)]]
            result[f"curve, {name}, seed {seed}"] = curve
        result[f"mean of the last 50 losses, {name}"] = [round(v, 5) for v in ends]
        result[f"held-out loss, {name}"] = [round(v, 5) for v in finals]
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
