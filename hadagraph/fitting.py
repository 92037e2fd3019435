"""Fit a device's profile to measured times. Measures nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hadagraph.cost import gemm_us
from hadagraph.device import DeviceProfile, GemmRate, QuantizerRate

LEAST_POINTS = 3
REWEIGHTINGS = 20


@dataclass(frozen=True)
class GemmPoint:
    """A GEMM's measured time."""

    format: str
    M: int
    N: int
    C: int
    us: float


@dataclass(frozen=True)
class QuantizerPoint:
    """A quantizer's measured time on bf16."""

    layouts: str
    kind: str
    T: int
    K: int
    us: float


def fit(
    prior: DeviceProfile,
    gemms: Sequence[GemmPoint],
    quantizers: Sequence[QuantizerPoint],
    *,
    steady: bool = False,
) -> DeviceProfile:
    """The profile with the rates that come nearest to the points (mean of |log(predicted /
    measured)| for GEMMs); those with fewer than three points stay as they are. steady: the points
    were measured without a pause, so that the power limit is in them: `sustained` is fitted, too.
    Else they are short bursts, which it does not reach."""
    rates = []
    for rate in prior.gemms:
        points = [point for point in gemms if point.format == rate.format]
        if len(points) >= LEAST_POINTS:
            rate = _fit_gemm(prior, rate, points, steady)
        rates.append(rate)
    fitted = []
    for quantizer in prior.quantizers:
        key = quantizer.layouts, quantizer.kind
        found = [point for point in quantizers if (point.layouts, point.kind) == key]
        fitted.append(_fit_quantizer(prior, quantizer, found))
    return replace(prior, gemms=tuple(rates), quantizers=tuple(fitted))


def _error(profile: DeviceProfile, rate: GemmRate, points: Sequence[GemmPoint]) -> float:
    candidate = replace(profile, gemms=(rate,))
    logs = [abs(math.log(gemm_us(candidate, p.M, p.N, p.C, rate.format) / p.us)) for p in points]
    return statistics.mean(logs)


def _fit_gemm(
    profile: DeviceProfile, rate: GemmRate, points: Sequence[GemmPoint], steady: bool
) -> GemmRate:
    """Descent along one parameter after the other, in ever smaller factors."""
    names = ("tflops", "ramp", "edge", "alone", "fixed_us") + ("sustained",) * steady
    best = rate if steady else replace(rate, sustained=math.inf)
    error = _error(profile, best, points)
    for factor in (1.3, 1.1, 1.03):
        improved = True
        while improved:
            improved = False
            for name in names:
                for by in (factor, 1 / factor):
                    changed = replace(best, **{name: getattr(best, name) * by})
                    changed = replace(changed, alone=min(changed.alone, 1.0))
                    found = _error(profile, changed, points)
                    if found < error - 1e-6:
                        best, error, improved = changed, found, True
    return best if steady else replace(best, sustained=rate.sustained)


def _fit_quantizer(
    profile: DeviceProfile, rate: QuantizerRate, points: Sequence[QuantizerPoint]
) -> QuantizerRate:
    """The line us = fixed + bytes / speed of least relative deviations, by squares reweighted: a
    point that something disturbed does not pull."""
    if len({(point.T, point.K) for point in points}) < LEAST_POINTS:
        return rate
    for _ in range(REWEIGHTINGS):
        predicted = [_line_us(profile, rate, point) for point in points]
        weights = [
            1 / max(abs(us - p.us), 0.01 * p.us) / p.us
            for us, p in zip(predicted, points, strict=True)
        ]
        rate = _least_squares(profile, rate, points, weights)
    return rate


def _least_squares(
    profile: DeviceProfile,
    rate: QuantizerRate,
    points: Sequence[QuantizerPoint],
    weights: Sequence[float],
) -> QuantizerRate:
    total = sum(weights)
    weighted = [
        (w, _copy_us(profile, rate.layouts, p), p.us) for w, p in zip(weights, points, strict=True)
    ]
    mean_x = sum(w * x for w, x, _ in weighted) / total
    mean_y = sum(w * y for w, _, y in weighted) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x, _ in weighted)
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in weighted) / spread
    slope = max(slope, 1.0)  # no faster than a copy
    return replace(rate, share=1 / slope, fixed_us=max(mean_y - slope * mean_x, 0.5))


def _line_us(profile: DeviceProfile, rate: QuantizerRate, point: QuantizerPoint) -> float:
    return rate.fixed_us + _copy_us(profile, rate.layouts, point) / rate.share


def _copy_us(profile: DeviceProfile, layouts: str, point: QuantizerPoint) -> float:
    moved = point.T * point.K * (2 + (2 if layouts == "both" else 1))
    return moved / profile.copy_bytes_per_us
