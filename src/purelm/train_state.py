"""A training run's state on the disk, from which it goes on exactly as if it had never stopped.

A checkpoint is a folder that appears whole or not at all: train_state.safetensors holds what is
trained and the optimizer's moments, train_state.json the step, where the model's dropout stands,
and what the run is (its identity). The order of the rows follows from step and seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import optimizers
from .convert import atomic
from .convert.bridge import CausalLM
from .convert.json_file import read_json
from .convert.safetensors_file import TensorInfo, read, read_header
from .errors import ArgumentError, CheckpointError
from .nn import tree
from .training import trained

FORMAT = "purelm-train-state-1"
_TENSORS, _STATE = "train_state.safetensors", "train_state.json"
_PARAM = "param."


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: the steps done, and whatever its report at the end needs."""

    step: int
    notes: Mapping[str, Any]


def fingerprint(model: CausalLM) -> str:
    """A digest of the base model: its spec, and the first bytes and the shape of every tensor."""
    total = hashlib.sha256(repr(model.spec).encode())
    for tensor in tree.tensors(model.params):
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        head = tensor.detach().reshape(-1)[:64].cpu().contiguous()
        total.update(head.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save(
    folder: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Write the state of a run after a step, in the place of the one before; raises SaveError."""
    entries = [atomic.entry(_PARAM + name, p.detach()) for name, p in trained(model).items()]
    for name, p in trained(model).items():
        for key, value in optimizers.kept(optimizer.state[p]).items():
            entries.append(atomic.entry(f"{key}.{name}", value))
    state = {
        "format": FORMAT,
        "step": progress.step,
        "dropout_seed": model.dropout_seed,
        "dropout_step": model.dropout_step,
        "notes": dict(progress.notes),
        "identity": dict(identity),
    }
    need = atomic.entry_bytes(entries)
    with atomic.folder(folder, need_bytes=need, replaces=("train_state.*",)) as new:
        atomic.write_safetensors(new / _TENSORS, entries)
        (new / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def exists(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint; what a crash left beside it is cleared away."""
    if folder.parent.is_dir():
        atomic.recover(folder)
    return (folder / _STATE).is_file()


def discard(folder: Path) -> None:
    """Remove a checkpoint, and its folder if nothing else is in it."""
    for name in (_STATE, _TENSORS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def restore(
    folder: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Progress:
    """Put the state in `folder` into the model and its optimizer; returns how far it is.

    Raises ArgumentError, naming what differs, for the state of another run, and CheckpointError
    for files that are missing, malformed or incomplete; then nothing is changed.
    """
    state = _read_state(folder / _STATE)
    _check_identity(state["identity"], identity, folder)
    infos, _ = read_header(folder / _TENSORS)
    params = trained(model)
    blank = optimizers.blank_states(optimizer)
    expected: dict[str, torch.Tensor] = {}
    for name, p in params.items():
        expected[_PARAM + name] = p.detach()
        expected |= {f"{key}.{name}": like for key, like in optimizers.kept(blank[p]).items()}
    if infos.keys() != expected.keys():
        differ = sorted(infos.keys() ^ expected.keys())
        raise CheckpointError(
            f"the tensors are not those of this run; first difference: {differ[0]}",
            file=folder / _TENSORS,
        )
    values = {name: _tensor(infos[name], like) for name, like in expected.items()}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[_PARAM + name])
            state_of_p = {key: values[f"{key}.{name}"] for key in optimizers.kept(blank[p])}
            optimizers.put(optimizer, p, blank[p], state_of_p)
    model.dropout_seed, model.dropout_step = state["dropout_seed"], state["dropout_step"]
    return Progress(state["step"], state["notes"])


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path, error=CheckpointError)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the format is {state.get('format')!r}, expected {FORMAT!r}", file=path
        )
    kinds = {"step": int, "dropout_seed": int, "dropout_step": int, "notes": dict, "identity": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{name} is missing or malformed", file=path)
    return state


def _check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    # Through JSON, so that both sides have its types.
    wanted = json.loads(json.dumps(dict(wanted)))
    differ = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if differ:
        parts = (f"{k} was {_short(found.get(k))}, is {_short(wanted.get(k))}" for k in differ)
        raise ArgumentError(
            f"the checkpoint in {folder} is of another run: {'; '.join(parts)}. Resume with the "
            "options and data it began with, or start anew in another output folder"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "..."


def _tensor(info: TensorInfo, like: torch.Tensor) -> torch.Tensor:
    if info.shape != tuple(like.shape) or info.dtype != like.dtype:
        raise CheckpointError(
            f"found {info.dtype} {list(info.shape)}, this run has {like.dtype} {list(like.shape)}",
            tensor=info.name,
            file=info.file,
        )
    return read(info)
