"""`purelm bench train` and `decode` beside other libraries; what a step's time goes to."""

import csv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

import purelm
from purelm import cli, nn
from purelm.bench import _beside, train
from purelm.bench._bars import stacked
from purelm.bench._breakdown import Span, kind, operations, split


def test_a_step_is_split_by_kinds_and_gaps() -> None:
    spans = [
        Span("nvjet_tst_128x256", 0.0, 4000.0),
        Span("Memcpy DtoH (Device -> Pinned)", 1000.0, 5000.0),  # beside the product
        Span("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 6000.0, 7000.0),
        Span("_nf4_kernel", 7000.0, 7500.0),
        Span("_silu_backward", 7500.0, 8000.0),
    ]
    assert split(spans, 10_000.0) == {
        "gemm": 4.0, "copies": 4.0, "attention": 1.0, "dequantize": 0.5, "elementwise": 0.5,
        "host gaps": 3.0,
    }  # fmt: skip
    assert split([], 2000.0) == {"host gaps": 2.0}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantize"),
        ("kOptimizerStatic8bit1StateBlockwise", "optimizer"),
        ("_cross_entropy_rows", "loss"),
        ("_rms_norm_backward", "elementwise"),
    ],
)
def test_kernels_are_known_by_name(name: str, wanted: str) -> None:
    assert kind(name) == wanted


def test_bars_are_the_parts() -> None:
    svg = stacked({"a & b": {"gemm": 3.0, "copies": 1.0}, "c": {"copies": 2.0}}, "one", "ms")
    bars = [
        float(rect.attrib["width"])
        for rect in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
        if len(rect)
    ]
    assert bars[0] == pytest.approx(3 * bars[1], rel=1e-2)
    assert bars[2] == pytest.approx(2 * bars[1], rel=1e-2)


def test_operations_by_formula_are_those_counted(folder: Path) -> None:
    model, _ = purelm.FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, load_in_4bit=False
    )
    ids = torch.randint(0, model.spec.vocab, (2, 24))
    counted = operations(lambda: nn.decoder.forward(model.params, model.spec, ids))
    step, longer = (train._model_operations(model, 2, length) for length in (24, 48))
    scores = (longer - 2 * step) / 2  # of 24 tokens: what grows with their square
    # A step has the forward's products twice, and seven causal products where it has two whole.
    assert counted == pytest.approx((step - scores) / 2 + scores * 4 / 7, rel=1e-9)
    layers, heads, width = 2, 2, 32
    product = 2 * width * 24 * 24 / 2  # causal, of one head and row
    assert scores == pytest.approx(7 * product * layers * heads * 2, rel=1e-9)


def test_attention_with_fewer_heads_of_keys_is_counted_whole() -> None:
    q, k = torch.randn(1, 4, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16)
    k.requires_grad_()

    def step() -> None:
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum().backward()

    product = 2 * 4 * 8 * 8 * 16
    assert operations(step) == 7 * product


def test_a_product_added_in_place_is_counted() -> None:
    y, x, w = torch.zeros(2, 5), torch.ones(2, 3), torch.ones(3, 5)
    assert operations(lambda: y.addmm_(x, w)) == 2 * 2 * 3 * 5


def test_a_figure_that_fails_costs_no_other() -> None:
    result: dict[str, Any] = {"tok_s": 3}
    train._note(result, "more", lambda: [].pop())
    train._note(result, "less", lambda: 2)
    assert result == {"tok_s": 3, "less": 2, "more_error": "IndexError: pop from empty list"}


def test_a_peer_that_is_not_there_is_a_row_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = [str(folder), "2", "8", "--steps", "1", "--warmup", "1", "--optimizer", "adamw"]
    rest = ["--beside", "unsloth", "--output", str(tmp_path)]
    assert cli.main(["bench", "train", *shape, *rest]) == 1
    with (tmp_path / "train.csv").open() as file:
        ours, other = csv.DictReader(file)
    assert float(ours["tok_s"]) > 0 and float(ours["model_tflops"]) >= 0
    assert other["peer"] == "unsloth" and "unsloth" in other["error"]
    said = capsys.readouterr().out
    assert "| purelm | " in said and "exit status 1" in said


@pytest.mark.parametrize(
    ("beside", "names"),
    [(["--beside", "unsloth", "hf"], ["unsloth", "hf"]), (["--beside=unsloth"], ["unsloth"])],
)
def test_decoding_beside(
    beside: list[str],
    names: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def results(module: str, arguments: list[str], timeout: float) -> list[_beside.Row]:
        seen.append((module, [*arguments]))
        ours = arguments[-1] == "purelm"
        row = {"peer": arguments[-1], "batch": 1, "token_ms": 2.0 if ours else 8.0}
        return [row | ({"roofline": 0.4} if ours else {})]

    monkeypatch.setattr(_beside, "results", results)
    run = ["bench", "decode", "m", "1", "--new", "4", *beside, "--rank", "2"]
    assert cli.main([*run, "--output", str(tmp_path)]) == 0
    kept = ["m", "1", "--new", "4", "--rank", "2", "--output", str(tmp_path), "--peer"]
    assert seen == [("decode", [*kept, peer]) for peer in ("purelm", *names)]
    assert "| unsloth | 1 | 8.0 | 0.1 |" in capsys.readouterr().out
