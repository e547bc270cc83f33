"""The model and the instruction rows that come with the package."""

from __future__ import annotations

from pathlib import Path

# As `from_pretrained`, `load` and adapter_config.json know it.
MODEL = "purelm/tiny"
_DATA = Path(__file__).parent / "data"


def model_folder() -> Path:
    """The folder that the name `purelm/tiny` stands for."""
    return _DATA / "tiny"


def train_rows() -> Path:
    """The instruction rows to train on."""
    return _DATA / "instructions" / "train.jsonl"


def held_out_rows() -> Path:
    """Rows about things of which none is asked in `train_rows`."""
    return _DATA / "instructions" / "heldout.jsonl"
