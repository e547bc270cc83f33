"""`purelm bench kernels` at tiny shapes, under the interpreter: what is checked, timed, refused."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from purelm import cli
from purelm.bench import _kernel_case, _kernel_cases, _kernel_cases_nf4, _kernel_time, kernels
from purelm.bench._kernel_case import SHAPES
from purelm.bench._kernel_cases import KERNELS
from purelm.bench._kernel_check import CheckFailed, against, close
from purelm.bench._kernel_peers import Calls
from purelm.bench._roofline import Point, picture
from purelm.kernels import gated


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "kernels.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_kernel(
    interpreted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--no-first", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = table(tmp_path)
    wanted = [
        (case.kernel, case.size)
        for make in KERNELS.values()
        for case in make(SHAPES["tiny"], torch.device("cpu"))
    ]
    assert [(row["kernel"], row["size"]) for row in rows] == wanted
    assert {row["path"] for row in rows if not row["kernel"].startswith("attention")} == {"triton"}
    assert all(float(row["us"]) > 0 and not row["refused"] for row in rows)
    assert all(f"torch={torch.__version__}" in row["versions"] for row in rows)
    said = capsys.readouterr().out
    assert all(kernel in said for kernel, _ in wanted)
    picture = ElementTree.parse(tmp_path / "kernels.svg").getroot()
    points = [c for c in picture.iter("{http://www.w3.org/2000/svg}circle") if len(c)]
    assert len(points) == len(wanted)


def test_a_wrong_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gated.gated
    monkeypatch.setattr(gated, "gated", lambda g, u, a: right(g, u, a) * 1.1)
    options = ["--no-first", "--device=cpu", "--output", str(tmp_path)]
    assert cli.main(["bench", "kernels", "--kernels", "gated,rope", *options]) == 1
    wrong = [row for row in table(tmp_path) if row["kernel"].startswith("gated")]
    assert len(wrong) == 2
    assert all("times the limit" in row["refused"] and not row["us"] for row in wrong)
    assert all(row["us"] for row in table(tmp_path) if row["kernel"].startswith("rope"))
    said = capsys.readouterr().out
    assert said.count("REFUSED gated silu") == 2 and "REFUSED rope" not in said


@pytest.mark.parametrize("wrong", ["codes", "raises"])
def test_bytes_are_held_to_the_bit(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """One bit of one code, or an error, is enough."""
    nf4 = _kernel_cases_nf4.nf4
    right = nf4.quantize

    def quantize(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "raises":
            raise RuntimeError("out of memory")
        packed, absmax = right(w, block)
        packed[7] ^= 1
        return packed, absmax

    monkeypatch.setattr(nf4, "quantize", quantize)
    rows, _ = kernels.measure(["nf4-quantize"], ["tiny"], [], torch.device("cpu"))
    assert [bool(row["refused"]) for row in rows] == [True, True]
    assert "us" not in rows[0]


def test_the_rule_sees_what_it_must() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    ours = x.float()
    close("y", ours, ours, x)
    for bad in (float("nan"), 3.0):
        ours = x.float()
        ours[2, 5] += bad
        with pytest.raises(CheckFailed, match="1 of 4 rows"):
            close("y", ours, x.float(), x)


def test_gradients_are_checked() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return dy

    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    against(Wrong.apply, torch.square)((x,), (dy,))
    with pytest.raises(CheckFailed, match="gradient 0"):
        against(Wrong.apply, torch.square, (0,))((x,), (dy,))


def test_peers_stand_beside_and_may_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(case: _kernel_case.Case) -> Calls:
        return {"twice": _kernel_case.forward(lambda *args: None)}

    def bad(case: _kernel_case.Case) -> Calls:
        raise ImportError("no such thing")

    monkeypatch.setattr(kernels, "PEERS", {"good": good, "bad": bad})
    rows, _ = kernels.measure(["rope"], ["tiny"], ["bad", "good"], torch.device("cpu"))
    assert [row["who"] for row in rows[:3]] == ["purelm", "twice", "purelm"]
    assert "bad failed at rope" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["all", "one"])
def test_first_result(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--first={how}", "--kernels=gated", "--device=cpu", "--shapes"]
    assert kernels.main([*options, "tiny"]) == 0
    assert json.loads(capsys.readouterr().out) > 0


def test_a_model_is_run_with_what_it_alone_has() -> None:
    assert not list(_kernel_cases.cases("gated", "lfm2", torch.device("cpu")))
    found = _kernel_cases.cases("short-conv", "lfm2", torch.device("cpu"))
    assert [case.size for case in found] == ["8x2048x2048, 3 taps"] * 2


def test_an_unknown_name_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--kernels", "--shapes", "--peers"):
        with pytest.raises(SystemExit):
            cli.main(["bench", "kernels", flag, "nothing"])
        assert "'nothing': expected some of" in capsys.readouterr().err


def test_inputs_outgrow_the_cache() -> None:
    assert _kernel_time.copies_for(1e9) == 1
    assert 32 <= _kernel_time.copies_for(8e6) <= 64


def test_the_roof_is_where_the_ceilings_say() -> None:
    """A point at the ridge lies on the roof's corner."""
    svg = picture([Point("a", "<a>", 300.0, 6e14, True)], 2e12, 6e14, "t")
    root = ElementTree.fromstring(svg)
    line = root.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    corner = line.attrib["points"].split()[1]
    circle = next(c for c in root.iter("{http://www.w3.org/2000/svg}circle") if len(c))
    assert corner == f"{circle.attrib['cx']},{circle.attrib['cy']}"
