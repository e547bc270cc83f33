"""purelm: language models as pure functions.

The names below are imported on first use, so that `import purelm` costs little more than
`import torch` and pulls in neither transformers nor Triton.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .convert.constraint import Constraint as Constraint
    from .convert.engine import Engine as Engine
    from .convert.engine_request import Request as Request
    from .convert.load import load as load
    from .convert.pretrained import FastLanguageModel as FastLanguageModel
    from .convert.sampling_params import SamplingParams as SamplingParams
    from .convert.tokenizer import Tokenizer as Tokenizer
    from .nn.decoder import forward as forward
    from .nn.sampling import Sampling as Sampling
    from .nn.spec import ModelSpec as ModelSpec
    from .optimizers import optimizer as optimizer
    from .rows import Row as Row
    from .training import train_step as train_step

_HOME = {
    "FastLanguageModel": "convert.pretrained",
    "load": "convert.load",
    "Tokenizer": "convert.tokenizer",
    "Constraint": "convert.constraint",
    "Engine": "convert.engine",
    "Request": "convert.engine_request",
    "Sampling": "nn.sampling",
    "SamplingParams": "convert.sampling_params",
    "ModelSpec": "nn.spec",
    "forward": "nn.decoder",
    "Row": "rows",
    "optimizer": "optimizers",
    "train_step": "training",
}

__all__ = [
    "Constraint",
    "Engine",
    "FastLanguageModel",
    "ModelSpec",
    "Request",
    "Row",
    "Sampling",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "forward",
    "load",
    "optimizer",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'purelm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
