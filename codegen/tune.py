"""Tables of tile configurations by target and shape, and the static choice among them. Knows no
tensors; `candidates` lists what benchmarks race and tests must cover."""

from __future__ import annotations

from dataclasses import dataclass

from hadagraph.codegen.spec import WIDTH, Capability

SMS_ASSUMED = 132
MAX_ROW_TILE = 128
"""Runs of WIDTH columns that one tile may hold: longer rows are read twice."""


@dataclass(frozen=True)
class RowsConfig:
    """Whole-row quantizer: `tile` runs of WIDTH columns a program (at least one row)."""

    tile: int
    warps: int
    stages: int
    persistent: bool
    fragment_order: bool
    programs_per_sm: int = 4


@dataclass(frozen=True)
class TilesConfig:
    """Amax and write passes over tiles: `tiles` of them down each program's stripe."""

    tiles: int
    warps: int
    stages: int
    fragment_order: bool


@dataclass(frozen=True)
class MmConfig:
    """Scaled matmul: tile sizes, and whether operands come through tensor descriptors."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int
    descriptors: bool
    group: int = 8


def tma(capability: Capability) -> bool:
    return capability[0] >= 9


def _table_key(capability: Capability) -> str:
    if capability[0] == 8:
        return "sm_89" if capability[1] == 9 else "sm_80"
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(capability[0], "fallback")


ROWS: dict[str, tuple[RowsConfig, ...]] = {
    "sm_80": (RowsConfig(128, 8, 2, False, True), RowsConfig(64, 4, 2, False, True)),
    "sm_89": (RowsConfig(128, 8, 2, False, True), RowsConfig(64, 4, 2, False, True)),
    "sm_90": (
        RowsConfig(128, 8, 3, True, True, 2),
        RowsConfig(128, 8, 3, True, False, 2),
        RowsConfig(128, 8, 2, False, True),
        RowsConfig(128, 8, 2, False, False),
        RowsConfig(64, 4, 2, False, True),
        RowsConfig(64, 4, 3, True, True, 4),
        RowsConfig(128, 4, 2, False, True),
        RowsConfig(128, 16, 2, False, True),
        RowsConfig(32, 4, 2, False, True),
    ),
    "sm_100": (RowsConfig(128, 8, 2, False, False), RowsConfig(64, 4, 2, False, False)),
    "sm_120": (RowsConfig(64, 4, 2, False, True), RowsConfig(128, 8, 2, False, True)),
    "fallback": (RowsConfig(64, 4, 2, False, False),),
}
TILES: dict[str, tuple[TilesConfig, ...]] = {
    "sm_80": (TilesConfig(1, 8, 2, True),),
    "sm_89": (TilesConfig(1, 8, 2, True),),
    "sm_90": (
        TilesConfig(4, 8, 2, True),
        TilesConfig(1, 8, 2, True),
        TilesConfig(4, 4, 2, True),
        TilesConfig(4, 8, 3, True),
        TilesConfig(4, 8, 2, False),
        TilesConfig(8, 8, 3, True),
    ),
    "sm_100": (TilesConfig(4, 8, 2, False),),
    "sm_120": (TilesConfig(1, 8, 2, True),),
    "fallback": (TilesConfig(1, 8, 2, False),),
}
# Of each list the first is for large outputs; `scaled_mm_configuration` steps down while too few
# programs would run.
MM: dict[str, tuple[MmConfig, ...]] = {
    "sm_80": (
        MmConfig(128, 128, 64, 8, 3, False),
        MmConfig(64, 128, 64, 4, 3, False),
        MmConfig(64, 64, 64, 4, 4, False),
        MmConfig(32, 64, 64, 4, 4, False),
    ),
    "sm_89": (
        MmConfig(128, 128, 64, 8, 3, False),
        MmConfig(64, 128, 64, 4, 3, False),
        MmConfig(64, 64, 64, 4, 4, False),
        MmConfig(32, 64, 64, 4, 4, False),
    ),
    "sm_90": (
        MmConfig(128, 128, 128, 4, 3, True),
        MmConfig(64, 128, 128, 4, 5, True),
        MmConfig(64, 64, 128, 4, 6, True),
        MmConfig(128, 128, 128, 4, 4, True),
        MmConfig(128, 256, 128, 8, 4, True),
        MmConfig(128, 128, 128, 8, 4, True),
        MmConfig(256, 128, 128, 8, 4, True),
        MmConfig(128, 256, 128, 8, 3, True),
        MmConfig(256, 128, 128, 8, 3, True),
        MmConfig(128, 128, 128, 8, 4, False),
    ),
    "sm_100": (
        MmConfig(128, 256, 128, 8, 3, True),
        MmConfig(128, 128, 128, 4, 4, True),
        MmConfig(128, 64, 128, 4, 4, True),
    ),
    "sm_120": (
        MmConfig(128, 128, 64, 8, 3, False),
        MmConfig(64, 128, 64, 4, 3, False),
        MmConfig(64, 64, 64, 4, 4, False),
    ),
    "fallback": (MmConfig(64, 64, 64, 4, 2, False),),
}
LADDER_LENGTH = {"sm_80": 4, "sm_89": 4, "sm_90": 3, "sm_100": 3, "sm_120": 3, "fallback": 1}


def rows_configuration(capability: Capability) -> RowsConfig:
    return ROWS[_table_key(capability)][0]


def tiles_configuration(capability: Capability) -> TilesConfig:
    return TILES[_table_key(capability)][0]


def scaled_mm_configuration(M: int, N: int, capability: Capability) -> MmConfig:
    """The largest tile of the table's ladder that still gives every SM a program; the smallest
    tile if none does."""
    key = _table_key(capability)
    ladder = MM[key][: LADDER_LENGTH[key]]
    for config in ladder:
        tiles = -(-M // config.block_m) * -(-N // config.block_n)
        if tiles >= SMS_ASSUMED:
            return config
    return ladder[-1]


def both_layouts_in_one(capability: Capability, input_bytes: int) -> bool:
    """Whether one kernel can hold an input tile and two rotation matrices in shared memory.

    The 99 KiB of sm_86, 89 and 120 cannot; on sm_100 triton 3.7 emits an empty kernel for fp32.
    """
    if capability in ((8, 0), (9, 0)):
        return True
    return capability[0] == 10 and input_bytes < 4


def rows_candidates(capability: Capability) -> tuple[RowsConfig, ...]:
    return ROWS[_table_key(capability)]


def tiles_candidates(capability: Capability) -> tuple[TilesConfig, ...]:
    return TILES[_table_key(capability)]


def scaled_mm_candidates(capability: Capability) -> tuple[MmConfig, ...]:
    return MM[_table_key(capability)]


def row_groups(K: int) -> int:
    """Runs of WIDTH columns in a tile's row: a power of two, at most MAX_ROW_TILE."""
    groups = max(1, -(-K // WIDTH))
    return min(MAX_ROW_TILE, 1 << (groups - 1).bit_length())
