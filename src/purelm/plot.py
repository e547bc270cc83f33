"""The picture of a run: the loss of every step and of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .convert import atomic


def loss_picture(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a metrics.jsonl's lines as a PNG; False, with nothing written, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train", "training, per step", {"color": "tab:blue", "alpha": 0.45, "linewidth": 1}),
        ("eval", "held out", {"color": "tab:orange", "marker": "o", "markersize": 4}),
    )
    for kind, name, style in styles:
        steps = [m["step"] for m in metrics if m["kind"] == kind]
        if steps:
            losses = [m["loss"] for m in metrics if m["kind"] == kind]
            axes.plot(steps, losses, label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic.file(path) as new:
        figure.savefig(new, format="png", dpi=120)
    return True
