"""Which kernels quantize the outputs of a chain: the schedule with the fewest bytes, and its specs.
From shapes, dtypes and the target alone.

T rows and K columns of the outputs. Bytes for one element of an output:

    passes            maxima of all sides, then codes of all: reads the chain's matrices twice
    passes, stored    the first pass writes the outputs, the second reads those instead
    rows_then_columns a whole-row kernel, then both passes for the columns: three reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hadagraph.codegen.choose import rows_spec
from hadagraph.codegen.spec import (
    INPUT_BYTES,
    WIDTH,
    AmaxSide,
    Capability,
    ChainAmaxSpec,
    ChainSide,
    ChainWriteSpec,
    MatrixArgument,
    QuantizeRowsSpec,
    Side,
    matrix_bytes,
)
from hadagraph.codegen.tune import (
    ChainConfig,
    PassConfig,
    RowsConfig,
    chain_configuration,
    chain_rows_configuration,
)
from hadagraph.formats import PER_TENSOR, Encoding
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import MATRIX, Chain, ChainInput, ChainOutput, Value
from hadagraph.rotation import Rotation

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
    """`whole_rows`: one kernel makes the row codes. `stored`: the first kernel writes the outputs,
    and later ones read them instead of the chain's matrices."""

    whole_rows: bool
    stored: bool


SCHEDULES = (
    ChainSchedule(whole_rows=True, stored=False),
    ChainSchedule(whole_rows=False, stored=False),
    ChainSchedule(whole_rows=False, stored=True),
    ChainSchedule(whole_rows=True, stored=True),
)
"""In the order in which one is taken of those that move the same bytes."""


def schedules(chain: Chain, wanted: tuple[Wanted, ...]) -> tuple[ChainSchedule, ...]:
    """The schedules that can make what is wanted, fewest bytes first."""
    rows = wanted[0].rows
    whole = len(wanted) == 1 and rows is not None and rows.granularity != PER_TENSOR
    only = whole and wanted[0].columns is None
    legal = [
        each
        for each in SCHEDULES
        if (whole or not each.whole_rows) and not (only and each.whole_rows and each.stored)
    ]
    return tuple(sorted(legal, key=lambda each: schedule_bytes(chain, wanted, each)))


def schedule_bytes(chain: Chain, wanted: tuple[Wanted, ...], schedule: ChainSchedule) -> float:
    """Device memory traffic for one element of every output, scales and maxima left out."""
    outputs = list(zip(chain.outputs, wanted, strict=True))
    read = matrix_bytes(chain)
    written = sum(
        INPUT_BYTES[output.dtype]
        for output, want in outputs
        if want.value or (schedule.stored and want.layouts)
    )
    codes = sum(len(want.layouts) for want in wanted)
    values = sum(INPUT_BYTES[output.dtype] for output, want in outputs if want.layouts)
    again = values if schedule.stored else read
    if not schedule.whole_rows:
        return read + written + again + codes
    return read + written + codes + (2 * again if wanted[0].columns else 0)


@dataclass(frozen=True)
class ChainPlan:
    """Kernels of one call, in order: `whole_rows` makes the first output's row codes; `amax` and
    `write` the codes of all other sides. `values`: the outputs that the first of them writes; those
    after read these where `stored`. `rotations`: those of the passes' matrices."""

    whole_rows: QuantizeRowsSpec | None
    amax: ChainAmaxSpec | None
    write: ChainWriteSpec | None
    values: tuple[bool, ...]
    stored: bool
    rotations: tuple[Rotation, ...] = ()
    programs_per_sm: int = 0

    @property
    def specs(self) -> tuple[QuantizeRowsSpec | ChainAmaxSpec | ChainWriteSpec, ...]:
        return tuple(spec for spec in (self.whole_rows, self.amax, self.write) if spec is not None)


def select_chain(
    T: int,
    K: int,
    chain: Chain,
    wanted: tuple[Wanted, ...],
    capability: Capability,
    config: RowsConfig | ChainConfig | None = None,
    schedule: ChainSchedule | None = None,
) -> ChainPlan:
    """The plan for what is `wanted` of each output of the chain. `config` overrides the table's,
    `schedule` the choice by bytes. ValueError if nothing is wanted, or the schedule can't be."""
    sides = [(index, layout) for index, want in enumerate(wanted) for layout in want.layouts]
    if not all(want.layouts or want.value for want in wanted) or not sides:
        raise ValueError(
            "quantize_chain: every output must be wanted in a layout or as a value, and one at "
            f"least in a layout, got {wanted}"
        )
    allowed = schedules(chain, wanted)
    if schedule is not None and schedule not in allowed:
        raise ValueError(f"schedule must be one of {allowed}, got {schedule}")
    schedule = schedule or allowed[0]
    values = tuple(w.value or (schedule.stored and bool(w.layouts)) for w in wanted)
    plan = ChainPlan(None, None, None, values, schedule.stored)
    if schedule.whole_rows:
        table = chain_rows_configuration(chain, capability)
        rows_config = config if isinstance(config, RowsConfig) else table
        spec = _whole_rows(T, K, chain, wanted[0], values[0], rows_config, capability)
        plan = replace(plan, whole_rows=spec, programs_per_sm=rows_config.programs_per_sm)
        sides = sides[1:]
    if not sides:
        return plan
    table_passes = chain_configuration(chain, len(sides), capability)
    passes = config if isinstance(config, ChainConfig) else table_passes
    return _passes(T, K, chain, wanted, sides, plan, passes, capability)


def _whole_rows(
    T: int,
    K: int,
    chain: Chain,
    want: Wanted,
    value: bool,
    config: RowsConfig,
    capability: Capability,
) -> QuantizeRowsSpec:
    assert want.rows is not None
    dtype = CHAIN_DTYPES[chain.outputs[0].dtype]
    spec = rows_spec(T, K, dtype, want.rows, capability, config)
    return replace(spec, chain=chain, value=value)


def _passes(
    T: int,
    K: int,
    chain: Chain,
    wanted: tuple[Wanted, ...],
    sides: list[tuple[int, str]],
    plan: ChainPlan,
    config: ChainConfig,
    capability: Capability,
) -> ChainPlan:
    """The plan with its amax and write pass over these (output, layout)."""
    columns = [wanted[index].columns for index, layout in sides if layout == "column"]
    blocks = [each.rotation.block for each in columns if each and each.rotation]
    tile_rows = max(config.tile_rows, *blocks) if blocks else config.tile_rows
    matrices: dict[tuple[Rotation, MatrixArgument], int] = {}
    made: list[ChainSide] = []
    maxima: list[ChainSide] = []
    for index, layout in sides:
        encoding = wanted[index].encoding(layout)
        assert encoding is not None
        matrix = None
        if encoding.rotation is not None:
            dtype = "fp16" if chain.outputs[index].dtype == "fp16" else "bf16"
            argument = MatrixArgument(dtype, WIDTH if layout == "row" else tile_rows)
            matrix = matrices.setdefault((encoding.rotation, argument), len(matrices))
        side = Side.of(encoding)
        made.append(ChainSide(index, layout, side, matrix))
        maxima.append(
            ChainSide(index, layout, AmaxSide(side.block is not None, side.per_tensor), matrix)
        )
    writes = (False,) * len(chain.outputs)
    stored = identity(chain)
    amax_reads_values = plan.whole_rows is not None and plan.stored
    amax = ChainAmaxSpec(
        stored if amax_reads_values else chain,
        tuple(maxima),
        writes if plan.whole_rows is not None else plan.values,
        **_pass_fields(T, K, tuple(m for _, m in matrices), tile_rows, config.amax, capability),
        fragment_order=False,
        capability=capability,
    )
    write = ChainWriteSpec(
        stored if plan.stored else chain,
        tuple(made),
        writes,
        **_pass_fields(T, K, tuple(m for _, m in matrices), tile_rows, config.write, capability),
        fragment_order=config.fragment_order,
        capability=capability,
    )
    return replace(plan, amax=amax, write=write, rotations=tuple(r for r, _ in matrices))


def _pass_fields(
    T: int,
    K: int,
    matrices: tuple[MatrixArgument, ...],
    tile_rows: int,
    config: PassConfig,
    capability: Capability,
) -> dict[str, Any]:
    return {
        "matrices": matrices,
        "tile_rows": tile_rows,
        "tiles": config.tiles,
        "maxnreg": config.maxnreg,
        "mask_rows": T % (tile_rows * config.tiles) != 0,
        "mask_columns": K % WIDTH != 0,
        "warps": config.warps,
        "stages": config.stages,
    }


def identity(chain: Chain) -> Chain:
    """The chain that reads the outputs of this one, as matrices, and yields them again."""
    return Chain(
        tuple(ChainInput(output.dtype, MATRIX) for output in chain.outputs),
        (),
        tuple(ChainOutput(Value(i), each.dtype) for i, each in enumerate(chain.outputs)),
    )
