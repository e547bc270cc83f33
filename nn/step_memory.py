"""The bytes of a training step, from its shape: what the layers' residuals take, and what a layer
or the head at work needs beside them. Pure arithmetic; `plan` fits it into a budget.
"""

from collections.abc import Callable
from dataclasses import replace

from ..kernels.cross_entropy import chunk_rows
from .halves import WHOLE
from .mlp_memory import fast_mixture_bytes, fast_mlp_bytes, mixture_bytes, mlp_bytes
from .recurrent import working_bytes
from .residuals import Policy, bytes_per_token
from .spec import LayerSpec, ModelSpec, MoESpec
from .step_shape import Shape, again


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


def residual_bytes(layer: LayerSpec, spec: ModelSpec, shape: Shape) -> dict[str, int]:
    """Bytes of each residual of a layer: none of parts that run again."""
    parts = again(layer, shape)
    gone = {"gate_up"} if "mlp" in parts else set()
    if WHOLE in parts:
        gone = {"qkv", "out", "mid", "gate_up"}
    if "attn" in parts:
        layer = replace(layer, attention=None)
    if "recurrent" in parts:
        layer = replace(layer, recurrent=None)
    each = bytes_per_token(layer, spec.dim, shape.itemsize)
    return {name: 0 if name in gone else shape.tokens * n for name, n in each.items()}


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
        each += max(q + 2 * kv, spec.dim) + spec.dim  # casts; the input's is there all the time
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
    by_hand = not parts.keys() & {WHOLE, "mlp"}
    if isinstance(mlp, MoESpec):
        given = mlp, spec.dim, shape
        of_mlp = fast_mixture_bytes(*given, policy) if by_hand else mixture_bytes(*given)
        width = mlp.shared.dim if mlp.shared else 0
    elif by_hand:
        width, of_mlp = mlp.dim, fast_mlp_bytes(mlp, spec.dim, shape, policy)
    else:
        width, of_mlp = mlp.dim, mlp_bytes(mlp, spec.dim, shape)
        if policy.tile is not None:
            of_mlp = of_mlp * min(policy.tile, shape.tokens) // shape.tokens
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
    if isinstance(layer.mlp, MoESpec) and "mlp" not in again(layer, shape):
        narrow += 3 * 8 * shape.tokens * layer.mlp.active  # the places of rows
    a = layer.attention
    if a is not None and a.latent is not None and "attn" not in again(layer, shape):
        ranks = a.latent.kv_rank + (a.latent.q_rank or 0) + (a.rope.dim if a.rope else 0)
        narrow += shape.tokens * ranks * shape.itemsize
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
