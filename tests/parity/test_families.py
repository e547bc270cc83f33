"""Every family against transformers' own class: fp32, tiny weights, each config switch thrown."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from family_cases import CASES, FAMILIES, LLAMA3, MAGNIFIED, VARIANTS, name_of

from purelm.convert.fused import stored
from purelm.convert.load import Loaded, load_folder
from purelm.nn import cache as kv
from purelm.nn import decoder, layout, lora, loss, stacks, tree
from purelm.nn.residuals import KEEP, OFFLOAD, RECOMPUTE
from purelm.quant.nf4 import NF4, dequantize

MODELS = [*((family, {}) for family in FAMILIES), *VARIANTS]
cases = pytest.mark.parametrize(("family", "switches"), CASES, ids=[name_of(c) for c in CASES])
# What where a token stands and whom it sees may hang on: other cases of a family stand for it.
PLACES = "rope window layer chunk alibi conv shared position bidirectional parallel rotary mamba"
placed = pytest.mark.parametrize(
    ("family", "switches"),
    [
        pytest.param(
            *case,
            id=name_of(case),
            marks=[]
            if not case[1] or any(word in name_of(case) for word in PLACES.split())
            else [pytest.mark.full],
        )
        for case in CASES
    ],
)


def load_both(
    family: str, switches: dict[str, Any], tmp_path: Path, **options: Any
) -> tuple[Any, Loaded]:
    model = tiny.hf_model(family, **switches)
    folder = tiny.save(model, tmp_path / "model")
    options = {"quantize": None, "dtype": None, "device": torch.device("cpu"), **options}
    return model, load_folder(folder, **options)


def theirs_of(model: Any, loaded: Loaded, grad: bool = False) -> dict[str, torch.Tensor]:
    """transformers' weights, or their gradients, by our paths; fused ones taken apart, as views
    with an axis of kv heads in front where they are stored head by head.
    """
    names, found = loaded.family.names, {}
    known = dict(tree.items(stacks.one_by_one(loaded.params)))
    for name, p in (*model.named_parameters(), *tiny.trained_buffers(model)):
        value = p.grad if grad else p.data
        value = value.mT if names.is_transposed(name) else value
        one = stored(name, names, loaded.spec, known)
        if one is None:
            found[names.to_ours(name, known)] = value
        else:
            found.update({path: one.view(value, i) for i, path in enumerate(one.paths)})
    return found


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def tokens(seed: int = 1, rows: int = 2, length: int = 31) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


# Cases with gradients that may be farther than 1e-5 from transformers': which tensors, by the ends
# of their paths, and how far. The figures beside are the largest measured with AVX-512, AVX2 and
# neither (ATEN_CPU_CAPABILITY), since all of it is the order in which sums are added up.
FARTHER: dict[str, dict[str, float]] = {
    # Scores scaled up sharpen the softmax, which amplifies that order: 1.5e-5, in every tensor.
    "gemma2-attn_logit_softcapping-query_pre_attn_scalar": {"": 1.8e-5},
    # A delta net normalizes what it reads from its state, and a token whose state says nearly
    # nothing has its rounding blown up: 1.4e-5, in what lies before it.
    "qwen3_next-rms_norm_eps": {"": 1.8e-5},
    # What follows are single numbers, of a layer or of a head, whose gradient is a sum over all
    # tokens that nearly cancels. xIELU's, over all features too: 3.6e-5, its terms adding up to 970
    # times their sum.
    "apertus-head_dim-rms_norm_eps": {"act.alpha_p": 4.5e-5},
    "apertus-head_dim": {"act.alpha_p": 4e-5},  # 3.1e-5
    # A router's bias; a norm of keys whose attention hardly tells them apart.
    "gpt_oss": {"router.bias": 2.8e-5},  # 2.2e-5
    "gemma4_text-use_double_wide_mlp-attention_k_eq_v": {"k_norm.weight": 1.4e-5},  # 1.1e-5
    # Of a mixer: the terms of its heads add up to 3 to 17 times their sum, of single ones to 600.
    "falcon_h1-mamba_rms_norm-rms_norm_eps-mamba_norm_before_gate-mamba_d_conv": {
        "recurrent.D": 1.4e-5,  # 1.1e-5
    },
    "falcon_h1-mamba_rms_norm-rms_norm_eps-mamba_norm_before_gate-mlp_bias": {
        "recurrent.dt_bias": 1.8e-5,  # 1.5e-5
        "recurrent.D": 2.8e-5,  # 2.3e-5
        "": 1.8e-5,  # 1.4e-5, in what lies before a gated norm of next to nothing
    },
    "falcon_h1-mamba_proj_bias-projectors_bias-attention_bias": {
        "recurrent.A_log": 2.2e-5,  # 1.8e-5
    },
    "bamba-head_dim-tie_word_embeddings-rope_parameters-rms_norm_eps-default": {
        "recurrent.A_log": 1.6e-5,  # 1.2e-5
    },
    "granitemoehybrid-layer_types-mamba_d_conv-use_cache": {
        "recurrent.dt_bias": 1.5e-5,  # 1.2e-5
    },
    "granitemoehybrid-num_experts_per_tok": {"recurrent.dt_bias": 1.5e-5},  # 1.2e-5
    "granitemoehybrid-position_embedding_type-rope_parameters-default": {
        "recurrent.dt_bias": 3e-5,  # 2.9e-5
    },
    "granitemoehybrid-tie_word_embeddings": {"recurrent.A_log": 2.9e-5},  # 2.3e-5
    "qwen3_next-mlp_only_layers-num_experts_per_tok-num_key_value_heads": {
        "recurrent.A_log": 1.3e-5,  # 1.0e-5
    },
    "qwen3_5_text": {
        "recurrent.A_log": 1.6e-5,  # 1.3e-5
        "recurrent.dt_bias": 1.4e-5,  # 1.1e-5
    },
    "qwen3_5_text-layer_types-tie_word_embeddings": {
        "recurrent.A_log": 1.6e-5,  # 1.3e-5
        "recurrent.dt_bias": 1.4e-5,  # 1.1e-5
    },
    "qwen3_5_text-rms_norm_eps": {
        "recurrent.A_log": 2.8e-5,  # 2.2e-5
        "recurrent.dt_bias": 2e-5,  # 1.6e-5
    },
    "qwen3_5_moe_text-linear_key_head_dim-linear_conv_kernel_dim": {
        "recurrent.A_log": 4.5e-5,  # 3.6e-5
        "recurrent.dt_bias": 3e-5,  # 2.8e-5
    },
}


def farthest(case: tuple[str, dict[str, Any]], path: str) -> float:
    """How far the gradient of a tensor may be from transformers', relative to its norm."""
    listed = FARTHER.get(name_of(case), {})
    return next((limit for end, limit in listed.items() if path.endswith(end)), 1e-5)


def test_what_is_farther_is_of_cases() -> None:
    names = [name_of(case) for case in CASES]
    for case, listed in FARTHER.items():
        assert names.count(case) == 1, case
        assert all(1e-5 < limit <= 1e-4 for limit in listed.values())


@cases
def test_logits_and_gradients(family: str, switches: dict[str, Any], tmp_path: Path) -> None:
    model, loaded = load_both(family, switches, tmp_path)
    ids = tokens()
    for t in tree.tensors(loaded.params):
        t.requires_grad_()
    for _, buffer in tiny.trained_buffers(model):
        buffer.requires_grad_()
    theirs = model(ids, labels=ids)
    assert_same_logits(decoder.forward(loaded.params, loaded.spec, ids), theirs.logits.detach())
    ours = loss.loss(loaded.params, loaded.spec, ids, ids)
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-6, atol=0)
    ours.backward()
    theirs.loss.backward()
    want = theirs_of(model, loaded, grad=True)
    grads = tree.map(lambda leaf: leaf.grad, loaded.params)
    chooses = [path for path, leaf in tree.items(loaded.params) if leaf.grad is None]
    assert all(path.endswith("router.bias") for path in chooses)
    for path, found in tree.items(stacks.one_by_one(grads)):
        grad = want[path].reshape(found.shape)
        size = grad.norm()
        if path.endswith("k.bias"):
            # What a bias on k shifts alike in all scores cancels (without positions, all of it):
            # what is left carries the rounding of the same sums as the weight's gradient.
            size = max(size, want[path.replace("bias", "weight")].norm())
        if path.endswith("scale") and path.count(".") == 2:
            # What a factor of the whole stream changes cancels in the norms that follow; of the
            # last layer all of it: what is left is the rounding of the same sums as the norm's.
            size = max(size, want[path.replace("scale", "mlp_post_norm.weight")].norm())
        assert (found - grad).norm() <= farthest((family, switches), path) * size, path


@placed
def test_left_padding(family: str, switches: dict[str, Any], tmp_path: Path) -> None:
    """A left-padded row has the logits of the row alone."""
    model, loaded = load_both(family, switches, tmp_path)
    short, long = tokens(2, 1, 9), tokens(3, 1, 20)
    if switches.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope"):
        short = tokens(2, 1, 20)  # its frequencies follow the longest row of a batch, in HF too
    pad = long.shape[1] - short.shape[1]
    batch = torch.cat([torch.nn.functional.pad(short, (pad, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    ours = decoder.forward(loaded.params, loaded.spec, batch, layout=layout.from_mask(mask))
    assert_same_logits(ours[:1, pad:], model(short).logits)
    assert_same_logits(ours[1:], model(long).logits)


@placed
def test_packed_rows(family: str, switches: dict[str, Any], tmp_path: Path) -> None:
    """Documents packed into one row have the logits and the loss of each alone."""
    model, loaded = load_both(family, switches, tmp_path)
    of_length = name_of((family, switches)).endswith(("dynamic", "longrope"))
    lengths = (20, 20) if of_length else (5, 17, 9)
    documents = [tokens(i, 1, n) for i, n in enumerate(lengths)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    row = torch.cat(documents, 1)
    packed = layout.from_cu_seqlens(ends, row.shape[1])
    ours = decoder.forward(loaded.params, loaded.spec, row, layout=packed)
    alone = torch.cat([model(document).logits for document in documents], 1)
    assert_same_logits(ours, alone)
    total = loss.loss(loaded.params, loaded.spec, row, row, layout=packed, count=1.0)
    want = sum(
        model(document, labels=document).loss * (document.shape[1] - 1) for document in documents
    )
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    by_position = layout.from_positions(packed.positions)
    assert torch.equal(decoder.forward(loaded.params, loaded.spec, row, layout=by_position), ours)


@pytest.mark.parametrize(
    ("family", "switches"), MODELS, ids=[name_of(model)[:40] for model in MODELS]
)
def test_nf4(family: str, switches: dict[str, Any], tmp_path: Path) -> None:
    """Quantized matrices are bitsandbytes', and logits are transformers' on what they stand for."""
    from bitsandbytes import functional as bnb

    # Widths of whole blocks: bitsandbytes' CPU dequantizer reads other rows with the wrong scales.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, **switches}
    model, loaded = load_both(family, sizes, tmp_path, quantize="nf4")
    want = theirs_of(model, loaded)
    quantized = 0
    with torch.no_grad():
        for path, leaf in tree.items(stacks.one_by_one(loaded.params)):
            if not isinstance(leaf, NF4):
                continue
            quantized += 1
            weight = want[path].reshape(leaf.shape)
            packed, state = bnb.quantize_4bit(
                weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            assert torch.equal(leaf.packed, packed.flatten())
            assert torch.equal(leaf.absmax, state.absmax)
            dense = dequantize(leaf, torch.float32)
            assert torch.equal(dense, bnb.dequantize_4bit(packed, state))
            want[path].copy_(dense.view_as(want[path]))
    assert quantized == sum(p.quantize for p in tree.leaves(stacks.each_spec(loaded.spec)))
    assert quantized >= 5 * 3
    ids = tokens()
    assert_same_logits(decoder.forward(loaded.params, loaded.spec, ids), model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [7, 20], ids=["short", "long"])
def test_recomputed_layers(family: str, length: int, tmp_path: Path) -> None:
    """Adapters get the gradients of plain autograd, equal to the bit under every policy."""
    _, loaded = load_both(family, {}, tmp_path)
    generator = torch.Generator().manual_seed(3)
    adapters = lora.init(loaded.spec, rank=3, generator=generator)
    for leaf in tree.leaves(adapters):
        leaf.b.normal_(generator=generator)
    leaves = [t.requires_grad_() for t in tree.tensors(adapters)]
    ids = tokens(4, 2, length)

    def grads(policy: Any) -> Any:
        given = {"adapters": adapters, "residuals": policy}
        return torch.autograd.grad(loss.loss(loaded.params, loaded.spec, ids, ids, **given), leaves)

    kept = grads(KEEP)
    for ours, want in zip(kept, grads(None), strict=True):
        assert (ours - want).norm() <= 1e-5 * want.norm()
    for policy in (RECOMPUTE, OFFLOAD):
        assert all(torch.equal(a, b) for a, b in zip(grads(policy), kept, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time(family: str, tmp_path: Path) -> None:
    """The cache changes nothing, behind left padding too."""
    _, loaded = load_both(family, {}, tmp_path)
    ids, mask = tokens(5, 2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    full = layout.from_mask(mask)
    assert full.segments is not None
    want = decoder.forward(loaded.params, loaded.spec, ids, layout=full)
    cache = kv.empty(loaded.spec, 2, 20, padded=True, dtype=torch.float32, device="cpu")
    steps = [slice(0, 9), *(slice(i, i + 1) for i in range(9, 20))]
    parts = []
    for at in steps:
        part = layout.Layout(full.positions[:, at], full.segments[:, at])
        x, cache = decoder.extend(loaded.params, loaded.spec, ids[:, at], cache, layout=part)
        parts.append(decoder.logits(loaded.params, loaded.spec, x))
    ours = torch.cat(parts, 1)
    assert_same_logits(ours[0, 3:], want[0, 3:])
    assert_same_logits(ours[1], want[1])


OLD_STYLE = [
    ({"rope_theta": 777.0}, {"rope_theta": 777.0}),
    (
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        LLAMA3,
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD_STYLE, ids=["theta", "llama3", "linear"])
def test_old_config_keys(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` at the top say what `rope_parameters` says."""
    model = tiny.hf_model("llama", rope_parameters=new)
    folder = tiny.save(model, tmp_path / "model")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps({**fields, **old}))
    loaded = load_folder(folder, quantize=None, dtype=None, device=torch.device("cpu"))
    ids = tokens()
    assert_same_logits(decoder.forward(loaded.params, loaded.spec, ids), model(ids).logits)


def test_long_rows_of_phimoe_take_the_long_factors(tmp_path: Path) -> None:
    """As in Microsoft's code; transformers 5 forgets to tell its frequencies the row's length."""
    switches = {"rope_parameters": {**MAGNIFIED, "original_max_position_embeddings": 20}}
    model, loaded = load_both("phimoe", switches, tmp_path)
    ids, rotary = tokens(), model.model.rotary_emb
    made = rotary.rope_init_fn
    rotary.rope_init_fn = lambda config: made(config, seq_len=ids.shape[1])
    assert_same_logits(decoder.forward(loaded.params, loaded.spec, ids), model(ids).logits)
    short = ids[:, :20]
    rotary.rope_init_fn = made
    assert_same_logits(decoder.forward(loaded.params, loaded.spec, short), model(short).logits)


def test_a_head_with_a_bias_and_the_embeddings_matrix(tmp_path: Path) -> None:
    """It trains, and is written, as two tensors; log-probabilities have the bias too."""
    model, loaded = load_both("phi", {"tie_word_embeddings": True}, tmp_path)
    ids = tokens()
    assert "weight" not in loaded.params["head"]
    x = decoder.hidden(loaded.params, loaded.spec, ids)
    ours = loss.token_logprobs(loaded.params, loaded.spec, x, ids)
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours[:, :-1], want, rtol=1e-5, atol=1e-5)
