"""Which kernels an operator call runs, from shapes, dtypes and the target alone: no tensors, so
that sources can be listed without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hadagraph.codegen.direct import gluon_refusal
from hadagraph.codegen.spec import (
    INPUT_BYTES,
    VECTORS,
    WIDTH,
    AmaxSide,
    AmaxSpec,
    Capability,
    ColumnAmaxSpec,
    ColumnWriteSpec,
    GluonMmSpec,
    MmSpec,
    QuantizeRowsSpec,
    QuantizerSpec,
    QuantizeTilesSpec,
    ScaledMmSpec,
    Side,
)
from hadagraph.codegen.tune import (
    LITERAL_ELEMENTS,
    ColumnsConfig,
    MmConfig,
    RowsConfig,
    TilesConfig,
    VectorsConfig,
    both_layouts_in_one,
    butterflies_win,
    columns_configuration,
    row_groups,
    rows_configuration,
    scaled_mm_configuration,
    tiles_configuration,
    tma,
)
from hadagraph.formats import FORMATS, PER_TENSOR, Encoding
from hadagraph.reference import INT32_CONTRACTION
from hadagraph.region import Chain

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NAMES = {row.dtype: row.name for row in FORMATS.values() if row.bits == 8}

# Hopper's tensor cores keep about 14 bits of an fp8 accumulator. Over this many products the error
# stays far below that of the codes themselves (2^-4 each), so parts of it are promoted to fp32.
FP8_CONTRACTION = 1 << 13
DESCRIPTOR_ALIGNMENT = 16
FP8_CHUNK = 64
"""Tokens of fp8 codes that are stored together, at most: until then they take four bytes each."""


QuantizerConfig = RowsConfig | ColumnsConfig | TilesConfig


@dataclass(frozen=True)
class QuantizePlan:
    """Kernels of one quantizer call on x [T, K] with unit stride along K: either `whole_rows`, or
    `amax` and then `write`. `programs_per_sm` bounds a persistent grid."""

    whole_rows: QuantizeRowsSpec | None
    amax: AmaxSpec | ColumnAmaxSpec | None
    write: QuantizeTilesSpec | ColumnWriteSpec | None
    programs_per_sm: int = 0

    @property
    def specs(self) -> tuple[QuantizerSpec, ...]:
        return tuple(spec for spec in (self.whole_rows, self.amax, self.write) if spec is not None)


def select_quantize(
    T: int,
    K: int,
    dtype: torch.dtype,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: QuantizerConfig | None = None,
    *,
    addressable: bool = True,
    stride: int | None = None,
) -> QuantizePlan:
    """The plan for codes of the rows and/or the columns of x [T, K], whose rows lie `stride` (K
    unless given) elements apart; `addressable`: as tensor descriptors need it (`tma_addressable`).
    `config` overrides the table's."""
    rotated = any(side is not None and side.rotation is not None for side in (rows, columns))
    if rows is not None and columns is None and rows.granularity != PER_TENSOR:
        table_rows = rows_configuration(K, rotated, capability)
        rows_config = config if isinstance(config, RowsConfig) else table_rows
        spec = rows_spec(T, K, dtype, rows, capability, rows_config)
        return QuantizePlan(spec, None, None, rows_config.programs_per_sm)
    both = rows is not None and columns is not None
    if columns is not None and not both and by_butterflies(columns):
        by_table = butterflies_win(capability) and not isinstance(config, TilesConfig)
        if by_table or isinstance(config, ColumnsConfig):
            table_columns = columns_configuration(T, K, capability)
            columns_config = config if isinstance(config, ColumnsConfig) else table_columns
            apart = K if stride is None else stride
            return _columns_plan(T, K, dtype, columns, capability, columns_config, apart)
    table = tiles_configuration(T, K, rotated, both, addressable, capability)
    tiles_config = config if isinstance(config, TilesConfig) else table
    return _tiles_plan(T, K, dtype, rows, columns, capability, tiles_config, addressable)


def in_one_kernel(
    rows: Encoding,
    columns: Encoding,
    dtype: torch.dtype,
    capability: Capability,
    config: QuantizerConfig | None = None,
) -> bool:
    """Whether both layouts are made together (`both_layouts_in_one`); where the configuration of
    such kernels is given, they are if one matrix rotates both."""
    one_matrix = rows.rotation in (None, columns.rotation)
    each = PER_TENSOR not in (rows.granularity, columns.granularity)
    rotated = rows.rotation is not None or columns.rotation is not None
    butterflies = each and rotated and not isinstance(config, TilesConfig)
    return both_layouts_in_one(capability, dtype.itemsize, one_matrix, butterflies)


def by_butterflies(encoding: Encoding) -> bool:
    """Whether additions over VECTORS tokens can rotate columns so."""
    if encoding.granularity == PER_TENSOR:
        return False
    rotation = encoding.rotation
    return rotation is None or (rotation.signs is None and rotation.block <= VECTORS)


def tma_addressable(stride: int, K: int, dtype: torch.dtype, aligned: bool) -> bool:
    """Whether tensor descriptors can read x [T, K] with unit stride along K: elements of 16 bits,
    rows `stride` elements apart that don't overlap, whole 16 bytes apart, from an `aligned` start
    (a multiple of 16 bytes)."""
    apart = stride >= K and stride * dtype.itemsize % DESCRIPTOR_ALIGNMENT == 0
    return aligned and dtype.itemsize == 2 and apart


def _tiles_plan(
    T: int,
    K: int,
    dtype: torch.dtype,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: TilesConfig,
    addressable: bool,
) -> QuantizePlan:
    sides = (Side.of(rows) if rows else None, Side.of(columns) if columns else None)
    one_matrix = bool(rows and columns and rows.rotation and rows.rotation == columns.rotation)
    least = -(-T // (WIDTH * SECOND_GRID_DIM))  # tiles a program, of a grid within its limit
    amax_tiles, write_tiles = max(config.amax.tiles, least), max(config.write.tiles, least)
    amax = AmaxSpec(
        DTYPE_NAMES[dtype],
        AmaxSide.of(sides[0]),
        AmaxSide.of(sides[1]),
        one_matrix,
        amax_tiles,
        mask_rows=T % (WIDTH * amax_tiles) != 0,
        mask_columns=K % WIDTH != 0,
        warps=config.amax.warps,
        stages=config.amax.stages,
        capability=capability,
    )
    write = QuantizeTilesSpec(
        DTYPE_NAMES[dtype],
        *sides,
        one_matrix,
        write_tiles,
        config.write.descriptors and addressable and tma(capability),
        config.write.maxnreg,
        config.fragment_order,
        mask_rows=T % (WIDTH * write_tiles) != 0,
        mask_columns=K % WIDTH != 0,
        warps=config.write.warps,
        stages=config.write.stages,
        capability=capability,
    )
    return QuantizePlan(None, amax, write)


def _columns_plan(
    T: int,
    K: int,
    dtype: torch.dtype,
    columns: Encoding,
    capability: Capability,
    config: ColumnsConfig,
    stride: int,
) -> QuantizePlan:
    side, name = Side.of(columns), DTYPE_NAMES[dtype]
    amax = ColumnAmaxSpec(
        name,
        None,
        **pass_fields(T, K, (stride,), config.amax, capability),
        blocks=(side.block or 1,),
        values=(False,),
        value_stride=None,
    )
    write = column_write_spec(T, K, name, None, (stride,), side, config.write, capability)
    return QuantizePlan(None, amax, write)


def column_write_spec(
    T: int,
    K: int,
    dtype: str,
    chain: Chain | None,
    strides: Sequence[int],
    side: Side,
    config: VectorsConfig,
    capability: Capability,
) -> ColumnWriteSpec:
    """The pass that writes codes of the columns of x [T, K] in `dtype`, or of a chain's output."""
    integer = FORMATS[side.format].is_integer
    return ColumnWriteSpec(
        dtype,
        chain,
        **pass_fields(T, K, strides, config, capability),
        side=side,
        chunk=config.chunk if integer else min(config.chunk, FP8_CHUNK),
    )


SECOND_GRID_DIM = 65535
"""Programs along the second dim of a grid, at most (CUDA C++ Programming Guide, 16.2)."""


def pass_fields(
    T: int, K: int, strides: Sequence[int], config: VectorsConfig, capability: Capability
) -> dict[str, Any]:
    """Fields of a column pass over matrices whose rows lie `strides` elements apart."""
    literal = config.literal and T * K >= LITERAL_ELEMENTS
    return {
        "columns": config.columns,
        "tokens": config.tokens,
        "strides": tuple(strides) if literal else None,
        "tokens_first": config.tokens_first or -(-T // config.tokens) > SECOND_GRID_DIM,
        "backward": config.backward,
        "mask_tokens": T % config.tokens != 0,
        "mask_columns": K % config.columns != 0,
        "warps": config.warps,
        "stages": 3,
        "capability": capability,
    }


def rows_spec(
    T: int, K: int, dtype: torch.dtype, rows: Encoding, capability: Capability, config: RowsConfig
) -> QuantizeRowsSpec:
    """The whole-row kernel for x [T, K]. Signs differ between the parts of a block, which then is
    rotated by a matrix as large as itself."""
    groups = row_groups(K)
    tile_rows = max(1, max(config.tile, _least_tile(config.warps)) // groups)
    streamed = groups * WIDTH < K
    mask_columns = K % (groups * WIDTH) != 0
    small = rows.rotation is not None and rows.rotation.signs is None
    return QuantizeRowsSpec(
        DTYPE_NAMES[dtype],
        Side.of(rows),
        tile_rows,
        groups,
        config.width if small else WIDTH,
        streamed=streamed,
        persistent=config.persistent and not streamed,
        fragment_order=config.fragment_order,
        mask_rows=T % tile_rows != 0,
        mask_columns=mask_columns,
        ragged=K % WIDTH != 0,
        warps=config.warps,
        stages=config.stages,
        capability=capability,
    )


def _least_tile(warps: int) -> int:
    """Each warp of a matrix product needs 16 rows of its own."""
    return 16 * min(warps, 8)


def select_scaled_mm(
    M: int,
    N: int,
    C: int,
    a_format: str,
    b_format: str,
    per_tensor: tuple[bool, bool],
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    capability: Capability,
    config: MmConfig | None = None,
    l2_bytes: int | None = None,
) -> MmSpec:
    """The kernel for a [M, C] times b [N, C]^T; `config` overrides the table's, but for one in
    Gluon that cannot be used. `l2_bytes`: as `scaled_mm_configuration`."""
    integer = FORMATS[a_format].is_integer
    refusal = gluon_mm_refusal(N, C, a_format, DTYPE_NAMES[out_dtype], capability)
    if config is None or (config.schedule is not None and refusal is not None):
        config = scaled_mm_configuration(
            M, N, integer, capability, gluon=refusal is None, l2_bytes=l2_bytes
        )
    if config.schedule is not None:
        return GluonMmSpec(
            config.schedule,
            DTYPE_NAMES[out_dtype],
            None if bias_dtype is None else DTYPE_NAMES[bias_dtype],
            *per_tensor,
            **config.fields(M, N),
            capability=capability,
        )
    longest = INT32_CONTRACTION if integer else FP8_CONTRACTION
    return ScaledMmSpec(
        a_format,
        b_format,
        DTYPE_NAMES[out_dtype],
        None if bias_dtype is None else DTYPE_NAMES[bias_dtype],
        *per_tensor,
        **config.fields(M, N),
        part=longest if longest < C else None,
        descriptors=config.descriptors,
        mask_c=not config.descriptors and C % config.block_c != 0,
        capability=capability,
    )


def gluon_mm_refusal(
    N: int, C: int, format: str, out_dtype: str, capability: Capability
) -> str | None:
    """Why the kernel in Gluon cannot make out [M, N] from codes of the format over C; None if it
    can."""
    if capability != (9, 0) or torch.version.hip is not None:
        return "it is written for compute capability 9.0"
    if not FORMATS[format].is_integer:
        return "it multiplies int8 only"
    if C > INT32_CONTRACTION:
        return f"an int32 sum of {C} products could overflow"
    if N * INPUT_BYTES[out_dtype] % DESCRIPTOR_ALIGNMENT != 0:
        return f"rows of the output must be whole {DESCRIPTOR_ALIGNMENT} bytes, for TMA"
    return gluon_refusal()
