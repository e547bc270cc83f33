"""A family's tensor names: module paths, ours and Hugging Face's, in a two-way table."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..nn.spec import ModelSpec

# Llama's layout, which most dense decoders share: our module path -> the checkpoint's.
LLAMA = {
    "embed": "model.embed_tokens",
    "layers.*.attn_norm": "model.layers.*.input_layernorm",
    "layers.*.attn.q": "model.layers.*.self_attn.q_proj",
    "layers.*.attn.k": "model.layers.*.self_attn.k_proj",
    "layers.*.attn.v": "model.layers.*.self_attn.v_proj",
    "layers.*.attn.o": "model.layers.*.self_attn.o_proj",
    "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "layers.*.mlp.up": "model.layers.*.mlp.up_proj",
    "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
QK_NORMS = {
    "layers.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attn.k_norm": "model.layers.*.self_attn.k_norm",
}
# Norms after the branches only; OLMo 2's names.
POST_NORMS = {
    "layers.*.attn_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}
# A norm before and one after each branch; Gemma 2's names.
SANDWICH_NORMS = {
    "layers.*.attn_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}
# One matrix for both; Phi-3's and GLM's name.
GATE_UP = {"model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up")}
# A part of a path that counts layers or experts.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Names:
    """Both directions of a table; `*` stands for the number of a layer, or of an expert.

    A row is of a module, or of one tensor whose last part differs too. `fused`: modules (or tensors
    that are no module's) of a checkpoint that hold several of ours, one above the other; `by_head`:
    once for each kv head, its own rows of each (GPT-NeoX, Falcon); `in_turn`: of each expert row by
    row (gpt-oss). A path among them may be of a bias. A module may be there twice, as in the
    table: that whose parts the model has is meant. `aliases`: other names of modules in checkpoints
    -> ours. `constants`: stored tensors that always have one value, which is not read.
    `transposed`: modules whose weights are stored [in, out] (Conv1D), and stacks.
    `further_layers`: a checkpoint may have layers behind the last, or a module `mtp`, which predict
    further tokens and are left out. `peft_refuses`: last parts of modules on which peft takes no
    adapters. `peft_joins`: peft makes adapters of experts' parameters of those of single experts.
    `peft_swaps`: it takes experts' parameters [x, in, out] for [x, out, in]. `own_linear`:
    transformers has projections in a class of its own, which it does not have in 4 bits.
    """

    table: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    by_head: bool = False
    in_turn: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, float], ...] = ()
    transposed: frozenset[str] = frozenset()
    further_layers: bool = False
    peft_refuses: frozenset[str] = frozenset()
    own_linear: bool = False
    peft_joins: bool = False
    peft_swaps: bool = False

    @cached_property
    def _ours_to_hf(self) -> dict[str, str]:
        return dict(self.table)

    @cached_property
    def _hf_to_ours(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for theirs, ours in (*((hf, ours) for ours, hf in self.table), *self.aliases):
            found.setdefault(theirs, []).append(ours)
        return found

    @cached_property
    def _stacks(self) -> dict[str, str]:
        """Modules of experts together: the rows of one expert without its number."""
        return {
            ours.replace(".experts.*.", ".experts."): hf.replace(".experts.*.", ".experts.")
            for ours, hf in self.table
            if ".experts.*." in ours
        } | {path: name for name, path in self.stacked.items()}

    @cached_property
    def stacked(self) -> dict[str, str]:
        """Parameters of a layer's experts together in a checkpoint (`...experts.gate_up_proj`) ->
        our module path (`layers.*.mlp.experts.gate_up`).
        """
        ours = {("gate", "up"): "gate_up", ("down",): "down", ("up",): "up"}
        found = {}
        for name, paths in self.fused:
            last = tuple(path.rpartition(".")[2] for path in paths)
            if all(".experts.*." in path for path in paths) and last in ours:
                found[name] = f"{paths[0].partition('.*.mlp')[0]}.*.mlp.experts.{ours[last]}"
        return found

    def module_to_hf(self, path: str) -> str:
        """`layers.3.attn.q` -> `model.layers.3.self_attn.q_proj`; KeyError if there is none.

        Of `layers.3.mlp.experts.gate`, a stack, what is the same in each expert's name.
        """
        return _translate(
            self._ours_to_hf if _pattern(path) in self._ours_to_hf else self._stacks, path
        )

    def parts(self, name: str) -> list[tuple[str, ...]]:
        """Our paths of the tensors that may lie in a fused tensor called `name`; else none.

        A `*` that is left in them stands for every expert.
        """
        module, _, leaf = name.rpartition(".")
        found = []
        for fused, paths in self.fused:
            if fused == _pattern(name):  # a parameter that no module's `weight` holds
                found.append(tuple(_tensor(_fill(path, name)) for path in paths))
            elif fused == _pattern(module):
                found.append(tuple(f"{_fill(path, module)}.{leaf}" for path in paths))
        return found

    def groups(self, spec: ModelSpec) -> int:
        """How often the parts of a fused tensor follow each other."""
        return next(spec.attentions()).kv_heads if self.by_head else 1

    def turns(self, name: str) -> int:
        """How many parts of the fused tensor `name` follow each other row by row; else 1."""
        return max((len(paths) for paths in self.parts(name)), default=1) if self.in_turn else 1

    def single(self, name: str) -> bool:
        """Whether the table has the stored tensor `name` by itself, not as part of its module."""
        return _pattern(name) in self._hf_to_ours

    def constant(self, name: str) -> float | None:
        """The value that a stored tensor always has, or None for one that is read."""
        return dict(self.constants).get(_pattern(name))

    def is_transposed(self, name: str) -> bool:
        """Whether the stored tensor `name` is a weight [in, out]."""
        if _pattern(name) in self.transposed:
            return True
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and _pattern(module) in self.transposed

    def is_further(self, name: str, layers: int) -> bool:
        """Whether a tensor is of what comes behind the last of `layers`, and left out."""
        found = _NUMBER.search(name)
        behind = found is not None and int(found.group()) >= layers
        return self.further_layers and (behind or name.startswith("mtp."))

    def to_hf(self, path: str) -> str:
        """A tensor's path (`layers.3.attn.q.weight`) -> its name in a checkpoint."""
        if _pattern(path) in self._ours_to_hf:
            return _translate(self._ours_to_hf, path)
        module, _, leaf = path.rpartition(".")
        return f"{self.module_to_hf(module)}.{leaf}"

    def to_ours(self, name: str, known: Container[str] = ()) -> str:
        """The inverse of `to_hf`; of a name with several meanings the one that is `known`, else the
        last. Raises KeyError for a name that the table does not have.
        """
        module, _, leaf = name.rpartition(".")
        found = [_fill(path, name) for path in self._hf_to_ours.get(_pattern(name), ())]
        modules = () if found else self._hf_to_ours.get(_pattern(module), ())
        found += [f"{_fill(path, module)}.{leaf}" for path in modules]
        if not found:
            raise KeyError(name)
        return next((path for path in found if path in known), found[-1])

    def is_called(self, name: str, path: str) -> bool:
        """Whether a stored tensor's name, or an alias of it, is that of our `path`."""
        try:
            return self.to_ours(name, {path}) == path
        except KeyError:
            return False


def names(
    *tables: dict[str, str],
    fused: Mapping[str, tuple[str, ...]] | None = None,
    or_fused: Mapping[str, tuple[str, ...]] | None = None,
    by_head: bool = False,
    in_turn: bool = False,
    aliases: Mapping[str, str] | None = None,
    constants: Mapping[str, float] | None = None,
    transposed: Iterable[str] = (),
    further_layers: bool = False,
    peft_refuses: Iterable[str] = (),
    own_linear: bool = False,
    peft_joins: bool = False,
    peft_swaps: bool = False,
) -> Names:
    """The table with all these rows; a later one replaces an earlier one of the same module."""
    rows = {ours: hf for table in tables for ours, hf in table.items()}
    parts = (*(fused or {}).items(), *(or_fused or {}).items())
    others = tuple((aliases or {}).items())
    return Names(
        tuple(rows.items()),
        parts,
        by_head,
        in_turn,
        others,
        tuple((constants or {}).items()),
        frozenset(transposed),
        further_layers,
        frozenset(peft_refuses),
        own_linear,
        peft_joins,
        peft_swaps,
    )


def _tensor(path: str) -> str:
    """The path of a module's weight, or of a bias as it is."""
    return path if path.endswith(".bias") else f"{path}.weight"


def _pattern(path: str) -> str:
    return _NUMBER.sub("*", path)


def _translate(table: dict[str, str], path: str) -> str:
    pattern = _pattern(path)
    if pattern not in table:
        raise KeyError(path)
    return _fill(table[pattern], path)


def _fill(pattern: str, path: str) -> str:
    """`pattern` with the numbers of `path` in place of its `*`."""
    for number in _NUMBER.findall(path):
        pattern = pattern.replace("*", number, 1)
    return pattern
