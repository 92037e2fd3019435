"""What recipe `auto` chooses from in one graph: a plan's candidates with their predicted precision,
as parts for the search. Chooses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from hadagraph.auto import Option, Part, Site, alike, distinct
from hadagraph.device import DeviceProfile
from hadagraph.error import predicted_sqnr, prior_sqnr
from hadagraph.formats import Encoding
from hadagraph.graph import gemms
from hadagraph.parts import Reading, SizeOf, is_priced, readings
from hadagraph.plan import Candidate, Decision, GemmSite, Plan
from hadagraph.profile import Profile


@dataclass(frozen=True)
class Alternatives:
    """The parts of a graph, alike ones as one; and for each the GEMMs, by node name and in the
    order of its sites, of all that it stands for."""

    parts: tuple[Part, ...]
    names: tuple[tuple[tuple[str, ...], ...], ...]


def alternatives(
    graph: fx.Graph,
    plan: Plan,
    profile: DeviceProfile | None,
    *,
    budget: float,
    statistics: Profile | None,
    fused: bool,
    size_of: SizeOf,
) -> Alternatives:
    """The lowered GEMMs of a plan, each with its candidates; one without has what it has.

    profile: the device's; what it has no figures for is left out. budget: dB; parts are alike if
    the same of their options reach it. statistics: of a calibration; a GEMM that it has not seen,
    or all without it, is judged by stated priors. fused, size_of: see `parts.readings`.
    """
    decisions = {d.site.node: d for d in plan.decisions if by_name(d, profile)}
    nodes = [node for node in gemms(graph) if node.name in decisions]
    groups = readings(graph, nodes, fused, size_of)
    parts, members = alike(
        [_part(group, decisions, profile, statistics) for group in groups], budget
    )
    names = [tuple(node.name for node in group) for group in groups]
    return Alternatives(
        tuple(parts), tuple(tuple(names[index] for index in numbers) for numbers in members)
    )


def _part(
    group: Mapping[fx.Node, Reading],
    decisions: Mapping[str, Decision],
    profile: DeviceProfile | None,
    statistics: Profile | None,
) -> Part:
    linears: dict[str, int] = {}
    sites = []
    for node, reading in group.items():
        decision = decisions[node.name]
        linear = linears.setdefault(decision.site.name, len(linears))
        options = [
            _option(candidate, reading, decision.site, statistics)
            for candidate in by_name(decision, profile).values()
        ]
        kept = distinct(options) if reading.known else tuple(options[:1])
        asked = decision.asked or not reading.known
        fixed = not decision.candidates
        sites.append(Site(decision.site.role, linear, kept, fixed, asked))
    return Part(tuple(sites))


def by_name(decision: Decision, profile: DeviceProfile | None) -> dict[str, Candidate]:
    """What a decision may become, as far as the device has figures for it; itself where there is no
    choice; nothing where it is not to be compared."""
    candidates = decision.candidates
    if not candidates and decision.is_native:
        assert decision.lhs is not None and decision.rhs is not None
        candidates = (Candidate("", decision.lhs, decision.rhs),)
    return {
        candidate.name: candidate
        for candidate in candidates
        if is_priced(candidate.lhs.encoding, profile)
    }


def _option(
    candidate: Candidate, reading: Reading, site: GemmSite, statistics: Profile | None
) -> Option:
    lhs, rhs = candidate.lhs.encoding, candidate.rhs.encoding
    gemm = reading.gemm(lhs, rhs)
    if not candidate.name:
        return Option("", "as asked for", gemm, 0.0)
    label = candidate.name
    if lhs.format == "int8":
        label = f"int8 h{lhs.rotation.block}" if lhs.rotation else "int8 unrotated"
    return Option(candidate.name, label, gemm, sqnr_of(site, lhs, rhs, statistics))


def sqnr_of(
    site: GemmSite, lhs: Encoding | None, rhs: Encoding | None, statistics: Profile | None
) -> float:
    """Predicted dB of a GEMM with its operands in these encodings (None: their own precision): from
    a calibration that has seen it, else by priors."""
    seen = statistics.site(site.name, site.role, site.lhs) if statistics else None
    if seen is not None:
        return predicted_sqnr(seen, lhs, rhs)
    return prior_sqnr(site.role, (site.lhs, site.rhs), lhs, rhs)
