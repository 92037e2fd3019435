"""Tables of tile configurations by target and shape, and the static choice among them. Knows no
tensors; `candidates` lists what benchmarks race and tests must cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hadagraph.codegen.spec import COOPERATIVE, PINGPONG, VECTORS, WIDTH, Capability
from hadagraph.region import MATRIX, Chain

SMS_ASSUMED = 132
MAX_ROW_TILE = 128
"""Runs of WIDTH columns that one tile may hold: longer rows are read twice."""


@dataclass(frozen=True)
class RowsConfig:
    """Whole-row quantizer: `tile` runs of WIDTH columns a program (at least one row). `width`:
    columns of the matrix that rotates, where there are no signs."""

    tile: int
    warps: int
    stages: int
    persistent: bool
    fragment_order: bool
    programs_per_sm: int = 4
    width: int = WIDTH


@dataclass(frozen=True)
class PassConfig:
    """One pass over tiles, `tiles` of them down each program's stripe. `descriptors`: tiles are
    moved by TMA where the tensors allow. `maxnreg`: registers a thread, at most."""

    tiles: int
    warps: int
    stages: int
    descriptors: bool = False
    maxnreg: int | None = None


@dataclass(frozen=True)
class TilesConfig:
    """The amax pass and the write pass that follows it."""

    amax: PassConfig
    write: PassConfig
    fragment_order: bool = True


@dataclass(frozen=True)
class VectorsConfig:
    """One column pass by butterflies: programs of `columns` x `tokens`. `chunk`: tokens whose codes
    are stored together. `literal`: row strides are written into the source."""

    columns: int
    tokens: int
    warps: int
    chunk: int = VECTORS
    tokens_first: bool = False
    backward: bool = False
    literal: bool = True


@dataclass(frozen=True)
class ColumnsConfig:
    """The pass for the maxima of columns and the one that writes their codes."""

    amax: VectorsConfig
    write: VectorsConfig


@dataclass(frozen=True)
class MmConfig:
    """Scaled matmul: tile sizes, and whether operands come through tensor descriptors.
    `schedule`: of the kernel in Gluon, where it can be used; None: the one in Triton."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int
    descriptors: bool
    group: int = 8
    schedule: str | None = None

    def tiles(self, M: int, N: int) -> int:
        """Of an output [M, N]."""
        return -(-M // self.block_m) * -(-N // self.block_n)

    def fields(self, M: int, N: int) -> dict[str, Any]:
        """Of the spec of a matmul with this output."""
        return {
            "block_m": self.block_m,
            "block_n": self.block_n,
            "block_c": self.block_c,
            "group": self.group,
            "mask_m": M % self.block_m != 0,
            "mask_n": N % self.block_n != 0,
            "warps": self.warps,
            "stages": self.stages,
        }


@dataclass(frozen=True)
class LibraryMm:
    """torch._scaled_mm in place of an emitted kernel. `fast_accumulation`: its fp32 sums stay in
    the tensor core to the end."""

    fast_accumulation: bool


def tma(capability: Capability) -> bool:
    return capability[0] >= 9


def _table_key(capability: Capability) -> str:
    if capability[0] == 8:
        return "sm_89" if capability[1] == 9 else "sm_80"
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(capability[0], "fallback")


# Rows that are not rotated are bound by memory and want small programs. So do rotations by a small
# matrix: 128 elements a thread, the least that a warp's product takes. A matrix of 128 columns is
# 32 KiB of shared memory, and `stages` are what still lets two programs share an SM.
_SMALL_ROWS = RowsConfig(32, 4, 2, False, True)
_ROWS = RowsConfig(64, 4, 2, False, True)
_LARGE_ROWS = RowsConfig(128, 8, 2, False, True)
_UNORDERED_ROWS = RowsConfig(128, 8, 2, False, False)
# By the runs of WIDTH columns in a row's tile.
ROWS_CASES = {"rotated": 32, "rotated_64": 64, "rotated_128": MAX_ROW_TILE}
_ROWS_CASES = ("plain", *ROWS_CASES)
ROWS: dict[str, dict[str, RowsConfig]] = {
    "sm_80": dict.fromkeys(_ROWS_CASES, _LARGE_ROWS),
    "sm_89": dict.fromkeys(_ROWS_CASES, _LARGE_ROWS),
    "sm_90": {
        "plain": _SMALL_ROWS,
        "rotated": RowsConfig(32, 1, 3, False, True, width=32),
        "rotated_64": RowsConfig(64, 2, 3, False, True, width=32),
        "rotated_128": RowsConfig(128, 4, 3, False, True, width=32),
    },
    "sm_100": dict.fromkeys(_ROWS_CASES, _UNORDERED_ROWS),
    "sm_120": dict.fromkeys(_ROWS_CASES, _ROWS),
    "fallback": dict.fromkeys(_ROWS_CASES, RowsConfig(64, 4, 2, False, False)),
}
ROWS_RACED: dict[str, tuple[RowsConfig, ...]] = {
    "sm_90": (
        RowsConfig(64, 4, 3, True, True, 4),
        RowsConfig(128, 8, 2, True, True, 2),
        RowsConfig(128, 4, 3, False, True, width=64),
        RowsConfig(64, 2, 3, False, True, width=64),
        RowsConfig(32, 2, 2, True, True, 8, width=32),
        RowsConfig(128, 8, 1, True, True, 2, width=32),
        RowsConfig(128, 8, 2, False, False, width=32),
    ),
}
_ONE = PassConfig(1, 8, 2)
_FOUR = PassConfig(4, 8, 2)
_FOUR_TMA = PassConfig(4, 8, 1, descriptors=True)
_FOUR_128_REGISTERS = PassConfig(4, 8, 2, maxnreg=128)
_ONES = TilesConfig(_ONE, _ONE)
_UNORDERED = TilesConfig(_ONE, _ONE, fragment_order=False)
# Ladders: the first configuration that the tensors allow and that gives every SM a program.
TILES: dict[str, dict[str, tuple[TilesConfig, ...]]] = {
    "sm_80": dict.fromkeys(("plain", "rotated", "rotated_both"), (_ONES,)),
    "sm_89": dict.fromkeys(("plain", "rotated", "rotated_both"), (_ONES,)),
    "sm_90": {
        "plain": (_ONES,),
        "rotated": (TilesConfig(_FOUR, _FOUR), _ONES),
        "rotated_both": (
            TilesConfig(_FOUR, _FOUR_128_REGISTERS),
            _ONES,
        ),
    },
    "sm_100": dict.fromkeys(
        ("plain", "rotated", "rotated_both"),
        (TilesConfig(_FOUR, _FOUR, fragment_order=False), _UNORDERED),
    ),
    "sm_120": dict.fromkeys(("plain", "rotated", "rotated_both"), (_ONES,)),
    "fallback": dict.fromkeys(("plain", "rotated", "rotated_both"), (_UNORDERED,)),
}
TILES_RACED: dict[str, tuple[TilesConfig, ...]] = {
    "sm_90": (
        TilesConfig(_FOUR, _FOUR_TMA),
        TilesConfig(_FOUR, _ONE),
        TilesConfig(PassConfig(8, 8, 2), PassConfig(8, 8, 1, descriptors=True)),
        TilesConfig(PassConfig(4, 8, 1), PassConfig(1, 8, 1, descriptors=True)),
        TilesConfig(PassConfig(4, 4, 2), PassConfig(4, 8, 1, descriptors=True, maxnreg=128)),
        TilesConfig(_FOUR, PassConfig(4, 8, 2, descriptors=True), fragment_order=False),
    ),
}
# Chains. Whole rows: of chains that read one matrix with short rows, and of others (raced with
# SwiGLU; at 8192 columns a width of 32 is 4 % faster alone, 64 3 % faster between GEMMs).
CHAIN_ROWS: dict[str, tuple[RowsConfig, RowsConfig]] = {
    "sm_80": (_LARGE_ROWS, _LARGE_ROWS),
    "sm_89": (_LARGE_ROWS, _LARGE_ROWS),
    "sm_90": (
        RowsConfig(64, 4, 3, False, True, width=32),
        RowsConfig(128, 8, 2, False, True, width=64),
    ),
    "sm_100": (_UNORDERED_ROWS, _UNORDERED_ROWS),
    "sm_120": (_ROWS, _ROWS),
    "fallback": (RowsConfig(64, 4, 2, False, False), RowsConfig(64, 4, 2, False, False)),
}
CHAIN_ROWS_RACED: dict[str, tuple[RowsConfig, ...]] = {
    "sm_90": (
        RowsConfig(64, 4, 2, True, True, 2),
        RowsConfig(128, 8, 2, True, True, 1),
        RowsConfig(32, 2, 2, False, True, width=32),
        RowsConfig(128, 4, 3, False, True, width=32),
        RowsConfig(128, 16, 2, False, True, width=32),
        RowsConfig(128, 8, 2, False, True, width=32),
        RowsConfig(128, 8, 2, True, True, 2, width=64),
    ),
}
# Columns by butterflies. Ladders: the first configuration that gives every SM a program.
_SMALL_COLUMNS = ColumnsConfig(
    VectorsConfig(128, 64, 2, literal=False), VectorsConfig(128, 64, 2, 64, literal=False)
)
# Chunks of 64 tokens compile three times faster than of 128: Triton's coalescing pass walks, for
# each load, all that is connected with it.
_COLUMNS = (
    ColumnsConfig(VectorsConfig(256, 512, 4), VectorsConfig(128, 64, 2, 64, backward=True)),
    ColumnsConfig(VectorsConfig(256, 256, 4), VectorsConfig(128, 128, 2, 64, backward=True)),
    _SMALL_COLUMNS,
)
# One that computes has fewer columns a thread. Raced on Hopper, and taken elsewhere.
_CHAIN_COLUMNS = (
    ColumnsConfig(VectorsConfig(256, 128, 4), VectorsConfig(64, 64, 1)),
    ColumnsConfig(
        VectorsConfig(128, 32, 2, literal=False), VectorsConfig(64, 64, 1, literal=False)
    ),
)
# Of three outputs, that compute most: one column a thread, and many small programs, so that those
# which wait for memory leave others to compute. (Codes are written of one output at a time.)
_THREE_COLUMNS = (ColumnsConfig(VectorsConfig(64, 64, 2), _CHAIN_COLUMNS[0].write),)
_CHAINS = {"chain": _CHAIN_COLUMNS, "three outputs": _THREE_COLUMNS}
_ANY_COLUMNS = {"short": _CHAIN_COLUMNS, "long": _CHAIN_COLUMNS, **_CHAINS}
COLUMNS: dict[str, dict[str, tuple[ColumnsConfig, ...]]] = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_100", "sm_120", "fallback"), _ANY_COLUMNS),
    "sm_90": {
        "short": _COLUMNS,
        "long": (
            ColumnsConfig(
                VectorsConfig(256, 256, 4), VectorsConfig(128, 128, 2, 64, tokens_first=True)
            ),
            *_COLUMNS,
        ),
        **_CHAINS,
    },
}
COLUMNS_RACED: dict[str, tuple[ColumnsConfig, ...]] = {
    "sm_90": (
        ColumnsConfig(VectorsConfig(128, 256, 2), VectorsConfig(128, 128, 2, 64)),
        ColumnsConfig(
            VectorsConfig(256, 256, 4, tokens_first=True), VectorsConfig(256, 128, 4, 64)
        ),
        ColumnsConfig(
            VectorsConfig(256, 256, 4, literal=False), VectorsConfig(128, 64, 2, 64, literal=False)
        ),
        ColumnsConfig(VectorsConfig(256, 128, 8), VectorsConfig(128, 128, 2, 64, backward=True)),
        ColumnsConfig(VectorsConfig(32, 64, 1), VectorsConfig(128, 128, 2, 64, backward=True)),
        ColumnsConfig(VectorsConfig(128, 128, 2), VectorsConfig(128, 32, 2)),
    ),
}
# Elements from which a kernel that is compiled for one row stride pays for that.
LITERAL_ELEMENTS = 1 << 23
# Where butterflies beat matrix products for columns; chains take them everywhere.
BUTTERFLIES = ("sm_90",)
_SM_80 = (
    MmConfig(128, 128, 64, 8, 3, False),
    MmConfig(64, 128, 64, 4, 3, False),
    MmConfig(64, 64, 64, 4, 4, False),
    MmConfig(32, 64, 64, 4, 4, False),
)
_SM_100 = (
    MmConfig(128, 256, 128, 8, 3, True),
    MmConfig(128, 128, 128, 4, 4, True),
    MmConfig(128, 64, 128, 4, 4, True),
)
# In Gluon two warpgroups take turns: 1325 to 1495 TFLOP/s over the GEMMs of a Llama block on one
# H200, where the first of _HOPPER has 981 to 1459.
_PINGPONG = MmConfig(128, 128, 128, 4, 6, True, schedule=PINGPONG)
# At full rate a tile of 128 x 128 reads 64 bytes a cycle, all that an SM's port to L2 takes; one of
# twice the width three quarters of that, but nobody multiplies while it is stored. The six largest
# GEMMs of a step take 60.1 and 62.5 ms on an H200 (60 MiB of L2), 68.3 and 57.8 on an H100 (50 MiB)
# (bench/results/gemm_schedules.json); the bound lies between the two.
_COOPERATIVE = MmConfig(128, 256, 128, 4, 4, True, schedule=COOPERATIVE)
COOPERATIVE_BELOW_L2 = 55 << 20
# How many times the waves of _PINGPONG's tiles, in their time, it may take on the SMs: less than
# the 1.18 that it gains. Raced were shapes of 1.01 at most, contractions of 1024 and more.
COOPERATIVE_WAVES = 1.1
# Triton waits for Hopper's int8 product in every step: two programs an SM fill each other's gaps,
# which the 4-warp tile with three stages allows. fp8 is not waited for and takes the large tile.
_HOPPER = (
    MmConfig(128, 128, 128, 4, 3, True, group=16),
    MmConfig(64, 128, 128, 4, 5, True),
    MmConfig(64, 64, 128, 4, 6, True),
)
MM: dict[str, dict[str, tuple[MmConfig, ...]]] = {
    "sm_80": dict.fromkeys(("int8", "fp8"), _SM_80),
    "sm_89": dict.fromkeys(("int8", "fp8"), _SM_80),
    "sm_90": {
        "int8": (_PINGPONG, *_HOPPER),
        "fp8": (MmConfig(128, 256, 128, 8, 4, True), *_HOPPER),
    },
    "sm_100": dict.fromkeys(("int8", "fp8"), _SM_100),
    "sm_120": dict.fromkeys(("int8", "fp8"), _SM_80[:3]),
    "fallback": dict.fromkeys(("int8", "fp8"), (MmConfig(64, 64, 64, 4, 2, False),)),
}
MM_RACED: dict[str, tuple[MmConfig, ...]] = {
    "sm_90": (
        MmConfig(128, 128, 128, 4, 6, True, group=16, schedule=PINGPONG),
        _COOPERATIVE,
        MmConfig(128, 256, 128, 4, 4, True, group=16, schedule=COOPERATIVE),
        MmConfig(256, 128, 128, 8, 4, True),
        MmConfig(128, 64, 128, 4, 5, True),
        MmConfig(64, 64, 128, 4, 3, True),
        MmConfig(128, 128, 128, 4, 3, True),
        MmConfig(128, 128, 128, 8, 4, False),
    ),
}
# At 256 x 4096 x 4096 a 64 x 128 tile (128 programs) beats 64 x 64 for fp8, not for int8.
MM_PROGRAMS = {"int8": SMS_ASSUMED, "fp8": 120}
# The fp8 matmuls that torch._scaled_mm wins (bench/results/kernels.json), as the least number of
# 128 x 128 tiles in the output, for one scale a tensor and one a row. Row-wise it has no smaller
# tile and no split, and loses where SMs stay idle.
LIBRARY_TILES: dict[str, dict[str, int]] = {"sm_90": {"tensorwise": 1, "rowwise": SMS_ASSUMED}}


def rows_configuration(K: int, rotated: bool, capability: Capability) -> RowsConfig:
    """The table's whole-row configuration for rows of K elements."""
    case = "plain"
    if rotated:
        case = next(name for name, groups in ROWS_CASES.items() if row_groups(K) <= groups)
    return ROWS[_table_key(capability)][case]


def tiles_configuration(
    T: int, K: int, rotated: bool, both: bool, addressable: bool, capability: Capability
) -> TilesConfig:
    """The first of the table's ladder whose tensors TMA can address (`addressable`) and that fills
    the SMs; the last if none does."""
    case = "plain" if not rotated else "rotated_both" if both else "rotated"
    ladder = TILES[_table_key(capability)][case]
    for config in ladder:
        stripe = WIDTH * max(config.amax.tiles, config.write.tiles)
        programs = -(-K // WIDTH) * -(-T // stripe)
        if programs >= SMS_ASSUMED and (addressable or not config.write.descriptors):
            return config
    return ladder[-1]


def chain_rows_configuration(chain: Chain, K: int, capability: Capability) -> RowsConfig:
    """The table's configuration of the whole-row kernel of a chain, for rows of K elements."""
    one_matrix = sum(each.shape == MATRIX for each in chain.inputs) == 1
    short = row_groups(K) <= ROWS_CASES["rotated"]
    return CHAIN_ROWS[_table_key(capability)][0 if one_matrix and short else 1]


def columns_configuration(
    T: int, K: int, capability: Capability, *, chained: int = 0
) -> ColumnsConfig:
    """The first of the table's ladder whose maxima fill the SMs; the last if none does. `chained`:
    how many matrices the kernel itself computes."""
    case = "long" if row_groups(K) == MAX_ROW_TILE else "short"
    if chained:
        case = "three outputs" if chained > 2 else "chain"
    ladder = COLUMNS[_table_key(capability)][case]
    for config in ladder:
        if -(-K // config.amax.columns) * -(-T // config.amax.tokens) >= SMS_ASSUMED:
            return config
    return ladder[-1]


def butterflies_win(capability: Capability) -> bool:
    """Whether columns in blocks of at most VECTORS tokens are rotated by additions."""
    return _table_key(capability) in BUTTERFLIES


def columns_candidates(capability: Capability) -> tuple[ColumnsConfig, ...]:
    key = _table_key(capability)
    ladders = [config for ladder in COLUMNS[key].values() for config in ladder]
    return tuple(dict.fromkeys((*ladders, *COLUMNS_RACED.get(key, ()))))


def chain_rows_candidates(capability: Capability) -> tuple[RowsConfig, ...]:
    key = _table_key(capability)
    return tuple(dict.fromkeys((*CHAIN_ROWS[key], *CHAIN_ROWS_RACED.get(key, ()))))


def scaled_mm_configuration(
    M: int,
    N: int,
    integer: bool,
    capability: Capability,
    *,
    gluon: bool = False,
    l2_bytes: int | None = None,
) -> MmConfig:
    """The largest tile of the format's ladder that still gives nearly every SM a program; the
    smallest tile if none does. `gluon`: kernels in Gluon can be used. `l2_bytes`: of the device;
    where it is small, _COOPERATIVE in place of _PINGPONG, as far as its waves allow."""
    name = "int8" if integer else "fp8"
    whole = MM[_table_key(capability)][name]
    ladder = [config for config in whole if gluon or config.schedule is None]
    found = first_that_fills(ladder, M, N, MM_PROGRAMS[name])
    small_l2 = l2_bytes is not None and l2_bytes < COOPERATIVE_BELOW_L2
    if found != _PINGPONG or not small_l2:
        return found
    allowed = COOPERATIVE_WAVES * _waves(_PINGPONG, M, N)
    return _COOPERATIVE if _waves(_COOPERATIVE, M, N) <= allowed else found


def _waves(config: MmConfig, M: int, N: int) -> int:
    """Tiles of 128 x 128, one after another, that the busiest SM multiplies."""
    area = config.block_m * config.block_n // 128**2
    return area * -(-config.tiles(M, N) // SMS_ASSUMED)


def first_that_fills(ladder: Sequence[MmConfig], M: int, N: int, programs: int) -> MmConfig:
    """The first of the ladder with that many programs at least; the last if none has."""
    return next((config for config in ladder if config.tiles(M, N) >= programs), ladder[-1])


def library_is_faster(M: int, N: int, tensorwise: bool, capability: Capability) -> bool:
    """Whether the table gives an fp8 matmul with an [M, N] output to torch._scaled_mm."""
    least = LIBRARY_TILES.get(_table_key(capability))
    if least is None:
        return False
    tiles = -(-M // 128) * -(-N // 128)
    return tiles >= least["tensorwise" if tensorwise else "rowwise"]


def both_layouts_in_one(
    capability: Capability, input_bytes: int, one_matrix: bool, butterflies: bool
) -> bool:
    """Whether one kernel should make both layouts, rather than the row kernel and then the column
    passes. `butterflies`: rows or columns are rotated with a scale each.

    Two different rotation matrices leave room for one program an SM only: on Hopper 0.22 ms, beside
    0.18 ms for two calls and 0.16 ms with one matrix (16384 x 4096); rows by a small matrix and
    columns by butterflies take 0.15 ms. The 99 KiB of sm_86, 89 and 120 cannot hold the tile; on
    sm_100 triton 3.7 emits an empty kernel for fp32.
    """
    if not one_matrix or (butterflies and butterflies_win(capability)):
        return False
    if capability in ((8, 0), (9, 0)):
        return True
    return capability[0] == 10 and input_bytes < 4


def rows_candidates(capability: Capability) -> tuple[RowsConfig, ...]:
    key = _table_key(capability)
    return tuple(dict.fromkeys((*ROWS[key].values(), *ROWS_RACED.get(key, ()))))


def tiles_candidates(capability: Capability) -> tuple[TilesConfig, ...]:
    key = _table_key(capability)
    ladders = [config for ladder in TILES[key].values() for config in ladder]
    return tuple(dict.fromkeys((*ladders, *TILES_RACED.get(key, ()))))


def scaled_mm_candidates(capability: Capability) -> tuple[MmConfig, ...]:
    key = _table_key(capability)
    ladders = [config for ladder in MM[key].values() for config in ladder]
    return tuple(dict.fromkeys((*ladders, *MM_RACED.get(key, ()))))


def row_groups(K: int) -> int:
    """Runs of WIDTH columns in a tile's row: a power of two, at most MAX_ROW_TILE."""
    groups = max(1, -(-K // WIDTH))
    return min(MAX_ROW_TILE, 1 << (groups - 1).bit_length())
