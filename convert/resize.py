"""More rows for a vocabulary: asked for, or needed by a pad token that ends nothing."""

from dataclasses import replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..nn import tree
from ..nn.spec import ModelSpec
from .config import Config
from .dense import with_layers
from .tokenizer import Tokenizer
from .tokenizer_repair import repair

_TABLES = ("embed.weight", "head.weight", "head.bias", "inputs.table.weight")


def resized(
    spec: ModelSpec, params: tree.Tree, config: Config, rows: int
) -> tuple[ModelSpec, tree.Tree]:
    """With `rows` rows in the embeddings and the head, which `config` is told too.

    New rows are the mean of the old. Raises ArgumentError for fewer rows than there are.
    """
    if type(rows) is not int or rows < spec.vocab:
        raise ArgumentError(
            f"resize_model_vocab is {rows!r}, expected an integer of at least {spec.vocab}, the "
            "rows there are: none is thrown away"
        )

    def grow(path: str, leaf: Any) -> Any:
        if path not in _TABLES or not isinstance(leaf, torch.Tensor) or len(leaf) >= rows:
            return leaf
        mean = leaf.float().mean(0, keepdim=True).to(leaf.dtype)
        return torch.cat([leaf, mean.expand(rows - len(leaf), *leaf.shape[1:])])

    config.vocab_size = rows
    grown = replace(spec, vocab=rows)
    if spec.inputs is not None:
        inputs = replace(spec.inputs, vocab=max(rows, spec.inputs.vocab))
        config.vocab_size_per_layer_input = inputs.vocab
        grown = with_layers(grown, inputs=inputs)
    return grown, tree.map_with_path(grow, params)


def with_pad_token(
    tokenizer: Tokenizer,
    eos_ids: list[int],
    spec: ModelSpec,
    params: tree.Tree,
    config: Config,
    notes: list[str],
) -> tuple[ModelSpec, tree.Tree]:
    """Give the tokenizer a pad token that ends nothing, with a row of its own if need be."""
    for change in repair(tokenizer, vocab_rows=spec.vocab, eos_ids=eos_ids):
        if change.rows:
            spec, params = resized(spec, params, config, spec.vocab + change.rows)
            notes.append(
                f"{change.field} was {change.before!r}; no token can serve, so embedding and head "
                f"grew to {spec.vocab} rows"
            )
            return with_pad_token(tokenizer, eos_ids, spec, params, config, notes)
        notes.append(f"{change.field}: {change.before!r} -> {change.after!r}, {change.why}")
    return spec, params
