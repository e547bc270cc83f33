"""What Hugging Face's trainers ask a model for, by their names."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ArgumentError
from ..nn import tree
from ..nn.residuals import KEEP, OFFLOAD, RECOMPUTE, Residuals
from ..nn.spec import ModelSpec
from .arguments import Auto

if TYPE_CHECKING:
    from .bridge import CausalLM


class Trainee(nn.Module):
    """The part of the bridge that trainers talk to; it computes nothing."""

    # The forward divides by num_items_in_batch, so a trainer must not divide again.
    accepts_loss_kwargs = True
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    spec: ModelSpec
    origin: Any
    residuals: Residuals | Auto
    train_all: bool
    _params: tree.Tree
    plans: dict[Any, Any]

    @property
    def trained(self) -> tree.Tree:
        """The trained copies of params."""
        raise NotImplementedError

    @property
    def adapters(self) -> tree.Tree:
        """The adapters as they act."""
        raise NotImplementedError

    def _node(self, name: str) -> nn.Module:
        """The module under the checkpoint's `name`, made where there is none."""
        node: nn.Module = self
        for key in name.split("."):
            if key not in node._modules:
                node.add_module(key, nn.Module())
            node = node._modules[key]  # type: ignore[assignment]
        return node

    def _get_name(self) -> str:
        # The class that transformers has for it: a trainer that smooths labels itself shifts them
        # for the causal language models it knows by this name, and for no others.
        name: str = self.origin.family.hf_class
        return name

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Keep a trainer's tags in `model_tags`; no file of ours carries them."""
        found = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags: list[str] = [*getattr(self, "model_tags", []), *found]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters, quantized ones counted as what they stand for.

        exclude_embeddings: without the embedding, as trainers count the operations of a pass.
        """
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        embed = self._params["embed"]["weight"]
        left_out = embed.numel() if exclude_embeddings else 0
        if exclude_embeddings and self.spec.inputs is not None:
            left_out += self._params["inputs"]["table"]["weight"].numel()
        if only_trainable:
            return trained - (left_out if embed.requires_grad else 0)
        base: int = sum(leaf.numel() for leaf in tree.leaves(self._params))
        return base - left_out + (0 if self.train_all else trained)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all)."""
        return self.num_parameters(True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in peft's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def get_input_embeddings(self) -> nn.Module:
        """The module whose `weight` is the embedding [v, e]."""
        return self._node(self.origin.family.names.module_to_hf("embed"))

    def get_output_embeddings(self) -> nn.Module:
        """The module whose `weight` is the head [v, e]: the embedding's where they are tied."""
        module = "embed" if self.spec.tied else "head"
        node = self._node(self.origin.family.names.module_to_hf(module))
        if not hasattr(node, "bias"):
            node.register_parameter("bias", None)
        return node

    @property
    def base_model(self) -> Callable[..., Any]:
        """The forward whose result has `last_hidden_state` [b, s, e], for trainers that bring a
        head of their own (TRL's SFTTrainer); they read it from `get_output_embeddings`.

        Raises ArgumentError where the head is trained, whole or by an adapter: that is its frozen
        weight.
        """
        module = "embed" if self.spec.tied else "head"
        trained = tree.get(self.trained, module) or tree.get(self.trained, "head")
        if trained or tree.get(self.adapters, "head") is not None:
            raise ArgumentError(
                "the head is trained (modules_to_save, or an adapter of its own), and this trainer "
                "would use the frozen one; train without it, or with transformers.Trainer"
            )
        if self.spec.tied and self.spec.head_bias:
            raise ArgumentError(
                "the head has a bias of its own and the embedding's matrix, and this trainer would "
                "leave the bias out; use transformers.Trainer"
            )
        # Not self.forward, which such a trainer replaces.
        return partial(type(self).forward, self)

    def reference(self) -> "CausalLM":
        """A frozen model of what this one is now, over the same base: TRL's `ref_model`."""
        from .reference import frozen

        model: CausalLM = self  # type: ignore[assignment]
        return frozen(model)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep the small residuals of a layer, run the large ones again in backward.

        every_n_layers: in each n-th layer from the first, the others keep all. offload: the small
        ones go to the host. The kwargs, for torch's own checkpointing, change nothing.
        """
        if type(every_n_layers) is not int or every_n_layers < 1:
            raise ArgumentError(f"every_n_layers is {every_n_layers!r}, expected 1 or more")
        policy = OFFLOAD if offload else RECOMPUTE
        count = len(self.spec.layers)
        every = tuple(KEEP if i % every_n_layers else policy for i in range(count))
        self.residuals = policy if every_n_layers == 1 else every

    def activation_checkpointing_disable(self) -> None:
        """Keep all intermediates for backward."""
        self.residuals = KEEP

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` by its older name."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.residuals != KEEP

    def enable_input_require_grads(self) -> None:
        """Nothing to do: recomputation here never needs inputs with gradients."""
