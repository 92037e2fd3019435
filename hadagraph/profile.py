"""What a calibration run saw of every GEMM's operands, as data: means over batches that merge, and
their JSON. Knows neither how they are measured nor what is concluded from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity

ROTATION_BLOCKS = (0, 16, 32, 64, 128)
"""Inner rotations that statistics are kept for; 0: none."""
GROUPINGS = (
    PER_TENSOR,
    PER_KEPT_INDEX,
    Granularity("block_contracted", 16),
    Granularity("block_contracted", 32),
)
"""Scale groups that statistics are kept for."""
BINS = 32
"""Of |x| / max |x| of its group: 16 half octaves ([0.75, 1], [0.5, 0.75), ...), 15 octaves, and
what is below 2^-23."""
SEQUENCIES = 16
"""Walsh rows that the energy along the contracted dim is told apart by, blocks of 16."""
PATTERNS = ("row", "column", "none")
VERSION = 1
_DIGITS = 5


def bin_edges() -> list[tuple[float, float]]:
    """(low, high) of every bin."""
    half_octaves = [e * 2.0**-k for k in range(8) for e in (1.0, 0.75)]
    edges = [*half_octaves, *(2.0**-k for k in range(8, 24)), 0.0]
    return list(zip(edges[1:], edges[:-1], strict=True))


@dataclass(frozen=True)
class OperandStatistics:
    """One operand of a GEMM, [kept, contracted] as the GEMM reads it; means over batches but for
    `amax`, which is the maximum.

    kind: `input`, `weight` or `grad_output`. mean_square: of its elements. crest_contracted: the
    square root of the mean over contracted indices of max |x|^2, over the rms (that along the other
    axis is `crest`). patterns: the share of batches in which a few kept indices (`row`), a few
    contracted ones (`column`) or none hold outliers (`hadagraph.statistics.outlier_pattern`).
    peaks: for (rotation block, scale groups) of ROTATION_BLOCKS x GROUPINGS, in that order, and
    each bin of |x| / amax of its group: the sum of amax^2 over the elements in the bin, as a share
    of the sum of x^2. sequency: the share of energy in each Walsh row along the contracted dim.
    """

    kind: str
    amax: float
    mean_square: float
    crest_contracted: float
    patterns: tuple[float, ...]
    peaks: tuple[tuple[float, ...], ...]
    sequency: tuple[float, ...]

    @property
    def rms(self) -> float:
        """Root mean square of the elements."""
        return self.mean_square**0.5

    @property
    def pattern(self) -> str:
        """The pattern of most batches."""
        return max(zip(self.patterns, PATTERNS, strict=True), key=lambda item: item[0])[1]

    def histogram(self, block: int, granularity: Granularity) -> tuple[float, ...]:
        """`peaks` of one rotation block (0: none) and granularity, both as listed above."""
        at = ROTATION_BLOCKS.index(block) * len(GROUPINGS) + GROUPINGS.index(granularity)
        return self.peaks[at]

    def crest(self, block: int, granularity: Granularity) -> float:
        """sqrt of the sum of n amax^2 over groups, over the sum of x^2: rms of the peaks over rms
        of the elements."""
        return sum(self.histogram(block, granularity)) ** 0.5


@dataclass(frozen=True)
class SiteStatistics:
    """One GEMM, sum_C lhs[M, C] rhs[N, C]; means over `batches`.

    alignment: energy of the output over what independent operands of this energy would give,
    |A|^2 |B|^2 / C. overlaps: for each of ROTATION_BLOCKS, C sum_c a_c b_c / (sum a sum b) of the
    operands' energies at contracted index c: 1 where either is flat. peak_overlaps: likewise for
    each rotation block and each block granularity of GROUPINGS, (left, right): that operand's
    amax^2 in place of its energy.
    """

    name: str
    role: str
    m: int
    n: int
    c: int
    batches: int
    lhs: OperandStatistics
    rhs: OperandStatistics
    alignment: float
    overlaps: tuple[float, ...]
    peak_overlaps: tuple[tuple[float, float], ...]

    def flipped(self) -> SiteStatistics:
        """The same GEMM with its operands exchanged (the output transposed)."""
        overlaps = tuple((right, left) for left, right in self.peak_overlaps)
        return SiteStatistics(
            self.name,
            self.role,
            self.n,
            self.m,
            self.c,
            self.batches,
            self.rhs,
            self.lhs,
            self.alignment,
            self.overlaps,
            overlaps,
        )


@dataclass(frozen=True)
class Profile:
    """The statistics of a model's GEMMs, from `hadagraph.calibrate`."""

    sites: tuple[SiteStatistics, ...] = ()
    _by_key: dict[tuple[str, str], SiteStatistics] = field(
        init=False, repr=False, compare=False, hash=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._by_key.update({(site.name, site.role): site for site in self.sites})

    def site(self, name: str, role: str, lhs: str | None = None) -> SiteStatistics | None:
        """The statistics of a GEMM, None where it was not seen. `lhs`: what its left operand is
        (`input`, ...), and then the operands are in that order."""
        found = self._by_key.get((name, role))
        if found is None or lhs in (None, found.lhs.kind):
            return found
        return found.flipped()

    def merged(self, other: Profile) -> Profile:
        """Both runs as one: means weighted by batches."""
        sites = {(site.name, site.role): site for site in self.sites}
        for site in other.sites:
            before = sites.get((site.name, site.role))
            sites[site.name, site.role] = site if before is None else _merged(before, site)
        return Profile(tuple(sites.values()))

    def fingerprint(self) -> str:
        """A hash of the contents, for cache keys."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The profile as JSON, one line a site; `from_json` reads the same profile back."""
        lines = ",\n".join(json.dumps(_site_data(site)) for site in self.sites)
        return f'{{"hadagraph_profile": {VERSION}, "sites": [\n{lines}\n]}}\n'

    @staticmethod
    def from_json(text: str) -> Profile:
        """The profile that `to_json` wrote. ValueError on any other text."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"profile is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("hadagraph_profile") != VERSION:
            raise ValueError(
                f"profile must be one that hadagraph.calibrate wrote, of version {VERSION}"
            )
        try:
            return Profile(tuple(_site_of(entry) for entry in data["sites"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"profile is damaged: {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, as a whole."""
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json())
        os.replace(temporary, target)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """The profile in a file. ValueError where it is none; OSError where it cannot be read."""
        return Profile.from_json(Path(path).read_text())


def rounded(value: float) -> float:
    """To the digits that are kept, so that what is read back is the same number."""
    return float(f"{value:.{_DIGITS}g}")


def _merged(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    if b.lhs.kind != a.lhs.kind:
        b = b.flipped()
    if (a.lhs.kind, a.rhs.kind) != (b.lhs.kind, b.rhs.kind):
        raise ValueError(f"profiles of {a.name}:{a.role} are of different operands")
    weights = a.batches, b.batches
    pairs = zip(a.peak_overlaps, b.peak_overlaps, strict=True)
    return SiteStatistics(
        a.name,
        a.role,
        b.m,
        b.n,
        b.c,
        a.batches + b.batches,
        _merged_operand(a.lhs, b.lhs, weights),
        _merged_operand(a.rhs, b.rhs, weights),
        _mean((a.alignment, b.alignment), weights),
        _means((a.overlaps, b.overlaps), weights),
        tuple((_mean((p[0], q[0]), weights), _mean((p[1], q[1]), weights)) for p, q in pairs),
    )


def _merged_operand(
    a: OperandStatistics, b: OperandStatistics, weights: tuple[int, int]
) -> OperandStatistics:
    return OperandStatistics(
        a.kind,
        max(a.amax, b.amax),
        _mean((a.mean_square, b.mean_square), weights),
        _mean((a.crest_contracted, b.crest_contracted), weights),
        _means((a.patterns, b.patterns), weights),
        tuple(_means(rows, weights) for rows in zip(a.peaks, b.peaks, strict=True)),
        _means((a.sequency, b.sequency), weights),
    )


def _mean(values: Sequence[float], weights: tuple[int, int]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return rounded(total / sum(weights))


def _means(rows: Iterable[Sequence[float]], weights: tuple[int, int]) -> tuple[float, ...]:
    return tuple(_mean(values, weights) for values in zip(*rows, strict=True))


def _site_data(site: SiteStatistics) -> dict[str, Any]:
    data = {name: value for name, value in vars(site).items() if name not in ("lhs", "rhs")}
    return data | {"lhs": vars(site.lhs), "rhs": vars(site.rhs)}


def _site_of(entry: dict[str, Any]) -> SiteStatistics:
    fields = dict(entry)
    for side in ("lhs", "rhs"):
        operand = {name: _as_tuple(value) for name, value in entry[side].items()}
        fields[side] = OperandStatistics(**operand)
    fields["overlaps"] = _as_tuple(entry["overlaps"])
    fields["peak_overlaps"] = _as_tuple(entry["peak_overlaps"])
    return SiteStatistics(**fields)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list) else value
