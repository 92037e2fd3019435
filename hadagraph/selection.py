"""Which of a graph's GEMMs to lower so that it takes least, by predicted times: a greedy search
over parts that share no operand. Knows no graph and no plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hadagraph.cost import (
    Gemm,
    Matrix,
    Times,
    Use,
    gemm_times,
    producer_times,
    quantizer_times,
    step_times,
)
from hadagraph.device import DeviceProfile

# Predictions are off by 5 to 10 %: a plan that gains less than this over bf16 may well lose.
LEAST_GAIN = 0.03
# The host's time differs by more than that from process to process.
LEAST_GAIN_BY_HOST = 0.1
# A Linear lowered in part keeps its operands in both precisions: more memory, and traffic that is
# not counted. Its GEMMs stay only where that saves this share of their time in bf16.
LEAST_GAIN_IN_PART = 0.1
Lowered = frozenset[int]


@dataclass(frozen=True)
class Candidate:
    """A GEMM that the plan lowers. `linear` tells the Linears apart; `asked`: the user named it."""

    gemm: Gemm
    role: str
    linear: int
    asked: bool


@dataclass(frozen=True)
class Part:
    """GEMMs that share operands, directly or through others: nothing outside changes their time.
    `count` of them are alike in a graph. Lowered GEMMs are given by their index."""

    candidates: tuple[Candidate, ...]
    count: int = 1

    def times(self, profile: DeviceProfile, lowered: Lowered) -> Times:
        """One of these parts, with these GEMMs lowered."""
        total = Times()
        quantized: list[Use] = []
        plain: set[Matrix] = set()
        for index, candidate in enumerate(self.candidates):
            total += gemm_times(profile, candidate.gemm, index in lowered)
            if index in lowered:
                quantized += candidate.gemm.uses
                plain.update(use.matrix for use in candidate.gemm.uses if use.by_blocks)
            else:
                plain.update(use.matrix for use in candidate.gemm.uses)
        every = dict.fromkeys(use.matrix for each in self.candidates for use in each.gemm.uses)
        total += producer_times(profile, every, plain)
        return total + quantizer_times(profile, quantized)

    def asked(self) -> Lowered:
        return frozenset(i for i, each in enumerate(self.candidates) if each.asked)

    def leaves_a_linear_in_part(self, lowered: Lowered, move: Lowered) -> bool:
        dropped = {self.candidates[index].linear for index in move}
        return any(self.candidates[index].linear in dropped for index in lowered - move)

    def moves(self, lowered: Lowered) -> Iterator[Lowered]:
        """What may be dropped together: a GEMM, a role, a Linear, all."""
        may = lowered - self.asked()
        groups: dict[object, set[int]] = defaultdict(set)
        for index in may:
            candidate = self.candidates[index]
            for key in (index, candidate.role, ("linear", candidate.linear), None):
                groups[key].add(index)
        yield from dict.fromkeys(frozenset(group) for group in groups.values())


@dataclass(frozen=True)
class Choice:
    """What to lower of each part, why the rest is not, and the predicted times of the slower side,
    device or host: of the choice, of everything lowered, and of nothing but what was asked for."""

    lowered: tuple[Lowered, ...]
    reasons: tuple[dict[int, str], ...]
    us: float
    all_us: float
    none_us: float


class Search:
    """From everything lowered, drops the GEMM, role or Linear that saves most as long as anything
    does; then compares what is left with nothing lowered at all. `host`: whether the step and its
    launches cost the host time, which they don't in a captured CUDA graph."""

    def __init__(self, parts: Sequence[Part], profile: DeviceProfile, host: bool) -> None:
        self.parts, self.profile, self.host = parts, profile, host
        self.step = step_times(profile) if host else Times()
        self.known: dict[tuple[int, Lowered], Times] = {}
        self.reasons: list[dict[int, str]] = [{} for _ in parts]

    def run(self) -> Choice:
        everything = [frozenset(range(len(part.candidates))) for part in self.parts]
        nothing = [part.asked() for part in self.parts]
        all_us, none_us = self.total(everything).us, self.total(nothing).us
        lowered = list(everything)
        while (step := self.best_step(lowered)) is not None:
            index, move = step
            self.reasons[index].update(dict.fromkeys(move, self.reason(lowered, index, move)))
            lowered[index] -= move
        total = self.total(lowered)
        us, least = total.us, LEAST_GAIN_BY_HOST if total.host > total.device else LEAST_GAIN
        if us > (1 - least) * none_us and lowered != nothing:
            reason = f"stays bf16: the graph is predicted at {us:.0f} us against {none_us:.0f} us"
            for index, left in enumerate(lowered):
                self.reasons[index].update(dict.fromkeys(left - nothing[index], reason))
            lowered, us = nothing, none_us
        return Choice(tuple(lowered), tuple(self.reasons), us, all_us, none_us)

    def best_step(self, lowered: list[Lowered]) -> tuple[int, Lowered] | None:
        """The part and the GEMMs whose removal saves most; None if none saves anything."""
        total = self.total(lowered)
        best, least = None, total.us * (1 - 1e-9)
        for index, part in enumerate(self.parts):
            before = self.times(index, lowered[index])
            for move in part.moves(lowered[index]):
                after = self.times(index, lowered[index] - move)
                us = (total + after * part.count + before * -part.count).us
                if part.leaves_a_linear_in_part(lowered[index], move):
                    plain = self.plain(index, move) * part.count
                    if us > total.us - LEAST_GAIN_IN_PART * plain.us:
                        continue
                if us < least:
                    best, least = (index, move), us
        return best

    def reason(self, lowered: list[Lowered], index: int, move: Lowered) -> str:
        """The moved GEMMs with the quantizers that only they need, beside the same in bf16, on the
        side that is the slower one: device or host."""
        total = self.total(lowered)
        saved = self.times(index, lowered[index]) + self.times(index, lowered[index] - move) * -1
        plain = self.plain(index, move)
        eight = plain + saved
        together = f", {len(move)} GEMMs together" if len(move) > 1 else ""
        if self.host and total.host > total.device:
            return (
                f"stays bf16: predicted {eight.host:.0f} us of launches by the host "
                f"against {plain.host:.0f} us{together}"
            )
        return (
            f"stays bf16: predicted {eight.device:.0f} us against {plain.device:.0f} us{together}"
        )

    def plain(self, index: int, move: Lowered) -> Times:
        """These GEMMs of one part, in high precision."""
        total = Times()
        for each in sorted(move):
            total += gemm_times(self.profile, self.parts[index].candidates[each].gemm, False)
        return total if self.host else Times(total.device)

    def total(self, lowered: Sequence[Lowered]) -> Times:
        total = self.step
        for index, part in enumerate(self.parts):
            total += self.times(index, lowered[index]) * part.count
        return total

    def times(self, index: int, lowered: Lowered) -> Times:
        key = index, lowered
        if key not in self.known:
            times = self.parts[index].times(self.profile, lowered)
            self.known[key] = times if self.host else Times(times.device)
        return self.known[key]
