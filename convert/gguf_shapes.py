"""Tensors that a GGUF file has in another shape than a checkpoint, both ways."""

import math

from ..nn.spec import Mamba2Spec, ModelSpec

# One row, which is stored as a vector.
_VECTORS = ("ffn_gate_inp_shexp.weight",)
# Filters [c, 1, k] of torch, which are stored as [c, k].
_FILTERS = ("shortconv.conv.weight", "ssm_conv1d.weight")
# A number for each head of a mixer, which are stored as [h, 1] for Mamba 2.
_NUMBERS = (".ssm_a", ".ssm_d")
_GROUPED = ("ssm_norm.weight",)
# Norms whose weight is never kept as a difference.
PLAIN = _GROUPED
# Rates of decay, of which a checkpoint has the logarithm.
DECAYS = (".ssm_a",)
# What is always stored in fp32, beside norms, biases and routers.
WIDE = (*_FILTERS, *_NUMBERS)


def stored(name: str, shape: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """The shape of ggml's tensor `name` in a file."""
    if name.endswith(_VECTORS):
        return shape[1:]
    if name.endswith(_FILTERS):
        return shape[0], shape[-1]
    mixers = (x.recurrent for x in spec.layers if isinstance(x.recurrent, Mamba2Spec))
    mixer = next(mixers, None)
    if mixer is not None and name.endswith(_NUMBERS):
        return *shape, 1
    if mixer is not None and name.endswith(_GROUPED):
        return mixer.groups, shape[0] // mixer.groups
    return shape


def loaded(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a checkpoint of ggml's tensor `name`, which has `shape` in a file."""
    if name.endswith(_VECTORS) and len(shape) == 1:
        return 1, *shape
    if name.endswith(_FILTERS) and len(shape) == 2:
        return shape[0], 1, shape[1]
    if name.endswith((*_NUMBERS, *_GROUPED)):
        return (math.prod(shape),)
    return shape
