"""Check every family on a CUDA machine: `python tests/families_gpu.py OUT [--tiny] [FAMILY...]`.

A small model of each family in NF4 with LoRA on all that has it takes two training steps over our
kernels, of two rows and of three documents in one, in bf16 and in fp32, and then decodes. Its loss,
its adapters' gradients and its logits are held to float64 in plain torch on the same device, beside
bf16 in plain torch. Greedy tokens of captured steps in fp32 are those that the model has without a
cache. Families run in processes of their own side by side; OUT/families.json gets all figures.
`--dora` makes the adapters DoRA's. `--tiny` runs it on the CPU, without kernels. `--configs=FILE`
reads the configs from there, or writes them where it is not there: for a machine whose transformers
lacks a family.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
import torch  # noqa: E402

from purelm.convert.registry import FAMILIES  # noqa: E402
from purelm.kernels import attention as kernel_attention  # noqa: E402
from purelm.kernels import launch  # noqa: E402
from purelm.nn import attention as nn_attention  # noqa: E402
from purelm.nn import cache as kv  # noqa: E402
from purelm.nn import decode, decoder, generate, layout, lora, loss, params, tree  # noqa: E402
from purelm.nn.residuals import KEEP, RECOMPUTE  # noqa: E402
from purelm.nn.spec import ModelSpec, MoESpec  # noqa: E402
from purelm.quant.nf4 import NF4, dequantize, quantize  # noqa: E402
from purelm.quant.stack import Stack, stack  # noqa: E402

TINY = "--tiny" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() and not TINY else "cpu"
VOCAB, RANK, PROMPT, NEW = 512, 8, 20, 8
# Widths that kernels take, the same for all families as far as may be: they compile once.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "head_dim": 64,
}
DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "rms_norm_eps": 1e-2}
LATENT = {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "global_head_dim": 128,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 64,
    },
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,
    "glm4_moe_lite": LATENT,
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_d_state": 64, "mamba_chunk_size": 64},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 64, "mamba_chunk_size": 64},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
        "rms_norm_eps": 1e-3,
    },
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    # Of a clamp whose slope jumps no gradient is near any other.
    "gpt_oss": {"swiglu_limit": 7.0},
}
Figures = dict[str, float]


def config_of(family: str) -> dict[str, Any]:
    """The fields of a small model's config.json."""
    path = next((Path(a[10:]) for a in sys.argv if a.startswith("--configs=")), None)
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())[family]
        return found
    import tiny

    sizes = {**SIZES, **OWN.get(family, {})}
    if OWN.get(family) is LATENT:
        del sizes["head_dim"]
    made: dict[str, Any] = json.loads(tiny.config(family, **sizes).to_json_string(use_diff=False))
    return {**made, "model_type": family}


def spec_of(family: str) -> ModelSpec:
    return FAMILIES[family].spec(config_of(family))


def drawn(spec: ModelSpec) -> Any:
    """Parameters in fp32, matrices that may be in NF4, norms off 1 and biases off 0."""
    g = torch.Generator().manual_seed(0)
    unscaled = any(a.scale == 1.0 for a in spec.attentions())

    def draw(path: str, p: params.ParamSpec) -> Any:
        noise = torch.randn(p.shape, generator=g)
        if path.endswith("attn.q_norm.weight") and unscaled:
            noise = noise * 0.1 + 1.0
            return noise * p.shape[-1] ** -0.5
        if len(p.shape) == 1 or p.init != "normal":
            base = {"normal": 0.0, "zeros": 0.0, "ones": 1.0}.get(str(p.init), p.init)
            if p.init == "log_range":
                return torch.arange(1.0, p.shape[0] + 1).log()
            return float(base) + noise * 0.1
        weight = noise * ((0.4 if "conv" in path else 1.0) / p.shape[-1] ** 0.5)
        if not p.quantize:
            return weight
        return stack([quantize(w) for w in weight]) if weight.ndim == 3 else quantize(weight)

    return tree.map_with_path(draw, params.param_specs(spec))


def in_dtype(spec: ModelSpec, made: Any, dtype: torch.dtype, *, dense: bool = False) -> Any:
    """Parameters on the device as a model in `dtype` has them."""
    specs = params.param_specs(spec)

    def cast(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Stack):
            each = [cast(path, leaf.one(i)) for i in range(leaf.count)]
            return stack(each)
        if isinstance(leaf, NF4):
            leaf = replace(leaf.to(DEVICE), dtype=dtype)
            return dequantize(leaf, torch.float32).to(dtype) if dense else leaf
        keeps = tree.at(specs, path).wide
        return leaf.to(DEVICE, torch.promote_types(dtype, torch.float32) if keeps else dtype)

    return tree.map_with_path(cast, made)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, no kernel of ours runs, nor a fused attention."""
    with (
        mock.patch.object(launch, "_launching", set()),
        mock.patch.object(kernel_attention, "fused", lambda *_: False),
        mock.patch.object(nn_attention, "fused", lambda *_: False),
    ):
        yield


def step(
    p: Any, spec: ModelSpec, adapters: Any, ids: torch.Tensor, **how: Any
) -> tuple[float, torch.Tensor]:
    """The loss and the gradients of all adapters in one vector, in fp64."""
    leaves = tree.tensors(adapters)
    total = loss.loss(p, spec, ids, ids, adapters=adapters, **how)
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return float(total.detach()), torch.cat([g.double().flatten() for g in grads])


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def check(family: str) -> Figures:
    """The errors of a family as shares of what is exact: ours, and beside it of plain torch."""
    spec = spec_of(family)
    made = drawn(spec)
    g = torch.Generator().manual_seed(1)
    adapters = lora.init(spec, generator=g, rank=RANK)
    for leaf in tree.leaves(adapters):
        leaf.b.normal_(generator=g).mul_(0.05)
    if "--dora" in sys.argv:
        sizes = torch.rand(2**16, generator=g) + 0.5
        adapters = tree.map(lambda f: replace(f, magnitude=sizes[: len(f.b)].clone()), adapters)
    adapters = tree.map_tensors(lambda t: t.to(DEVICE).requires_grad_(), adapters)
    wide = in_dtype(spec, made, torch.float64, dense=True)
    models = {dtype: in_dtype(spec, made, dtype) for dtype in (torch.float32, torch.bfloat16)}
    dense = in_dtype(spec, made, torch.bfloat16, dense=True)
    ids = torch.randint(3, VOCAB, (2, 48), generator=g).to(DEVICE)
    row = ids.view(1, 96)
    documents = layout.from_cu_seqlens(torch.tensor([0, 30, 71, 96], device=DEVICE), 96)
    found: Figures = {"mixture": any(isinstance(layer.mlp, MoESpec) for layer in spec.layers)}
    batches: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "rows": (ids, {}),
        "packed": (row, {"layout": documents}),
    }
    # Two steps: the second from adapters that the first one moved.
    for (name, (tokens, more)), policy in zip(batches.items(), (KEEP, RECOMPUTE), strict=True):
        value, exact = step(wide, spec, adapters, tokens, **more)
        with plain():
            eager = step(dense, spec, adapters, tokens, **more)
        for dtype, p in models.items():
            ours = step(p, spec, adapters, tokens, residuals=policy, **more)
            kind = str(dtype).removeprefix("torch.")
            found[f"{name} {kind} loss"] = abs(ours[0] - value) / value
            found[f"{name} {kind} gradients"] = off(ours[1], exact)
            last = ours[1]
        found[f"{name} plain loss"] = abs(eager[0] - value) / value
        found[f"{name} plain gradients"] = off(eager[1], exact)
        with torch.no_grad():
            at = 0
            for t in tree.tensors(adapters):
                t -= 0.1 * last[at : at + t.numel()].view(t.shape) / last.norm()
                at += t.numel()
    free = tree.map_tensors(lambda t: t.detach(), adapters)
    with torch.inference_mode():
        want = decoder.forward(wide, spec, ids, adapters=free)[:, PROMPT - 1 :]
        with plain():
            eager_ = decoder.forward(dense, spec, ids, adapters=free)[:, PROMPT - 1 :]
        p = models[torch.bfloat16]
        cache = kv.empty(spec, 2, 64, padded=False, dtype=torch.bfloat16, device=DEVICE)
        logits, cache = decode.prefill(p, spec, ids[:, :PROMPT], cache, adapters=free)
        parts = [logits]
        for i in range(PROMPT, PROMPT + NEW):
            logits, cache = decode.decode(p, spec, ids[:, i], cache, adapters=free)
            parts.append(logits)
        ours_ = torch.stack(parts, 1)
        found["decode bfloat16"] = off(ours_, want[:, : NEW + 1])
        found["decode plain"] = off(eager_[:, : NEW + 1], want[:, : NEW + 1])
        p = models[torch.float32]
        out = generate.generate(p, spec, ids[:, :PROMPT], max_new_tokens=NEW, adapters=free)
        behind = []
        for model in (p, wide):  # of which one may send a token to another expert
            logits = decoder.forward(model, spec, out, adapters=free)[:, PROMPT - 1 : -1]
            chosen = logits.gather(-1, out[:, PROMPT:, None])[..., 0]
            behind.append(float((logits.amax(-1) - chosen).max() / logits.abs().amax()))
        # 0 where the tokens are the same; else by how much another one is better.
        found["greedy"] = min(behind)
    return found


def wrong(found: Figures) -> list[str]:
    """The figures that are farther off than they may be: in bf16 twice plain torch's error and a
    rounding, and where there are experts those of a few tokens that others take; in fp32 what the
    order of sums explains.
    """
    eps = 2.0**-8
    bad = []
    for name, value in found.items():
        if name == "mixture":
            continue
        if name == "greedy":
            limit = 1e-5
        elif "plain" in name:
            continue
        elif "float32" in name:
            limit = 1e-3 if "gradients" in name else 1e-5
        else:
            limit = 2 * found[name.replace("bfloat16", "plain")] + eps + found["mixture"] * 0.2
        if not value <= limit:
            bad.append(f"{name} {value:.2g} > {limit:.2g}")
    return bad


def work(families: list[str], path: Path) -> None:
    """Check these, and write a line for each."""
    with path.open("w") as file:
        for family in families:
            begun = time.monotonic()
            line: dict[str, Any] = {"family": family}
            try:
                line["found"] = check(family)
            except Exception:
                line["error"] = traceback.format_exc(limit=-6)
            line["seconds"] = round(time.monotonic() - begun, 1)
            file.write(json.dumps(line) + "\n")
            file.flush()


def main() -> int:
    """All families, in processes of their own; what is wrong is printed."""
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    out, families = Path(args[0]), args[1:] or list(FAMILIES)
    if "--work" in sys.argv:
        work(families, out)
        return 0
    configs = next((Path(a[10:]) for a in sys.argv if a.startswith("--configs=")), None)
    if configs is not None and not configs.exists():
        configs.write_text(json.dumps({family: config_of(family) for family in families}))
        return 0
    limit = float(next((a[8:] for a in sys.argv if a.startswith("--limit=")), "600"))
    out.mkdir(parents=True, exist_ok=True)
    # The kernels of scans compile longest.
    families = sorted(families, key=lambda family: spec_of(family).layers[0].recurrent is None)
    count = min(len(families), max(1, (os.cpu_count() or 1) - 1))
    flags = [a for a in sys.argv[1:] if a.startswith("--")]
    begun = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(out / f"part{i}"), *families[i::count], *flags, "--work"]
        )
        for i in range(count)
    ]
    for process in running:
        try:
            process.wait(max(0.1, limit - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
    lines: dict[str, dict[str, Any]] = {}
    for i in range(count):
        path = out / f"part{i}"
        for text in path.read_text().splitlines() if path.exists() else []:
            line = json.loads(text)
            lines[line["family"]] = line
        path.unlink(missing_ok=True)
    (out / "families.json").write_text(json.dumps(lines, indent=1))
    failed = 0
    for family in families:
        line = lines.get(family, {"error": "not reached"})
        bad = wrong(line["found"]) if "found" in line else [str(line["error"])[-700:]]
        failed += bool(bad)
        if bad:
            print(f"{family}: {'; '.join(bad)}")
    print(f"{len(families) - failed} of {len(families)} families right", end="")
    print(f", {time.monotonic() - begun:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
