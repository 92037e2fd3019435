"""The error model: how precise a GEMM of two encoded operands is, from their statistics or from
stated priors. Knows nothing of graphs, plans or devices.

SQNR is the energy of the exact output over that of the error, in dB. In units of what independent
operands would give, |A|^2 |B|^2 / C, the output's energy is the site's `alignment`. An operand's
error has three parts, each a share of the operand's energy:

    shrunk     what rounding takes away in proportion: numbers that become zero or are clamped. It
               looks like the operand, so its product has the site's alignment
    relative   rounding errors in proportion to the number (floating point), independent: their
               product is weighed by the site's overlap of energies
    absolute   rounding errors in proportion to the group's scale, independent: weighed by the
               overlap of scales with the other operand's energies, 1 where a scale holds for the
               whole contracted dim

Each is a sum over the bins of |x| / amax that the statistics count. Approximations: numbers are
spread evenly in a bin; signs change nothing; scale groups that were not observed are had from the
nearest by the growth of normal data's maximum; a rotation block that was not observed counts as the
nearest; `four_six` gains what it gains on normal data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch

from hadagraph import compat
from hadagraph.codec import grid_step, smallest_scale, to_grid
from hadagraph.encode import NORMAL_REACH, THREE_QUARTERS
from hadagraph.formats import SCALE_FORMATS, Encoding, Granularity, format_named
from hadagraph.profile import (
    GROUPINGS,
    ROTATION_BLOCKS,
    SEQUENCIES,
    OperandStatistics,
    SiteStatistics,
    bin_edges,
)

BEST = 60.0
"""dB: what two operands in bf16 are counted as."""
FOUR_SIX_GAIN = 0.87
"""Error of the 4/6 choice over that of the scale that puts the largest number on 6: normal data."""
_BLOCKS = tuple(g.block for g in GROUPINGS if g.block is not None)
_SAMPLES = 64  # of a bin, and of what a scale is rounded by


@dataclass(frozen=True)
class Noise:
    """An operand's error as shares of its energy, see above."""

    shrunk: float
    relative: float
    absolute: float

    @property
    def total(self) -> float:
        return self.shrunk + self.relative + self.absolute


NONE = Noise(0.0, 0.0, 0.0)


def predicted_sqnr(site: SiteStatistics, lhs: Encoding | None, rhs: Encoding | None) -> float:
    """dB of the GEMM with these encodings of its operands (in the site's order); None: the
    operand's own precision. 0 where the output was all zeros, of which any error is too much."""
    left = operand_noise(site.lhs, lhs, (site.m, site.c))
    right = operand_noise(site.rhs, rhs, (site.n, site.c))
    error = _product_error(site, lhs, left, 0) + _product_error(site, rhs, right, 1)
    error += left.total * right.total + _dropped(site, lhs or rhs)
    signal = site.alignment
    if signal == 0.0:
        return 0.0
    return min(BEST, 10 * math.log10(signal / max(error, signal * 10 ** (-BEST / 10))))


def _product_error(
    site: SiteStatistics, encoding: Encoding | None, noise: Noise, side: int
) -> float:
    """The error of one operand times the other operand, in units of |A|^2 |B|^2 / C."""
    if encoding is None:
        return 0.0
    at = ROTATION_BLOCKS.index(_block(encoding))
    scales = 1.0
    if encoding.granularity.block is not None:
        near = _BLOCKS.index(_observed_group(encoding.granularity)[0].block or 0)
        scales = site.peak_overlaps[at * len(_BLOCKS) + near][side]
    aligned = noise.shrunk * site.alignment
    return aligned + noise.relative * site.overlaps[at] + noise.absolute * scales


def _dropped(site: SiteStatistics, encoding: Encoding | None) -> float:
    """The product of what a projection leaves out of both operands: the share that its Walsh rows
    have in the output of independent operands."""
    if encoding is None or encoding.tokens_kept is None:
        return 0.0
    kept, block = encoding.tokens_kept
    rows = round(kept * SEQUENCIES / block)
    products = [a * b for a, b in zip(site.lhs.sequency, site.rhs.sequency, strict=True)]
    return site.alignment * sum(products[rows:]) / sum(products)


def operand_noise(
    operand: OperandStatistics, encoding: Encoding | None, shape: tuple[int, int]
) -> Noise:
    """The error of one encoded operand, [kept, contracted] of this shape."""
    if encoding is None:
        return NONE
    granularity, growth = _observed_group(encoding.granularity)
    counts = list(operand.histogram(_block(encoding), granularity))
    sizes = {"per_tensor": shape[0] * shape[1], "per_kept_index": shape[1]}
    largest = sum(counts) / sizes.get(granularity.kind, granularity.block or 1)
    counts = [min(largest, counts[0]), max(counts[0] - largest, 0.0), *counts[1:]]
    if _scales_underflow(operand, encoding, granularity):
        return Noise(1.0, 0.0, 0.0)
    crest = 0.0
    if encoding.fit == "mse":  # in steps that let tables be shared
        crest = round(math.log2(max(operand.crest(_block(encoding), granularity), 1.0)) * 8) / 8
    shares = [0.0, 0.0, 0.0]
    energy = 0.0
    for count, (mean_square, *parts) in zip(counts, _table(encoding, growth, crest), strict=True):
        energy += count * mean_square
        for index, part in enumerate(parts):
            shares[index] += count * part
    # Numbers thin out towards the upper end of a bin, where they have most energy.
    return Noise(shares[0] / energy, shares[1] / energy, shares[2])


def _block(encoding: Encoding) -> int:
    """The observed rotation block nearest to the encoding's."""
    return (
        0 if encoding.rotation is None else _nearest(encoding.rotation.block, ROTATION_BLOCKS[1:])
    )


def _nearest(block: int, observed: tuple[int, ...]) -> int:
    return min(observed, key=lambda other: abs(math.log2(other / block)))


def _observed_group(granularity: Granularity) -> tuple[Granularity, float]:
    """The observed scale groups to take, and by what factor maxima are larger than theirs."""
    if granularity in GROUPINGS:
        return granularity, 1.0
    assert granularity.block is not None
    size = granularity.block ** (2 if granularity.kind == "block_2d" else 1)
    near = _nearest(granularity.block, _BLOCKS)
    growth = _normal_peak(size) / _normal_peak(near)
    return Granularity("block_contracted", near), growth


def _normal_peak(count: int) -> float:
    """About the median of max |x| of so many normal numbers."""
    return NormalDist().inv_cdf(0.5 + 0.5 * 0.5 ** (1 / count))


def _scales_underflow(
    operand: OperandStatistics, encoding: Encoding, granularity: Granularity
) -> bool:
    """Whether most scales would be below the smallest that their format has."""
    scale = SCALE_FORMATS[encoding.scale]
    if scale.mantissa_bits in (0, 23) or encoding.prescale:
        return False
    peak = operand.rms * operand.crest(_block(encoding), granularity)
    return peak / format_named(encoding.format).max < smallest_scale(scale)


@lru_cache(maxsize=512)
def _table(
    encoding: Encoding, growth: float, log_crest: float
) -> tuple[tuple[float, float, float, float], ...]:
    """For the largest number itself and for each bin: the mean of (x / amax)^2 and of the error's
    shrunk, relative and absolute parts in units of amax^2."""
    with compat.unset_fake_temporarily():  # passes run where every new tensor is fake
        return _tabulated(encoding, growth, 2.0**log_crest)


def _tabulated(
    encoding: Encoding, growth: float, crest: float
) -> tuple[tuple[float, float, float, float], ...]:
    format = format_named(encoding.format)
    reach = _reaches(encoding, crest) / growth
    rows = []
    for low, high in ((1.0, 1.0), *bin_edges()):
        share = low + (high - low) * _spread()
        at = share[:, None] * reach
        clamped = at.clamp(max=format.max)
        if encoding.rounding == "stochastic":
            error, spread = clamped - at, _stochastic_variance(clamped, encoding)
        else:
            error, spread = to_grid(at, format) - at, torch.zeros_like(at)
        shrink = (-(error * at).mean(0) / at.square().mean(0)).clamp(min=0.0)
        total = (error.square().mean(0) + spread.mean(0)) / reach.square()
        mean_square = float(share.square().mean())
        shrunk = torch.minimum(shrink.square() * mean_square, total)
        rest = float((total - shrunk).mean())
        normal = not format.is_integer and float(at.mean()) >= 2.0**format.least_exponent
        relative, absolute = (rest, 0.0) if normal else (0.0, rest)
        rows.append((mean_square, float(shrunk.mean()), relative, absolute))
    gain = FOUR_SIX_GAIN if encoding.fit == "four_six" else 1.0
    return tuple((s, gain * a, gain * b, gain * c) for s, a, b, c in rows)


def _spread() -> torch.Tensor:
    """Numbers that fill (0, 1) evenly, in step with no grid: multiples of the golden ratio."""
    return (torch.arange(_SAMPLES) + 0.5).mul((5**0.5 - 1) / 2).frac()


def _stochastic_variance(x: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    step = grid_step(x, format_named(encoding.format))
    up = (x / step).frac()
    return up * (1 - up) * step.square()


def _reaches(encoding: Encoding, crest: float) -> torch.Tensor:
    """Where a group's largest number comes to lie in units of the format, before it is clamped:
    [cases], evenly likely. crest: of the group, for `mse`."""
    format, scale = format_named(encoding.format), SCALE_FORMATS[encoding.scale]
    octave = 2.0 ** ((torch.arange(_SAMPLES) + 0.5) / _SAMPLES)
    fitted = format.max
    if encoding.fit == "mse":
        fitted *= crest / NORMAL_REACH[format.name]
    if encoding.scale == "fp32":
        reach = torch.tensor([fitted])
    elif encoding.scale == "e8m0":
        if encoding.fit == "mse":
            reach = fitted * octave * 2**-0.5
        elif encoding.fit == "ceil":
            reach = fitted / octave
        else:
            reach = 2.0 ** (int(format.max).bit_length() - 1) * octave
    else:
        step = 2.0**-scale.mantissa_bits
        quotient = octave / step
        rounded = quotient.ceil() if encoding.fit == "ceil" else quotient.round()
        reach = fitted * quotient / rounded
    return reach * (THREE_QUARTERS if encoding.fit == "three_quarters" else 1.0)


# dB of one GEMM with both operands in this format, by what shares a scale and whether it is
# rotated: output, grad_input, grad_weight. About what nine in ten sites of SmolLM2-135M exceed
# (bench/results/error_model.json); where nothing was measured, below the nearest that was.
_ROLES = ("output", "grad_input", "grad_weight")
_PRIORS: dict[tuple[str, str, bool], tuple[float, float, float]] = {
    ("int8", "per_kept_index", False): (23.0, 25.0, 22.0),
    ("int8", "per_kept_index", True): (34.0, 32.0, 32.0),
    ("int8", "per_tensor", False): (14.0, 9.0, 10.0),
    ("int8", "per_tensor", True): (27.0, 15.0, 7.0),
    ("int8", "block", False): (33.0, 32.0, 33.0),
    ("int8", "block", True): (34.0, 33.0, 33.0),
    ("int4", "per_kept_index", False): (2.0, 4.0, 2.0),
    ("int4", "per_kept_index", True): (8.0, 8.0, 6.0),
    ("int4", "per_tensor", False): (0.0, 0.0, 0.0),
    ("int4", "per_tensor", True): (4.0, 1.0, 0.0),
    ("int4", "block", False): (10.0, 9.0, 10.0),
    ("int4", "block", True): (11.0, 10.0, 9.0),
    ("fp8_e4m3", "per_kept_index", False): (28.0, 26.0, 28.0),
    ("fp8_e4m3", "per_kept_index", True): (24.0, 25.0, 25.0),
    ("fp8_e4m3", "per_tensor", False): (27.5, 25.5, 27.5),
    ("fp8_e4m3", "per_tensor", True): (24.0, 24.5, 24.0),
    ("fp8_e4m3", "block", False): (26.5, 24.0, 25.0),
    ("fp8_e4m3", "block", True): (23.0, 24.0, 23.0),
    ("fp8_e5m2", "per_kept_index", False): (21.5, 19.5, 22.0),
    ("fp8_e5m2", "per_kept_index", True): (18.0, 18.5, 18.5),
    ("fp8_e5m2", "per_tensor", False): (21.5, 19.5, 22.0),
    ("fp8_e5m2", "per_tensor", True): (18.0, 18.5, 18.0),
    ("fp8_e5m2", "block", False): (20.5, 18.5, 20.5),
    ("fp8_e5m2", "block", True): (17.0, 17.5, 17.0),
    ("fp6_e3m2", "per_kept_index", False): (16.0, 15.0, 15.0),
    ("fp6_e3m2", "per_kept_index", True): (18.0, 17.0, 16.0),
    ("fp6_e3m2", "per_tensor", False): (10.0, 7.0, 8.0),
    ("fp6_e3m2", "per_tensor", True): (15.0, 11.0, 6.0),
    ("fp6_e3m2", "block", False): (21.5, 19.0, 21.0),
    ("fp6_e3m2", "block", True): (18.0, 18.5, 18.5),
    ("fp6_e2m3", "per_kept_index", False): (13.0, 13.0, 11.0),
    ("fp6_e2m3", "per_kept_index", True): (20.0, 19.0, 17.0),
    ("fp6_e2m3", "per_tensor", False): (5.0, 3.0, 4.0),
    ("fp6_e2m3", "per_tensor", True): (15.0, 8.0, 4.0),
    ("fp6_e2m3", "block", False): (23.5, 23.0, 24.0),
    ("fp6_e2m3", "block", True): (23.0, 24.0, 24.0),
    ("fp4_e2m1", "per_kept_index", False): (3.0, 4.0, 3.0),
    ("fp4_e2m1", "per_kept_index", True): (8.0, 8.0, 6.0),
    ("fp4_e2m1", "per_tensor", False): (0.0, 0.0, 0.0),
    ("fp4_e2m1", "per_tensor", True): (4.0, 1.0, 0.0),
    ("fp4_e2m1", "block", False): (12.0, 11.5, 12.5),
    ("fp4_e2m1", "block", True): (11.5, 12.0, 9.0),
}
FINE_SCALES_DB = 2.0
"""More dB of e2m1 in blocks of up to 16 whose scales have a mantissa."""
STOCHASTIC_DB = -3.0
"""Stochastic rounding has twice the error of rounding to nearest, or more."""
LONG_TOKEN_BLOCK = 32
LONG_TOKEN_BLOCK_DB = -5.0
"""Longer rotations along the tokens spread attention sinks over tokens whose level hides theirs."""
DROPPED_DB = 3.0
"""Of a projection that leaves out half of the tokens' Walsh rows."""


def prior_sqnr(
    role: str, operands: tuple[str, str], lhs: Encoding | None, rhs: Encoding | None
) -> float:
    """dB without statistics: what about nine in ten GEMMs of SmolLM2-135M exceed; the worst has
    some dB less. operands: what they are (`input`, `weight`, `grad_output`); None: the operand's
    own precision. ValueError on an unknown role."""
    if role not in _ROLES:
        raise ValueError(f"role must be one of {', '.join(_ROLES)}, got {role!r}")
    error = 10 ** (-BEST / 10)
    for encoding, kind in zip((lhs, rhs), operands, strict=True):
        if encoding is not None:
            error += 0.5 * 10 ** (-_prior(role, kind, encoding) / 10)
    projected = lhs or rhs
    if projected is not None and projected.tokens_kept is not None:
        kept, block = projected.tokens_kept
        error += 2 * (1 - kept / block) * 10 ** (-DROPPED_DB / 10)
    return -10 * math.log10(error)


def _prior(role: str, operand: str, encoding: Encoding) -> float:
    """dB of a GEMM with both operands in this encoding."""
    kind = encoding.granularity.kind
    group = "block" if encoding.granularity.block is not None else kind
    rotated = encoding.rotation is not None
    level = _PRIORS[encoding.format, group, rotated][_ROLES.index(role)]
    scale = SCALE_FORMATS[encoding.scale]
    if encoding.format == "fp4_e2m1" and group == "block" and scale.mantissa_bits:
        level += FINE_SCALES_DB if (encoding.granularity.block or 0) <= 16 else 0.0
    if scale.mantissa_bits == 3 and not encoding.prescale and operand == "grad_output":
        return 0.0  # gradients may lie below every scale
    long = encoding.rotation is not None and encoding.rotation.block > LONG_TOKEN_BLOCK
    if role == "grad_weight" and long:
        level += LONG_TOKEN_BLOCK_DB
    return level + (STOCHASTIC_DB if encoding.rounding == "stochastic" else 0.0)
