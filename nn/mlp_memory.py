"""The bytes that an MLP or a mixture of experts takes while its backward is at work."""

from ..kernels.gated import ACTIVATIONS
from ..kernels.grouped import PACKED_ROWS, PARTS
from .activation import inputs
from .dispatch import CHUNK
from .residuals import Policy
from .spec import MLPSpec, MoESpec
from .step_shape import Shape


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
    total = max(rows * each, rows * kept + mlp_bytes(spec.shared, e, shape) if spec.shared else 0)
    if not shape.one_by_one:
        total += min(rows, CHUNK) * e * (w + 2 * 4)
        if w == 2 and rows > PACKED_ROWS * spec.experts:
            total += _parts(spec, e)
    return total + 3 * 4 * shape.tokens * spec.experts


def fast_mixture_bytes(spec: MoESpec, dim: int, shape: Shape, policy: Policy) -> int:
    """The same in `fast_experts`: of a row its gradient, the hidden product and its gradient, gate
    and up where they are made again, whose gradients take their place; then these gradients with
    the input, or with the input's.
    """
    rows, w, e, f = shape.tokens * spec.active, shape.itemsize, dim, spec.expert.dim
    n = len(inputs(spec.expert))
    again = n if policy.gate_up == "recompute" else 0
    fused = shape.offload and spec.expert.gated and spec.expert.activation in ACTIVATIONS
    own = 0 if fused and again else n  # gradients of gate and up that do not take their place
    each = max(
        e + (2 + again) * f,  # the gradients of the hidden product and of the weights
        (2 - fused + again + own) * f,  # of gate and up
        e + n * f,  # of their adapters
        2 * e + (n - 1) * f,  # and of the rows
    )
    if spec.weigh_inputs:  # the rows before they are weighed
        each = max(each, 3 * e)
    total = rows * (each * w + (4 * e if spec.weigh_inputs else 0))
    if not shape.offload:  # fp32 copies in plain torch's activations and weighed sums
        total += rows * 2 * f * w
    total += shape.tokens * shape.ranks * w
    if w == 2 and rows > PACKED_ROWS * spec.experts:
        total += _parts(spec, e)
    if spec.shared is not None:
        total = max(total, fast_mlp_bytes(spec.shared, e, shape, policy))
    return total + 3 * 4 * shape.tokens * spec.experts


def mlp_bytes(spec: MLPSpec, dim: int, shape: Shape) -> int:
    """The same of a dense MLP that autograd runs again: gate and up with their gradients, and that
    of the hidden product, which itself is there longer in plain torch.
    """
    n = len(inputs(spec))
    width = (2 * n + (1 if shape.offload else 2)) * spec.dim * shape.itemsize
    return shape.tokens * (width + _casts(spec, dim, shape))


def fast_mlp_bytes(spec: MLPSpec, dim: int, shape: Shape, policy: Policy) -> int:
    """The same in `fast_layer`: gate and up, whose gradients take the place of what is run again of
    them, and one of the hidden product and its gradient, in one place too; without a kernel for
    that, all of these.
    """
    wide = len(inputs(spec)) * spec.dim
    if spec.gated and shape.offload:
        again = wide if shape.dora and policy.gate_up == "recompute" else 0  # which DoRA reads
        width = (spec.dim + wide + again) * shape.itemsize
        # The gradients are made with their casts, beside the hidden product, after which comes the
        # input's gradient, which adds to nothing; the input's cast is there all the time.
        if shape.fp8:
            width = max(width + wide, wide * shape.itemsize + _casts(spec, dim, shape)) + dim
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


def _parts(spec: MoESpec, dim: int) -> int:
    """Bytes of a part of the experts in 16 bits, with the fp32 maxima of all experts' blocks, twice
    while they are made.
    """
    each = dim * spec.expert.dim
    return -(-spec.experts // PARTS) * each * 2 + spec.experts * each * 4 * 2 // 64
