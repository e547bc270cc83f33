"""Adapters of all experts of a layer as of one parameter: peft's `target_parameters`.

transformers 5 has a layer's experts as two parameters, `experts.gate_up_proj` [x, 2f, e] and
`experts.down_proj` [x, e, f]. peft adapts each as a stack: A [x * r, in], an expert's rows
together, and B [out, r * x], in which neighbours are of different experts. Its wrappers lie in one
another, so that of two on one module the first is `experts.base_layer`, the second `experts`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError
from ..nn import stacks, tree
from ..nn.lora import LoRA
from ..nn.params import param_specs
from ..nn.spec import ModelSpec
from .lora_config import PeftConfig
from .names import Names
from .peft_targets import matches, parameters
from .shards import TensorInfo

_TENSOR = re.compile(r"(.+\.experts(?:\.base_layer)*)\.lora_([AB])\.weight")
_INNER = ".base_layer"


def shape_of(path: str, spec: ModelSpec) -> tuple[int, int, int]:
    """(experts, out, in) of the parameter whose adapter has this path."""
    experts = tree.at(param_specs(spec), path.rpartition(".")[0])
    last = path.rpartition(".")[2]
    x, out, inp = experts["up" if last == stacks.BOTH else last]["weight"].shape
    return (x, 2 * out if last == stacks.BOTH else out, inp)


def taken_out(
    adapters: tree.Tree, config: PeftConfig | None, spec: ModelSpec, names: Names
) -> tuple[tree.Tree, dict[str, LoRA]]:
    """`adapters` without those of whole parameters, and these by their path.

    What is of gate and up together is one, and what of its layer goes with it, and what `config`
    names.
    """
    known = parameters(spec, names)
    flat = dict(tree.items(adapters))
    wanted = () if config is None else config.target_parameters or ()
    whole = {
        path: leaf
        for path, leaf in flat.items()
        if path in known
        and (f"{path.rpartition('.')[0]}.{stacks.BOTH}" in flat or matches(wanted, known[path]))
    }
    rest = {path: leaf for path, leaf in flat.items() if path not in whole}
    return tree.from_items(rest), whole


def named(whole: Mapping[str, LoRA], spec: ModelSpec, names: Names) -> dict[str, torch.Tensor]:
    """The adapters' tensors under peft's names, without the prefix of all, and in its layout."""
    found: dict[str, torch.Tensor] = {}
    for module, paths in _modules(whole, spec, names).items():
        for depth, path in enumerate(reversed(paths)):
            leaf, name = _turned(whole[path], names), module + depth * _INNER
            found[f"{name}.lora_A.weight"] = leaf.a.flatten(0, 1)
            b = leaf.b
            if _in_turn(path, names):
                b = torch.stack(b.chunk(2, 1), 2).flatten(1, 2)
            found[f"{name}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return found


def _turned(leaf: LoRA, names: Names) -> LoRA:
    """The adapter of a stack [x, out, in] as of its transpose, where peft takes it for that."""
    return replace(leaf, a=leaf.b.mT, b=leaf.a.mT) if names.peft_swaps else leaf


def _stored_shape(path: str, spec: ModelSpec, names: Names) -> tuple[int, int, int]:
    x, out, inp = shape_of(path, spec)
    return (x, inp, out) if names.peft_swaps else (x, out, inp)


def _in_turn(path: str, names: Names) -> bool:
    """Whether the parameter holds rows of gate and up in turn, where ours are one half each."""
    return names.in_turn and path.rpartition(".")[2] == stacks.BOTH


def _modules(paths: Iterable[str], spec: ModelSpec, names: Names) -> dict[str, list[str]]:
    """The name of each layer's experts -> the given paths in it, in transformers' order."""
    given, found = set(paths), dict[str, list[str]]()
    for path, name in parameters(spec, names).items():
        if path in given:
            found.setdefault(name.rpartition(".")[0], []).append(path)
    return found


def sorted_out(
    tensors: Mapping[str, TensorInfo], spec: ModelSpec, names: Names, prefix: str
) -> dict[str, dict[str, TensorInfo]]:
    """The path of each parameter's adapter -> its "A" and "B" among a file's tensors.

    Which parameter it is follows from the shapes, as the names say only how peft nested them.
    """
    modules = _modules(parameters(spec, names), spec, names)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        if lora := _TENSOR.fullmatch(name.removeprefix(prefix)):
            pairs.setdefault(lora[1], {})[lora[2]] = tensor
    found = {}
    for name, pair in pairs.items():
        for path in modules.get(name.replace(_INNER, ""), ()):
            _, out, inp = _stored_shape(path, spec, names)
            a, b = (getattr(pair.get(kind), "shape", (0, 0)) for kind in "AB")
            if path not in found and len(a) == len(b) == 2 and (b[0], a[1]) == (out, inp):
                found[path] = pair
                break
    return found


def read(
    path: str,
    pair: Mapping[str, torch.Tensor],
    rank: int,
    scale: float,
    spec: ModelSpec,
    names: Names,
    file: Path,
) -> LoRA:
    """The adapter of a parameter, from peft's layout; AdapterError for another rank's shapes."""
    x, out, inp = _stored_shape(path, spec, names)
    a, b = pair["A"], pair["B"]
    if a.shape != (x * rank, inp) or b.shape != (out, rank * x):
        raise AdapterError(
            f"{path}: found A {list(a.shape)} and B {list(b.shape)}, the config and the model make "
            f"them {[x * rank, inp]} and {[out, rank * x]}",
            file=file,
        )
    b = b.float().view(out, rank, x).permute(2, 0, 1)
    if _in_turn(path, names):
        b = torch.cat([b[:, ::2], b[:, 1::2]], 1)
    made = _turned(LoRA(a.float().view(x, rank, inp), b, scale), names)
    return replace(made, a=made.a.contiguous(), b=made.b.contiguous())


def fitted(
    targets: tuple[str, ...] | None, have: set[str], every: Iterable[str]
) -> tuple[str, ...] | None:
    """`target_parameters` that mean exactly the parameters called `have` of `every` one."""
    if {name for name in every if matches(targets or (), name)} == have:
        return targets or None
    short = {re.sub(r".*\.\d+\.", "", name) for name in have}
    fits = {name for name in every if matches(short, name)} == have
    return tuple(sorted(short if fits else have)) or None


def missing(
    config: PeftConfig, have: Mapping[str, Any], spec: ModelSpec, names: Names
) -> list[str]:
    """Parameters that the config names and the file has no adapter for."""
    return [
        name
        for path, name in parameters(spec, names).items()
        if path not in have and matches(config.target_parameters or (), name)
    ]
