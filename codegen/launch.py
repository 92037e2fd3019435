"""The CUDA implementations of hadagraph's operators: finds the launch that is ready for tensors of
this layout (`calls`), or makes it from what `choose` says. Never waits for the device.

T rows and K columns of a quantizer's input; M, N kept dims and C contracted dim of a GEMM.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hadagraph.codegen.calls import (
    Matrix,
    Operands,
    Output,
    Quantized,
    columns_call,
    library_call,
    on_device,
    readable_bias,
    rows_call,
    scaled_mm_call,
    tiles_call,
)
from hadagraph.codegen.chains import ChainCall, chain_call
from hadagraph.codegen.choose import (
    DESCRIPTOR_ALIGNMENT,
    DTYPE_NAMES,
    FORMAT_NAMES,
    QuantizerConfig,
    in_one_kernel,
    select_quantize,
    tma_addressable,
)
from hadagraph.codegen.choose_chains import ChainSchedule, wanted_of
from hadagraph.codegen.choose_mm import select_mm
from hadagraph.codegen.listing import sources_for, specs_for
from hadagraph.codegen.matrices import WIDTHS, matrix_on, plain_rotations
from hadagraph.codegen.spec import Capability, ColumnWriteSpec, check_capability
from hadagraph.codegen.store import emitted_sources
from hadagraph.codegen.tune import ColumnsConfig, LibraryMm, RowsConfig
from hadagraph.codegen.tuned import MmChoice
from hadagraph.compat import compute_capability
from hadagraph.formats import Encoding
from hadagraph.ops import LIBRARY
from hadagraph.reference import scaled_mm_reference
from hadagraph.region import Chain
from hadagraph.rotation import Rotation, padded_size

__all__ = [
    "emitted_sources",
    "prepare",
    "quantize",
    "quantize_chain",
    "scaled_mm",
    "sources_for",
    "specs_for",
]

Outputs = tuple[Quantized | None, Quantized | None]
LAYOUTS_KEPT = 4096
"""Layouts of operands whose launches are kept ready."""
log = logging.getLogger(__name__)
_READY: dict[tuple[Hashable, ...], Callable[..., Any]] = {}


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> Capability:
    return compute_capability(device)


def prepare(device: torch.device | str, rotations: Iterable[Rotation] = ()) -> None:
    """Puts the matrices of all unsigned rotations and of `rotations` on the device, so that later
    launches only allocate their outputs. Waits for the copies; call it before any capture."""
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    for rotation in [*plain_rotations(), *rotations]:
        for dtype in (torch.bfloat16, torch.float16):
            for reorder, width in itertools.product((False, True), WIDTHS):
                if rotation.block <= width:
                    matrix_on(where, dtype, rotation, reorder, width)


def layout_of(x: Tensor) -> tuple[Hashable, ...]:
    """What a ready launch depends on of a matrix."""
    aligned = x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    return x.shape, x.stride(), x.dtype, x.device, aligned


def ready(key: tuple[Hashable, ...], make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The launch kept under the key; made on the first call."""
    call = _READY.get(key)
    if call is None:
        if len(_READY) >= LAYOUTS_KEPT:
            _READY.clear()
        call = _READY[key] = make()
    return call


def run_ready(
    key: tuple[Hashable, ...],
    make: Callable[..., Callable[..., Any]],
    arguments: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
) -> Any:
    """What `make` makes ready, given the device's capability and an operator's `arguments`, run on
    the `tensors` among them; found by `key` from the second call on."""
    device = arguments[0].device
    with on_device(device):
        run = ready(key, lambda: make(capability_of(device), *arguments))
        return run(*tensors)


@cache
def log_refusal(what: str, reason: str) -> None:
    """Says once that a reference runs in place of a kernel."""
    log.info("%s: by torch's operators, not by an emitted kernel: %s", what, reason)


def quantize(
    x: Tensor,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: QuantizerConfig | None = None,
) -> Outputs:
    """Codes and scales of the rows and/or the columns of x [T, K], any strides; as
    `quantize_reference` along dims 1 and 0. `config` overrides the table's configuration."""
    key = (*layout_of(x), rows, columns, capability, config)
    with on_device(x.device):
        run = ready(key, lambda: quantizer(x, rows, columns, capability, config))
        outputs: Outputs = run(x)
    return outputs


def quantizer(
    x: Tensor,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: QuantizerConfig | None = None,
) -> Callable[[Tensor], Outputs]:
    """The quantizer of tensors laid out as x."""
    if x.dtype not in DTYPE_NAMES:
        return lambda x: quantize(x.float(), rows, columns, capability, config)
    if x.shape[1] != 1 and x.stride(1) != 1:
        if x.stride(0) == 1:
            turned = quantizer(x.t(), columns, rows, capability, config)
            return lambda x: turned(x.t())[::-1]
        return lambda x: quantize(x.contiguous(), rows, columns, capability, config)
    if rows and columns and not in_one_kernel(rows, columns, x.dtype, capability, config):
        by_rows = quantizer(x, rows, None, capability, config)
        by_columns = quantizer(x, None, columns, capability, config)
        return lambda x: (by_rows(x)[0], by_columns(x)[1])
    T, K = x.shape
    row_output = None if rows is None else Output.of((T, K), rows, 1)
    column_output = None if columns is None else Output.of((T, K), columns, 0)
    if T == 0 or K == 0:
        return lambda x: (_without_groups(row_output, x), _without_groups(column_output, x))
    aligned = x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    addressable = tma_addressable(x.stride(0), K, x.dtype, aligned)
    plan = select_quantize(
        T,
        K,
        x.dtype,
        rows,
        columns,
        capability,
        config,
        addressable=addressable,
        stride=x.stride(0),
    )
    if plan.whole_rows is not None:
        assert rows is not None and row_output is not None
        whole_rows = rows_call(plan, Matrix.of(x), rows, row_output)
        return lambda x: (whole_rows(x), None)
    if isinstance(plan.write, ColumnWriteSpec):
        assert column_output is not None
        by_butterflies = columns_call(plan, Matrix.of(x), column_output)
        return lambda x: (None, by_butterflies(x))
    tiles = tiles_call(plan, Matrix.of(x), (rows, columns), (row_output, column_output))
    if columns is None:
        return lambda x: (tiles(x)[0], None)
    if rows is None:
        return lambda x: (None, tiles(x)[0])
    return tiles  # type: ignore[return-value]


def quantize_chain(
    inputs: Sequence[Tensor],
    chain: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[bool],
    capability: Capability | None = None,
    config: RowsConfig | ColumnsConfig | None = None,
    schedule: ChainSchedule | None = None,
) -> list[Tensor]:
    """Codes and scales of what a chain (`hadagraph.region`) makes of its inputs: matrices [T, K],
    rows [T], columns [K], scalars. Per output the encodings of its layouts ("": not wanted), and
    whether the rounded matrix is wanted; of those wanted, in order: row codes, row scale, column
    codes, column scale, value. `config` overrides the table's for kernels that compute
    the chain, `schedule` the choice by bytes."""
    layouts = tuple(map(layout_of, inputs))
    wanted = (tuple(rows), tuple(columns), tuple(values))
    key = (layouts, chain, wanted, capability, config, schedule)
    device = inputs[0].device

    def make() -> ChainCall:
        target = capability or capability_of(device)
        return chain_call(inputs, Chain.parse(chain), wanted_of(*wanted), target, config, schedule)

    with on_device(device):
        run: ChainCall = ready(key, make)
        return run(inputs)


def _without_groups(output: Output | None, x: Tensor) -> Quantized | None:
    """Codes of an empty tensor; their scales are 1."""
    if output is None:
        return None
    codes, scale = output.allocate(x.device)
    return codes.zero_(), scale.fill_(1.0)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    capability: Capability,
    config: MmChoice | None = None,
) -> Tensor:
    """As `scaled_mm_reference`: a [M, C] and b [N, C] codes, out [M, N] in bf16, fp16 or fp32.
    `config` overrides the table's configuration."""
    of_bias = None if bias is None else layout_of(bias)
    scales = (layout_of(a_scale), layout_of(b_scale))
    key = (layout_of(a), layout_of(b), scales, of_bias, out_dtype, capability, config)
    operands = (a, b, a_scale, b_scale, bias)
    with on_device(a.device):
        run = ready(key, lambda: multiplier(operands, out_dtype, capability, config))
        out: Tensor = run(*operands)
    return out


def multiplier(
    operands: Operands,
    out_dtype: torch.dtype,
    capability: Capability,
    config: MmChoice | None = None,
) -> Callable[..., Tensor]:
    """The scaled matmul of operands laid out as these."""
    if out_dtype not in DTYPE_NAMES:
        raise ValueError(f"out_dtype must be one of {list(DTYPE_NAMES)}, got {out_dtype}")
    a, b, a_scale, b_scale, bias = operands
    (M, C), N = a.shape, b.shape[0]
    for codes in (a, b):
        check_capability(FORMAT_NAMES[codes.dtype], capability)
    for name, scale in (("a_scale", a_scale), ("b_scale", b_scale)):
        if scale.dtype != torch.float32 or scale.device != a.device:
            raise ValueError(
                f"{name} must be torch.float32 on {a.device}, got {scale.dtype} on {scale.device}"
            )
    if M == 0 or N == 0 or C == 0:
        return partial(scaled_mm_reference, out_dtype=out_dtype)
    pairs = zip(operands, _launchable(operands), strict=True)
    if any(given is not ready for given, ready in pairs):
        return lambda *operands: scaled_mm(*_launchable(operands), out_dtype, capability, config)
    route = select_mm(
        (M, N, C),
        (FORMAT_NAMES[a.dtype], FORMAT_NAMES[b.dtype]),
        (a_scale.numel() == 1, b_scale.numel() == 1),
        None if bias is None else bias.dtype,
        out_dtype,
        capability,
        config,
        dense=a.stride(0) == C == b.stride(0),
    )
    if isinstance(route, LibraryMm):
        return library_call(route, operands, out_dtype)
    return scaled_mm_call(route, a, b, out_dtype)


def _launchable(operands: Operands) -> Operands:
    """The operands as kernels read them, copied only where they aren't."""
    a, b, a_scale, b_scale, bias = operands
    scales = a_scale.contiguous(), b_scale.contiguous()
    return _addressable(a), _addressable(b), *scales, readable_bias(bias)


def _addressable(codes: Tensor) -> Tensor:
    """Codes that a tensor descriptor can address: unit last stride, 16-byte rows and start."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    rows, length = codes.shape
    padded = torch.empty(rows, padded_size(length, 16), dtype=codes.dtype, device=codes.device)
    return padded[:, :length].copy_(codes)


def _quantize_cuda(x: Tensor, rows: str | None, columns: str | None) -> Outputs:
    """`quantize`, found by the encodings' text: an operator call parses nothing."""
    outputs: Outputs = run_ready(
        (*layout_of(x), rows, columns), ready_quantize, (x, rows, columns), (x,)
    )
    return outputs


def ready_quantize(
    capability: Capability, x: Tensor, rows: str | None, columns: str | None
) -> Callable[[Tensor], Outputs]:
    """`quantizer`, of the encodings' text."""
    row_encoding = None if rows is None else Encoding.parse(rows)
    column_encoding = None if columns is None else Encoding.parse(columns)
    return quantizer(x, row_encoding, column_encoding, capability)


def _quantize_rows_cuda(x: Tensor, rows: str) -> Quantized:
    return _quantize_cuda(x, rows, None)[0]  # type: ignore[return-value]


def _quantize_columns_cuda(x: Tensor, columns: str) -> Quantized:
    return _quantize_cuda(x, None, columns)[1]  # type: ignore[return-value]


def _quantize_both_cuda(
    x: Tensor, rows: str, columns: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_outputs, column_outputs = _quantize_cuda(x, rows, columns)
    return (*row_outputs, *column_outputs)  # type: ignore[misc]


def _scaled_mm_cuda(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, capability_of(a.device))


LIBRARY.impl("quantize_rows", _quantize_rows_cuda, "CUDA")
LIBRARY.impl("quantize_columns", _quantize_columns_cuda, "CUDA")
LIBRARY.impl("quantize_both", _quantize_both_cuda, "CUDA")
LIBRARY.impl("quantize_chain", quantize_chain, "CUDA")
LIBRARY.impl("scaled_mm", _scaled_mm_cuda, "CUDA")
