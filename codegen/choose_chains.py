"""Which kernels quantize the outputs of a chain: the schedule with the fewest bytes, and its specs.
From shapes, dtypes and the target alone. T rows and K columns of the outputs.

    first    a column pass: maxima of the outputs whose columns butterflies rotate, and values
    rows     for an output, the whole-row kernel, which may write the value too
    columns  for an output, the column pass that writes codes from those maxima
    tiles    for an output, the quantizer of matrices that serves other encodings

Those after the first compute the part of the chain that they need anew, or read the value that it
wrote, whichever is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hadagraph.codegen.choose import (
    QuantizePlan,
    by_butterflies,
    column_write_spec,
    in_one_kernel,
    pass_fields,
    rows_spec,
    select_quantize,
    tma_addressable,
)
from hadagraph.codegen.spec import (
    INPUT_BYTES,
    Capability,
    ColumnAmaxSpec,
    ColumnWriteSpec,
    QuantizeRowsSpec,
    QuantizerSpec,
    Side,
    matrix_bytes,
)
from hadagraph.codegen.tune import (
    ColumnsConfig,
    RowsConfig,
    chain_rows_configuration,
    columns_configuration,
    rows_configuration,
)
from hadagraph.formats import PER_TENSOR, Encoding
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import MATRIX, Chain, ChainOutput, Step, Value

LAYOUTS = ("row", "column")


@dataclass(frozen=True)
class Wanted:
    """What is wanted of one output: the encodings of its layouts, and its high-precision value."""

    rows: Encoding | None
    columns: Encoding | None
    value: bool

    def encoding(self, layout: str) -> Encoding | None:
        return self.rows if layout == "row" else self.columns

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(layout for layout in LAYOUTS if self.encoding(layout) is not None)

    @property
    def whole_rows(self) -> bool:
        return self.rows is not None and self.rows.granularity != PER_TENSOR

    @property
    def by_butterflies(self) -> bool:
        return self.columns is not None and by_butterflies(self.columns)

    @property
    def by_tiles(self) -> tuple[Encoding | None, Encoding | None]:
        """Of rows and columns, what neither whole rows nor butterflies make."""
        rows = None if self.whole_rows else self.rows
        return rows, None if self.by_butterflies else self.columns


def wanted_of(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[bool]
) -> tuple[Wanted, ...]:
    """What is wanted of each output, from the encodings' text ("": that layout is not)."""
    return tuple(
        Wanted(Encoding.parse(row) if row else None, Encoding.parse(col) if col else None, value)
        for row, col, value in zip(rows, columns, values, strict=True)
    )


@dataclass(frozen=True)
class ChainSchedule:
    """`stored`: the first kernel writes the outputs, and later ones read them."""

    stored: bool


SCHEDULES = (ChainSchedule(stored=False), ChainSchedule(stored=True))
"""In the order in which one is taken of those that move the same bytes."""


@dataclass(frozen=True)
class Source:
    """The outputs that a kernel needs of a chain, made of those of its inputs; `inputs` None: it
    reads the value."""

    chain: Chain | None
    inputs: tuple[int, ...] | None


@dataclass(frozen=True)
class FirstStep:
    """The pass that all others follow; `outputs` are those that it makes."""

    spec: ColumnAmaxSpec
    source: Source
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class RowsStep:
    spec: QuantizeRowsSpec
    source: Source
    output: int
    programs_per_sm: int


@dataclass(frozen=True)
class ColumnsStep:
    spec: ColumnWriteSpec
    source: Source
    output: int


@dataclass(frozen=True)
class TilesStep:
    """A quantizer of the value for other encodings of rows and columns."""

    plan: QuantizePlan
    output: int
    rows: Encoding | None
    columns: Encoding | None


@dataclass(frozen=True)
class ChainPlan:
    """Kernels of one call: `first`, then those of each output. `values`: the outputs whose values
    are written."""

    first: FirstStep | None
    rows: tuple[RowsStep, ...]
    columns: tuple[ColumnsStep, ...]
    tiles: tuple[TilesStep, ...]
    values: tuple[bool, ...]

    @property
    def specs(self) -> tuple[QuantizerSpec, ...]:
        first = () if self.first is None else (self.first.spec,)
        rows = (step.spec for step in self.rows)
        columns = (step.spec for step in self.columns)
        tiles = (spec for step in self.tiles for spec in step.plan.specs)
        return (*first, *rows, *columns, *tiles)

    @property
    def stored(self) -> bool:
        """Whether the first kernel writes outputs."""
        return self.first is not None and any(self.first.spec.values)

    def bytes(self, T: int, K: int) -> int:
        """Device memory traffic of all kernels."""
        return sum(spec.bytes(T, K) for spec in self.specs)


def select_chain(
    T: int,
    K: int,
    chain: Chain,
    wanted: tuple[Wanted, ...],
    capability: Capability,
    config: RowsConfig | ColumnsConfig | None = None,
    schedule: ChainSchedule | None = None,
    strides: Sequence[int] = (),
) -> ChainPlan:
    """The plan for what is `wanted` of each output of the chain, whose matrices have rows that lie
    `strides` (K unless given) elements apart. `config` overrides the table's for kernels that
    compute the chain, `schedule` the choice by bytes. ValueError if nothing is wanted."""
    layouts = [want.layouts for want in wanted]
    if not all(want.layouts or want.value for want in wanted) or not any(layouts):
        raise ValueError(
            "quantize_chain: every output must be wanted in a layout or as a value, and one at "
            f"least in a layout, got {wanted}"
        )
    matrices = [index for index, each in enumerate(chain.inputs) if each.shape == MATRIX]
    apart = dict(zip(matrices, strides or (K,) * len(matrices), strict=True))
    plan = _Planner(T, K, chain, wanted, capability, config, apart).plan
    if schedule is not None:
        return plan(schedule)
    return min(map(plan, SCHEDULES), key=lambda made: made.bytes(T, K))


@dataclass(frozen=True)
class _Planner:
    """Makes the plans of one call; `strides` by input."""

    T: int
    K: int
    chain: Chain
    wanted: tuple[Wanted, ...]
    capability: Capability
    config: RowsConfig | ColumnsConfig | None
    strides: dict[int, int]

    def plan(self, schedule: ChainSchedule) -> ChainPlan:
        numbered = list(enumerate(self.wanted))
        stored = {i for i, want in numbered if self._stored_first(want, schedule)}
        maxima = {i for i, want in numbered if want.by_butterflies}
        values = tuple(i in stored or want.value for i, want in numbered)
        return ChainPlan(
            self._first(sorted(stored | maxima), stored) if stored | maxima else None,
            tuple(self._rows(i, want, stored) for i, want in numbered if want.whole_rows),
            tuple(self._columns(i, want, stored) for i, want in numbered if want.by_butterflies),
            tuple(step for i, want in numbered for step in self._tiles(i, want)),
            values,
        )

    def _stored_first(self, want: Wanted, schedule: ChainSchedule) -> bool:
        """Whether the first kernel writes the output's value; else whole rows do if wanted."""
        if any(want.by_tiles) or (schedule.stored and want.layouts):
            return True
        return want.value and (want.by_butterflies or not want.whole_rows)

    def _source(self, output: int, stored: set[int]) -> Source:
        chain, inputs = restricted(self.chain, [output])
        dtype = self.chain.outputs[output].dtype
        if output in stored and INPUT_BYTES[dtype] <= matrix_bytes(chain):
            return Source(None, None)
        return Source(chain, inputs)

    def _apart(self, source: Source) -> tuple[int, ...]:
        """Row strides of the matrices that are read."""
        if source.inputs is None:
            return (self.K,)
        return tuple(self.strides[index] for index in source.inputs if index in self.strides)

    def _passes(self, source: Source) -> ColumnsConfig:
        if source.chain is None:
            return columns_configuration(self.T, self.K, self.capability)
        if isinstance(self.config, ColumnsConfig):
            return self.config
        chained = len(source.chain.outputs)
        return columns_configuration(self.T, self.K, self.capability, chained=chained)

    def _first(self, outputs: list[int], stored: set[int]) -> FirstStep:
        source = Source(*restricted(self.chain, outputs))
        blocks: list[int | None] = []
        for want in (self.wanted[output] for output in outputs):
            rotation = want.columns.rotation if want.columns and want.by_butterflies else None
            blocks.append((rotation.block if rotation else 1) if want.by_butterflies else None)
        config, apart = self._passes(source).amax, self._apart(source)
        fields = pass_fields(self.T, self.K, apart, config, self.capability)
        values = tuple(output in stored for output in outputs)
        spec = ColumnAmaxSpec(
            self.chain.outputs[outputs[0]].dtype,
            source.chain,
            **fields,
            blocks=tuple(blocks),
            values=values,
            value_stride=self.K if any(values) and fields["strides"] is not None else None,
        )
        return FirstStep(spec, source, tuple(outputs))

    def _rows(self, output: int, want: Wanted, stored: set[int]) -> RowsStep:
        assert want.rows is not None
        source = self._source(output, stored)
        if source.chain is None:
            config = rows_configuration(self.K, want.rows.rotation is not None, self.capability)
        elif isinstance(self.config, RowsConfig):
            config = self.config
        else:
            config = chain_rows_configuration(source.chain, self.K, self.capability)
        dtype = CHAIN_DTYPES[self.chain.outputs[output].dtype]
        spec = rows_spec(self.T, self.K, dtype, want.rows, self.capability, config)
        value = want.value and output not in stored
        return RowsStep(
            replace(spec, chain=source.chain, value=value), source, output, config.programs_per_sm
        )

    def _columns(self, output: int, want: Wanted, stored: set[int]) -> ColumnsStep:
        assert want.columns is not None
        source = self._source(output, stored)
        config = self._passes(source).write
        dtype = self.chain.outputs[output].dtype
        arguments = (dtype, source.chain, self._apart(source), Side.of(want.columns))
        spec = column_write_spec(self.T, self.K, *arguments, config, self.capability)
        return ColumnsStep(spec, source, output)

    def _tiles(self, output: int, want: Wanted) -> list[TilesStep]:
        rows, columns = want.by_tiles
        dtype = CHAIN_DTYPES[self.chain.outputs[output].dtype]
        addressable = tma_addressable(self.K, self.K, dtype, True)
        shape, target = (self.T, self.K, dtype), self.capability
        pairs = [(rows, columns)] if rows or columns else []
        if rows and columns and not in_one_kernel(rows, columns, dtype, self.capability):
            pairs = [(rows, None), (None, columns)]
        plans = [select_quantize(*shape, *pair, target, addressable=addressable) for pair in pairs]
        return [TilesStep(plan, output, *pair) for plan, pair in zip(plans, pairs, strict=True)]


def restricted(chain: Chain, outputs: Sequence[int]) -> tuple[Chain, tuple[int, ...]]:
    """The chain that makes only these outputs, and the inputs of the whole one that it reads."""
    count = len(chain.inputs)
    needed = {chain.outputs[output].value.index for output in outputs}
    for index in range(count + len(chain.steps) - 1, count - 1, -1):
        if index in needed:
            operands = chain.steps[index - count].operands
            needed |= {each.index for each in operands if isinstance(each, Value)}
    matrices = [index for index, each in enumerate(chain.inputs) if each.shape == MATRIX]
    if not needed.intersection(matrices):  # a chain's matrices have the shape of its outputs
        needed.add(matrices[0])
    kept = sorted(needed)
    place = {index: Value(position) for position, index in enumerate(kept)}
    steps = tuple(
        Step(step.op, tuple(place[e.index] if isinstance(e, Value) else e for e in step.operands))
        for step in (chain.steps[index - count] for index in kept if index >= count)
    )
    inputs = tuple(index for index in kept if index < count)
    made = tuple(
        ChainOutput(place[each.value.index], each.dtype)
        for each in (chain.outputs[output] for output in outputs)
    )
    return Chain(tuple(chain.inputs[index] for index in inputs), steps, made), inputs
