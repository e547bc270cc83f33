"""Broken files of every stored form: a typed error, or a model whose every value is finite.

One thing at a time is spoilt by name, and hypothesis spoils up to three at once. Nothing takes
more than 2 s or 200 MB.
"""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from audit import watched
from faults import bounded, spoil
from hypothesis import given
from hypothesis import strategies as st
from stored_bases import FORMS, Stored, write

from purelm.convert.load import load_folder
from purelm.errors import CheckpointError, ConfigError, LoadError
from purelm.nn import tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported when first needed is no part of what a broken file costs."""
    for name, form in FORMS.items():
        stored = form()
        read(stored, write(stored, tmp_path_factory.mktemp(name)))


def read(stored: Stored, folder: Path, quantize: str | None = None) -> tree.Tree:
    return load_folder(
        folder,
        quantize=quantize,  # type: ignore[arg-type]
        dtype=torch.float32,
        device=CPU,
        text_only=stored.text_only,
    ).params


def refused(
    stored: Stored, folder: Path, error: type[LoadError], quantize: str | None = None
) -> None:
    """Loading fails with that error, which names the place, and nothing else was touched."""
    write(stored, folder)
    with bounded(), watched() as events, pytest.raises(LoadError) as caught:
        read(stored, folder, quantize)
    assert type(caught.value) is error, caught.value
    assert len(str(caught.value)) < 4000
    assert str(folder) in str(caught.value) or caught.value.tensor
    inside = os.path.realpath(folder)
    assert [e for e in events if e[0] != "open" or not Path(e[1]).is_relative_to(inside)] == []


# By name: what is spoilt in which form.

Q = "model.layers.0.self_attn.q_proj."
DOWN = "model.layers.1.mlp.down_proj."
GATE = "model.layers.0.mlp.experts.gate_up_proj"
Spoil = Callable[[Stored], object]


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda s: s.tensors.update({name: change(s.tensors[name])})


def gone(name: str) -> Spoil:
    return lambda s: s.tensors.pop(name)


def filled(name: str, value: float) -> Spoil:
    return tensor(name, lambda t: torch.full_like(t, value))


def quantization(**fields: Any) -> Spoil:
    return lambda s: s.config["quantization_config"].update(fields)


def state(name: str, **fields: Any) -> Spoil:
    def spoil(stored: Stored) -> None:
        found = json.loads(stored.tensors[name].numpy().tobytes())
        content = bytearray(json.dumps(found | fields).encode())
        stored.tensors[name] = torch.frombuffer(content, dtype=torch.uint8)

    return spoil


STATE = DOWN + "weight.quant_state.bitsandbytes__"
NAN, INF = float("nan"), float("inf")
# form, what is wrong -> (spoil, error); tried as stored, and dequantized.
BROKEN: dict[tuple[str, str], tuple[Spoil, type[LoadError]]] = {
    ("gptq", "no zeros"): (gone(Q + "qzeros"), CheckpointError),
    ("gptq", "no words"): (gone(Q + "qweight"), CheckpointError),
    ("gptq", "no groups of inputs"): (gone(Q + "g_idx"), CheckpointError),
    ("gptq", "group beyond the last"): (filled(Q + "g_idx", 2), CheckpointError),
    ("gptq", "group of 2^31 - 1"): (filled(Q + "g_idx", 2**31 - 1), CheckpointError),
    ("gptq", "scale NaN"): (filled(Q + "scales", NAN), CheckpointError),
    ("gptq", "words cut"): (tensor(Q + "qweight", lambda t: t[:1]), CheckpointError),
    ("gptq", "words turned"): (tensor(DOWN + "qweight", lambda t: t.T), CheckpointError),
    ("gptq", "no inputs"): (tensor(Q + "qweight", lambda t: t[:0]), CheckpointError),
    ("gptq", "three dimensions"): (tensor(Q + "scales", lambda t: t[None]), CheckpointError),
    ("gptq", "words of floats"): (tensor(Q + "qweight", lambda t: t.float()), CheckpointError),
    ("gptq", "bits true"): (quantization(bits=True), ConfigError),
    ("gptq", "bits a text"): (quantization(bits="4"), ConfigError),
    ("gptq", "bits 8"): (quantization(bits=8), CheckpointError),
    ("gptq", "bits a list"): (quantization(bits=[4]), ConfigError),
    ("gptq", "layout a list"): (quantization(checkpoint_format=["gptq"]), ConfigError),
    ("gptq", "called awq"): (quantization(quant_method="awq"), CheckpointError),
    ("gptq", "method a list"): (quantization(quant_method=["gptq"]), ConfigError),
    ("awq", "no scales"): (gone(Q + "scales"), CheckpointError),
    ("awq", "scale infinite"): (filled(Q + "scales", INF), CheckpointError),
    ("awq", "groups do not divide"): (tensor(DOWN + "scales", lambda t: t.repeat(4, 1)[:5]),
                                      CheckpointError),
    ("awq", "no groups"): (tensor(Q + "scales", lambda t: t[:0]), CheckpointError),
    ("awq", "words turned"): (tensor(DOWN + "qweight", lambda t: t.T), CheckpointError),
    ("awq", "zeros of another width"): (tensor(Q + "qzeros", lambda t: t[:, :1]), CheckpointError),
    ("awq", "bits a float"): (quantization(bits=4.0), ConfigError),
    ("awq", "version a number"): (quantization(version=2), ConfigError),
    ("awq", "no zero points"): (quantization(zero_point=0), ConfigError),
    ("int8", "no rows' largest"): (gone(Q + "SCB"), CheckpointError),
    ("int8", "rows' largest NaN"): (filled(Q + "SCB", NAN), CheckpointError),
    ("int8", "rows' largest infinite"): (filled(Q + "SCB", INF), CheckpointError),
    ("int8", "one for all rows"): (tensor(Q + "SCB", lambda t: t[:1]), CheckpointError),
    ("int8", "of halves"): (tensor(Q + "SCB", lambda t: t.half()), CheckpointError),
    ("int8", "tiled"): (filled(Q + "weight_format", 1), CheckpointError),
    ("int8", "many layouts"): (tensor(Q + "weight_format", lambda t: t.repeat(9)), CheckpointError),
    ("int8", "threshold a text"): (quantization(llm_int8_threshold="6"), ConfigError),
    ("int8", "threshold NaN-like"): (quantization(llm_int8_threshold=None), ConfigError),
    ("int8", "threshold negative"): (quantization(llm_int8_threshold=-1.0), ConfigError),
    ("fp4", "no state"): (gone(STATE + "fp4"), CheckpointError),
    ("fp4", "maximum NaN"): (filled(DOWN + "weight.absmax", NAN), CheckpointError),
    ("fp4", "maximum infinite"): (filled(DOWN + "weight.absmax", INF), CheckpointError),
    ("fp4", "block of 63"): (state(STATE + "fp4", blocksize=63), CheckpointError),
    ("fp4", "block of 0"): (state(STATE + "fp4", blocksize=0), CheckpointError),
    ("fp4", "block another size"): (state(STATE + "fp4", blocksize=128), CheckpointError),
    ("fp4", "shape another"): (state(STATE + "fp4", shape=[24, 16]), CheckpointError),
    ("fp4", "shape enormous"): (state(STATE + "fp4", shape=[2**39, 2**39]), CheckpointError),
    ("fp4", "shape negative"): (state(STATE + "fp4", shape=[-16, -24]), CheckpointError),
    ("fp4", "kind nf4 within"): (state(STATE + "fp4", quant_type="nf4"), CheckpointError),
    ("fp4", "levels others"): (filled(DOWN + "weight.quant_map", 0.5), CheckpointError),
    ("nf4_double", "offset infinite"): (state(STATE + "nf4", nested_offset=INF), CheckpointError),
    ("nf4_double", "offset a text"): (state(STATE + "nf4", nested_offset="0"), CheckpointError),
    ("nf4_double", "no maxima of maxima"): (gone(DOWN + "weight.nested_absmax"), CheckpointError),
    ("nf4_double", "codes cut"): (tensor(DOWN + "weight", lambda t: t[:-1]), CheckpointError),
    ("fp8_block", "no scale"): (gone(Q + "weight_scale_inv"), CheckpointError),
    ("fp8_block", "scale NaN"): (filled(Q + "weight_scale_inv", NAN), CheckpointError),
    ("fp8_block", "scales of more blocks"): (
        tensor(Q + "weight_scale_inv", lambda t: t.repeat(2, 1)), CheckpointError),
    ("fp8_block", "a code is NaN"): (
        tensor(Q + "weight", lambda t: torch.full_like(t.view(torch.uint8), 127).view(t.dtype)),
        CheckpointError),
    ("fp8_block", "blocks of 64"): (quantization(weight_block_size=[64, 64]), ConfigError),
    ("fp8_block", "blocks a text"): (quantization(weight_block_size="128"), ConfigError),
    ("fp8_row", "a scale for half of the rows"): (
        tensor(DOWN + "weight_scale", lambda t: t[: len(t) // 2]), CheckpointError),
    ("fp8_row", "scales of integers"): (
        tensor(DOWN + "weight_scale", lambda t: t.int()), CheckpointError),
    ("fp8_row", "weight one long row"): (tensor(Q + "weight", lambda t: t.view(-1)),
                                         CheckpointError),
    ("mxfp4", "no scales"): (gone(GATE + "_scales"), CheckpointError),
    ("mxfp4", "exponent 255"): (filled(GATE + "_scales", 255), CheckpointError),
    ("mxfp4", "exponent 254"): (filled(GATE + "_scales", 254), CheckpointError),
    ("mxfp4", "blocks of 8 bytes"): (tensor(GATE + "_blocks", lambda t: t[..., :8]),
                                     CheckpointError),
    ("mxfp4", "flat"): (tensor(GATE + "_blocks", lambda t: t.flatten(2)), CheckpointError),
    ("mxfp4", "experts missing"): (
        lambda s: s.tensors.update({GATE + end: s.tensors[GATE + end][:1]
                                    for end in ("_blocks", "_scales")}), CheckpointError),
    ("vision_language", "no text half"): (
        lambda s: s.config.pop("text_config"), ConfigError),
    ("vision_language", "text half a list"): (
        lambda s: s.config.update(text_config=["llama"]), ConfigError),
    ("vision_language", "text half of itself"): (
        lambda s: s.config.update(text_config=dict(s.config)), ConfigError),
    ("vision_language", "wrapper not known"): (
        lambda s: s.config.update(model_type="llama_omni"), ConfigError),
    ("vision_language", "two heads"): (
        lambda s: s.tensors.update({"lm_head.weight": s.tensors["language_model.lm_head.weight"]
                                    .clone()}), CheckpointError),
    ("vision_language", "text tensors missing"): (
        lambda s: [s.tensors.pop(n) for n in list(s.tensors) if ".0.mlp" in n], CheckpointError),
    ("vision_language", "text tensors of no name"): (
        lambda s: [s.tensors.pop(n) for n in list(s.tensors) if "language" in n], CheckpointError),
    ("vision_language", "rope a list"): (
        lambda s: s.config["text_config"].update(rope_scaling=["mrope"]), ConfigError),
    ("vision_language", "sizes of texts"): (
        lambda s: s.config["text_config"].update(hidden_size="16"), ConfigError),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=", ".join)
def test_what_does_not_fit(case: tuple[str, str], tmp_path: Path) -> None:
    broken, error = BROKEN[case]
    stored = FORMS[case[0]]()
    broken(stored)
    for quantize in {None, stored.keep}:
        refused(deepcopy(stored), tmp_path / str(quantize), error, quantize)


# Whatever hypothesis makes of them.


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_spoilt_checkpoints(
    form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    stored = FORMS[form]()
    spoil(data.draw, stored)
    folder = write(stored, tmp_path_factory.mktemp("spoilt"))
    for quantize in sorted({None, stored.keep}, key=str):
        with bounded():
            try:
                params = read(stored, folder, quantize)
            except LoadError as problem:
                assert len(str(problem)) < 8000 and (problem.file or problem.tensor), problem
            else:
                for t in tree.tensors(params):
                    assert not t.is_floating_point() or bool(t.float().isfinite().all())
