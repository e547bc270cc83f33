"""Names of tensors in GGUF files and in checkpoints, both ways, by way of ours."""

import re
from collections.abc import Container

from ..errors import SaveError
from . import gguf_latent
from .gguf_architecture import Architecture
from .names import Names
from .registry import FAMILIES

ROPE_FREQS = "rope_freqs.weight"
# LongRoPE's divisors for rows beyond the original context and within it.
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
# Our module path -> ggml's. Stacks of experts are one tensor there.
_OURS = {
    "embed": "token_embd",
    "inputs.table": "per_layer_token_embd",
    "inputs.project": "per_layer_model_proj",
    "inputs.norm": "per_layer_proj_norm",
    "norm": "output_norm",
    "head": "output",
    **{
        f"layers.*.{ours}": f"blk.*.{theirs}"
        for ours, theirs in {
            "attn_norm": "attn_norm",
            "attn.q": "attn_q",
            "attn.k": "attn_k",
            "attn.v": "attn_v",
            "attn.o": "attn_output",
            "attn.q_norm": "attn_q_norm",
            "attn.k_norm": "attn_k_norm",
            "attn_post_norm": "post_attention_norm",
            "mlp_norm": "ffn_norm",
            "mlp_post_norm": "post_ffw_norm",
            "mlp.gate": "ffn_gate",
            "mlp.up": "ffn_up",
            "mlp.down": "ffn_down",
            "mlp.router": "ffn_gate_inp",
            "mlp.experts.gate": "ffn_gate_exps",
            "mlp.experts.up": "ffn_up_exps",
            "mlp.experts.down": "ffn_down_exps",
            "mlp.shared.gate": "ffn_gate_shexp",
            "mlp.shared.up": "ffn_up_shexp",
            "mlp.shared.down": "ffn_down_shexp",
            "mlp.shared_gate": "ffn_gate_inp_shexp",
        }.items()
    },
}
_LAYER = re.compile(r"(model\.layers|layers|blk)\.(0|[1-9]\d{0,8})\.(.+)")


def to_ggml(
    name: str, architecture: Architecture, names: Names, known: Container[str] = ()
) -> tuple[str, ...]:
    """ggml's names of what a checkpoint's tensor `name` holds; none for what is no param of ours.

    Several for a tensor that holds several of our matrices; an expert's own name becomes that of
    the stack. known: the model's params, which tell what a name means that has several meanings.
    Raises SaveError for a param that has no place there.
    """
    module, _, leaf = name.rpartition(".")
    pattern, number = _pattern(module)
    for theirs, path in architecture.modules.items():
        if path == pattern:
            return (f"blk.{number}.{theirs}.{leaf}",)
    if parts := [
        paths
        for paths in names.parts(name)
        if ".experts.*." in paths[0] or (len(paths) > 1 and paths[0] in known)
    ]:
        paths = tuple(path.replace(".experts.*.", ".experts.") for path in parts[0])
    else:
        try:
            paths = (re.sub(r"\.experts\.\d+\.", ".experts.", names.to_ours(name, known)),)
        except KeyError:
            return ()
    pattern, number = _pattern(paths[0])
    if architecture.latent and pattern == f"{gguf_latent.BOTH}.weight":
        return tuple(f"blk.{number}.{stack}.weight" for stack in gguf_latent.STACKS)
    table = _table(architecture)
    found = []
    tensors = {ours: theirs for theirs, ours in architecture.tensors.items()}
    for path in paths:
        pattern, number = _pattern(path)
        if pattern in tensors:
            found.append(f"blk.{number}.{tensors[pattern]}")
            continue
        module, _, leaf = path.rpartition(".")
        pattern, number = _pattern(module)
        if pattern not in table:
            raise SaveError(
                f"{name} has no place in a GGUF file of architecture {architecture.name}"
            )
        found.append(f"{table[pattern].replace('*', number)}.{leaf}")
    return tuple(found)


def to_hf(name: str, architecture: Architecture) -> str | None:
    """The name in a checkpoint of ggml's tensor `name`, with a `*` for each expert of a stack; None
    for one that no such model has.
    """
    names = FAMILIES[architecture.family].names
    pattern, number = _pattern(name)
    whole = architecture.tensors.get(pattern.removeprefix("blk.*."))
    if whole is not None:
        filled = whole.replace("*", number)
        return filled if whole.startswith("model.") else names.to_hf(filled)
    module, _, leaf = name.rpartition(".")
    pattern, number = _pattern(module)
    back = {theirs: ours for ours, theirs in _table(architecture).items()}
    path = back.get(pattern)
    path = architecture.modules.get(pattern.removeprefix("blk.*."), path)
    if path is None or leaf not in ("weight", "bias"):
        return None
    if path.startswith("model."):
        return f"{path.replace('*', number)}.{leaf}"
    path = path.replace(".experts.", ".experts.0.").replace("*", number)
    try:
        found = names.to_hf(f"{path}.{leaf}")
    except KeyError:
        return None
    return found.replace(".experts.0.", ".experts.*.")


def _table(architecture: Architecture) -> dict[str, str]:
    """Our module path -> ggml's."""
    own = {
        path: f"blk.*.{theirs}" if "*" in path else theirs
        for theirs, path in architecture.modules.items()
        if not path.startswith("model.")
    }
    return {**_OURS, **own}


def _pattern(module: str) -> tuple[str, str]:
    """`blk.3.attn_q` -> `blk.*.attn_q` and `3`; a path without a layer stays, with no number."""
    found = _LAYER.fullmatch(module)
    if found is None:
        return module, ""
    return f"{found[1]}.*.{found[3]}", found[2]
