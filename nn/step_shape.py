"""A training step's shape, and what autograd runs again in it."""

from dataclasses import dataclass

from .halves import WHOLE, runs_again
from .spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's shape: rows, tokens in a row, bytes of an element. `offload`: whether there is a
    host to send residuals to; `scores`: whether attention writes its scores out; `ranks`: the ranks
    of a layer's adapters summed (those of experts once for each that a token passes), whose narrow
    products are kept throughout; `tile`: how many tokens a dense MLP runs on at a time; `fp8`:
    whether frozen products are in fp8; `gradients`: bytes of the gradients of one layer, the one
    where most is trained. Of what autograd runs again: `masked`: whether the batch needs a mask,
    `dora`: whether adapters have magnitudes, if they have `dropout` too, `rounded`: whether weights
    are rounded in training, `one_by_one`: whether experts run one after the other, `trained`:
    whether the layers' weights are trained.
    """

    batch: int
    length: int
    itemsize: int
    offload: bool = True
    scores: bool = False
    ranks: int = 0
    tile: int | None = None
    masked: bool = False
    dora: bool = False
    dropout: bool = False
    trained: bool = False
    fp8: bool = False
    one_by_one: bool = False
    rounded: bool = False
    gradients: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length


_WAITS = "dropout, DoRA or their format"


def again(layer: LayerSpec, shape: Shape) -> dict[str, str]:
    """Which parts of a layer autograd runs again, or all of it, and why: `halves.runs_again`."""
    if shape.trained:
        return {WHOLE: "trained weights"}
    how = {"masked": shape.masked, "dora": shape.dora and shape.dropout, "rounded": shape.rounded}
    return runs_again(layer, **how, waits=_WAITS if shape.one_by_one else None)
