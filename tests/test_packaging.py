"""The house stays as it is laid out: what a wheel holds, who imports whom, what an import costs."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nn", "quant", "kernels", "convert")
# Each may import from itself and from those after it.
ORDER = ("face", "convert", "nn", "quant", "kernels")


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src", "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> list[Path]:
    real = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    face = ROOT / "src" / "purelm"
    return real + sorted([*face.glob("*.py"), *(face / "bench").glob("*.py")])


def home(path: Path) -> str:
    top = path.relative_to(ROOT).parts[0]
    return "face" if top == "src" else top


def imported(path: Path) -> set[str]:
    """Dotted names that the file imports, relative ones as `purelm.…`."""
    inside = path.relative_to(ROOT)
    package = ["purelm", *inside.parts[:-1]]
    if home(path) == "face":
        package = list(inside.parts[1:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build")
    # Not in ROOT's build/, where files lie that an earlier tree had.
    config = tmp_path / "extra.cfg"
    config.write_text(f"[build]\nbuild_base = {tmp_path / 'build'}\n")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "DIST_EXTRA_CONFIG": str(config)},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    want = {
        "purelm/" + str(p.relative_to(ROOT / "src" / "purelm" if home(p) == "face" else ROOT))
        for p in sources()
    }
    assert {n for n in names if n.endswith(".py")} == want
    assert "purelm/py.typed" in names
    assert all(n.endswith(".py") or n == "purelm/py.typed" or "/data/" in n for n in names)


def test_every_folder_with_sources_is_packaged() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    for path in sources():
        inside = path.relative_to(ROOT / "src" if home(path) == "face" else ROOT).parent
        dotted = ".".join(inside.parts if home(path) == "face" else ("purelm", *inside.parts))
        assert dotted in listed, path


def test_no_package_is_shadowed() -> None:
    """From the root, `kernels` is not ours, so that transformers' look-up of it stays right."""
    for folder in FOLDERS:
        assert not list((ROOT / folder).rglob("__init__.py"))
    found = python("import importlib.util as u; print(u.find_spec('kernels').origin)")
    assert str(ROOT) not in found
    python("import transformers.models.llama.modeling_llama")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    allowed = ORDER[ORDER.index(home(path)) :]
    for name in imported(path):
        if not name.startswith("purelm."):
            continue
        top = name.split(".")[1]
        where = top if top in FOLDERS else "face"
        assert where in allowed or top == "errors", f"{path} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_who_imports_what_from_outside(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    if path.name != "launch.py" and home(path) != "face":
        assert "triton" not in tops
    if home(path) in ("nn", "quant", "kernels"):
        assert not tops & {"safetensors", "huggingface_hub", "tokenizers", "jinja2", "tqdm"}
    if home(path) == "nn":
        assert "model_type" not in path.read_text()
    if path.parent.name == "families":
        assert "torch" not in tops


def test_import_is_light() -> None:
    before = python("import torch, sys; print(*sorted(sys.modules))").split()
    after = python("import torch, purelm, sys; print(*sorted(sys.modules))").split()
    assert {m for m in set(after) - set(before) if not m.startswith("purelm")} == set()
    heavy = ("transformers", "triton", "bitsandbytes", "peft", "matplotlib", "jinja2")
    loaded = python(
        "import torch, sys; before = set(sys.modules); "
        "from purelm import FastLanguageModel; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert not [m for m in loaded if m.split(".")[0] in heavy]


def test_import_changes_nothing_elsewhere() -> None:
    """torch, transformers, the environment, warnings and generators are what they were before."""
    python(
        """
import os, random, warnings, torch, transformers
def state():
    modules = {m: {k: id(v) for k, v in vars(m).items() if not k.startswith("__")}
               for m in (torch, torch.nn.Module, torch.nn.functional, torch.Tensor,
                         torch.utils.checkpoint, transformers.PreTrainedModel,
                         transformers.models.llama.modeling_llama.LlamaAttention)}
    return (modules, dict(os.environ), list(warnings.filters), random.getstate(),
            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads())
import transformers.models.llama.modeling_llama, torch.utils.checkpoint
before = state()
import purelm, purelm.convert.pretrained, purelm.nn.generate, purelm.cli
for name in purelm.__all__:
    getattr(purelm, name)
after = state()
assert before == after, [a for a, b in zip(before, after) if a != b]
"""
    )


def test_no_module_has_two_names() -> None:
    ours = tuple(str(ROOT / folder) + os.sep for folder in (*FOLDERS, "src"))
    python(
        "import sys, os\n"
        "import purelm.convert.pretrained, purelm.nn.generate\n"
        "seen = {}\n"
        "for name, module in list(sys.modules.items()):\n"
        "    file = os.path.realpath(getattr(module, '__file__', None) or '')\n"
        f"    if file.startswith({ours!r}):\n"
        "        assert seen.setdefault(file, name) == name\n"
        "assert len(seen) > 20\n"
    )


def test_parts_stand_alone() -> None:
    """kernels and quant work without nn and convert; nn works without convert."""
    python(
        "import sys, torch, purelm.quant.nf4 as q\n"
        "q.dequantize(q.quantize(torch.randn(8, 64)))\n"
        "assert not [m for m in sys.modules if m.startswith(('purelm.nn', 'purelm.convert'))]\n"
        "import purelm.nn.decoder, purelm.nn.lora, purelm.nn.loss\n"
        "assert not [m for m in sys.modules if m.startswith('purelm.convert')]\n"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code(path: Path) -> None:
    """No exec, eval, pickle, torch.load, shell or os.system anywhere in the library."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "compile", "torch.load", "os.system"), called
            assert not any(k.arg == "shell" for k in node.keywords)
    assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "marshal", "dill"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_other_peoples_models_stay_outside(path: Path) -> None:
    """transformers and peft where a tokenizer is handed to one, and where they are measured."""
    others = {"transformers", "peft"}
    found = {name.split(".")[0] for name in imported(path)} & others
    assert not found or path.name == "tokenizer_export.py" or path.parent.name == "bench"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & others
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in others


def test_types_and_style_are_clean() -> None:
    subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, check=True)
    env = {**os.environ, "MYPY_CACHE_DIR": ".mypy_cache"}
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
