"""Kernel launches made ready once per shape: everything that does not depend on the tensors'
addresses is looked up, checked and kept, so that a launch costs little Python. Decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hadagraph.codegen import workers
from hadagraph.codegen.choose import DTYPE_NAMES, QuantizePlan
from hadagraph.codegen.direct import Launch, empty, zero_words
from hadagraph.codegen.encode_spec import AnySpec
from hadagraph.codegen.matrices import factor, matrix_on
from hadagraph.codegen.spec import (
    WIDTH,
    AmaxSpec,
    BlockScaledMmSpec,
    ColumnAmaxSpec,
    ColumnWriteSpec,
    GluonMmSpec,
    MmSpec,
    QuantizeRowsSpec,
    QuantizeTilesSpec,
)
from hadagraph.codegen.store import kernel_module
from hadagraph.codegen.tune import LibraryMm
from hadagraph.compat import library_scaled_mm
from hadagraph.encode import Encoded
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.rotation import padded_size

Quantized = tuple[Tensor, Tensor]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""a, b, a_scale, b_scale, bias."""
AMAX_ALIGNMENT = 32


_NOTED: ContextVar[list[workers.Request] | None] = ContextVar("_NOTED", default=None)


@contextlib.contextmanager
def noted() -> Iterator[list[workers.Request]]:
    """A context that lists the kernels of the calls which are made ready in it."""
    requests: list[workers.Request] = []
    token = _NOTED.set(requests)
    try:
        yield requests
    finally:
        _NOTED.reset(token)


def launch_of(
    spec: AnySpec,
    grid: tuple[int, ...],
    integers: tuple[int, ...],
    streams: tuple[int, ...] = (),
) -> Launch:
    """The spec's kernel, ready for tensors alike in dtype and layout. `streams` follow the integers
    that its binary depends on."""
    module = kernel_module(spec)
    request = workers.Request(spec, (*integers, *(0 for _ in streams)))
    noted = _NOTED.get()
    if noted is not None:
        noted.append(request)
    kernel = getattr(module, spec.name)
    prepare = partial(workers.wait_for, request)
    arguments = (*integers, *streams)
    return Launch(kernel, grid, module.OPTIONS, module.SIGNATURE, arguments, prepare)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Matrix:
    """How a matrix [T, K] with unit stride along K lies: `stride` elements between its rows."""

    shape: tuple[int, int]
    stride: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> Matrix:
        T, K = x.shape
        return Matrix((T, K), x.stride(0), x.dtype, x.device)


@dataclass(frozen=True)
class Output:
    """Shapes and dtype of one layout's codes and scales, and the zeros to which the maxima of its
    scale groups start."""

    codes: tuple[int, int]
    groups: int
    dtype: torch.dtype

    @staticmethod
    def of(shape: tuple[int, int], encoding: Encoding, contracted_dim: int) -> Output:
        kept = shape[1 - contracted_dim]
        contracted = padded_size(shape[contracted_dim], encoding.contracted_multiple)
        groups = 1 if encoding.granularity == PER_TENSOR else kept
        return Output((kept, contracted), groups, format_named(encoding.format).dtype)

    def allocate(self, device: torch.device) -> Quantized:
        codes = empty(self.codes, self.dtype, device)
        return codes, empty((self.groups,), torch.float32, device)


def rows_launch(
    spec: QuantizeRowsSpec,
    programs_per_sm: int,
    x: Matrix,
    strides: tuple[int, ...],
    rows: Encoding,
    output: Output,
) -> Callable[..., None]:
    """(what the kernel reads, its outputs): the whole-row kernel. `strides`: of what it reads; `x`
    has the shape and dtype of what is quantized."""
    (T, K), device = x.shape, x.device
    programs = -(-T // spec.rows)
    if spec.persistent:
        programs = min(programs, programs_per_sm * multiprocessors(device))
    launch = launch_of(spec, (programs,), (T, K, *strides, output.codes[1]))
    matrix: tuple[Tensor, ...] = ()
    if rows.rotation is not None:
        small = factor(rows.rotation, spec.width)
        matrix = (matrix_on(device, x.dtype, small, spec.fragment_order, spec.width),)

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        launch(*inputs, *matrix, *outputs)

    return run


def rows_call(
    plan: QuantizePlan, x: Matrix, rows: Encoding, output: Output
) -> Callable[[Tensor], Quantized]:
    """x -> codes and scales of its rows, for every x that lies so."""
    assert plan.whole_rows is not None
    launch = rows_launch(plan.whole_rows, plan.programs_per_sm, x, (x.stride,), rows, output)
    device = x.device

    def run(x: Tensor) -> Quantized:
        outputs = output.allocate(device)
        launch((x,), outputs)
        return outputs

    return run


def pass_launch(
    spec: ColumnAmaxSpec | ColumnWriteSpec,
    shape: tuple[int, int],
    strides: tuple[int, ...],
    *more: int,
) -> Launch:
    """A column pass over matrices [T, K] whose rows lie `strides` elements apart."""
    T, K = shape
    grid = (-(-K // spec.columns), -(-T // spec.tokens))
    if spec.tokens_first:
        grid = grid[::-1]
    return launch_of(spec, grid, (T, K, *(strides if spec.strides is None else ()), *more))


def columns_call(plan: QuantizePlan, x: Matrix, output: Output) -> Callable[[Tensor], Quantized]:
    """x -> codes and scales of its columns: the maxima into a zeroed buffer, then the codes; for
    every x that lies so."""
    assert isinstance(plan.amax, ColumnAmaxSpec) and isinstance(plan.write, ColumnWriteSpec)
    device, groups = x.device, output.groups
    amax = pass_launch(plan.amax, x.shape, (x.stride,))
    write = pass_launch(plan.write, x.shape, (x.stride,), output.codes[1])

    def run(x: Tensor) -> Quantized:
        results = output.allocate(device)
        bits = zero_words(groups, device)
        amax(x, bits)
        write(x, bits, *results)
        return results

    return run


def tiles_launch(
    plan: QuantizePlan,
    x: Matrix,
    encodings: tuple[Encoding | None, Encoding | None],
    outputs: tuple[Output | None, Output | None],
) -> Callable[[Tensor, Sequence[Quantized]], None]:
    """(x, codes and scales of its rows and/or columns): the amax pass into a zeroed buffer, then
    the write pass; for every x that lies so."""
    assert isinstance(plan.amax, AmaxSpec) and isinstance(plan.write, QuantizeTilesSpec)
    T, K = x.shape
    device = x.device
    present = [output for output in outputs if output is not None]
    sizes = (T, K, x.stride)
    write_sizes = (*sizes, *(output.codes[1] for output in present))
    if plan.write.descriptors:
        write_sizes = (T, K)
    amax, write = (
        launch_of(spec, (-(-K // WIDTH), -(-T // (WIDTH * spec.tiles))), integers)
        for spec, integers in ((plan.amax, sizes), (plan.write, write_sizes))
    )
    rotations = [side.rotation for side in encodings if side is not None and side.rotation]
    if plan.amax.one_matrix:
        rotations = rotations[:1]
    plain, ordered = (
        [matrix_on(device, x.dtype, rotation, order) for rotation in rotations]
        for order in (False, plan.write.fragment_order)
    )
    starts = [0, padded_size(present[0].groups, AMAX_ALIGNMENT)][: len(present)]
    total = starts[-1] + present[-1].groups
    ends = [start + output.groups for start, output in zip(starts, present, strict=True)]

    def run(x: Tensor, results: Sequence[Quantized]) -> None:
        bits = zero_words(total, device)
        buffers = [bits]
        if len(starts) == 2:
            buffers = [bits[: ends[0]], bits[starts[1] :]]
        amax(x, *plain, *buffers)
        arguments = [x, *ordered]
        for buffer, (codes, scale) in zip(buffers, results, strict=True):
            arguments += (buffer, codes, scale)
        write(*arguments)

    return run


def tiles_call(
    plan: QuantizePlan,
    x: Matrix,
    encodings: tuple[Encoding | None, Encoding | None],
    outputs: tuple[Output | None, Output | None],
) -> Callable[[Tensor], list[Quantized]]:
    """x -> codes and scales of its rows and/or columns, as `tiles_launch` makes them."""
    launch = tiles_launch(plan, x, encodings, outputs)
    present = [output for output in outputs if output is not None]
    device = x.device

    def run(x: Tensor) -> list[Quantized]:
        results = [output.allocate(device) for output in present]
        launch(x, results)
        return results

    return run


def scaled_mm_call(
    spec: MmSpec, a: Tensor, b: Tensor, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """(a, b, a_scale, b_scale, bias) -> out [M, N], for operands laid out as these."""
    (M, C), N, device = a.shape, b.shape[0], a.device
    sizes: tuple[int, ...] = (M, N, C)
    programs = -(-M // spec.block_m) * -(-N // spec.block_n)
    if isinstance(spec, GluonMmSpec):
        programs = min(programs, multiprocessors(device))
    elif not spec.descriptors:
        sizes = (*sizes, a.stride(0), b.stride(0))
    launch = launch_of(spec, (programs,), sizes)

    def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
        out = empty((M, N), out_dtype, device)
        vectors = (a_scale, b_scale) if bias is None else (a_scale, b_scale, bias)
        launch(a, b, out, *vectors)
        return out

    return run


def readable_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as the epilogues of matmuls read it, copied only where it isn't so."""
    if bias is None:
        return None
    return (bias if bias.dtype in DTYPE_NAMES else bias.float()).contiguous()


def block_scaled_mm_call(
    spec: BlockScaledMmSpec, a: Encoded, b: Encoded, size: int, out_dtype: torch.dtype
) -> Callable[[Encoded, Encoded, Tensor | None], Tensor]:
    """(a, b, bias) -> out [M, N], for operands laid out as these; size: what both have along C."""
    device, M, N = a.codes.device, a.codes.shape[0], b.codes.shape[0]
    laid = partial(_block_scales, spec, "a"), partial(_block_scales, spec, "b")
    sizes: tuple[int, ...] = (M, N, size)
    if not spec.descriptors:
        sizes = (*sizes, a.codes.stride(0), b.codes.stride(0))
    sizes = (*sizes, laid[0](a).stride(0), laid[1](b).stride(0))
    programs = -(-M // spec.block_m) * -(-N // spec.block_n)
    launch = launch_of(spec, (programs,), sizes)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        out = empty((M, N), out_dtype, device)
        blocks = (laid[0](a), laid[1](b))
        rest = () if bias is None else (bias,)
        launch(a.codes, b.codes, out, *blocks, a.tensor_scale, b.tensor_scale, *rest)
        return out

    return run


def _block_scales(spec: BlockScaledMmSpec, side: str, encoded: Encoded) -> Tensor:
    """The block scales of one side, a or b, as its kernel takes them."""
    scale = encoded.scale
    if spec.arranged:
        sides = {"a": (spec.a_tiles, spec.block_m), "b": (spec.b_tiles, spec.block_n)}
        tiles, rows = sides[side]
        if tiles:
            scale = scale[:, None].expand(-1, spec.block, -1).flatten(0, 1)
        scale = arranged(scale, rows, spec.block_c // spec.block)
    return scale if spec.scale == "e8m0" else scale.view(torch.float8_e4m3fn)


def arranged(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [kept, S], bytes, as `tcgen05.cp` copies them to tensor memory: [kept / 128,
    S / 4 * 512], where 512 bytes hold 4 scales of 128 rows in the order [32, 4, 4] of the row's
    place in a quarter, the quarter, and the scale. Zeros fill up multiples of `rows`, `columns`."""
    kept, size = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -size % columns, 0, -kept % rows))
    parts = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    return parts.permute(0, 3, 2, 1, 4).flatten(1).contiguous()


def library_call(
    route: LibraryMm, operands: Operands, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """As `scaled_mm_call`, through torch._scaled_mm: scales [1] and [1], or [M] and [N]."""
    fast = route.fast_accumulation
    tensorwise = operands[2].numel() == 1 and operands[3].numel() == 1

    def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
        if not tensorwise:
            a_scale, b_scale = a_scale.unsqueeze(1), b_scale.unsqueeze(0)
        return library_scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale,
            bias=bias,
            out_dtype=out_dtype,
            use_fast_accum=fast,
        )

    return run
