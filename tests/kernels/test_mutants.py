"""Kernels with one thing wrong are noticed by their own tests: nearly all of them, and cleanly."""

import functools
import importlib.util
import inspect
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import mutants
import pytest

from purelm.kernels import (
    cross_entropy_rows,
    decode_attention,
    fp8_launch,
    fp8_made,
    fp8_nf4_launch,
    gated,
    nf4_launch,
    nf4_matvec_launch,
    nf4_quantize_launch,
    nf4_row,
    nf4_tensor,
    rms_norm_launch,
    rope_launch,
)

HERE = Path(__file__).parent
EXAMPLES, COUNT = 12, 60
# The file of tests and the module of kernels.
FAMILIES: dict[str, tuple[str, ModuleType]] = {
    "gated": ("gated", gated),
    "rms_norm": ("rms_norm", rms_norm_launch),
    "rope": ("rope", rope_launch),
    "cross_entropy": ("cross_entropy", cross_entropy_rows),
    "nf4_quantize": ("nf4", nf4_quantize_launch),
    "nf4_dequantize": ("nf4", nf4_launch),
    "nf4_matvec": ("nf4_matvec", nf4_matvec_launch),
    "nf4_tensor": ("nf4_products", nf4_tensor),
    "nf4_row": ("nf4_products", nf4_row),
    "decode_attention": ("decode_attention", decode_attention),
    "fp8_cast": ("fp8", fp8_launch),
    "fp8_nf4": ("fp8", fp8_nf4_launch),
    "fp8_made": ("fp8_made", fp8_made),
}


def asked_of(name: str) -> list[Any]:
    """What the tests of a kernel's file ask of its launches, as functions without arguments: the
    file is imported anew, properties get few examples."""
    file = HERE / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    few = hypothesis.settings(
        max_examples=EXAMPLES, database=None, derandomize=True, deadline=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    made = []
    everywhere = [mark.args for mark in [getattr(module, "pytestmark", None)] if mark]
    for f in vars(module).values():
        if not getattr(f, "__name__", "").startswith("test_"):
            continue
        f = few(f) if getattr(f, "is_hypothesis_test", False) else f
        choices: dict[str, Any] = {"interpreted": [None], "poisoned": [None]}
        for mark in getattr(f, "pytestmark", []):
            if mark.name == "parametrize":
                choices[mark.args[0]] = mark.args[1]
        choices["on"] = [True]
        names = inspect.signature(f).parameters
        if "interpreted" in {*names, *itertools.chain(*everywhere)} and set(names) <= set(choices):
            values = itertools.product(*(choices[name] for name in names))
            made += [functools.partial(f, **dict(zip(names, some, strict=True))) for some in values]
    return made


def killed(test: Any) -> str | None:
    """What a test raised, if anything."""
    try:
        test()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_most_mutants_are_killed(
    interpreted: None, poisoned: None, family: str, tmp_path: Path
) -> None:
    name, module = FAMILIES[family]
    tests = asked_of(name)
    assert tests and not any(map(killed, tests)), "the kernel itself must pass"
    survivors = []
    made = mutants.drawn(module, COUNT)
    for mutant in made:
        with mutants.installed(mutant, tmp_path):
            if not any(map(killed, tests)):
                survivors.append(str(mutant))
    print(f"{family}: {len(made)} mutants, {len(survivors)} live", *survivors, sep="\n  ")
    assert len(survivors) <= 0.05 * len(made), "\n".join(survivors)


def test_a_mutant_is_noticed_and_undone(interpreted: None, poisoned: None, tmp_path: Path) -> None:
    property_test = asked_of("gated")[0]
    wrong = next(m for m in mutants.every(gated) if m.what == "b_act * b_up -> b_act + b_up")
    assert wrong.name == "_forward_kernel" and killed(property_test) is None
    with mutants.installed(wrong, tmp_path):
        assert "AssertionError" in str(killed(property_test))
    assert killed(property_test) is None
