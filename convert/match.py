"""Which stored tensor is which param: every one of a model has its place, and none is left over."""

import re
from collections.abc import Sequence

import torch

from ..errors import CheckpointError
from ..nn import stacks, tree
from ..nn.params import ParamSpec
from ..nn.spec import ModelSpec
from . import fused
from .bnb_file import Entry, read_dense
from .fused_read import Stored, split, turned
from .registry import Family
from .shards import Checkpoint

# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
LOADABLE = (torch.float32, torch.float16, torch.bfloat16)


def match(
    found: Sequence[Entry], checkpoint: Checkpoint, spec: ModelSpec, family: Family
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Our path -> where it is stored, in file order, and the names that are rightly not loaded.

    Raises CheckpointError where something is missing, misshapen or not expected.
    """
    want: dict[str, ParamSpec] = dict(tree.items(stacks.each_spec(spec)))
    chosen: dict[str, Stored] = {}
    left_out, unknown = [], []
    for entry in found:
        info = turned(entry) if family.names.is_transposed(entry.name) else entry
        if (whole := fused.stored(info.name, family.names, spec, want)) is not None:
            chosen.update(split(info, whole))
            continue
        try:
            path = family.names.to_ours(info.name, want)
        except KeyError:
            path = ""
        if path in want:
            chosen[path] = info
        elif path == "head.weight" and spec.tied:
            _check_tied(found, family, entry)
            left_out.append(info.name)
        elif (value := family.names.constant(info.name)) is not None:
            _check_constant(entry, value)
            left_out.append(info.name)
        elif _is_borrowed(path, spec):
            left_out.append(info.name)
        elif _DERIVED.search(info.name) or family.names.is_further(info.name, len(spec.layers)):
            left_out.append(info.name)
        else:
            unknown.append(info.name)
    missing = [family.names.to_hf(path) for path in want if path not in chosen]
    if missing or unknown:
        raise CheckpointError(
            "the tensors are not those that config.json describes: "
            f"missing {_some(missing)}; not expected {_some(unknown)}",
            file=checkpoint.folder,
        )
    for path, stored in chosen.items():
        if stored.shape != want[path].shape:
            raise CheckpointError(
                f"found shape {list(stored.shape)}, config.json makes it {list(want[path].shape)}",
                tensor=stored.name,
                file=stored.file,
            )
        if stored.dtype not in LOADABLE:
            raise CheckpointError(
                f"found dtype {stored.dtype}, expected one of {', '.join(map(str, LOADABLE))}",
                tensor=stored.name,
                file=stored.file,
            )
    return chosen, tuple(left_out)


def _is_borrowed(path: str, spec: ModelSpec) -> bool:
    """Whether a tensor makes keys or values of a layer that reads those of another (Gemma 4)."""
    found = re.match(r"layers\.(\d+)\.attn\.[kv](_norm)?\.", path)
    if found is None or int(found[1]) >= len(spec.layers):
        return False
    return spec.layers[int(found[1])].kv_from is not None


def _check_tied(found: Sequence[Entry], family: Family, head: Entry) -> None:
    embed = next((e for e in found if e.name == family.names.to_hf("embed.weight")), None)
    if embed is not None and not torch.equal(read_dense(embed), read_dense(head)):
        raise CheckpointError(
            "tie_word_embeddings is true, but the stored head differs from the embedding; "
            "set it to false in config.json to use both",
            tensor=head.name,
            file=head.file,
        )


def _check_constant(info: Entry, value: float) -> None:
    stored = read_dense(info)
    if not torch.equal(stored, torch.full_like(stored, value)):
        raise CheckpointError(
            f"found values other than {value}, the only one its model_type is computed with",
            tensor=info.name,
            file=info.file,
        )


def _some(names: list[str], limit: int = 6) -> str:
    if not names:
        return "none"
    shown = ", ".join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
