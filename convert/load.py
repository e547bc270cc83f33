"""A checkpoint's tensors into a tree of params: read one at a time, placed, quantized, checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..errors import ArgumentError, CheckpointError, ConfigError
from ..nn import tree
from ..nn.params import ParamSpec, param_specs
from ..nn.spec import ModelSpec
from ..quant.nf4 import quantize as nf4_quantize
from .config import Config
from .hub import resolve
from .registry import Family, family_of
from .shards import Checkpoint, TensorInfo, open_checkpoint, read
from .staging import Stager

Quantize = Literal["nf4"] | None

# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_LOADABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Loaded:
    """A model as it came from its files."""

    spec: ModelSpec
    params: tree.Tree
    config: Config
    family: Family
    checkpoint: Checkpoint
    stored_dtypes: tuple[torch.dtype, ...]
    left_out: tuple[str, ...] = field(default=())


def load(
    name: str | Path,
    *,
    quantize: Quantize = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quant_skip: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    progress: bool = False,
) -> tuple[ModelSpec, tree.Tree]:
    """(spec, params) of a local folder or a hub repository.

    quantize: "nf4" stores every projection of the layers in 4 bits. dtype: of the other tensors and
    of what 4-bit weights dequantize to (default: as stored; bfloat16 where that differs by
    tensor). device: default the first GPU if there is one, else the CPU. quant_skip: texts; a
    projection whose checkpoint name contains one stays unquantized.

    Raises SourceError, ConfigError or CheckpointError.
    """
    source = resolve(
        str(name),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    loaded = load_folder(
        source.folder,
        quantize=quantize,
        dtype=dtype,
        device=default_device() if device is None else torch.device(device),
        quant_skip=quant_skip,
        progress=progress,
    )
    return loaded.spec, loaded.params


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_folder(
    folder: Path,
    *,
    quantize: Quantize,
    dtype: torch.dtype | None,
    device: torch.device,
    quant_skip: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Loaded:
    """The model in `folder`; `overrides` replace fields of its config.json."""
    if quantize not in (None, "nf4"):
        raise ArgumentError(f"quantize is {quantize!r}, expected 'nf4' or None")
    if dtype is not None and dtype not in _LOADABLE:
        raise ArgumentError(f"dtype is {dtype}, expected one of {_LOADABLE}")
    if isinstance(quant_skip, str) or not all(isinstance(t, str) and t for t in quant_skip):
        raise ArgumentError(f"quant_skip is {quant_skip!r}, expected a list of texts")
    path = Path(folder) / "config.json"
    config = Config.from_folder(folder)
    config.update(dict(overrides or {}))
    if config.quantization_config is not None:
        stored = config.quantization_config
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
        raise ConfigError(
            f"the checkpoint is stored quantized ({method!s:.60}), which is not read yet; load the "
            "16-bit original, which purelm quantizes while loading",
            file=path,
        )
    family = family_of(config.fields, path)
    spec = family.spec(config.fields, path)
    checkpoint = open_checkpoint(folder)
    chosen, left_out = _match(checkpoint, spec, family)
    for text in quant_skip:
        if not any(text in name for name in checkpoint.tensors):
            raise ArgumentError(f"quant_skip has {text!r}, which is in no tensor's name")
    if dtype is None:
        dtype = _common_dtype(chosen)
    params = _read_all(chosen, spec, quantize, dtype, device, quant_skip, family, progress)
    stored = tuple(dict.fromkeys(info.dtype for info in chosen.values()))
    return Loaded(spec, params, config, family, checkpoint, stored, left_out)


def _match(
    checkpoint: Checkpoint, spec: ModelSpec, family: Family
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Our path -> where it is stored, in file order, and the names that are rightly not loaded."""
    want: dict[str, ParamSpec] = dict(tree.items(param_specs(spec)))
    chosen: dict[str, TensorInfo] = {}
    left_out, unknown = [], []
    for info in checkpoint.in_file_order():
        try:
            path = family.names.to_ours(info.name)
        except KeyError:
            path = ""
        if path in want:
            chosen[path] = info
        elif path == "head.weight" and spec.tied:
            _check_tied(checkpoint, family, info)
            left_out.append(info.name)
        elif _DERIVED.search(info.name):
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
    for path, info in chosen.items():
        if info.shape != want[path].shape:
            raise CheckpointError(
                f"found shape {list(info.shape)}, config.json makes it {list(want[path].shape)}",
                tensor=info.name,
                file=info.file,
            )
        if info.dtype not in _LOADABLE:
            raise CheckpointError(
                f"found dtype {info.dtype}, expected one of {', '.join(map(str, _LOADABLE))}",
                tensor=info.name,
                file=info.file,
            )
    return chosen, tuple(left_out)


def _check_tied(checkpoint: Checkpoint, family: Family, head: TensorInfo) -> None:
    embed = checkpoint.tensors.get(family.names.to_hf("embed.weight"))
    if embed is not None and not torch.equal(read(embed), read(head)):
        raise CheckpointError(
            "tie_word_embeddings is true, but the stored head differs from the embedding; "
            "set it to false in config.json to use both",
            tensor=head.name,
            file=head.file,
        )


def _some(names: list[str], limit: int = 6) -> str:
    if not names:
        return "none"
    shown = ", ".join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _common_dtype(chosen: Mapping[str, TensorInfo]) -> torch.dtype:
    found = {info.dtype for info in chosen.values()}
    return found.pop() if len(found) == 1 else torch.bfloat16


def _finite(made: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """`made` if no value of it is NaN or infinite; aminmax needs no second tensor to tell."""
    if not all(bool(end.isfinite()) for end in made.aminmax()):
        count = int((~made.isfinite()).sum())
        advice = "repair the checkpoint"
        if made.dtype != info.dtype:
            advice += f", or load it as {info.dtype} if they fit that"
        raise CheckpointError(
            f"{count} of {made.numel()} values are NaN or infinite in {made.dtype}; {advice}",
            tensor=info.name,
            file=info.file,
        )
    return made


def _read_all(
    chosen: Mapping[str, TensorInfo],
    spec: ModelSpec,
    quantize: Quantize,
    dtype: torch.dtype,
    device: torch.device,
    quant_skip: Sequence[str],
    family: Family,
    progress: bool,
) -> tree.Tree:
    want: dict[str, ParamSpec] = dict(tree.items(param_specs(spec)))
    leaves: dict[str, Any] = {}
    total = sum(info.nbytes for info in chosen.values())
    shown = None if progress else True  # None: where there is a terminal
    with (
        Stager(device) as stager,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="loading", disable=shown, leave=False
        ) as bar,
    ):
        for path, info in chosen.items():
            skip = any(text in info.name for text in quant_skip)
            dense = _finite(stager.read(info).to(dtype), info)
            four_bits = quantize == "nf4" and want[path].quantize and not skip
            leaves[path] = nf4_quantize(dense, name=info.name) if four_bits else dense
            bar.update(info.nbytes)
    # In the order of the spec, so that trees of equal models are equal in order too.
    return tree.from_items({path: leaves[path] for path in want})
