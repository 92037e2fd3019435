"""Predicted times, in microseconds, of what a plan puts into a graph: GEMMs, quantizers and their
launches by the host, from a device profile. Knows nothing of graphs or plans.

M, N kept dims and C contracted dim of a GEMM; T rows and K columns of a quantizer's input.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

from hadagraph.device import BLOCK_KINDS, DeviceProfile, GemmRate

# The fastest that an fp32 matmul can be, in TF32, beside bf16.
FP32_SLOWDOWN = 2.0
# What a pointwise kernel of Inductor's moves for each byte that it makes for a GEMM.
BYTES_PER_MADE = 3.0
WIDTHS = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "mxfp8": 1.0, "fp4": 0.5}


def gemm_us(profile: DeviceProfile, M: int, N: int, C: int, format: str) -> float:
    """Time of out[M, N] (16 bit) = sum_C lhs[M, C] rhs[N, C] in a format of `device.GemmRate`;
    `fp32` stands for TF32. ValueError on a format that the device has not.

    The tile and the split of the contraction that take least; a program's time is proportional to
    its tile, edges included, and to its run of C; programs come in waves over the multiprocessors.
    Never less than the traffic takes at copy bandwidth, or the FLOPs at the sustained rate.
    """
    if format == "fp32":
        return FP32_SLOWDOWN * gemm_us(profile, M, N, C, "bf16")
    rate = profile.gemm(format)
    traffic = ((M + N) * C * WIDTHS[format] + 2 * M * N) / profile.copy_bytes_per_us
    work = min(
        _programs_us(profile, rate, tile, M, N, C, parts)
        for tile in rate.tiles
        for parts in _splits(rate.splits)
    )
    least = 2e-6 * M * N * C / rate.sustained
    return max(rate.fixed_us + max(traffic, work), least)


def _splits(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _programs_us(
    profile: DeviceProfile,
    rate: GemmRate,
    tile: tuple[int, int],
    M: int,
    N: int,
    C: int,
    parts: int,
) -> float:
    rows, columns = tile
    programs = -(-M // rows) * -(-N // columns) * parts
    waves = -(-programs // profile.multiprocessors)
    pairs = waves // 2 * 2 + waves % 2 / rate.alone
    area = (rows + rate.edge) * (columns + rate.edge)
    flops = 2.0 * area * (C / parts + rate.ramp)
    each = flops * profile.multiprocessors / (rate.tflops * 1e6)
    # Parts are written and read again in fp32.
    reduction = 0.0 if parts == 1 else 8.0 * parts * M * N / profile.copy_bytes_per_us
    return pairs * each + reduction


def quantizer_us(
    profile: DeviceProfile, T: int, K: int, layouts: str, kind: str, input_bytes: int = 2
) -> float:
    """Time of a quantizer of x [T, K] with elements of `input_bytes`; `layouts` is `rows`,
    `columns` or `both`, `kind` of `device.KINDS`, or of `device.BLOCK_KINDS` for one layout."""
    rate = profile.quantizer(layouts, kind)
    moved = T * K * (input_bytes + (2 if layouts == "both" else 1))
    return rate.fixed_us + moved / (rate.share * profile.copy_bytes_per_us)


@dataclass(frozen=True)
class Matrix:
    """A tensor [T, K] that GEMMs read: `given` to the graph, as weights and inputs are, or made
    by a kernel of it. `fused`: its quantizers compute it, so that it is not written where every
    GEMM that reads it is lowered."""

    key: Hashable
    T: int
    K: int
    itemsize: int
    given: bool
    fused: bool = False


@dataclass(frozen=True)
class Use:
    """One operand of one GEMM: the matrix, the dim that is contracted (1: codes of its rows, 0: of
    its columns), the encoding's text and its kind, and whether the backward asks for it."""

    matrix: Matrix
    dim: int
    encoding: str
    kind: str
    backward: bool

    @property
    def by_blocks(self) -> bool:
        """Whether its codes have block scales: the quantizer then makes one layout of a tensor that
        lies in memory."""
        return self.kind in BLOCK_KINDS


@dataclass(frozen=True)
class Gemm:
    """A GEMM that may be lowered to `format` or stay in `plain` (`bf16` or `fp32`)."""

    M: int
    N: int
    C: int
    format: str
    plain: str
    uses: tuple[Use, Use]


@dataclass(frozen=True)
class Times:
    """Microseconds of the device and of the host that keeps it busy."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(self.device + other.device, self.host + other.host)

    def __mul__(self, count: int) -> Times:
        return Times(count * self.device, count * self.host)

    @property
    def us(self) -> float:
        """The time that passes: both work at once, so the slower of the two."""
        return max(self.device, self.host)


def step_times(profile: DeviceProfile) -> Times:
    """What a step of a compiled graph costs the host beside its calls."""
    return Times(host=profile.host.step)


def gemm_times(profile: DeviceProfile, gemm: Gemm, lowered: bool) -> Times:
    """A GEMM by itself, its operands ready."""
    format = gemm.format if lowered else gemm.plain
    host = profile.host.scaled_mm if lowered else profile.host.mm
    return Times(gemm_us(profile, gemm.M, gemm.N, gemm.C, format), host)


def quantizer_times(profile: DeviceProfile, uses: Iterable[Use]) -> Times:
    """The quantizers that these operands need: each tensor's codes made once, and both layouts by
    one operator where the same phase needs them and neither has block scales."""
    by_matrix: dict[Matrix, dict[tuple[int, str], list[Use]]] = {}
    for use in uses:
        layouts = by_matrix.setdefault(use.matrix, {})
        layouts.setdefault((use.dim, use.encoding), []).append(use)
    total = Times()
    for matrix, layouts in by_matrix.items():
        first = [group[0] for group in layouts.values()]
        dims = [dim for dim, _ in layouts]
        phases = {all(use.backward for use in group) for group in layouts.values()}
        blocks = any(use.by_blocks for use in first)
        if sorted(dims) == [0, 1] and len(phases) == 1 and not blocks:
            total += _quantizer(profile, matrix, "both", _slower_kind(first))
            continue
        for use in first:
            total += _quantizer(profile, matrix, "rows" if use.dim else "columns", use.kind)
    return total


def _slower_kind(uses: list[Use]) -> str:
    return max((use.kind for use in uses), key=("plain", "per_tensor", "rotated").index)


def _quantizer(profile: DeviceProfile, matrix: Matrix, layouts: str, kind: str) -> Times:
    device = quantizer_us(profile, matrix.T, matrix.K, layouts, kind, matrix.itemsize)
    return Times(device, getattr(profile.host, f"quantize_{layouts}"))


def producer_times(
    profile: DeviceProfile, matrices: Iterable[Matrix], plain: Collection[Matrix]
) -> Times:
    """The kernels of Inductor's that make these matrices; `plain` of them are read by a GEMM that
    is not lowered, or by a quantizer that cannot compute them."""
    made = [matrix for matrix in matrices if not matrix.given]
    moved = 0.0
    for matrix in made:
        written = matrix in plain or not matrix.fused
        size = matrix.T * matrix.K * matrix.itemsize
        moved += size * (BYTES_PER_MADE if written else BYTES_PER_MADE - 1)
    return Times(moved / profile.copy_bytes_per_us, profile.host.kernel * len(made))
