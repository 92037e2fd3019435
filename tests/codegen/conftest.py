"""Memory whose every byte must be written and, under TRITON_INTERPRET, bf16 products and roundings
that are right, and what the interpreter lacks: functions of libdevice, and moves in assembly."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch


@pytest.fixture
def poisoned_allocations():
    """Freed memory of the caching allocator holds 0x7F bytes: an element not written is seen."""
    block = torch.full((1 << 24,), 0x7F, dtype=torch.uint8, device="cuda")
    small = [torch.full((1 << 12,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(64)]
    del block, small
    yield
    torch.cuda.synchronize()


def _widen_bf16_operands() -> None:
    """The interpreter multiplies bf16's bit patterns as integers; give it their fp32 values."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widen(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return original(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _interpret_chains() -> None:
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    class Moved:
        def __init__(self, values: list[interpreter.TensorHandle]) -> None:
            self.values = values

        def get_result(self, index: int) -> interpreter.TensorHandle:
            return self.values[index]

    def create_inline_asm(self, assembly, constraints, values, *rest):  # type: ignore[no-untyped-def]
        assert assembly == "mov.b32 $0, $1;"
        return Moved(values)

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, value, dtype):  # type: ignore[no-untyped-def]
        """To nearest even, where the interpreter truncates to bf16."""
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, dtype)
        bits = torch.from_numpy(np.array(value.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    def function(compute):  # type: ignore[no-untyped-def]
        def of_tensors(*given):  # type: ignore[no-untyped-def]
            values = [getattr(getattr(x, "handle", None), "data", x) for x in given]
            with np.errstate(all="ignore"):
                data = compute(*values).astype(np.float32)
            (shape, *_) = [x.type for x in given if isinstance(x, tl.tensor)]
            return tl.tensor(interpreter.TensorHandle(data, tl.float32), shape)

        return of_tensors

    erf = np.vectorize(math.erf, otypes=[np.float32])
    computed = {
        "exp": np.exp,
        "exp2": np.exp2,
        "fast_dividef": lambda x, y: np.where(np.abs(y) > 2.0**126, 0.0, np.divide(x, y)),
        "tanh": np.tanh,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "erf": erf,
        "pow": np.power,
    }
    for name, compute in computed.items():
        setattr(libdevice, name, function(compute))


if os.environ.get("TRITON_INTERPRET") == "1":
    _widen_bf16_operands()
    _interpret_chains()
