"""What `hadagraph.profile` holds, measured: the statistics of one GEMM's operands as one vector on
the device, without a host sync. Knows nothing of graphs.

A [M, C], B [N, C]: the operands, kept dim first. Every entry of the vector is a mean over batches,
so that vectors add up, over batches and over ranks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hadagraph.profile import (
    BINS,
    GROUPINGS,
    PATTERNS,
    ROTATION_BLOCKS,
    SEQUENCIES,
    OperandStatistics,
    SiteStatistics,
    rounded,
)
from hadagraph.rotation import Rotation, hadamard_matrix, rotate_reference

SAMPLED_ELEMENTS = 1 << 15
"""Histograms see so many elements of an operand: rows spread evenly over it, and the HEAVY_ROWS
with most energy, which decide where a few rows hold it. Everything else sees all elements."""
LEAST_ROWS = 64
HEAVY_ROWS = 24
OUTLIER_RATIO = 2.0
"""From where on the largest rms along an axis, over the median one, is an outlier's."""
_WIDEST = ROTATION_BLOCKS[-1]
_BLOCKS = tuple(g.block for g in GROUPINGS if g.block is not None)
_PEAKS = len(ROTATION_BLOCKS) * len(GROUPINGS) * BINS
_OPERAND = 2 + len(PATTERNS) + _PEAKS + SEQUENCIES
_OVERLAPS = len(ROTATION_BLOCKS)
_PEAK_OVERLAPS = len(ROTATION_BLOCKS) * len(_BLOCKS)
SUMS = 2 + _OVERLAPS + 2 * _PEAK_OVERLAPS + 2 * _OPERAND
MAXIMA = 2


def observed(a: Tensor, b: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [SUMS] and [MAXIMA] of one batch, zeros where an operand holds inf or NaN or is zero.

    a: [M, C], b: [N, C], any float dtype and strides, not empty; product: [M, N], a b^T without a
    bias. Takes no more memory than the sampled rows in fp32, some times.
    """
    with torch.autocast(a.device.type, enabled=False), torch.no_grad():
        left, right = _Operand(a), _Operand(b)
        expected = left.energy * right.energy / a.shape[1]
        alignment = _energy(product, (0, 1)) / expected
        ours, theirs = left.along(), right.along()
        overlaps = [_overlap(ours, theirs)]
        overlaps += _by_blocks([_overlap(left.peaks_along(block), theirs) for block in _BLOCKS])
        overlaps += _by_blocks([_overlap(ours, right.peaks_along(block)) for block in _BLOCKS])
        alone = torch.stack([torch.ones_like(alignment), alignment])
        scalars = torch.cat([alone, a.shape[1] * torch.cat(overlaps)])
        sums = torch.cat([scalars, left.vector(), right.vector()])
        maxima = torch.stack([left.amax, right.amax])
        valid = sums.isfinite().all() & (expected > 0)
        return torch.where(valid, sums, 0.0), torch.where(valid, maxima, 0.0)


def outlier_pattern(x: Tensor) -> Tensor:
    """fp32 [3], one of PATTERNS marked by 1, for x [rows, columns].

    Ours, where AdaHOP (arXiv 2604.02525) is known by its threshold of 2.0 only: along each axis the
    largest rms over the median rms. `none` where both are below OUTLIER_RATIO, else the axis with
    the larger ratio: `row` where a few rows stand out.
    """
    return _pattern(_energy(x, 1), _energy(x, 0))


def _pattern(energy_by_row: Tensor, energy_by_column: Tensor) -> Tensor:
    by_row, by_column = _ratio(energy_by_row.sqrt()), _ratio(energy_by_column.sqrt())
    none = torch.maximum(by_row, by_column) < OUTLIER_RATIO
    row = ~none & (by_row >= by_column)
    return torch.stack([row, ~none & ~row, none]).float()


def _energy(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """The sum of squares along `dim`, in fp32 and without a copy of x."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32).square()


def _ratio(rms: Tensor) -> Tensor:
    return rms.max() / rms.median().clamp(min=torch.finfo(torch.float32).tiny)


def _overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """[R]: sum o t / (sum o sum t) of energies or peaks [R, C] by rotation and contracted index."""
    return (ours * theirs).sum(1) / (ours.sum(1) * theirs.sum(1))


def _by_blocks(overlaps: list[Tensor]) -> list[Tensor]:
    return [torch.stack(overlaps, 1).flatten()]


class _Operand:
    """One operand, [kept, contracted], and the sampled rows in fp32 under each of the R
    rotations."""

    def __init__(self, x: Tensor) -> None:
        self.by_row, self.by_column = _energy(x, 1), _energy(x, 0)
        self.energy = self.by_column.sum()
        low, high = torch.aminmax(x, dim=0)
        self.largest = torch.maximum(-low, high).float()
        self.amax = self.largest.max()
        self.mean_square = self.energy / x.numel()
        self.padding = -x.shape[1] % _WIDEST
        rows, self.weights = _sampled(x, self.by_row)
        self.rotated = _rotations(torch.nn.functional.pad(rows.float(), (0, self.padding)))
        self.magnitudes = self.rotated.abs()
        self.groups = _group_maxima(self.magnitudes)
        self.energies = (self.weights[:, None] * self.magnitudes.square()).sum(1)

    def along(self) -> Tensor:
        """[R, C]: energy by contracted index of the rotated operand; from all rows where it is not
        rotated."""
        exact = torch.nn.functional.pad(self.by_column, (0, self.padding))
        return torch.cat([exact[None], self.energies[1:]])

    def peaks_along(self, block: int) -> Tensor:
        """[R, C]: amax^2 of each contracted index's block, summed over rows."""
        summed = (self.weights[:, None] * self.groups[block].square()).sum(1)
        return summed.repeat_interleave(block, 1)

    def vector(self) -> Tensor:
        """[_OPERAND], in the order that `_operand_of` reads."""
        rows = self.groups[_WIDEST].amax(2, keepdim=True)
        whole = torch.cat([self.amax[None], rows[1:].amax((1, 2))])[:, None, None].expand_as(rows)
        amax = {"per_tensor": whole, "per_kept_index": rows}
        histograms = [
            _histogram(
                self.magnitudes,
                amax[g.kind] if g.block is None else self.groups[g.block],
                self.weights,
            )
            for g in GROUPINGS
        ]
        # As shares of the energy, that of the sample made that of all rows.
        peaks = torch.stack(histograms, 1).flatten() / self.energies[0].sum()
        head = torch.stack([self.mean_square, self.largest.square().mean() / self.mean_square])
        pattern = _pattern(self.by_row, self.by_column)
        return torch.cat([head, pattern, peaks, self._sequency()])

    def _sequency(self) -> Tensor:
        matrix = _walsh(SEQUENCIES).to(self.rotated)
        blocks = self.rotated[0].unflatten(1, (-1, SEQUENCIES)) @ matrix.t()
        energy = (self.weights[:, None, None] * blocks.square()).sum((0, 1))
        return energy / energy.sum()


def _sampled(x: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x, and how many rows each stands for; `energy` of each row."""
    count = max(LEAST_ROWS, SAMPLED_ELEMENTS // x.shape[1])
    if x.shape[0] <= count:
        return x, torch.ones_like(energy)
    heavy = energy.topk(HEAVY_ROWS).indices
    spread = count - HEAVY_ROWS
    others = torch.arange(spread, device=x.device) * x.shape[0] // spread
    light = torch.ones_like(energy).index_fill(0, heavy, 0.0)[others]
    weight = (x.shape[0] - HEAVY_ROWS) / light.sum()
    rows = x[torch.cat([heavy, others])]
    return rows, torch.cat([energy.new_ones(HEAVY_ROWS), light * weight])


def _rotations(x: Tensor) -> Tensor:
    """[R, rows, C]: x under each of ROTATION_BLOCKS. H_2n is H_2 (x) H_n, so that each doubling is
    one butterfly."""
    results = [x, rotate_reference(x, 1, Rotation(ROTATION_BLOCKS[1]))]
    for block in ROTATION_BLOCKS[2:]:
        low, high = results[-1].unflatten(1, (-1, 2, block // 2)).unbind(2)
        results.append(torch.stack([low + high, low - high], 2).flatten(1) * 2**-0.5)
    return torch.stack(results)


def _group_maxima(magnitudes: Tensor) -> dict[int, Tensor]:
    """[R, rows, runs]: maxima of runs along the contracted dim, by their length."""
    found, maxima, reached = {}, magnitudes, 1
    for block in (*_BLOCKS, _WIDEST):
        maxima = maxima.unflatten(2, (-1, block // reached)).amax(3)
        found[block], reached = maxima, block
    return found


def _histogram(magnitudes: Tensor, amax: Tensor, weights: Tensor) -> Tensor:
    """fp32 [R, BINS]: amax^2 of each element's group, summed over the elements in each bin; `amax`
    [R, rows, groups along the contracted dim]."""
    rotations, rows, groups = amax.shape
    inverse = torch.where(amax > 0, 1 / amax, 0.0)
    share = magnitudes.unflatten(2, (groups, -1)) * inverse[..., None]
    # Sign, exponent and first bit of the mantissa.
    place = _bin_of_bits(share.device)[share.view(torch.int32) >> 22]
    weight = (weights[:, None] * amax.square())[..., None].expand(place.shape)
    row = torch.arange(rotations * rows, device=place.device).view(rotations, rows, 1, 1) * BINS
    counted = torch.zeros(rotations * rows * BINS, device=place.device)
    counted.scatter_add_(0, (place + row).flatten(), weight.flatten())
    return counted.view(rotations, rows, BINS).sum(1)


@lru_cache(maxsize=8)
def _bin_of_bits(device: torch.device) -> Tensor:
    """int64 [512]: the bin of an fp32 number in [0, 1] by its 10 upper bits."""
    half_octave = (253 - torch.arange(512)).clamp(min=0)
    octaves = 16 + (half_octave - 16) // 2
    return torch.where(half_octave < 16, half_octave, octaves).clamp(max=BINS - 1).to(device)


@lru_cache(maxsize=4)
def _walsh(block: int) -> Tensor:
    """The normalized Walsh matrix by sequency."""
    matrix = hadamard_matrix(block)
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[changes.argsort()] * block**-0.5


def site_statistics(
    name: str,
    role: str,
    kinds: tuple[str, str],
    sizes: tuple[int, int, int],
    sums: Tensor,
    maxima: Tensor,
) -> SiteStatistics | None:
    """The means of summed vectors; None where no batch was valid. sizes: M, N, C."""
    total = sums.double().cpu()
    batches = int(total[0])
    if batches == 0:
        return None
    values = [rounded(value) for value in (total / batches).tolist()]
    at = 2 + _OVERLAPS
    by_left = values[at : at + _PEAK_OVERLAPS]
    by_right = values[at + _PEAK_OVERLAPS : at + 2 * _PEAK_OVERLAPS]
    start = at + 2 * _PEAK_OVERLAPS
    largest = [rounded(value) for value in maxima.double().cpu().tolist()]
    lhs, rhs = (
        _operand_of(kind, amax, values[start + side * _OPERAND :][:_OPERAND])
        for side, (kind, amax) in enumerate(zip(kinds, largest, strict=True))
    )
    return SiteStatistics(
        name,
        role,
        *sizes,
        batches,
        lhs,
        rhs,
        alignment=values[1],
        overlaps=tuple(values[2:at]),
        peak_overlaps=tuple(zip(by_left, by_right, strict=True)),
    )


def _operand_of(kind: str, amax: float, values: list[float]) -> OperandStatistics:
    patterns = values[2 : 2 + len(PATTERNS)]
    start = 2 + len(PATTERNS)
    peaks = values[start : start + _PEAKS]
    return OperandStatistics(
        kind,
        amax,
        mean_square=values[0],
        crest_contracted=rounded(values[1] ** 0.5),
        patterns=tuple(patterns),
        peaks=tuple(tuple(peaks[i : i + BINS]) for i in range(0, _PEAKS, BINS)),
        sequency=tuple(values[start + _PEAKS :]),
    )
