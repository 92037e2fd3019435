"""Choose for every GEMM of recipe `auto` among its candidates, by predicted times and precision.
An analysis: changes the plan, not the graph. Alike parts of a model are decided alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from hadagraph.alternatives import alternatives, by_name
from hadagraph.auto import HIGH_PRECISION, Search
from hadagraph.compat import static_hint
from hadagraph.device import DeviceProfile
from hadagraph.plan import Decision, Plan
from hadagraph.profile import Profile

log = logging.getLogger(__name__)


def choose_precision(
    graph: fx.Graph,
    plan: Plan,
    profile: DeviceProfile | None,
    *,
    budget: float,
    statistics: Profile | None = None,
    host: bool = True,
    fused: bool = True,
) -> Plan:
    """The plan without candidates: one is chosen, or none is predicted at `budget` dB and the GEMM
    stays.

    profile: the device's; None where nothing is known of it, and then the most precise is taken.
    statistics: of a calibration; a GEMM that it has not seen, or all without it, is judged by
    stated priors. host: whether the host launches kernel by kernel. fused: whether quantizers
    compute their input where it is pointwise. Sizes that are symbols count as they were traced.
    """
    if not any(decision.candidates for decision in plan.decisions):
        return plan
    found = alternatives(
        graph,
        plan,
        profile,
        budget=budget,
        statistics=statistics,
        fused=fused,
        size_of=static_hint,
    )
    choice = Search(found.parts, profile, budget, host).run()
    decisions = plan.by_node()
    chosen: dict[str, Decision] = {}
    for part, names, numbers, reasons in zip(
        found.parts, found.names, choice.chosen, choice.reasons, strict=True
    ):
        keys = [
            "" if number == HIGH_PRECISION else site.options[number].key
            for site, number in zip(part.sites, numbers, strict=True)
        ]
        for member in names:
            for name, key, reason in zip(member, keys, reasons, strict=True):
                chosen[name] = _chosen(decisions[name], key, reason, profile)
    note = f"auto: every GEMM at {budget:g} dB or more, {_basis(decisions.values(), statistics)}"
    decided = tuple(chosen.get(d.site.node, d) for d in plan.decisions)
    return replace(plan, decisions=decided, note=note)


def _chosen(decision: Decision, key: str, reason: str, profile: DeviceProfile | None) -> Decision:
    site = decision.site
    if not decision.candidates:
        return decision
    if not key:
        why = f"nothing else reaches the error budget: {reason}"
        log.info("%s %s stays in high precision: %s", site.name, site.role, why)
        return Decision(site, reason=why, asked=decision.asked)
    candidate = by_name(decision, profile)[key]
    return replace(decision, lhs=candidate.lhs, rhs=candidate.rhs, why=reason, candidates=())


def _basis(decisions: Iterable[Decision], statistics: Profile | None) -> str:
    """Where the precisions come from, as the end of a sentence."""
    if statistics is None:
        return "predicted by priors (no calibration)"
    sites = [decision.site for decision in decisions if decision.candidates]
    unseen = sum(statistics.site(site.name, site.role) is None for site in sites)
    rest = f", {unseen} of {len(sites)} GEMMs by priors" if unseen else ""
    return f"predicted from a calibration{rest}"
