"""The bridge to torch: one `nn.Module` that wears a tree of params and speaks Hugging Face's names.

All computation is nn's pure functions over the tree; the Module holds the tensors (frozen ones as
Parameters without gradient), so that optimizers, trainers and `.to(device)` find them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError
from ..nn import decoder, loss, pinned, qat, tree, watch
from ..nn.dense_weights import DenseWeights
from ..nn.kept_steps import KeptSteps
from ..nn.params import param_specs
from ..nn.plan import Plan
from ..nn.residuals import RECOMPUTE, Residuals
from ..nn.spec import ModelSpec
from . import batch, memory_plan, named_adapters, report
from .arguments import Auto, choose_residuals
from .config import Config
from .named_adapters import Adapter
from .output import CausalLMOutput
from .registry import Family
from .saving import Saving
from .shards import Checkpoint
from .wearing import Wearing

if TYPE_CHECKING:
    from .fast_generate import RequestOutput
    from .fast_inference import FastInference


@dataclass(frozen=True)
class Origin:
    """Where a model came from: what saving, merging and reporting need to know."""

    name: str
    revision: str | None
    folder: Path
    family: Family
    checkpoint: Checkpoint
    quantize: str | None
    notes: tuple[str, ...] = ()
    rope_scaling: dict[str, Any] | None = None  # as it was asked for; the config has it too

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # nothing in it changes, and it names modules, which cannot be copied


# Of a batch, the count to divide by, smoothing and z_loss; None where the pass is to run.
Replays = Callable[
    [dict[str, torch.Tensor | None], torch.Tensor | float | None, float, float],
    CausalLMOutput | None,
]


class CausalLM(Saving, Wearing):
    """A causal language model.

    The tree and the Module share storage: an optimizer step through `parameters()` changes what
    `params` and `adapters` return. Parameters carry the checkpoint's names; adapters are worn
    beside the weights that they change (`Wearing`).
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: tree.Tree,
        *,
        config: Config,
        generation_config: Config,
        origin: Origin,
        dtype: torch.dtype,
        max_seq_length: int,
        train_all: bool = False,
        residuals: Residuals | Auto = RECOMPUTE,
        memory_budget: int | None = None,
        seed: int = 3407,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.generation_config = generation_config
        self.origin = origin
        self.max_seq_length = max_seq_length
        self.residuals = residuals
        self.memory_budget = memory_budget
        # Under "auto": the plan of every shape of batch that was met, in order.
        self.plans: dict[tuple[int, int, bool], Plan] = {}
        # And the weights that training keeps dequantized.
        self.dense = DenseWeights()
        self.train_all = train_all
        # Whether a pass, forward and backward, stops at the first layer and tensor that is not
        # finite, with a TrainingError that names it; each layer then waits for the device.
        self.debug = False
        # What passes of training are replayed from in place of running (`graphed_bridge.replay`).
        self.replays: Replays | None = None
        self.host_tables: tuple[torch.Tensor, ...] = ()
        # Tokens that the MLP runs on at a time while training (`residuals.Policy`).
        self.tile: int | None = None
        self.qat_scheme: str | None = None
        self.fast_inference: FastInference | None = None
        # Of keys and values while generating; None: what is computed in.
        self.cache_dtype: torch.dtype | None = None
        # Of `generate`, for its next call; training gets their memory back.
        self.kept_steps = KeptSteps()
        self.tokenizer: Any = None
        self._dtype = dtype
        # What adapters and trained copies are in; None: as they come, which is fp32.
        self.adapter_dtype: torch.dtype | None = None
        # The dropout of step n is drawn from (seed, n), so that it can be repeated and resumed.
        self.dropout_seed, self.dropout_step = seed, 0
        self._worn, self._active, self._disabled = {}, (), False
        self._params = self._wear(params, lambda path: train_all)
        # Full fine-tuning in mixed precision: weights that are trained in more than is computed in.
        self._wide = {path for path, p in tree.items(param_specs(spec)) if p.wide}
        self.mixed = train_all and any(
            leaf.dtype != dtype for path, leaf in tree.items(params) if path not in self._wide
        )

    def keep_embedding_on_host(self) -> None:
        """Leave the embeddings in host memory; a pass copies the rows that it uses.

        Where the embedding is the head too, that is the layers' own table alone (Gemma 4). Raises
        ArgumentError where all of it is needed: as the head, or because it is trained.
        """
        tables = [] if self.spec.tied else [self._params["embed"]["weight"]]
        if self.spec.inputs is not None:
            tables.append(self._params["inputs"]["table"]["weight"])
        if not tables or self.train_all:
            why = "every weight is trained" if self.train_all else "its head is the same table"
            raise ArgumentError(
                f"offload_embedding=True: the device needs the whole embedding, for {why}; "
                "load without it"
            )
        for table in tables:
            host = (pinned.like if table.is_cuda else torch.empty_like)(table.detach())
            table.data = host.copy_(table.detach())
        self.host_tables = tuple(tables)

    def own_trees(self) -> tuple[tree.Tree, ...]:
        """The trees of the tensors that a pass now computes with, as it holds them itself: params,
        and of each acting adapter its trained copies, its factors and what those began with.
        """
        worn = self.acting
        return (self._params, *(t for one in worn for t in (one.trained, one.adapters, one.start)))

    def derives(self) -> bool:
        """Whether `computed_params` or `adapters` hold tensors made of its own, anew each time."""
        worn = self.acting
        if self.mixed:
            return True
        several = len(worn) > 1 or any(one.trained or one.start for one in worn)
        return several or self.qat_scheme is not None

    def round_weights(self, qat_scheme: str | None) -> None:
        """Compute as if projections were stored by `qat_scheme` (quant/fake.py); None ends it.

        Raises ArgumentError and KernelError, as `qat.wrap`.
        """
        if qat_scheme is not None:
            qat.wrap(self.params, self.spec, qat_scheme)
        self.qat_scheme = qat_scheme
        self.plans.clear()  # layers whose weights are rounded run again

    # Running.

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CausalLMOutput:
        """input_ids [b, s] -> loss (with labels [b, s], -100 ignored) and logits [b, s, v].

        Positions come from `attention_mask` (ones for real tokens, padding on either side), from
        `cu_seqlens` [documents + 1] (one packed row), or from `position_ids` (a document begins
        where they are 0), beside which a mask still says what is padding. num_items_in_batch:
        what the summed loss is divided by (default: the labels that count). smoothing (of
        labels; trainers take what is called label for a column of the data) and z_loss: those of
        `nn.loss.next_token`. use_cache and return_dict are accepted and change nothing.

        Raises InputError for ids outside of the vocabulary, rows longer than the context, and
        labels of which none counts.
        """
        batch.check_ids(input_ids, self.spec)
        assert input_ids is not None
        if self.replays is not None and self.training and labels is not None:
            given = {"input_ids": input_ids, "labels": labels, "cu_seqlens": cu_seqlens}
            given |= {"attention_mask": attention_mask, "position_ids": position_ids}
            if torch.is_grad_enabled() and not self.debug:
                replayed = self.replays(given, num_items_in_batch, smoothing, z_loss)
                if replayed is not None:
                    return replayed
        layout = batch.layout_of(
            input_ids,
            self.spec,
            self.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
        )
        if labels is not None:
            batch.check_labels(labels, layout, self.spec, num_items_in_batch)
            labels = labels.to(self.device)
        input_ids = input_ids.to(self.device)
        params, adapters = self.computed_params(), self.adapters
        seed = self.next_seed() if self.training else None
        if self.debug:  # of layers the decoder checks what is trained
            params, adapters = (
                {k: x if k == "layers" else watch.of_trained(x, k) for k, x in (one or {}).items()}
                for one in (params, adapters)
            )
        count = num_items_in_batch
        if isinstance(count, torch.Tensor):
            count = count.to(self.device)
        total = None
        residuals = None
        if self.training:
            masked = memory_plan.is_masked(self, layout)
            residuals = memory_plan.residuals_for(self, *input_ids.shape, masked=masked)
            if torch.is_grad_enabled():
                params = self.dense.put(params, self._dtype)
        with self._own_dtypes(), memory_plan.told(self, residuals):
            x = decoder.hidden(
                params,
                self.spec,
                input_ids,
                layout=layout,
                adapters=adapters,
                residuals=residuals,
                seed=seed,
                debug=self.debug,
            )
            if labels is not None:
                total = loss.next_token(
                    params,
                    self.spec,
                    x,
                    labels,
                    layout=layout,
                    adapters=adapters,
                    seed=seed,
                    count=count,
                    label_smoothing=smoothing,
                    z_loss=z_loss,
                )
                if self.debug:
                    total = watch.checked(total, "the loss")

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            with self._own_dtypes():
                return decoder.logits(params, self.spec, hidden, adapters=adapters, seed=seed)

        return CausalLMOutput(total, x, logits)

    def _own_dtypes(self) -> torch.autocast:
        """Autocast off: every dtype is chosen here, also inside a trainer that casts."""
        return torch.autocast(self.device.type, enabled=False)

    def computed_params(
        self,
        worn: Sequence[Adapter] | None = None,
        own: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tree.Tree:
        """`params` as a pass computes with them: fp32 trained copies, or all weights where they are
        fp32, in the model's dtype, weights rounded under a `qat_scheme`. worn, own: in place of
        what acts, and of the base's tensors.
        """
        params = self.in_dtype(own)
        trained = named_adapters.trained(self.acting if worn is None else worn)
        if trained:
            cast = tree.map(lambda leaf: leaf.to(self._dtype), trained)
            params = tree.combine(cast, params)
        return qat.wrap(params, self.spec, self.qat_scheme) if self.qat_scheme else params

    def in_dtype(self, own: Callable[[torch.Tensor], torch.Tensor] | None = None) -> tree.Tree:
        """`base_params` in the dtype that is computed in; `own` in place of each tensor first."""
        params = self._params if own is None else tree.map_tensors(own, self._params)
        if not self.mixed:
            return params
        return tree.map_with_path(
            lambda path, leaf: leaf if path in self._wide else leaf.to(self._dtype), params
        )

    def next_seed(self) -> int | None:
        """What drives the dropout of the next pass of training; None where nothing drops."""
        leaves = [leaf for one in self.acting for leaf in tree.leaves(one.adapters)]
        if not any(leaf.dropout for leaf in leaves):
            return None
        self.dropout_step += 1
        return (self.dropout_seed * 1_000_003 + self.dropout_step * 10_007) % 2**48

    def generate(self, *args: Any, **keywords: Any) -> Any:
        """Prompts [b, s] -> prompts and answers, as `generation.generate`, whose arguments it has.

        A tensor; with return_dict_in_generate=True a `GenerationOutput`.
        """
        from .generation import generate

        return generate(self, *args, **keywords)

    def fast_generate(self, *args: Any, **keywords: Any) -> list["RequestOutput"]:
        """Many prompts at once, as `fast_generate.fast_generate`, whose arguments it has; needs
        `fast_inference=True` at loading.
        """
        from .fast_generate import fast_generate

        return fast_generate(self, *args, **keywords)

    # Reporting; saving is in `Saving`.

    def report(self) -> str:
        """What was loaded from where, in which precision."""
        return report.describe(self)

    def explain(self) -> str:
        """Which path each projection takes, and why."""
        return report.explain(self)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        # The embedding may stay on the host.
        first: torch.Tensor = tree.tensors(self._params["layers"][0])[0]
        return first.device

    def for_training(self, use_gradient_checkpointing: bool | str = "unsloth") -> "CausalLM":
        """Training mode; returns the model."""
        self.residuals = choose_residuals(use_gradient_checkpointing)
        return self.train()

    def for_inference(self) -> "CausalLM":
        """Evaluation mode; returns the model."""
        self.dense.keep(0)
        self.plans.clear()
        return self.eval()

    def train(self, mode: bool = True) -> "CausalLM":
        """Training mode, or evaluation mode; returns the model."""
        if mode:
            self.kept_steps.clear()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained: adapters and trained copies, or all under full fine-tuning."""
        full = super().state_dict(*args, **kwargs)
        # A parent module passes its own dict, in which others' entries must stay.
        prefix = kwargs.get("prefix", "")
        # One that several modules have is there once, under its first name.
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        for name, _ in self.named_parameters(remove_duplicate=False):
            if name not in trained:
                full.pop(prefix + name, None)
        return full

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """The inverse of `state_dict`; with `strict`, exactly what is trained must be there."""
        if assign:
            raise ArgumentError("assign=True would part the tree from the module; use assign=False")
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        if strict and trained != set(state_dict):
            missing, extra = sorted(trained - set(state_dict)), sorted(set(state_dict) - trained)
            raise ArgumentError(f"state_dict does not fit: missing {missing}, extra {extra}")
        found = super().load_state_dict(state_dict, strict=False)
        # Frozen weights are in no state_dict of ours, so they are not missing.
        found.missing_keys[:] = [name for name in found.missing_keys if name in trained]
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Statistics of quantized weights and fp32 adapters must never change dtype with the model.
        probe = fn(torch.zeros((), dtype=self._dtype, device=self.device))
        if probe.dtype != self._dtype:
            raise ArgumentError(
                f"cannot change the model's dtype from {self._dtype} to {probe.dtype} after "
                "loading; pass dtype= to from_pretrained"
            )

        self.kept_steps.clear()
        self.dense.keep(0)
        self.plans.clear()

        def keep_dtype(t: torch.Tensor) -> torch.Tensor:
            moved = t if any(t is table for table in self.host_tables) else fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
