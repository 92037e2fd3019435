"""Kernel launches made ready once per shape: everything that does not depend on the tensors'
addresses is looked up, checked and kept, so that a launch costs little Python. Decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hadagraph.codegen.choose import QuantizePlan
from hadagraph.codegen.matrices import matrix_on
from hadagraph.codegen.spec import WIDTH, KernelSpec, QuantizeRowsSpec, ScaledMmSpec
from hadagraph.codegen.store import kernel_module
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.rotation import padded_size

Quantized = tuple[Tensor, Tensor]
AMAX_ALIGNMENT = 32


@dataclass(frozen=True)
class Call:
    """A kernel and its grid."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]

    @staticmethod
    def of(spec: KernelSpec, grid: tuple[int, ...]) -> Call:
        module = kernel_module(spec)
        return Call(getattr(module, spec.name), grid, module.OPTIONS)

    def __call__(self, *arguments: Any) -> None:
        self.kernel[self.grid](*arguments, **self.options)


class DescriptorMaker:
    """Tensor descriptors of tensors alike in shape, stride and alignment: triton checks the first,
    the others differ in their base alone."""

    def __init__(self, block: tuple[int, int]) -> None:
        self.block = list(block)
        self.checked: dict[str, Any] | None = None

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        if self.checked is None:
            first = TensorDescriptor(
                tensor, list(tensor.shape), list(tensor.stride()), list(self.block)
            )
            self.checked = {name: value for name, value in vars(first).items() if name != "base"}
            return first
        descriptor = TensorDescriptor.__new__(TensorDescriptor)
        vars(descriptor).update(self.checked, base=tensor)
        return descriptor


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


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
        codes = torch.empty(self.codes, dtype=self.dtype, device=device)
        return codes, torch.empty(self.groups, dtype=torch.float32, device=device)


def rows_call(
    plan: QuantizePlan, x: Tensor, rows: Encoding, output: Output
) -> Callable[[Tensor], Quantized]:
    """x -> codes and scales of its rows, for every x laid out as this one."""
    spec = plan.whole_rows
    assert isinstance(spec, QuantizeRowsSpec)
    T, K = x.shape
    programs = -(-T // spec.rows)
    if spec.persistent:
        programs = min(programs, plan.programs_per_sm * _multiprocessors(x.device))
    call = Call.of(spec, (programs,))
    matrix: tuple[Tensor, ...] = ()
    if rows.rotation is not None:
        matrix = (matrix_on(x.device, x.dtype, rows.rotation, spec.fragment_order),)
    sizes, device = (T, K, x.stride(0), output.codes[1]), x.device

    def run(x: Tensor) -> Quantized:
        outputs = output.allocate(device)
        call(x, *matrix, *outputs, *sizes)
        return outputs

    return run


def tiles_call(
    plan: QuantizePlan,
    x: Tensor,
    encodings: tuple[Encoding | None, Encoding | None],
    outputs: tuple[Output | None, Output | None],
) -> Callable[[Tensor], list[Quantized]]:
    """x -> codes and scales of its rows and/or columns: the amax pass into a zeroed buffer, then
    the write pass; for every x laid out as this one."""
    assert plan.amax is not None and plan.write is not None
    T, K = x.shape
    device, descriptors = x.device, plan.write.descriptors
    present = [output for output in outputs if output is not None]
    amax, write = (
        Call.of(spec, (-(-K // WIDTH), -(-T // (WIDTH * spec.tiles))))
        for spec in (plan.amax, plan.write)
    )
    sizes = (T, K, x.stride(0))
    write_sizes = (T, K) if descriptors else (*sizes, *(output.codes[1] for output in present))
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
    describe_x = DescriptorMaker((WIDTH, WIDTH))
    describe_codes = [DescriptorMaker((WIDTH, WIDTH)) for _ in present]

    def run(x: Tensor) -> list[Quantized]:
        results = [output.allocate(device) for output in present]
        bits = torch.zeros(total, dtype=torch.int32, device=device)
        buffers = [bits]
        if len(starts) == 2:
            buffers = [bits[: ends[0]], bits[starts[1] :]]
        amax(x, *plain, *buffers, *sizes)
        arguments: list[Any] = [describe_x(x) if descriptors else x, *ordered]
        for index, (codes, scale) in enumerate(results):
            target = describe_codes[index](codes) if descriptors else codes
            arguments += (buffers[index], target, scale)
        write(*arguments, *write_sizes)
        return results

    return run


def scaled_mm_call(
    spec: ScaledMmSpec, a: Tensor, b: Tensor, out_dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """(a, b, a_scale, b_scale, bias) -> out [M, N], for operands laid out as these."""
    (M, C), N, device = a.shape, b.shape[0], a.device
    call = Call.of(spec, (-(-M // spec.block_m) * -(-N // spec.block_n),))
    sizes: tuple[int, ...] = (M, N, C)
    if not spec.descriptors:
        sizes = (*sizes, a.stride(0), b.stride(0))
    describe_a = DescriptorMaker((spec.block_m, spec.block_c))
    describe_b = DescriptorMaker((spec.block_n, spec.block_c))

    def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty((M, N), dtype=out_dtype, device=device)
        operands = (describe_a(a), describe_b(b)) if spec.descriptors else (a, b)
        vectors = (a_scale, b_scale) if bias is None else (a_scale, b_scale, bias)
        call(*operands, out, *vectors, *sizes)
        return out

    return run
