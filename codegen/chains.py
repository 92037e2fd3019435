"""Launches of chain kernels, made ready once per layout of the inputs: (inputs) -> codes, scales
and values of every output of a chain. What runs is in `choose_chains`.

After the first kernel, one output is finished before the next is begun: its codes are allocated
when they are written, and its value, where nobody wants that, is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hadagraph.codegen.calls import (
    AMAX_ALIGNMENT,
    Matrix,
    Output,
    Quantized,
    pass_launch,
    rows_launch,
    tiles_launch,
)
from hadagraph.codegen.choose_chains import (
    ChainPlan,
    ChainSchedule,
    ColumnsStep,
    FirstStep,
    RowsStep,
    Source,
    TilesStep,
    Wanted,
    select_chain,
)
from hadagraph.codegen.direct import empty, zero_words
from hadagraph.codegen.spec import Capability
from hadagraph.codegen.tune import ColumnsConfig, RowsConfig
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import MATRIX, Chain, ChainInput
from hadagraph.rotation import padded_size

ChainCall = Callable[[Sequence[Tensor]], list[Tensor]]


def chain_call(
    inputs: Sequence[Tensor],
    chain: Chain,
    wanted: tuple[Wanted, ...],
    capability: Capability,
    config: RowsConfig | ColumnsConfig | None = None,
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
    strides = {
        index: given.stride(0) for index, (given, each) in enumerate(pairs) if each.shape == MATRIX
    }
    apart = tuple(strides.values())
    plan = select_chain(T, K, chain, wanted, capability, config, schedule, apart)
    device = inputs[0].device
    results = _Results(T, K, chain, wanted, plan.values, device)
    if T == 0 or K == 0:
        return lambda inputs: results.wanted(results.without_groups(), results.values())
    kernels = _Kernels(plan, wanted, results, strides)
    # Fewest codes first: they are allocated while most values are there.
    order = sorted(range(len(wanted)), key=lambda output: len(wanted[output].layouts))
    first, rest = kernels.first(), [(output, kernels.of(output)) for output in order]
    words = kernels.words

    def run_all(inputs: Sequence[Tensor]) -> list[Tensor]:
        made: Made = {}
        values = results.values()
        bits = zero_words(words, device) if words else None
        if first is not None:
            first(inputs, made, values, bits)
        for output, runs in rest:
            for run in runs:
                run(inputs, made, values, bits)
            if not wanted[output].value:
                values[output] = None
        return results.wanted(made, values)

    return run_all


Made = dict[tuple[int, str], Quantized]
"""(output, layout) -> codes and scale."""
Values = list[Tensor | None]
Run = Callable[[Sequence[Tensor], Made, Values, Tensor | None], None]


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
        self.shape, self.device, self.chain, self.want = (T, K), device, chain, wanted
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

    def codes(self, output: int, layout: str) -> Quantized:
        return self.outputs[output, layout].allocate(self.device)

    def values(self) -> Values:
        return [
            None if dtype is None else empty(self.shape, dtype, self.device)
            for dtype in self.dtypes
        ]

    def without_groups(self) -> Made:
        """Codes and scales of empty tensors, which are 0 and 1."""
        made = {side: self.codes(*side) for side in self.outputs}
        for codes, scale in made.values():
            codes.zero_()
            scale.fill_(1.0)
        return made

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
    for index, given in enumerate(inputs):
        if given.device != matrices[0].device:
            raise ValueError(
                f"quantize_chain: input {index} must be on {matrices[0].device}, got {given.device}"
            )
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


class _Kernels:
    """The launches of a plan; `words`: of the buffer for maxima."""

    def __init__(
        self,
        plan: ChainPlan,
        wanted: tuple[Wanted, ...],
        results: _Results,
        strides: dict[int, int],
    ) -> None:
        self.plan, self.want, self.results, self.strides = plan, wanted, results, strides
        K = results.shape[1]
        step = padded_size(K, AMAX_ALIGNMENT)
        self.slices = {
            each.output: slice(number * step, number * step + K)
            for number, each in enumerate(plan.columns)
        }
        self.words = step * len(self.slices)

    def first(self) -> Run | None:
        """What runs before all others."""
        return None if self.plan.first is None else self._first(self.plan.first)

    def of(self, output: int) -> list[Run]:
        """What then makes one output's codes."""
        plan = self.plan
        return [
            *(self._rows(step) for step in plan.rows if step.output == output),
            *(self._columns(step) for step in plan.columns if step.output == output),
            *(self._tiles(step) for step in plan.tiles if step.output == output),
        ]

    def _apart(self, source: Source) -> tuple[int, ...]:
        """Row strides of the matrices that a kernel reads."""
        if source.inputs is None:
            return (self.results.shape[1],)
        return tuple(self.strides[index] for index in source.inputs if index in self.strides)

    def _matrix(self, output: int) -> Matrix:
        """The output's value."""
        dtype = CHAIN_DTYPES[self.results.chain.outputs[output].dtype]
        return Matrix(self.results.shape, self.results.shape[1], dtype, self.results.device)

    def _first(self, step: FirstStep) -> Run:
        launch = pass_launch(step.spec, self.results.shape, self._apart(step.source))
        read = step.source.inputs
        assert read is not None
        slices = [self.slices[output] for output in step.outputs if output in self.slices]
        written = [o for o, here in zip(step.outputs, step.spec.values, strict=True) if here]

        def run(inputs: Sequence[Tensor], made: Made, values: Values, bits: Tensor | None) -> None:
            maxima = [] if bits is None else [bits[each] for each in slices]
            launch(*(inputs[i] for i in read), *maxima, *(_there(values[o]) for o in written))

        return run

    def _rows(self, step: RowsStep) -> Run:
        side = (step.output, "row")
        encoding = self.want[step.output].rows
        assert encoding is not None
        launch = rows_launch(
            step.spec,
            step.programs_per_sm,
            self._matrix(step.output),
            self._apart(step.source),
            encoding,
            self.results.outputs[side],
        )
        read = _reader(step.source, step.output)
        value = step.spec.value

        def run(inputs: Sequence[Tensor], made: Made, values: Values, bits: Tensor | None) -> None:
            made[side] = self.results.codes(*side)
            written = (_there(values[step.output]),) if value else ()
            launch(read(inputs, values), (*made[side], *written))

        return run

    def _columns(self, step: ColumnsStep) -> Run:
        side = (step.output, "column")
        contracted = self.results.outputs[side].codes[1]
        launch = pass_launch(step.spec, self.results.shape, self._apart(step.source), contracted)
        read = _reader(step.source, step.output)
        where = self.slices[step.output]

        def run(inputs: Sequence[Tensor], made: Made, values: Values, bits: Tensor | None) -> None:
            made[side] = self.results.codes(*side)
            launch(*read(inputs, values), _there(bits)[where], *made[side])

        return run

    def _tiles(self, step: TilesStep) -> Run:
        output = step.output
        outputs = (
            None if step.rows is None else self.results.outputs[output, "row"],
            None if step.columns is None else self.results.outputs[output, "column"],
        )
        encodings = (step.rows, step.columns)
        layouts = zip(("row", "column"), encodings, strict=True)
        sides = [(output, layout) for layout, encoding in layouts if encoding is not None]
        launch = tiles_launch(step.plan, self._matrix(output), encodings, outputs)

        def run(inputs: Sequence[Tensor], made: Made, values: Values, bits: Tensor | None) -> None:
            made.update({side: self.results.codes(*side) for side in sides})
            launch(_there(values[output]), [made[side] for side in sides])

        return run


def _reader(source: Source, output: int) -> Callable[[Sequence[Tensor], Values], list[Tensor]]:
    """What a kernel reads, of (inputs, values)."""
    indices = source.inputs
    if indices is None:
        return lambda inputs, values: [_there(values[output])]
    return lambda inputs, values: [inputs[index] for index in indices]


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
