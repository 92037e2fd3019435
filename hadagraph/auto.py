"""The search of recipe `auto`: for each GEMM one of several ways to lower it, so that all together
take least by predicted times while each is predicted to be as precise as asked; and among plans
nearly as fast, the one whose worst GEMM is most precise. Knows no graph and no plan.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hadagraph.cost import (
    Gemm,
    Matrix,
    Times,
    gemm_times,
    producer_times,
    quantizer_times,
    step_times,
)
from hadagraph.device import DeviceProfile
from hadagraph.formats import PER_KEPT_INDEX
from hadagraph.recipes import RECIPES, ROLES, OperandRule

AUTO = "auto"
SLACK = 0.02
"""Of plans whose predicted times differ by less the more precise is taken: what auto may lose
against the fastest. Predictions err by more, which is beside it."""
MOST_COMBINATIONS = 400
"""Of a part's choices that are all tried; where there are more, a descent."""
LEAST_DIFFERENCE = 1.0
"""dB by which another rotation must be better, so that tensors are not rotated in two ways."""
HIGH_PRECISION = -1

Pair = tuple[OperandRule, OperandRule]
Choices = tuple[int, ...]


def _pairs(recipe: str) -> dict[str, Pair]:
    found = {role: RECIPES[recipe].rules(role) for role in ROLES}
    return {role: pair for role, pair in found.items() if pair is not None}


def _int8(block: int | None) -> dict[str, Pair]:
    rule = OperandRule("int8", PER_KEPT_INDEX, max_block=block)
    return dict.fromkeys(ROLES, (rule, rule))


# What auto chooses from, by name: role -> rules of the two operands. The first is what is taken
# where nothing is known of the device; of equals the earlier is taken.
CANDIDATES: dict[str, dict[str, Pair]] = {
    "int8_rotated": _pairs("int8_rotated"),
    "int8_h16": _int8(16),
    "int8_h32": _int8(32),
    "int8_h64": _int8(64),
    "int8_h128": _int8(128),
    "int8_plain": _int8(None),
    "fp8_rowwise": _pairs("fp8_rowwise"),
    "fp8_tensorwise": _pairs("fp8_tensorwise"),
}
# Only for devices whose matrix instructions take block scales.
BLOCK_SCALED: dict[str, dict[str, Pair]] = {
    name: _pairs(name) for name in ("mxfp8", "nvfp4", "mxfp4")
}


# -------------------------------------------------------------------------- what is chosen from


@dataclass(frozen=True)
class Option:
    """One way to lower a GEMM. `key` is the same for alike options of other GEMMs, `label` says
    what it is here, `sqnr` is its predicted precision in dB."""

    key: str
    label: str
    gemm: Gemm
    sqnr: float


@dataclass(frozen=True)
class Site:
    """A GEMM and its options. `linear` tells the Linears of a part apart. `fixed`: it has one
    option, which is taken whatever its precision. `asked`: the user wants it lowered."""

    role: str
    linear: int
    options: tuple[Option, ...]
    fixed: bool = False
    asked: bool = False

    def allowed(self, floor: float) -> Choices:
        """The options at least so precise; where there is none, high precision."""
        if self.fixed:
            return tuple(range(len(self.options)))
        found = tuple(i for i, option in enumerate(self.options) if option.sqnr >= floor)
        return found or (HIGH_PRECISION,)

    def others(self, choice: int) -> list[int]:
        """What it might have been instead."""
        if self.fixed:
            return []
        every = [*range(len(self.options)), HIGH_PRECISION]
        return [other for other in every if other != choice]

    def sqnr(self, choice: int) -> float:
        """dB of an option."""
        return math.inf if choice == HIGH_PRECISION else self.options[choice].sqnr

    @property
    def best(self) -> float:
        """The precision of the most precise option."""
        return max(option.sqnr for option in self.options)


@dataclass(frozen=True)
class Part:
    """GEMMs that share operands, directly or through others: nothing outside changes their time.
    `count` of them are alike in a graph."""

    sites: tuple[Site, ...]
    count: int = 1


@dataclass(frozen=True)
class Choice:
    """For every part the option of each of its sites (HIGH_PRECISION: none), why, and the predicted
    microseconds of all."""

    chosen: tuple[Choices, ...]
    reasons: tuple[tuple[str, ...], ...]
    us: float


# -------------------------------------------------------------------------- predicted times


class Pricing:
    """Predicted times of one part. A matrix's kernels depend only on what its readers are lowered
    to, and are priced once for each such combination."""

    def __init__(self, part: Part, profile: DeviceProfile) -> None:
        self.part, self.profile = part, profile
        self.readers: dict[Matrix, list[tuple[int, int]]] = defaultdict(list)
        for index, site in enumerate(part.sites):
            for side, use in enumerate(site.options[0].gemm.uses):
                self.readers[use.matrix].append((index, side))
        self.gemms = [
            {
                HIGH_PRECISION: gemm_times(profile, site.options[0].gemm, False),
                **{
                    number: gemm_times(profile, option.gemm, True)
                    for number, option in enumerate(site.options)
                },
            }
            for site in part.sites
        ]
        self.matrices: dict[tuple[Matrix, Choices], Times] = {}

    def times(self, chosen: Choices) -> Times:
        """The part with these options."""
        total = Times()
        for gemms, choice in zip(self.gemms, chosen, strict=True):
            total += gemms[choice]
        for matrix, readers in self.readers.items():
            total += self._matrix(matrix, tuple(chosen[index] for index, _ in readers))
        return total

    def _matrix(self, matrix: Matrix, choices: Choices) -> Times:
        known = self.matrices.get((matrix, choices))
        if known is None:
            readers = zip(self.readers[matrix], choices, strict=True)
            uses = [
                self.part.sites[index].options[choice].gemm.uses[side]
                for (index, side), choice in readers
                if choice != HIGH_PRECISION
            ]
            read = HIGH_PRECISION in choices or any(use.by_blocks for use in uses)
            plain = [matrix] if read else []
            known = producer_times(self.profile, [matrix], plain)
            known += quantizer_times(self.profile, uses)
            self.matrices[matrix, choices] = known
        return known


# -------------------------------------------------------------------------- the search


class Search:
    """Chooses for all parts of a graph. budget: dB that every GEMM is predicted to reach, or it
    stays in high precision. profile: None where nothing is known of the device; then the most
    precise option is taken. host: whether a step and its launches cost the host time."""

    def __init__(
        self, parts: Sequence[Part], profile: DeviceProfile | None, budget: float, host: bool
    ) -> None:
        self.parts, self.profile, self.budget, self.host = parts, profile, budget, host
        self.pricing = [Pricing(part, profile) for part in parts] if profile else []
        self.step = step_times(profile) if profile and host else Times()
        self.by_host = False

    def run(self) -> Choice:
        """The choices with their reasons."""
        if self.profile is None:
            return self._most_precise()
        chosen = self.choices()
        reasons = tuple(
            tuple(self._reason(index, part, position) for position in range(len(part)))
            for index, part in enumerate(chosen)
        )
        return Choice(tuple(chosen), reasons, self.us(chosen))

    def choices(self) -> list[Choices]:
        """For every part the options of its sites, where a device is known."""
        floors = [[self.budget] * len(part.sites) for part in self.parts]
        chosen = self._fastest(floors)
        return self._more_precise(chosen, (1 + SLACK) * self.us(chosen))

    def _most_precise(self) -> Choice:
        chosen = []
        for part in self.parts:
            chosen.append(tuple(max(s.allowed(self.budget), key=s.sqnr) for s in part.sites))
        reasons = tuple(
            tuple(
                self._reason_by_precision(site, choice)
                for site, choice in zip(part.sites, choices, strict=True)
            )
            for part, choices in zip(self.parts, chosen, strict=True)
        )
        return Choice(tuple(chosen), reasons, 0.0)

    # ---------------------------------------------------------------------- time

    def _fastest(self, floors: Sequence[Sequence[float]]) -> list[Choices]:
        """The choices of least time with these floors; by the host's time where that decides."""
        found = []
        for self.by_host in (False, True):
            chosen = [self._fastest_part(index, floors[index]) for index in range(len(self.parts))]
            found.append((self.us(chosen), self.by_host, chosen))
            times = self._total(chosen)
            if times.host <= times.device:
                break
        _, self.by_host, chosen = min(found, key=lambda each: each[:2])
        return chosen

    def _fastest_part(self, index: int, floors: Sequence[float]) -> Choices:
        sites = self.parts[index].sites
        allowed = [site.allowed(floor) for site, floor in zip(sites, floors, strict=True)]
        combinations = 1
        for choices in allowed:
            combinations *= len(choices)
        if combinations <= MOST_COMBINATIONS:
            return min(itertools.product(*allowed), key=lambda each: self._score(index, each))
        starts = dict.fromkeys(_taking(sites, allowed, key) for key in _keys(sites))
        ends = [self._descend(index, start, allowed) for start in starts]
        return min(ends, key=lambda each: self._score(index, each))

    def _descend(self, index: int, chosen: Choices, allowed: Sequence[Choices]) -> Choices:
        """Change one site, the sites of one role or one Linear, or all, as long as that saves."""
        sites = self.parts[index].sites
        score = self._score(index, chosen)
        improved = True
        while improved:
            improved = False
            for candidate in _moves(sites, chosen, allowed):
                found = self._score(index, candidate)
                if found < score:
                    chosen, score, improved = candidate, found, True
        return chosen

    def _score(self, index: int, chosen: Choices) -> float:
        times = self.pricing[index].times(chosen)
        return times.host + 1e-3 * times.device if self.by_host else times.device

    def us(self, chosen: Sequence[Choices]) -> float:
        """Predicted microseconds of all parts with these options, or of the host with a step of the
        graph, if that is slower."""
        return self._total(chosen).us

    def _total(self, chosen: Sequence[Choices]) -> Times:
        total = self.step
        for part, pricing, choices in zip(self.parts, self.pricing, chosen, strict=True):
            total += pricing.times(choices) * part.count
        return total if self.host else Times(total.device)

    # ---------------------------------------------------------------------- precision

    def _more_precise(self, chosen: list[Choices], limit: float) -> list[Choices]:
        """The fastest choices with the highest precision that every site has, as far as it can have
        it, within the time."""
        sqnrs = {o.sqnr for part in self.parts for site in part.sites for o in site.options}
        levels = sorted(sqnr for sqnr in sqnrs if sqnr > self.budget)
        reached = 0  # of the levels, bisected: a higher one never takes less
        above = len(levels) + 1
        while above - reached > 1:
            middle = (reached + above) // 2
            level = levels[middle - 1]
            floors = [
                [max(self.budget, min(level, site.best)) for site in part.sites]
                for part in self.parts
            ]
            found = [self._fastest_part(index, floors[index]) for index in range(len(self.parts))]
            if self.us(found) <= limit:
                reached, chosen = middle, found
            else:
                above = middle
        return chosen

    # ---------------------------------------------------------------------- why

    def _reason(self, index: int, chosen: Choices, position: int) -> str:
        """What the GEMM was given, and what other ways would cost or gain the part."""
        pricing, site = self.pricing[index], self.parts[index].sites[position]
        now = self._us(pricing.times(chosen))
        choice = chosen[position]
        difference = {}
        for other in site.others(choice):
            changed = (*chosen[:position], other, *chosen[position + 1 :])
            difference[other] = self._us(pricing.times(changed)) - now
        alone = self._us(pricing.gemms[position][choice])
        texts = [f"{self._described(site, choice)}, {alone:.1f} us"]
        for other in self._worth_telling(site, choice, difference):
            texts.append(f"{self._described(site, other)}, {difference[other]:+.1f} us")
        return "; ".join(texts)

    def _reason_by_precision(self, site: Site, choice: int) -> str:
        others = [other for other in site.others(choice) if other != HIGH_PRECISION]
        shown = [choice, *sorted(others, key=lambda other: -site.sqnr(other))[:2]]
        return "; ".join(self._described(site, each) for each in shown)

    def _worth_telling(self, site: Site, choice: int, difference: dict[int, float]) -> list[int]:
        """Of the other ways: the fastest, the most precise, and the fastest that is precise enough;
        high precision last."""
        lowered = [other for other in difference if other != HIGH_PRECISION]
        shown = sorted(lowered, key=lambda other: difference[other])[:1]
        shown += sorted(lowered, key=lambda other: -site.sqnr(other))[:1]
        enough = [other for other in lowered if site.sqnr(other) >= self.budget]
        shown += sorted(enough, key=lambda other: difference[other])[:1]
        shown += [HIGH_PRECISION] if HIGH_PRECISION in difference else []
        return list(dict.fromkeys(shown))

    def _described(self, site: Site, choice: int) -> str:
        if choice == HIGH_PRECISION:
            return "high precision"
        if site.fixed:
            return site.options[choice].label
        option = site.options[choice]
        missed = f" < {self.budget:g} dB" if option.sqnr < self.budget else ""
        return f"{option.label} {option.sqnr:.1f} dB{missed}"

    def _us(self, times: Times) -> float:
        return times.us if self.host else times.device


def _keys(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(option.key for site in sites for option in site.options))


def _taking(sites: Sequence[Site], allowed: Sequence[Choices], key: str) -> Choices:
    """The option of that name at every site that allows it, the first allowed elsewhere."""
    return tuple(
        next((c for c in choices if c != HIGH_PRECISION and site.options[c].key == key), choices[0])
        for site, choices in zip(sites, allowed, strict=True)
    )


def _moves(sites: Sequence[Site], chosen: Choices, allowed: Sequence[Choices]) -> Iterator[Choices]:
    groups: dict[object, list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        for group in (index, site.role, ("linear", site.linear), None):
            groups[group].append(index)
    for members in groups.values():
        for key in _keys(sites):
            taking = _taking(sites, allowed, key)
            moved = tuple(
                taking[index] if index in members else choice for index, choice in enumerate(chosen)
            )
            if moved != chosen:
                yield moved


# -------------------------------------------------------------------------- preparing it


def distinct(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options but for those that are the same as an earlier one, and for those that cost like
    the first of their kind and are no more precise; of the others that cost alike, the best."""
    first: dict[object, Option] = {}
    best: dict[object, Option] = {}
    for option in options:
        kind = option.gemm.format, tuple(use.kind for use in option.gemm.uses)
        first.setdefault(kind, option)
        if option.sqnr > best.setdefault(kind, option).sqnr + LEAST_DIFFERENCE:
            best[kind] = option
    kept = [*first.values(), *best.values()]
    return tuple(dict.fromkeys(option for option in options if option in kept))


def alike(parts: Sequence[Part], budget: float) -> tuple[list[Part], list[list[int]]]:
    """Parts of the same GEMMs and options, of which the same are precise enough, as one part with
    their count and the least precision of each option; and which of `parts` each stands for."""
    groups: dict[Part, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):

        def reached(s: int, o: int, part: Part = part) -> float:
            return float(part.sites[s].options[o].sqnr >= budget)

        groups[_with_sqnr(part, reached)].append(index)
    merged = []
    for members in groups.values():
        first = parts[members[0]]

        def least(s: int, o: int, members: list[int] = members) -> float:
            return min(parts[index].sites[s].options[o].sqnr for index in members)

        merged.append(replace(_with_sqnr(first, least), count=len(members)))
    return merged, list(groups.values())


def with_sizes(part: Part, value: Callable[[Any], int]) -> Part:
    """The part with a value for each of its sizes, which may be symbolic."""

    def sized(gemm: Gemm) -> Gemm:
        left, right = (
            replace(use, matrix=replace(use.matrix, T=value(use.matrix.T), K=value(use.matrix.K)))
            for use in gemm.uses
        )
        M, N, C = value(gemm.M), value(gemm.N), value(gemm.C)
        return replace(gemm, M=M, N=N, C=C, uses=(left, right))

    sites = [
        replace(site, options=tuple(replace(o, gemm=sized(o.gemm)) for o in site.options))
        for site in part.sites
    ]
    return replace(part, sites=tuple(sites))


def _with_sqnr(part: Part, sqnr: Callable[[int, int], float]) -> Part:
    sites = [
        replace(
            site,
            options=tuple(
                replace(option, sqnr=sqnr(number, position))
                for position, option in enumerate(site.options)
            ),
        )
        for number, site in enumerate(part.sites)
    ]
    return replace(part, sites=tuple(sites))
