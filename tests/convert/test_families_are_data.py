"""A family is a description: its file has no tensor math, and nn/ knows no family."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
from family_cases import FAMILIES as COVERED

from purelm.convert.registry import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "convert/families").glob("*.py")), ids=lambda p: p.stem
)
def test_a_family_file_has_no_tensor_math(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("torch") for name in node.names)
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            assert not source.startswith("torch")
            assert not source.startswith("nn") or source == "nn.spec"
    assert path.stem in FAMILIES and FAMILIES[path.stem].module.__name__.endswith(path.stem)


@pytest.mark.parametrize("path", sorted((ROOT / "nn").glob("*.py")), ids=lambda p: p.stem)
def test_nn_knows_no_family(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "model_type" not in text
    code = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
    assert not code & set(FAMILIES)


def test_every_family_has_parity_cases() -> None:
    assert set(COVERED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_short_file(family: str) -> None:
    lines = (ROOT / f"convert/families/{family}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 85


def test_the_contributor_text_shows_a_real_family() -> None:
    """Qwen3's whole file but for its imports and docstrings, and its row in each other file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    file, rows = (
        textwrap.dedent(block) for block in re.findall(r"   ```python\n(.*?)   ```", text, re.S)
    )
    real = ast.parse((ROOT / "convert/families/qwen3.py").read_text(encoding="utf-8"))
    code = [node for node in real.body if not isinstance(node, ast.ImportFrom | ast.Expr)]
    for node in code:
        if isinstance(node, ast.FunctionDef):
            del node.body[0]  # its docstring
    assert ast.dump(ast.parse(file)) == ast.dump(ast.Module(code, type_ignores=[]))
    others = ("convert/registry.py", "tests/tiny.py", "tests/family_cases.py")
    for row, path in zip(rows.splitlines(), others, strict=True):
        assert row in (ROOT / path).read_text(encoding="utf-8"), path
