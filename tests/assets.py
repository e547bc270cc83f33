"""Optional real models, tokenizers and data that stand beside a checkout; tests skip without
them.
"""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """The file or folder `path` of the assets beside the checkout; skips the test if absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} beside the checkout")
    return found
