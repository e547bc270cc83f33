"""The quantized formats that checkpoints are read from, besides bitsandbytes' 4 bits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .awq_file import AWQ
from .compressed_file import COMPRESSED
from .encoded import Format
from .fp4_file import NVFP4
from .fp8_file import FP8
from .gptq_file import GPTQ
from .int8_file import INT8
from .mxfp4_file import MXFP4

FORMATS = (FP8, NVFP4, INT8, GPTQ, AWQ, MXFP4, COMPRESSED)


def format_of(stored: Any, file: Path) -> Format | None:
    """The format that a `quantization_config` names, None for another or none.

    Raises ConfigError for a variant that is not read.
    """
    if not isinstance(stored, dict):
        return None
    return next((form for form in FORMATS if form.is_of(stored, file)), None)


def check_plain(names: Iterable[str], file: Path) -> None:
    """Raise ConfigError where a tensor's name is that of a quantized weight's part."""
    marks = tuple(mark for form in FORMATS for mark in form.marks)
    if found := next((name for name in names if name.endswith(marks)), None):
        raise ConfigError(
            f"weights are stored quantized ({found[:200]}), and there is no quantization_config "
            "that says how",
            file=file,
        )
