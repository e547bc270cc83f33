"""Training steps from graphs, where they can be: what a loop holds to replay them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .convert.bridge import CausalLM
from .errors import ArgumentError
from .graphed import GraphedStep, Uncapturable, uncapturable
from .graphed_update import GraphedUpdate
from .rows import Row, collate, pack


class Graphs:
    """The graphs of one model and its optimizer; `update` is None where that one runs eagerly.

    Raises ArgumentError, with the reason, for a model whose steps cannot be captured.
    """

    def __init__(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        *,
        packing: bool = True,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.limit = model, optimizer, max_grad_norm
        self.packing, self._say, self._said = packing, say, False
        self.step = GraphedStep(model, label_smoothing=label_smoothing, z_loss=z_loss)
        # bitsandbytes counts its steps on the host: its update is not captured.
        self.update: GraphedUpdate | None = None
        if isinstance(optimizer, torch.optim.AdamW):
            self.update = GraphedUpdate(optimizer, max_grad_norm)

    def check(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        *,
        packing: bool,
        label_smoothing: float,
        z_loss: float,
    ) -> None:
        """Raise ArgumentError for a step that is not the one that these replay."""
        if model is not self.model or optimizer is not self.optimizer:
            raise ArgumentError("graphs are of another model or optimizer; make new ones for this")
        asked = {
            "max_grad_norm": max_grad_norm,
            "packing": packing,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
        }
        smoothing, z = self.step.terms["smoothing"], self.step.terms["z_loss"]
        captured = dict(zip(asked, (self.limit, self.packing, smoothing, z), strict=True))
        for name, value in asked.items():
            if value != captured[name]:
                raise ArgumentError(
                    f"{name} is {value}, and the graphs replay steps with {captured[name]}: make "
                    "graphs with what the steps are to have"
                )

    def loss(self, rows: Sequence[Row], count: int) -> torch.Tensor:
        """The summed loss of a batch over `count`, whose gradients are added to `.grad`.

        A batch that no graph can hold runs without one into the same `.grad`, and says so once;
        without `say` it raises Uncapturable.
        """
        batch = pack(rows) if self.packing else collate(rows, 0)
        try:
            return self.step(**batch, num_items_in_batch=torch.tensor(float(count)))
        except Uncapturable as problem:
            if self._say is None:
                raise
            if not self._said:
                shape = "x".join(map(str, batch["input_ids"].shape))
                self._say(f"a batch of {shape} tokens runs without a graph: {problem}")
                self._said = True
        self.step.attach()  # those that the captured update reads
        loss: torch.Tensor | None = self.model(
            **batch, num_items_in_batch=count, **self.step.terms
        ).loss
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def graphs_for(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    *,
    packing: bool,
    asked: bool | None,
    say: Callable[[str], None],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Graphs | None:
    """Graphs where `asked` for (True: or ArgumentError, None: where possible, False: never); says
    why there are none on a GPU.
    """
    if asked is False:
        return None
    reason = uncapturable(model)
    if reason is None:
        return Graphs(
            model,
            optimizer,
            max_grad_norm,
            packing=packing,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            say=None if asked else say,
        )
    if asked:
        raise Uncapturable(f"graphs were asked for, and cannot be: {reason}")
    if model.device.type == "cuda":
        say(f"steps are not captured as graphs: {reason}")
    return None
