"""Launches of chain kernels, made ready once per layout of the inputs: (inputs) -> codes, scales
and values of every output of a chain. What runs is in `choose_chains`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hadagraph.codegen.calls import AMAX_ALIGNMENT, Output, launch_of, multiprocessors
from hadagraph.codegen.choose_chains import ChainPlan, ChainSchedule, Wanted, select_chain
from hadagraph.codegen.direct import empty, zero_words
from hadagraph.codegen.matrices import matrix_on
from hadagraph.codegen.spec import WIDTH, Capability, ChainAmaxSpec, ChainWriteSpec
from hadagraph.codegen.tune import ChainConfig, RowsConfig
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import MATRIX, Chain, ChainInput
from hadagraph.rotation import padded_size

ChainCall = Callable[[Sequence[Tensor]], list[Tensor]]


def chain_call(
    inputs: Sequence[Tensor],
    chain: Chain,
    wanted: tuple[Wanted, ...],
    capability: Capability,
    config: RowsConfig | ChainConfig | None = None,
    schedule: ChainSchedule | None = None,
) -> ChainCall:
    """The quantizer of inputs laid out as these. ValueError if they don't fit the chain."""
    T, K = _check(inputs, chain)
    pairs = list(zip(inputs, chain.inputs, strict=True))
    if not all(_launchable(*pair) for pair in pairs):
        copies = [partial(_copied, needed=not _launchable(*pair)) for pair in pairs]
        ready = [copy(given) for copy, given in zip(copies, inputs, strict=True)]
        run = chain_call(ready, chain, wanted, capability, config, schedule)
        return lambda inputs: run([copy(x) for copy, x in zip(copies, inputs, strict=True)])
    plan = select_chain(T, K, chain, wanted, capability, config, schedule)
    device = inputs[0].device
    results = _Results(T, K, chain, wanted, plan.values, device)
    if T == 0 or K == 0:
        return lambda inputs: results.wanted(*results.allocate(empty_scales=True))
    strides = tuple(given.stride(0) for given, each in pairs if each.shape == MATRIX)
    rows = _rows_run(T, K, plan, wanted[0], results, strides)
    passes = _passes_run(T, K, plan, wanted, results, strides)

    def run_all(inputs: Sequence[Tensor]) -> list[Tensor]:
        made, values = results.allocate()
        if rows is not None:
            rows(inputs, made, values)
        if passes is not None:
            passes(inputs, made, values)
        return results.wanted(made, values)

    return run_all


Made = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(output, layout) -> codes and scale."""
Values = list[Tensor | None]
Run = Callable[[Sequence[Tensor], Made, Values], None]


class _Results:
    """Allocates the tensors that a plan writes, and orders those that are wanted."""

    def __init__(
        self,
        T: int,
        K: int,
        chain: Chain,
        wanted: tuple[Wanted, ...],
        written: tuple[bool, ...],
        device: torch.device,
    ) -> None:
        self.shape, self.device, self.want = (T, K), device, wanted
        self.outputs: dict[tuple[int, str], Output] = {}
        for index, want in enumerate(wanted):
            for layout in want.layouts:
                encoding = want.encoding(layout)
                assert encoding is not None
                contracted = 1 if layout == "row" else 0
                self.outputs[index, layout] = Output.of((T, K), encoding, contracted)
        self.dtypes = [
            CHAIN_DTYPES[output.dtype] if here else None
            for output, here in zip(chain.outputs, written, strict=True)
        ]

    def allocate(self, *, empty_scales: bool = False) -> tuple[Made, Values]:
        """`empty_scales`: for empty tensors, whose codes are 0 and whose scales are 1."""
        made = {side: output.allocate(self.device) for side, output in self.outputs.items()}
        if empty_scales:
            for codes, scale in made.values():
                codes.zero_()
                scale.fill_(1.0)
        values = [
            None if dtype is None else empty(self.shape, dtype, self.device)
            for dtype in self.dtypes
        ]
        return made, values

    def wanted(self, made: Made, values: Values) -> list[Tensor]:
        results: list[Tensor] = []
        for index, want in enumerate(self.want):
            for layout in want.layouts:
                results += made[index, layout]
            value = values[index]
            if want.value:
                assert value is not None
                results.append(value)
        return results


def _check(inputs: Sequence[Tensor], chain: Chain) -> tuple[int, int]:
    """T and K. ValueError names the input that isn't what the chain says."""
    matrices = [x for x, each in zip(inputs, chain.inputs, strict=True) if each.shape == MATRIX]
    T, K = matrices[0].shape
    elements = {"matrix": T * K, "rows": T, "columns": K, "scalar": 1}
    for index, (given, each) in enumerate(zip(inputs, chain.inputs, strict=True)):
        expected = CHAIN_DTYPES[each.dtype], elements[each.shape]
        if (given.dtype, given.numel()) != expected:
            raise ValueError(
                f"quantize_chain: input {index} must be {each.shape} of {each.dtype} with "
                f"{expected[1]} elements, got {tuple(given.shape)} of {given.dtype}"
            )
    return T, K


def _launchable(given: Tensor, each: ChainInput) -> bool:
    """Whether kernels can read the input where it lies."""
    if each.shape == MATRIX:
        return given.shape[1] == 1 or given.stride(1) == 1
    return given.is_contiguous()


def _copied(given: Tensor, needed: bool) -> Tensor:
    return given.contiguous() if needed else given


def _rows_run(
    T: int, K: int, plan: ChainPlan, want: Wanted, results: _Results, strides: tuple[int, ...]
) -> Run | None:
    """The whole-row kernel's launch."""
    spec = plan.whole_rows
    if spec is None:
        return None
    assert want.rows is not None and spec.chain is not None
    device = results.device
    programs = -(-T // spec.rows)
    if spec.persistent:
        programs = min(programs, plan.programs_per_sm * multiprocessors(device))
    launch = launch_of(spec, (programs,), (T, K, *strides, results.outputs[0, "row"].codes[1]))
    matrix: tuple[Tensor, ...] = ()
    if want.rows.rotation is not None:
        dtype = CHAIN_DTYPES[spec.input_dtype]
        matrix = (matrix_on(device, dtype, want.rows.rotation, spec.fragment_order),)

    def run(inputs: Sequence[Tensor], made: Made, values: Values) -> None:
        written = [value for value in values if value is not None]
        launch(*inputs, *matrix, *made[0, "row"], *written)

    return run


def _passes_run(
    T: int,
    K: int,
    plan: ChainPlan,
    wanted: tuple[Wanted, ...],
    results: _Results,
    strides: tuple[int, ...],
) -> Run | None:
    """The launches of the amax pass into a zeroed buffer, and of the write pass."""
    amax, write = plan.amax, plan.write
    if amax is None or write is None:
        return None
    sides = [(side.output, side.layout) for side in write.sides]
    codes_strides = [results.outputs[side].codes[1] for side in sides]
    stored_strides = (K,) * len(wanted)
    amax_stored = plan.stored and plan.whole_rows is not None
    first = launch_of(
        amax, _grid(T, K, amax), (T, K, *(stored_strides if amax_stored else strides))
    )
    write_strides = stored_strides if plan.stored else strides
    second = launch_of(write, _grid(T, K, write), (T, K, *write_strides, *codes_strides))
    plain, ordered = (
        [
            matrix_on(results.device, CHAIN_DTYPES[each.dtype], rotation, order, each.width)
            for each, rotation in zip(write.matrices, plan.rotations, strict=True)
        ]
        for order in (False, write.fragment_order)
    )
    ends: list[int] = []
    starts: list[int] = []
    for side in sides:
        starts.append(padded_size(ends[-1], AMAX_ALIGNMENT) if ends else 0)
        ends.append(starts[-1] + results.outputs[side].groups)

    def run(inputs: Sequence[Tensor], made: Made, values: Values) -> None:
        written = [value for value in values if value is not None]
        bits = zero_words(ends[-1], results.device)
        buffers = [bits[start:end] for start, end in zip(starts, ends, strict=True)]
        if amax_stored:
            first(*written, *plain, *buffers)
        else:
            first(*inputs, *plain, *(written if any(amax.values) else ()), *buffers)
        arguments = [*(written if plan.stored else inputs), *ordered]
        for side, buffer in zip(sides, buffers, strict=True):
            arguments += (buffer, *made[side])
        second(*arguments)

    return run


def _grid(T: int, K: int, spec: ChainAmaxSpec | ChainWriteSpec) -> tuple[int, int]:
    return -(-K // WIDTH), -(-T // (spec.tile_rows * spec.tiles))
