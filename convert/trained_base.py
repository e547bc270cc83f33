"""The base that adapters of a quantized model were trained on, and the weights it was made of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError
from ..quant.linear import weight_of
from .bnb_file import Entry, Packed, entries, read_dense
from .encoded import Encoded
from .fused import Fused
from .fused_read import Turned, is_packed, reader
from .match import match
from .named_adapters import Adapter

if TYPE_CHECKING:
    from .bridge import CausalLM

LOFTQ = "loftq"


def belong_to_it(adapters: Iterable[Adapter]) -> bool:
    """Whether one of these makes up for what quantizing lost (LoftQ), so that it is right beside
    the quantized weights only.
    """
    return any(one.config is not None and one.config.init_lora_weights == LOFTQ for one in adapters)


def dequantized(
    info: Entry | Turned, leaves: Sequence[Any], whole: Fused | None, turned: bool
) -> Entry | Turned:
    """The stored `info` as a tensor whose values are those of the model's quantized leaves.

    leaves: the params that it holds, those of `whole` in its order; turned: it is stored [in, out].
    What is in 4 bits in the file, or not quantized in the model, is returned as it is.
    """
    if isinstance(info, Packed | Turned) or all(isinstance(x, torch.Tensor) for x in leaves):
        return info
    shape = info.shape

    def values() -> torch.Tensor:
        parts = [weight_of(leaf, leaf.dtype).detach().cpu() for leaf in leaves]
        if whole is None:
            return parts[0].view(shape)
        made = whole.whole(parts)
        if not turned:
            return made.view(shape)
        return made.view(*shape[:-2], shape[-1], shape[-2]).mT

    return Encoded(
        info.name, info.file, info.dtype, shape, info.offset, info.nbytes, info.stamp, (), values
    )


def originals(model: "CausalLM") -> Callable[[str], torch.Tensor]:
    """A function that reads the weight of the module at a path from the model's files, on the CPU.

    Raises ArgumentError where those are in 4 bits themselves.
    """
    family, checkpoint = model.origin.family, model.origin.checkpoint
    # The model's vocabulary may have grown since.
    rows = checkpoint.tensors[family.names.to_hf("embed.weight")].shape[0]
    spec = replace(model.spec, vocab=rows)
    chosen, _ = match(entries(checkpoint), checkpoint, spec, family)
    read = reader(read_dense)

    def original(path: str) -> torch.Tensor:
        info = chosen[f"{path}.weight"]
        if is_packed(info):
            raise ArgumentError(
                f"the files hold {family.names.module_to_hf(path)} in 4 bits, and not what that "
                "lost; load the 16-bit original with load_in_4bit=True, or use another start"
            )
        return read(info)

    return original
