"""Triton's interpreter, sooner: what it makes anew for every value of a program is made once.

Shapes and NumPy's dtypes are remembered, the language is patched once a process (Triton does it
again at every call of a device function), int32 overflow is one look at NumPy's sums where Triton
interprets nine operations, and a reduction takes slices where Triton takes elements. What a program
computes and what raises stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["install"]


def install(interpreter: Any, tl: Any) -> None:
    """Patch the interpreter; once, before the first launch."""
    _remember_shapes(tl.core)
    _remember_dtypes(interpreter, tl)
    _patch_language_once(interpreter, tl)
    tl.semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _overflow
    _reduce_slices(interpreter)


def _remember_shapes(core: Any) -> None:
    block, tensor, constexpr = core.block_type, core.tensor, core.constexpr
    block0 = block.__init__
    # By sizes and what they are, as 4.0 equals 4 and is refused: a block's shape and number of
    # elements as its type has them, and as its values do.
    known: dict[tuple[Any, ...], tuple[Any, int, Any, Any]] = {}
    scalar, listed = (constexpr(1), core.tuple([])), (list, core.tuple)

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        assert isinstance(shape, listed)
        sizes = [s.value if isinstance(s, constexpr) else s for s in shape]
        key = tuple(sizes), *map(type, sizes)
        found = known.get(key)
        if found is None:
            block0(self, element_ty, shape)
            each = core.tuple([constexpr(s) for s in self.shape])
            found = known[key] = self.shape, self.numel, constexpr(self.numel), each
        self.element_ty = element_ty
        self.shape, self.numel, *self._of_values = found

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type._of_values if type.is_block() else scalar

    def name(self: Any) -> str:
        return f"<{self.shape}, {self.element_ty}>"

    block.name = property(name, lambda self, given: None)
    block.__init__, tensor.__init__ = block_init, tensor_init


def _remember_dtypes(interpreter: Any, tl: Any) -> None:
    dtype0 = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        if isinstance(kind, tl.pointer_type):
            return np.dtype(np.uint64)
        found = known.get(kind.name)
        if found is None:
            found = known[kind.name] = dtype0(kind)
        return found

    interpreter._get_np_dtype = np_dtype


def _patch_language_once(interpreter: Any, tl: Any) -> None:
    patch0, done = interpreter._patch_lang, []

    def everything() -> None:
        """Its globals have both of the modules that are patched."""

    names = {"tl": tl, "core": tl.core}
    everything = type(everything)(everything.__code__, names)

    def patch(fn: Any) -> Any:
        if not done:
            patch0(everything)
            done.append(True)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _overflow(self: Any, left: Any, right: Any, op: Any) -> None:
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    does = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op.__name__]
    out = does(*(np.asarray(x.handle.data, np.int64) for x in (left, right)))
    if out.size and not kind.get_int_min_value() <= out.min() <= out.max() <= (
        kind.get_int_max_value()
    ):
        raise AssertionError(
            f"int{kind.int_bitwidth} overflow detected for operation {op.__name__}"
        )


def _reduce_slices(interpreter: Any) -> None:
    reduce0 = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, given: Any) -> list[Any]:
        """In the order of Triton's own: along the axis from its start."""
        if self.axis is None and len(given) > 1:
            made: list[Any] = reduce0(self, given)
            return made
        values, axis = self.unravel(given, self.axis)
        kinds = [x.dtype for x in values]
        slices = zip(*(np.moveaxis(x.handle.data, axis, 0) for x in values), strict=True)
        before = values[0].handle.data.shape
        shape = before[:axis] + before[axis + 1 :]

        def tensors(data: Any) -> list[Any]:
            return [self.to_tensor(x, kind) for x, kind in zip(data, kinds, strict=True)]

        total = tensors(next(slices))
        for one in slices:
            found = self.combine_fn.fn(*total, *tensors(one))
            parts = found if isinstance(found, tuple) else (found,)
            if [getattr(x, "dtype", None) for x in parts] != kinds:
                # What then becomes of a value is of Python's numbers.
                made = reduce0(self, given)
                return made
            total = tensors([x.handle.data.reshape(shape)[()] for x in parts])
        out = [x.handle.data.reshape(shape) for x in total]
        if self.keep_dims:
            out = [np.expand_dims(x, axis) for x in out]
        return tensors([x if x.shape else x.item() for x in out])

    interpreter.ReduceOps.generic_reduce = reduce
