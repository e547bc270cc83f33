"""Makes Triton's interpreter trustworthy: import this before anything imports triton.

The bare interpreter computes bf16 on bit patterns, truncates casts to bf16, rounds casts to e4m3
wrongly, ignores tf32, accepts out-of-bounds access, int32 overflow and races, reads masked lanes as
0 and skips device_assert. Here bf16, e4m3 and tf32 are right, and the rest raises. It imports
triton at the first launch only, so that importing it costs nothing where no kernel runs.

`checking(race=..., reverse=...)` sets, for the launches inside, whether stores of two programs to
one address raise, and whether the programs run in reverse order.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import quick_interpreter
import torch

__all__ = ["checking", "install"]


@dataclasses.dataclass
class _State:
    """What the launch in progress may touch, and what is asked of it."""

    ranges: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    writer: dict[int, Any] | None = None
    race: bool = False
    reverse: bool = False
    installed: bool = False
    other: bool = False  # whether the load in progress says what masked lanes get


_state = _State()


@contextlib.contextmanager
def checking(*, race: bool = False, reverse: bool = False) -> Iterator[None]:
    """Watch the launches inside for write races, or run their programs in reverse order."""
    before = _state.race, _state.reverse
    _state.race, _state.reverse = race, reverse
    try:
        yield
    finally:
        _state.race, _state.reverse = before


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) as float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = (bits + even) >> np.uint32(16)
    nan = np.uint32(0x7FC0) | ((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.where(np.isnan(values), nan, rounded).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to tf32's ten mantissa bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 as e4m3 bits, rounded to nearest even, the largest number for what is too large."""
    wide = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448.0, 448.0)
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_e4m3(bits: np.ndarray) -> np.ndarray:
    """e4m3 bits (uint8) as float32, exact."""
    codes = torch.from_numpy(np.ascontiguousarray(bits, np.uint8)).view(torch.float8_e4m3fn)
    return codes.float().numpy()


def install() -> None:
    """Patch the interpreter; once, before the first launch. Raises if triton was imported too
    early.
    """
    if _state.installed:
        return
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("triton was imported before tests/shim.py")
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    _state.installed = True
    quick_interpreter.install(interpreter, tl)
    _patch_numbers(interpreter, tl)
    _patch_memory(interpreter, tl)
    _patch_launch(interpreter)


def _patch_numbers(interpreter: Any, tl: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast0, binary0, unary0 = builder.cast_impl, builder.binary_op, builder.unary_op
    ternary0, dot0, fp0, fma0 = (
        builder.ternary_op,
        builder.create_dot,
        builder.create_fp_to_fp,
        builder.create_fma,
    )

    def is_bf16(h: Any) -> bool:
        return h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16

    def values(h: Any) -> np.ndarray:
        return widen(h.data) if is_bf16(h) else h.data

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        source, target = src.dtype.scalar, dst.scalar
        if target == tl.bfloat16:
            return handle(narrow(values(src).astype(np.float32)), target)
        if source == tl.bfloat16:
            return handle(values(src).astype(interpreter._get_np_dtype(target)), target)
        return cast0(self, src, dst)

    def fp_to_fp(self: Any, src: Any, dst: Any, mode: Any) -> Any:
        source, target = src.dtype.scalar, dst.scalar
        nearest = mode is None or mode == interpreter._ir.ROUNDING_MODE.RTNE
        if source == tl.float8e4nv and target == tl.bfloat16:
            return handle(narrow(from_e4m3(src.data)), target)
        if target == tl.bfloat16 and nearest:
            return cast_impl(self, src, dst)
        if source == tl.bfloat16 and target in (tl.float32, tl.float64):
            return cast_impl(self, src, dst)
        if target == tl.float8e4nv and nearest:
            return handle(to_e4m3(values(src).astype(np.float32)), target)
        return fp0(self, src, dst, mode)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if is_bf16(left) or is_bf16(right):
            out = op(values(left), values(right))
            return handle(out if out.dtype == np.bool_ else narrow(out), left.dtype.scalar)
        return binary0(self, left, right, op)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if is_bf16(arg):
            return handle(narrow(op(widen(arg.data))), tl.bfloat16)
        return unary0(self, arg, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is not np.where and is_bf16(a):
            return handle(narrow(op(values(a), values(b), values(c))), tl.bfloat16)
        return ternary0(self, a, b, c, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if is_bf16(z):
            out = values(x).astype(np.float64) * values(y) + values(z)
            return handle(narrow(out), tl.bfloat16)
        return fma0(self, x, y, z)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if is_bf16(a) or is_bf16(b):
            out = np.matmul(values(a), values(b)) + d.data
            return handle(out.astype(d.data.dtype), d.dtype.scalar)
        tf32 = "TF32" in str(precision) and "x3" not in str(precision)
        if a.data.dtype == np.float32 and tf32:
            return handle(np.matmul(to_tf32(a.data), to_tf32(b.data)) + d.data, d.dtype.scalar)
        return dot0(self, a, b, d, precision, imprecise)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(narrow(np.array([value], np.float32)), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, fp_to_fp
    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_dot, builder.get_bf16 = create_fma, create_dot, get_bf16

    # Triton 3.6 makes loop bounds by int() of an array of one element, which NumPy 2.4 refuses.
    patch0 = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch0(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch
    # Debug turns on the check of int32 overflow.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, debug=True
    )

    def create_assert(self: Any, cond: Any, msg: Any) -> None:
        if not np.all(cond.data):
            raise AssertionError(str(msg))

    builder.create_assert = create_assert
    builder.create_inline_asm = _inline_asm


def _inline_asm(
    self: Any, asm: str, constraints: str, inputs: Any, types: Any, pure: bool, pack: int
) -> Any:
    """The few PTX instructions that the kernels use, on 32-bit words; another raises."""
    import types as namespaces

    import triton.runtime.interpreter as interpreter

    assert pack == 1, "one word an instance"
    wanted = sum(part.startswith("=") for part in constraints.split(","))
    names: dict[str, Any] = {
        f"${wanted + i}": np.atleast_1d(h.data)
        if h.data.dtype == np.float32
        else np.atleast_1d(h.data).astype(np.int32).view(np.uint32)
        for i, h in enumerate(inputs)
    }
    shape = names[f"${wanted}"].shape
    # A register that depends on the lane has 32 values.
    names["%laneid"] = np.arange(32, dtype=np.uint32)
    for i, h in enumerate(inputs):
        if h.data.dtype.itemsize == 8:
            names[f"${wanted + i}"] = np.atleast_1d(h.data).ravel()[:1].astype(np.uint64)

    def value(text: str) -> np.ndarray:
        if text.startswith("0f"):
            return np.array([int(text[2:], 16)], np.uint32).view(np.float32)
        return names[text] if text in names else np.full(1, int(text, 0), np.uint32)

    def loaded(address: str) -> np.ndarray:
        found = names[address.strip("[]")].tolist()
        return np.array([ctypes.c_uint32.from_address(at).value for at in found], np.uint32)

    def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(shape, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            assert (nibble < 8).all(), "a selector that copies signs"
            byte = (both >> (np.uint64(8) * nibble)) & np.uint64(255)
            out |= byte.astype(np.uint32) << np.uint32(8 * i)
        return out

    does: dict[str, Callable[..., np.ndarray]] = {
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "shr.u32": np.right_shift,
        "prmt.b32": permuted,
        "mov.u32": lambda register: register,
        "mul.wide.u32": lambda a, b: a.astype(np.uint64) * b.astype(np.uint64),
        "add.s64": np.add,
        "shfl.sync.idx.b32": lambda held, lane, *_: held[lane & np.uint32(31)],
        "mul.rn.f32": np.multiply,
        "cvt.rn.satfinite.e4m3x2.f32": lambda high, low: (
            to_e4m3(high).astype(np.uint32) << np.uint32(8) | to_e4m3(low)
        ),
        "cvt.f32.f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float32),
    }
    for line in asm.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name == "mov.b32" and rest[0] == "$":
            target, low, high = (part.strip("{} ") for part in rest.split(","))
            names[target] = names[low] | names[high] << np.uint32(16)
        elif name == "mov.b32":
            low, high, word = (part.strip("{} ") for part in rest.split(","))
            names[low], names[high] = names[word] & np.uint32(0xFFFF), names[word] >> np.uint32(16)
        elif name == "ld.global.nc.b32":
            target, address = (part.strip() for part in rest.split(","))
            names[target] = loaded(address)
        elif name and name != ".reg":
            target, *sources = (part.strip() for part in rest.split(","))
            names[target] = does[name](*(value(text) for text in sources))
    handles = [
        interpreter.TensorHandle(
            names[f"${i}"].astype(interpreter._get_np_dtype(kind.scalar), copy=False), kind.scalar
        )
        for i, kind in enumerate(types)
    ]
    return namespaces.SimpleNamespace(get_result=handles.__getitem__)


def _patch_memory(interpreter: Any, tl: Any) -> None:
    builder = interpreter.InterpreterBuilder
    load0, store0 = builder.create_masked_load, builder.create_masked_store
    atomic0 = builder.create_atomic_rmw

    def width(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def data(mask: Any) -> Any:
        plain = mask is None or isinstance(mask, np.ndarray)
        return mask if plain else mask.data

    def check(pointers: Any, mask: Any, what: str) -> np.ndarray:
        """The addresses of the lanes that count, each inside one of the launch's tensors."""
        lanes = np.asarray(pointers.data)
        lanes = lanes.ravel() if mask is None else lanes[np.broadcast_to(mask, lanes.shape)]
        lanes = lanes.ravel().astype(np.uint64)
        if lanes.size == 0:
            return lanes
        inside = np.zeros(lanes.shape, bool)
        for low, high in _state.ranges:
            inside |= (lanes >= np.uint64(low)) & (lanes + np.uint64(width(pointers)) <= high)
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            raise IndexError(
                f"out-of-bounds {what}: {int((~inside).sum())} of {lanes.size} lanes, "
                f"program {program}"
            )
        return lanes

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *a: Any, **k: Any) -> Any:
        check(ptrs, data(mask), "load")
        if other is None:
            # A GPU leaves these lanes undefined; the interpreter would write 0.
            kind = ptrs.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            if _state.other:
                poison: Any = np.array(0, dtype)
            elif kind == tl.bfloat16:
                poison = np.uint16(0x7FC0)
            elif dtype.kind == "f":
                poison = np.array(np.nan, dtype)
            else:
                poison = np.array(0x5A, dtype) if dtype.kind in "ui" else np.array(True)
            full = np.full(np.shape(ptrs.data), poison, dtype=dtype)
            other = interpreter.TensorHandle(full, kind)
        return load0(self, ptrs, mask, other, *a, **k)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *a: Any, **k: Any) -> Any:
        lanes = check(ptrs, data(mask), "store")
        if _state.writer is not None and lanes.size:
            program = interpreter.interpreter_builder.grid_idx
            if np.unique(lanes).size != lanes.size:
                raise RuntimeError(f"duplicate address inside one store, program {program}")
            for address in lanes.tolist():
                other = _state.writer.setdefault(address, program)
                if other != program:
                    raise RuntimeError(
                        f"write race: programs {other} and {program} store to one address"
                    )
        return store0(self, ptrs, value, mask, *a, **k)

    def atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *a: Any, **k: Any) -> Any:
        check(ptr, data(mask), "atomic")
        return atomic0(self, op, ptr, val, mask, *a, **k)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store

    # Triton asks `if other`, which in the interpreter is the value of a tensor of one element: a
    # zero would count as not given.
    semantic = tl.semantic.TritonSemantic
    legacy0 = semantic._load_legacy

    def legacy(self: Any, ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        _state.other = other is not None
        try:
            return legacy0(self, ptr, mask, other, *rest)
        finally:
            _state.other = False

    semantic._load_legacy = legacy
    builder.create_atomic_rmw = atomic_rmw


def _tensors(arg: Any) -> Iterator[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, tuple | list):
        for part in arg:
            yield from _tensors(part)
    elif hasattr(arg, "base"):
        yield from _tensors(arg.base)


def _patch_launch(interpreter: Any) -> None:
    call0 = interpreter.GridExecutor.__call__
    builder = interpreter.InterpreterBuilder
    place0: Callable[..., None] = builder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if _state.reverse:
            a, b, c = self.grid_dim
            x, y, z = a - 1 - x, b - 1 - y, c - 1 - z
        place0(self, x, y, z)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        _state.ranges = []
        for tensor in _tensors([*args, *options.values()]):
            if tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                span = 1 + sum((size - 1) * abs(stride) for size, stride in steps)
                start = tensor.data_ptr()
                _state.ranges.append((start, start + span * tensor.element_size()))
        _state.writer = {} if _state.race else None
        try:
            # A GPU does not warn of an overflow or a division by zero.
            with np.errstate(all="ignore"):
                return call0(self, *args, **options)
        finally:
            _state.ranges, _state.writer = [], None

    builder.set_grid_idx = set_grid_idx
    interpreter.GridExecutor.__call__ = call
