"""A fine-tuning loop with no module and no optimizer object: trees in, trees out.

python examples/functional_loop.py [MODEL] [ROWS.jsonl]
"""

import sys
from typing import NamedTuple

import torch

import purelm
from purelm import embedded
from purelm.convert import hub
from purelm.nn import lora, tree
from purelm.nn.loss import loss
from purelm.row_files import read_rows
from purelm.rows import collate, encode


class AdamW(NamedTuple):
    """The optimizer's state: two trees shaped like the adapters, and a count."""

    mean: tree.Tree
    square: tree.Tree
    step: int


def adamw_init(tensors: tree.Tree) -> AdamW:
    zeros = tree.map_tensors(torch.zeros_like, tensors)
    return AdamW(zeros, zeros, 0)


def adamw(tensors, grads, state, rate, betas=(0.9, 0.999), eps=1e-8):
    """(new tensors, new state); nothing is written in place."""
    step = state.step + 1
    mean = torch.utils._pytree.tree_map(lambda m, g: m.lerp(g, 1 - betas[0]), state.mean, grads)
    square = torch.utils._pytree.tree_map(
        lambda s, g: s.lerp(g * g, 1 - betas[1]), state.square, grads
    )

    def move(x, m, s):
        m, s = m / (1 - betas[0] ** step), s / (1 - betas[1] ** step)
        return x - rate * m / (s.sqrt() + eps)

    return torch.utils._pytree.tree_map(move, tensors, mean, square), AdamW(mean, square, step)


def main(model: str, data: str, steps: int = 60, batch: int = 16) -> tuple[float, float]:
    spec, params = purelm.load(model, quantize="nf4", dtype=torch.float32)
    device = params["embed"]["weight"].device
    tokenizer = purelm.Tokenizer.from_folder(hub.resolve(model).folder)
    rows = encode(read_rows(data), tokenizer, max_length=spec.max_positions).rows
    generator = torch.Generator().manual_seed(0)
    adapters = lora.init(spec, rank=16, generator=generator, device=device)
    state = adamw_init(adapters)

    def loss_fn(adapters, batch):
        return loss(params, spec, batch["input_ids"], batch["labels"], adapters=adapters)

    step_fn = torch.func.grad_and_value(loss_fn)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(rows), (batch,), generator=generator).tolist()
        tokens = collate([rows[i] for i in chosen], pad_id=tokenizer.pad_token_id or 0)
        grads, value = step_fn(adapters, {k: v.to(device) for k, v in tokens.items()})
        adapters, state = adamw(adapters, grads, state, rate=5e-3 * (1 - step / steps))
        losses.append(float(value))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*(sys.argv[1:] or (embedded.MODEL, embedded.train_rows())))
