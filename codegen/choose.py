"""Which kernels an operator call runs, from shapes, dtypes and the target alone: no tensors, so
that sources can be listed without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hadagraph.codegen.direct import gluon_refusal
from hadagraph.codegen.spec import (
    INPUT_BYTES,
    WIDTH,
    AmaxSide,
    AmaxSpec,
    Capability,
    GluonMmSpec,
    MmSpec,
    QuantizeRowsSpec,
    QuantizeTilesSpec,
    ScaledMmSpec,
    Side,
)
from hadagraph.codegen.tune import (
    MmConfig,
    RowsConfig,
    TilesConfig,
    row_groups,
    rows_configuration,
    scaled_mm_configuration,
    tiles_configuration,
    tma,
)
from hadagraph.formats import FORMATS, PER_TENSOR, Encoding
from hadagraph.reference import INT32_CONTRACTION

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NAMES = {row.dtype: row.name for row in FORMATS.values() if row.bits == 8}

# Hopper's tensor cores keep about 14 bits of an fp8 accumulator. Over this many products the error
# stays far below that of the codes themselves (2^-4 each), so parts of it are promoted to fp32.
FP8_CONTRACTION = 1 << 13
DESCRIPTOR_ALIGNMENT = 16


@dataclass(frozen=True)
class QuantizePlan:
    """Kernels of one quantizer call on x [T, K] with unit stride along K: either `whole_rows`, or
    `amax` and then `write`. `programs_per_sm` bounds a persistent grid."""

    whole_rows: QuantizeRowsSpec | None
    amax: AmaxSpec | None
    write: QuantizeTilesSpec | None
    programs_per_sm: int = 0

    @property
    def specs(self) -> tuple[QuantizeRowsSpec | AmaxSpec | QuantizeTilesSpec, ...]:
        return tuple(spec for spec in (self.whole_rows, self.amax, self.write) if spec is not None)


def select_quantize(
    T: int,
    K: int,
    dtype: torch.dtype,
    rows: Encoding | None,
    columns: Encoding | None,
    capability: Capability,
    config: RowsConfig | TilesConfig | None = None,
    *,
    addressable: bool = True,
) -> QuantizePlan:
    """The plan for codes of the rows and/or the columns of x [T, K]; `addressable`: x lies as
    tensor descriptors need it (`tma_addressable`). `config` overrides the table's."""
    rotated = any(side is not None and side.rotation is not None for side in (rows, columns))
    if rows is not None and columns is None and rows.granularity != PER_TENSOR:
        table_rows = rows_configuration(K, rotated, capability)
        rows_config = config if isinstance(config, RowsConfig) else table_rows
        spec = rows_spec(T, K, dtype, rows, capability, rows_config)
        return QuantizePlan(spec, None, None, rows_config.programs_per_sm)
    both = rows is not None and columns is not None
    table = tiles_configuration(T, K, rotated, both, addressable, capability)
    tiles_config = config if isinstance(config, TilesConfig) else table
    return _tiles_plan(T, K, dtype, rows, columns, capability, tiles_config, addressable)


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
    amax = AmaxSpec(
        DTYPE_NAMES[dtype],
        AmaxSide.of(sides[0]),
        AmaxSide.of(sides[1]),
        one_matrix,
        config.amax.tiles,
        mask_rows=T % (WIDTH * config.amax.tiles) != 0,
        mask_columns=K % WIDTH != 0,
        warps=config.amax.warps,
        stages=config.amax.stages,
        capability=capability,
    )
    write = QuantizeTilesSpec(
        DTYPE_NAMES[dtype],
        *sides,
        one_matrix,
        config.write.tiles,
        config.write.descriptors and addressable and tma(capability),
        config.write.maxnreg,
        config.fragment_order,
        mask_rows=T % (WIDTH * config.write.tiles) != 0,
        mask_columns=K % WIDTH != 0,
        warps=config.write.warps,
        stages=config.write.stages,
        capability=capability,
    )
    return QuantizePlan(None, amax, write)


def rows_spec(
    T: int, K: int, dtype: torch.dtype, rows: Encoding, capability: Capability, config: RowsConfig
) -> QuantizeRowsSpec:
    """The whole-row kernel for x [T, K]."""
    groups = row_groups(K)
    tile_rows = max(1, max(config.tile, _least_tile(config.warps)) // groups)
    streamed = groups * WIDTH < K
    return QuantizeRowsSpec(
        DTYPE_NAMES[dtype],
        Side.of(rows),
        tile_rows,
        groups,
        streamed=streamed,
        persistent=config.persistent and not streamed,
        fragment_order=config.fragment_order,
        mask_rows=T % tile_rows != 0,
        mask_columns=K % (groups * WIDTH) != 0,
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
) -> MmSpec:
    """The kernel for a [M, C] times b [N, C]^T; `config` overrides the table's, but for one in
    Gluon that cannot be used."""
    integer = FORMATS[a_format].is_integer
    refusal = pingpong_refusal(N, C, a_format, DTYPE_NAMES[out_dtype], capability)
    if config is None or (config.pingpong and refusal is not None):
        config = scaled_mm_configuration(M, N, integer, capability, pingpong=refusal is None)
    if config.pingpong:
        return GluonMmSpec(
            DTYPE_NAMES[out_dtype],
            None if bias_dtype is None else DTYPE_NAMES[bias_dtype],
            *per_tensor,
            config.block_m,
            config.block_n,
            config.block_c,
            config.group,
            mask_m=M % config.block_m != 0,
            mask_n=N % config.block_n != 0,
            warps=config.warps,
            stages=config.stages,
            capability=capability,
        )
    longest = INT32_CONTRACTION if integer else FP8_CONTRACTION
    return ScaledMmSpec(
        a_format,
        b_format,
        DTYPE_NAMES[out_dtype],
        None if bias_dtype is None else DTYPE_NAMES[bias_dtype],
        per_tensor[0],
        per_tensor[1],
        config.block_m,
        config.block_n,
        config.block_c,
        config.group,
        part=longest if longest < C else None,
        descriptors=config.descriptors,
        mask_m=M % config.block_m != 0,
        mask_n=N % config.block_n != 0,
        mask_c=not config.descriptors and C % config.block_c != 0,
        warps=config.warps,
        stages=config.stages,
        capability=capability,
    )


def pingpong_refusal(
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
