"""An adapter of a folder, for a model that is there already."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError
from ..nn import tree
from . import adapter_file, base_mark
from .named_adapters import Adapter

if TYPE_CHECKING:
    from .bridge import CausalLM


def load(model: "CausalLM", folder: Path, *, check_base: bool = True) -> Adapter:
    """The adapter in `folder` as a value, on the model's device.

    Raises AdapterError for one of another model, or trained with another rope_scaling, or, with
    check_base, on other weights laid out as the model's.
    """
    names = model.origin.family.names
    adapters, trained, config = adapter_file.read_adapter(
        folder, model.spec, names, params=model.base_params
    )
    told = adapter_file.read_trained(folder, names)
    if check_base:
        base_mark.check(told.base, model.origin.checkpoint, folder)
    scaling = told.rope_scaling
    if scaling is not None and scaling != model.origin.rope_scaling:
        raise AdapterError(
            f"the adapter was trained with rope_scaling={scaling}, the model was loaded with "
            f"{model.origin.rope_scaling}; load the model with the adapter's",
            file=folder,
        )
    warn_of_precision(told.stored_as, model.origin.quantize)
    return placed(Adapter(adapters, trained, config=config), model)


def warn_of_precision(trained_on: str | None, quantize: str | None) -> str | None:
    """Warn, and return what was said, where an adapter meets a base in another precision than the
    one it was trained on.
    """
    if trained_on is None or trained_on == (quantize or "16bit"):
        return None
    text = (
        f"the adapter was trained on a base stored in {trained_on}, this one is stored in "
        f"{quantize or '16bit'}: the same adapter gives other logits here"
    )
    warnings.warn(text, stacklevel=3)
    return text


def placed(adapter: Adapter, model: "CausalLM") -> Adapter:
    """The adapter with its tensors on the model's device."""

    device = model.device
    return Adapter(
        tree.placed(adapter.adapters, device),
        tree.placed(adapter.trained, device),
        tree.placed(adapter.start, device),
        adapter.config,
    )
