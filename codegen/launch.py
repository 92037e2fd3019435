"""Launches emitted kernels: the CUDA implementations of hadagraph's operators. Allocates outputs,
never waits for the device. What runs is decided in `choose`; this file decides nothing but order.

T rows and K columns of a quantizer's input; M, N kept dims and C contracted dim of a GEMM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hadagraph.codegen.choose import (
    DTYPE_NAMES,
    FORMAT_NAMES,
    QuantizePlan,
    select_quantize,
    select_scaled_mm,
)
from hadagraph.codegen.emit import emit
from hadagraph.codegen.matrices import matrix_on, plain_rotations
from hadagraph.codegen.spec import (
    WIDTH,
    Capability,
    KernelSpec,
    QuantizeRowsSpec,
    ScaledMmSpec,
    check_capability,
)
from hadagraph.codegen.store import emitted_sources, kernel_module
from hadagraph.codegen.tune import MmConfig, RowsConfig, TilesConfig, both_layouts_in_one
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.ops import LIBRARY
from hadagraph.reference import scaled_mm_reference
from hadagraph.rotation import Rotation, padded_size

__all__ = ["emitted_sources", "prepare", "quantize", "scaled_mm", "sources_for"]

Quantized = tuple[Tensor, Tensor]
AMAX_ALIGNMENT = 32


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def prepare(device: torch.device | str, rotations: Iterable[Rotation] = ()) -> None:
    """Puts the matrices of all unsigned rotations and of `rotations` on the device, so that later
    launches only allocate their outputs. Waits for the copies; call it before any capture."""
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    for rotation in [*plain_rotations(), *rotations]:
        for dtype in (torch.bfloat16, torch.float16):
            for reorder in (False, True):
                matrix_on(where, dtype, rotation, reorder)


def _launch(spec: KernelSpec, grid: tuple[int, ...], arguments: list[Any]) -> None:
    module = kernel_module(spec)
    getattr(module, spec.name)[grid](*arguments, **module.OPTIONS)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


_plan_quantize = lru_cache(maxsize=4096)(select_quantize)
_plan_scaled_mm = lru_cache(maxsize=4096)(select_scaled_mm)


def quantize(
    x: Tensor,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: RowsConfig | TilesConfig | None = None,
) -> tuple[Quantized | None, Quantized | None]:
    """Codes and scales of the rows and/or the columns of x [T, K], any strides; as
    `quantize_reference` along dims 1 and 0. `config` overrides the table's configuration."""
    if x.dtype not in DTYPE_NAMES:
        x = x.float()
    if x.shape[1] != 1 and x.stride(1) != 1:
        if x.stride(0) == 1:
            turned = quantize(x.t(), columns, rows, capability, config)
            return turned[1], turned[0]
        x = x.contiguous()
    if rows and columns and not both_layouts_in_one(capability, x.element_size()):
        row_outputs, _ = quantize(x, rows, None, capability)
        _, column_outputs = quantize(x, None, columns, capability, config)
        return row_outputs, column_outputs
    row_outputs = _outputs(x, rows, 1)
    column_outputs = _outputs(x, columns, 0)
    if x.numel() == 0:
        for outputs in (row_outputs, column_outputs):
            if outputs is not None:
                outputs[1].fill_(1.0)
        return row_outputs, column_outputs
    plan = _plan_quantize(*x.shape, x.dtype, rows, columns, capability, config)
    with _on_device(x):
        if plan.whole_rows is not None:
            assert rows is not None and row_outputs is not None
            _launch_rows(plan.whole_rows, plan.programs_per_sm, x, rows, row_outputs)
        else:
            _launch_tiles(plan, x, rows, columns, row_outputs, column_outputs)
    return row_outputs, column_outputs


def _outputs(x: Tensor, encoding: Encoding | None, contracted_dim: int) -> Quantized | None:
    if encoding is None:
        return None
    kept = x.shape[1 - contracted_dim]
    contracted = padded_size(x.shape[contracted_dim], encoding.contracted_multiple)
    dtype = format_named(encoding.format).dtype
    groups = 1 if encoding.granularity == PER_TENSOR else kept
    codes = torch.empty((kept, contracted), dtype=dtype, device=x.device)
    return codes, torch.empty((groups,), dtype=torch.float32, device=x.device)


def _launch_rows(
    spec: QuantizeRowsSpec, programs_per_sm: int, x: Tensor, rows: Encoding, outputs: Quantized
) -> None:
    T, K = x.shape
    codes, scale = outputs
    programs = -(-T // spec.rows)
    if spec.persistent:
        programs = min(programs, programs_per_sm * _multiprocessors(x.device))
    matrix = []
    if rows.rotation is not None:
        matrix = [matrix_on(x.device, x.dtype, rows.rotation, spec.fragment_order)]
    arguments = [x, *matrix, codes, scale, T, K, x.stride(0), codes.shape[1]]
    _launch(spec, (programs,), arguments)


def _launch_tiles(
    plan: QuantizePlan,
    x: Tensor,
    rows: Encoding | None,
    columns: Encoding | None,
    row_outputs: Quantized | None,
    column_outputs: Quantized | None,
) -> None:
    """The amax pass into a zeroed buffer, then the write pass."""
    assert plan.amax is not None and plan.write is not None
    T, K = x.shape
    amax = _amax_buffers(x, row_outputs, column_outputs)
    sides = [
        (encoding, buffer, outputs)
        for encoding, buffer, outputs in zip(
            (rows, columns), amax, (row_outputs, column_outputs), strict=True
        )
        if encoding is not None and buffer is not None and outputs is not None
    ]
    rotations = [side[0].rotation for side in sides if side[0].rotation is not None]
    stripes = (-(-K // WIDTH), -(-T // (WIDTH * plan.amax.tiles)))
    plain = [matrix_on(x.device, x.dtype, rotation, False) for rotation in rotations]
    buffers = [buffer for _, buffer, _ in sides]
    _launch(plan.amax, stripes, [x, *plain, *buffers, T, K, x.stride(0)])

    order = plan.write.fragment_order
    matrices = [matrix_on(x.device, x.dtype, rotation, order) for rotation in rotations]
    tensors = [tensor for _, buffer, outputs in sides for tensor in (buffer, *outputs)]
    strides = [outputs[0].shape[1] for _, _, outputs in sides]
    stripes = (-(-K // WIDTH), -(-T // (WIDTH * plan.write.tiles)))
    _launch(plan.write, stripes, [x, *matrices, *tensors, T, K, x.stride(0), *strides])


def _amax_buffers(
    x: Tensor, row_outputs: Quantized | None, column_outputs: Quantized | None
) -> list[Tensor | None]:
    """One zeroed int32 allocation, cut into a buffer for each side at an aligned offset."""
    sizes = [
        0 if outputs is None else outputs[1].numel() for outputs in (row_outputs, column_outputs)
    ]
    offset = padded_size(sizes[0], AMAX_ALIGNMENT)
    whole = torch.zeros(offset + sizes[1], dtype=torch.int32, device=x.device)
    return [
        None if row_outputs is None else whole[: sizes[0]],
        None if column_outputs is None else whole[offset:],
    ]


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    capability: Capability,
    config: MmConfig | None = None,
) -> Tensor:
    """As `scaled_mm_reference`: a [M, C] and b [N, C] codes, out [M, N] in bf16, fp16 or fp32.
    `config` overrides the table's configuration."""
    if out_dtype not in DTYPE_NAMES:
        raise ValueError(f"out_dtype must be one of {list(DTYPE_NAMES)}, got {out_dtype}")
    M, C = a.shape
    N = b.shape[0]
    for codes in (a, b):
        check_capability(FORMAT_NAMES[codes.dtype], capability)
    if M == 0 or N == 0 or C == 0:
        return scaled_mm_reference(a, b, a_scale, b_scale, bias, out_dtype)
    if bias is not None:
        bias = bias.contiguous() if bias.dtype in DTYPE_NAMES else bias.float().contiguous()
    spec = _plan_scaled_mm(
        M,
        N,
        C,
        FORMAT_NAMES[a.dtype],
        FORMAT_NAMES[b.dtype],
        (a_scale.numel() == 1, b_scale.numel() == 1),
        None if bias is None else bias.dtype,
        out_dtype,
        capability,
        config,
    )
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    a, b = _addressable(a), _addressable(b)
    tensors = [out, a_scale.contiguous(), b_scale.contiguous()]
    if bias is not None:
        tensors.append(bias)
    grid = (-(-M // spec.block_m) * -(-N // spec.block_n),)
    with _on_device(a):
        _launch(spec, grid, [*_operands(spec, a, b), *tensors, M, N, C, *_strides(spec, a, b)])
    return out


def _addressable(codes: Tensor) -> Tensor:
    """Codes that a tensor descriptor can address: unit last stride, 16-byte rows and start."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    return codes.clone(memory_format=torch.contiguous_format)


def _operands(spec: ScaledMmSpec, a: Tensor, b: Tensor) -> list[Any]:
    if not spec.descriptors:
        return [a, b]
    return [
        TensorDescriptor(a, list(a.shape), list(a.stride()), [spec.block_m, spec.block_c]),
        TensorDescriptor(b, list(b.shape), list(b.stride()), [spec.block_n, spec.block_c]),
    ]


def _strides(spec: ScaledMmSpec, a: Tensor, b: Tensor) -> list[int]:
    return [] if spec.descriptors else [a.stride(0), b.stride(0)]


def _quantize_rows_cuda(x: Tensor, rows: str) -> Quantized:
    outputs, _ = quantize(x, Encoding.parse(rows), None, _capability(x.device))
    assert outputs is not None
    return outputs


def _quantize_columns_cuda(x: Tensor, columns: str) -> Quantized:
    _, outputs = quantize(x, None, Encoding.parse(columns), _capability(x.device))
    assert outputs is not None
    return outputs


def _quantize_both_cuda(
    x: Tensor, rows: str, columns: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_outputs, column_outputs = quantize(
        x, Encoding.parse(rows), Encoding.parse(columns), _capability(x.device)
    )
    assert row_outputs is not None and column_outputs is not None
    return (*row_outputs, *column_outputs)


def _scaled_mm_cuda(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, _capability(a.device))


LIBRARY.impl("quantize_rows", _quantize_rows_cuda, "CUDA")
LIBRARY.impl("quantize_columns", _quantize_columns_cuda, "CUDA")
LIBRARY.impl("quantize_both", _quantize_both_cuda, "CUDA")
LIBRARY.impl("scaled_mm", _scaled_mm_cuda, "CUDA")


def _hint(size: Any) -> int:
    """A symbolic size's hint; any other size itself."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def sources_for(op: str, arguments: tuple[Any, ...], capability: Capability) -> dict[str, str]:
    """Name -> source of the kernels that the operator (`"quantize_rows"`, ...) would run on the
    target. Tensor arguments need shape, stride and dtype only: fake and meta tensors will do."""
    return {spec.name: emit(spec) for spec in specs_for(op, arguments, capability)}


def specs_for(
    op: str, arguments: tuple[Any, ...], capability: Capability
) -> tuple[KernelSpec, ...]:
    """Specs of the kernels that the operator would run; see `sources_for`."""
    if op == "scaled_mm":
        a, b, a_scale, b_scale, bias, out_dtype = arguments
        return (
            select_scaled_mm(
                _hint(a.shape[0]),
                _hint(b.shape[0]),
                _hint(a.shape[1]),
                FORMAT_NAMES[a.dtype],
                FORMAT_NAMES[b.dtype],
                (_hint(a_scale.numel()) == 1, _hint(b_scale.numel()) == 1),
                None if bias is None else bias.dtype,
                out_dtype,
                capability,
            ),
        )
    x, *texts = arguments
    encodings = [Encoding.parse(text) for text in texts]
    rows = None if op == "quantize_columns" else encodings[0]
    columns = None if op == "quantize_rows" else encodings[-1]
    T, K = (_hint(size) for size in x.shape)
    dtype = x.dtype if x.dtype in DTYPE_NAMES else torch.float32
    if K != 1 and _hint(x.stride(1)) != 1 and _hint(x.stride(0)) == 1:
        T, K, rows, columns = K, T, columns, rows
    if rows and columns and not both_layouts_in_one(capability, dtype.itemsize):
        row_plan = select_quantize(T, K, dtype, rows, None, capability)
        return row_plan.specs + select_quantize(T, K, dtype, None, columns, capability).specs
    return select_quantize(T, K, dtype, rows, columns, capability).specs
