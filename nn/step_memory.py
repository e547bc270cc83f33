"""The bytes of a training step, from its shape: what the layers' residuals take, and what a layer
or the head at work needs beside them. Pure arithmetic; `plan` fits it into a budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.cross_entropy import chunk_rows
from ..kernels.grouped import PACKED_ROWS, PARTS
from .activation import inputs
from .dispatch import CHUNK
from .halves import WHOLE, runs_again
from .recurrent import working_bytes
from .residuals import Policy, bytes_per_token
from .spec import LayerSpec, MLPSpec, ModelSpec, MoESpec


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's shape: rows, tokens in a row, bytes of an element. `offload`: whether there is a
    host to send residuals to; `scores`: whether attention writes its scores out; `ranks`: the ranks
    of a layer's adapters summed, whose narrow products are kept throughout; `tile`: how many tokens
    a dense MLP runs on at a time; `fp8`: whether frozen products are in fp8; `one_by_one`: whether
    experts run one after the other; `gradients`: bytes of the gradients of one layer, the one where
    most is trained. Of what autograd runs again: `masked`: whether the batch needs a mask, `dora`:
    whether adapters have magnitudes, `trained`: whether the layers' weights are trained.
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
    trained: bool = False
    fp8: bool = False
    one_by_one: bool = False
    gradients: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def peak(spec: ModelSpec, shape: Shape, policies: tuple[Policy, ...], fixed: int) -> int:
    """Bytes at the most demanding moment of a step: the head, or some layer's backward."""
    on_device = 0
    largest = 0
    away = [_away(layer, spec, shape, p) for layer, p in zip(spec.layers, policies, strict=True)]
    for i, (layer, policy) in enumerate(zip(spec.layers, policies, strict=True)):
        # What is sent away is there while this layer and the next one below it are at work.
        passing = away[i] + (away[i - 1] if i else 0)
        on_device += _resident(layer, spec, shape, policy)
        largest = max(largest, on_device + passing + _working(layer, spec, shape, policy))
    passing = sum(away[-2:])
    # A mask is there from the first layer to the last: of booleans, and as what scores are added.
    if shape.masked:
        fixed += shape.batch * shape.length**2 * (1 + shape.itemsize)
    return fixed + max(largest, on_device + passing + _head(spec, shape))


def again(layer: LayerSpec, shape: Shape) -> dict[str, str]:
    """Which parts of a layer autograd runs again, or all of it, and why: `halves.runs_again`."""
    if shape.trained:
        return {WHOLE: "trained weights"}
    return runs_again(layer, masked=shape.masked, dora=shape.dora)


def residual_bytes(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> dict[str, int]:
    """Bytes of each residual of a layer: none of parts that run again."""
    parts = again(layer, shape)
    gone = {"qkv", "out"} if "attn" in parts else set()
    gone |= {"gate_up"} if "mlp" in parts else set()
    if WHOLE in parts:
        gone = {"qkv", "out", "mid", "gate_up"}
    each = bytes_per_token(layer, spec.dim, shape.itemsize)
    return {name: 0 if name in gone else shape.tokens * n for name, n in each.items()}


def mixture_bytes(spec: MoESpec, dim: int, shape: Shape) -> int:
    """Bytes that a mixture, run again by autograd, takes while its backward is at work.

    A row is one token at one of its experts. In one launch (`experts._grouped`) a row keeps its
    input, gate, up, hidden product and output; the largest moment is that of the weighed sum's
    gradient, of down's, or of the activation's. One by one it keeps as much, of plain torch's
    activations their own result too, and weighed rows are fp32 copies, as are their gradients.
    """
    rows, w, e, f = shape.tokens * spec.active, shape.itemsize, dim, spec.expert.dim
    n = len(inputs(spec.expert))
    kept = (2 * e + (n + 1) * f) * w
    if shape.one_by_one:
        kept += 0 if shape.offload or n == 1 else f * w
        each = kept + 8 * e + (2 * e * w if w < 4 else 0)
    else:
        each = max(3 * e + (n + 1) * f, 2 * e + (n + 2) * f, e + (2 * n + 1) * f) * w
    if spec.weigh_inputs:  # the rows before they are weighed; their product and its gradients
        each, kept = max(each + e * w, e * (2 * w + 12)), kept + e * w
    each += shape.ranks * w + 4 * 8  # narrow products; the places of the rows
    total = max(rows * each, rows * kept + _mlp(spec.shared, e, shape) if spec.shared else 0)
    if not shape.one_by_one:
        total += min(rows, CHUNK) * e * (w + 2 * 4)
        if w == 2 and rows > PACKED_ROWS * spec.experts:  # with the maxima of their blocks
            total += -(-spec.experts // PARTS) * e * f * w * 9 // 8
    return total + 3 * 4 * shape.tokens * spec.experts


def _mlp(spec: MLPSpec, dim: int, shape: Shape) -> int:
    """The same of an MLP that autograd runs again: gate and up with their gradients, and that of
    the hidden product, which itself is there longer in plain torch.
    """
    n = len(inputs(spec))
    width = (2 * n + (1 if shape.offload else 2)) * spec.dim * shape.itemsize
    return shape.tokens * (width + _casts(spec, dim, shape))


def _fast_mlp(spec: MLPSpec, dim: int, shape: Shape, policy: Policy) -> int:
    """The same in `fast_layer`: gate and up, whose gradients take the place of what is run again of
    them, and one of the hidden product and its gradient, in one place too; without a kernel for
    that, all of these.
    """
    wide = len(inputs(spec)) * spec.dim
    if spec.gated and shape.offload:
        width = (spec.dim + wide) * shape.itemsize
        # The gradients' casts follow the hidden product, and the input's gradient adds to nothing.
        if shape.fp8:
            width = max(width, wide * shape.itemsize + _casts(spec, dim, shape))
    else:
        again = wide if policy.gate_up == "recompute" else 0
        width = ((2 + len(inputs(spec))) * spec.dim + again) * shape.itemsize
        width += _casts(spec, dim, shape)
    tokens = shape.tokens if policy.tile is None else min(policy.tile, shape.tokens)
    return tokens * width


def _casts(spec: MLPSpec, dim: int, shape: Shape) -> int:
    """Bytes a token of what products in fp8 make more: the gradients of gate and up in e4m3, and
    the input's, a bf16 product of which would add to the adapters'.
    """
    return len(inputs(spec)) * spec.dim + dim * shape.itemsize if shape.fp8 else 0


def _attention(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> int:
    """The same of the mixers: q, k and v as projected and as rotated, their gradients twice over
    (fp32 in some backends), the output's gradient; scores where they are written out.
    """
    total = 0
    if layer.recurrent is not None:
        total += shape.tokens * working_bytes(layer.recurrent, shape.itemsize)
    a = layer.attention
    if a is None:
        return total
    q, kv = a.widths
    # Last the expanded heads' gradients of k and v, which some backends make before they sum
    # groups.
    each = (3 * (q + 2 * kv) + 2 * q + 2 * q) * shape.itemsize + q * 4
    if a.gated:  # the gates, their sigmoids, what they leave, and a gradient
        each += 4 * q * shape.itemsize
    if shape.fp8:
        each += max(q + 2 * kv, spec.dim)
    return total + shape.tokens * each


def _scores(layer: LayerSpec, shape: Shape) -> int:
    a = layer.attention
    if a is None:
        return 0
    # Our own kernels, which have caps, sinks and biases, serve 16 bits on a GPU.
    special = a.softcap is not None or a.sinks or a.alibi is not None
    if shape.scores or (special and not (shape.offload and shape.itemsize == 2)):
        return 4 * shape.batch * a.heads * shape.length**2 * 4
    return 0


def _working(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes beside the residuals while a layer's backward is at work: of its MLP or its mixer,
    whichever needs more, with the q, k, v and output that were made again; some hidden states, two
    dequantized weights, and gradients before they are added to what is there of them.
    """
    parts = again(layer, shape)
    mlp, width = layer.mlp, 0
    if isinstance(mlp, MoESpec):
        of_mlp = mixture_bytes(mlp, spec.dim, shape)
        width = mlp.shared.dim if mlp.shared else 0
    else:
        width = mlp.dim
        if parts.keys() & {WHOLE, "mlp"}:
            of_mlp = _mlp(mlp, spec.dim, shape)
            if policy.tile is not None:
                of_mlp = of_mlp * min(policy.tile, shape.tokens) // shape.tokens
        else:
            of_mlp = _fast_mlp(mlp, spec.dim, shape, policy)
    total = max(of_mlp, _attention(layer, spec, shape))
    each = bytes_per_token(layer, spec.dim, shape.itemsize)
    anew = bool(parts.keys() & {WHOLE, "attn"})
    total += shape.tokens * sum(
        each[name] for name in ("qkv", "out") if anew or getattr(policy, name) == "recompute"
    )
    total += 6 * shape.tokens * spec.dim * shape.itemsize
    if layer.attention is not None:
        width = max(width, layer.attention.widths[0])
    total += 2 * spec.dim * width * shape.itemsize
    if shape.dora:  # lengths of a weight's rows, in fp32: of the weight, its change and their sum
        total += 3 * spec.dim * width * 4
    return total + shape.gradients + _scores(layer, shape)


def _sum(
    layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy, taken: Callable[[str], bool]
) -> int:
    sizes = residual_bytes(layer, spec, shape)
    return sum(n for name, n in sizes.items() if taken(getattr(policy, name)))


def _resident(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes that a layer's residuals take on the device until its backward."""
    further = _further(layer, spec.dim, shape)
    if WHOLE in again(layer, shape):
        return further + residual_bytes(layer, spec, shape)["x"]
    narrow = shape.tokens * shape.ranks * shape.itemsize
    return further + narrow + _sum(layer, spec, shape, policy, lambda fate: fate == "keep")


def _further(layer: LayerSpec, dim: int, shape: Shape) -> int:
    """Bytes that stay whatever the policy: what a layer lends, its own input, and what the end of
    a layer is run again from.
    """
    a, values = layer.attention, 0
    if a is not None and a.lends:
        values += 2 * a.widths[1]
    if layer.inputs is not None:
        values += layer.inputs.dim + (0 if WHOLE in again(layer, shape) else dim)
    return shape.tokens * values * shape.itemsize


def _away(layer: LayerSpec, spec: ModelSpec, shape: Shape, policy: Policy) -> int:
    """Bytes that go to the host and come back."""
    if WHOLE in again(layer, shape):
        return 0
    return _sum(layer, spec, shape, policy, lambda fate: fate == "offload")


def _head(spec: ModelSpec, shape: Shape) -> int:
    """Bytes beside the residuals while the loss is computed: a chunk of logits, the final hidden
    states before and after their norm, and their gradient.
    """
    rows = min(shape.tokens, chunk_rows(spec.vocab, spec.dim, shape.itemsize))
    return (rows * spec.vocab + 4 * shape.tokens * spec.dim) * shape.itemsize
