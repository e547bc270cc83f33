"""Where Triton is met: kernels that compile at their first launch, the choice of path, the op
wrapper.

This is the only file that imports triton, and it does so inside functions, so every kernel file
imports without it. A kernel is written as for Triton, with `jit` and `language` from here:

    from .launch import jit, language as tl

    @jit
    def _double_kernel(p_x, p_y, n, BLOCK: tl.constexpr): ...

    _double_kernel((grid,), x, y, n, BLOCK=1024, num_warps=4)

The file must say `from __future__ import annotations`, so that `tl.constexpr` is never evaluated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import KernelError

if TYPE_CHECKING:
    from triton import language as language
else:
    # Stands for triton.language in a kernel's globals until the first launch puts the module in
    # its place.
    language = types.SimpleNamespace(__name__="triton.language")

# A plain module value, so that torch.compile can see it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Device types whose tensors take the launch.
_launching = {"cuda"}


# The launches by name: `ops.rms_norm(...)`. Filled by `operator`.
ops = types.SimpleNamespace()


class Kernel:
    """A Triton kernel or device function, made from its Python function at the first launch.

    The function gets a namespace of its own: the real `triton.language` for the stand-in,
    compiled device functions for other kernels, and constexprs for the module's numbers. The
    module itself is not touched.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def jitted(self) -> Any:
        """Triton's own object; under its interpreter an interpreted function."""
        import triton

        source = self.function
        names: dict[str, Any] = {"__name__": source.__module__, "tl": triton.language}
        for name in source.__code__.co_names:
            value = source.__globals__.get(name)
            if isinstance(value, Kernel):
                names[name] = value.jitted
            elif isinstance(value, bool | int | float):
                names[name] = triton.language.constexpr(value)
        bound = types.FunctionType(
            source.__code__, names, source.__name__, source.__defaults__, source.__closure__
        )
        bound.__annotations__ = source.__annotations__
        bound.__kwdefaults__ = source.__kwdefaults__
        bound.__module__, bound.__qualname__ = source.__module__, source.__qualname__
        return triton.jit(bound)

    def __call__(self, grid: Any, *args: Any, **options: Any) -> Any:
        """Launch over `grid` on the device of the first tensor; nothing is launched for an empty
        grid.
        """
        if 0 in grid:
            return
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.jitted[grid](*args, **options)


def jit(function: Callable[..., Any]) -> Kernel:
    """The counterpart of `triton.jit` that does not import triton."""
    return Kernel(function)


@contextlib.contextmanager
def interpreting(on: bool = True) -> Iterator[None]:
    """Inside, CPU tensors run the launches too: a test's way in.

    The process must have had TRITON_INTERPRET=1 from before triton was imported.
    """
    before = set(_launching)
    (_launching.add if on else _launching.discard)("cpu")
    try:
        yield
    finally:
        _launching.clear()
        _launching.update(before)


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether these tensors take the Triton launch (True) or the plain-torch reference (False).

    The launch serves CUDA tensors where triton is installed. float64 always takes the reference:
    kernels compute in fp32. Raises KernelError if the tensors lie on different devices.
    """
    given = [t for t in tensors if t is not None]
    devices = {t.device for t in given}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise KernelError(f"tensors on different devices ({found}): move them to one")
    if any(t.dtype == torch.float64 for t in given):
        return False
    return HAS_TRITON and any(device.type in _launching for device in devices)


def operator(
    schema: str,
    *,
    fake: Callable[..., Any],
    rows: Sequence[int] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a launch as `torch.ops.purelm.<name>`, given its schema as `name(Tensor x, ...) ->
    Tensor`, and as `ops.<name>`, which is how the library calls it.

    `fake` makes outputs of the right shape. Under vmap an op with `rows` runs once: the arguments
    at these positions take any leading dims, and a batch is one more; if another argument is
    batched, or without `rows`, one launch is made per entry. There is no autograd formula: the
    autograd.Function around the op is the formula.
    """
    name, _, rest = schema.partition("(")

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(
            f"purelm::{name}", function, mutates_args=mutates, schema=f"({rest}"
        )
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return op(*args) if _watched() else function(*args)

        setattr(ops, name, call)
        if mutates:
            return call

        def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            one_launch = rows is not None and all(
                dim is None or i in rows for i, dim in enumerate(in_dims)
            )
            if one_launch:
                moved = list(args)
                for i in rows or ():
                    dim = in_dims[i]
                    if isinstance(args[i], Tensor):
                        moved[i] = (
                            args[i].expand(info.batch_size, *args[i].shape)
                            if dim is None
                            else args[i].movedim(dim, 0)
                        )
                out = op(*moved)
            else:
                each = [
                    op(*(_member(a, d, i) for a, d in zip(args, in_dims, strict=True)))
                    for i in range(info.batch_size)
                ]
                if isinstance(each[0], Tensor):
                    out = torch.stack(each)
                else:
                    out = tuple(torch.stack(column) for column in zip(*each, strict=True))
            return out, 0 if isinstance(out, Tensor) else (0,) * len(out)

        op.register_vmap(batched)
        return call

    return wrap


def _member(arg: Any, dim: Any, i: int) -> Any:
    """The i-th of a batched argument, or of each tensor in a list of them."""
    if isinstance(dim, list | tuple):
        return [_member(a, d, i) for a, d in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.select(dim, i)


def _watched() -> bool:
    """Whether a transform, a tracer or a dispatch mode must see the op rather than its launch.

    Where nothing does, the op's own machinery costs several times the launch.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`, or its forward alone where no graph is built, which costs a third."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return function.forward(*args)


def once(op: Callable[..., Any], *args: Any) -> Any:
    """Call an op inside a backward; a derivative of what it returns raises KernelError.

    torch.func.grad runs a backward with gradients on, where an op without a formula would be
    refused.
    """
    return _Once.apply(op, *args) if torch.is_grad_enabled() else op(*args)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: Callable[..., Any], *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].__name__

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise KernelError(
            f"{ctx.name}: a launch has first derivatives only; for second ones use the reference"
        )


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n` (n >= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
