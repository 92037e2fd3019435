"""Give back to high precision what the device's profile predicts to be slower in 8 bit, quantizers
and launches counted. An analysis: changes the plan, not the graph. Alike parts of a model are
decided alike."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from hadagraph.compat import static_hint
from hadagraph.device import DeviceProfile
from hadagraph.graph import arguments, gemms, tensor
from hadagraph.parts import Reading, is_priced, readings
from hadagraph.plan import Decision, Plan, Predicted
from hadagraph.selection import Candidate, Part, Search

log = logging.getLogger(__name__)


def never_slower(
    graph: fx.Graph,
    plan: Plan,
    profile: DeviceProfile,
    *,
    host: bool = True,
    fused: bool = True,
) -> Plan:
    """The plan without what would lose, each GEMM with its reason; `plan.note` says what is
    predicted.

    host: whether the host launches kernel by kernel (not so in a captured CUDA graph). fused:
    whether quantizers compute their input where it is pointwise. Sizes that are symbols count as
    they were traced. An override that names a GEMM is obeyed, whatever is predicted.
    """
    compared = {d.site.node: d for d in plan.decisions if _is_compared(d, profile)}
    nodes = [node for node in gemms(graph) if node.name in compared]
    members = [_part(group, compared) for group in readings(graph, nodes, fused)]
    by_part: dict[Part, list[list[str]]] = defaultdict(list)
    for part, names in members:
        by_part[part].append(names)
    parts = [replace(part, count=len(found)) for part, found in by_part.items()]
    if not parts:
        return plan
    choice = Search(parts, profile, host).run()
    reasons = {
        name: choice.reasons[index][position]
        for index, found in enumerate(by_part.values())
        for names in found
        for position, name in enumerate(names)
        if position not in choice.lowered[index]
    }
    symbols = _symbols(graph)
    decisions = [_without(decision, reasons, symbols) for decision in plan.decisions]
    note = (
        f"predicted on {profile.name} ({profile.source}): GEMMs and their operands, "
        f"or the host, {choice.us:.0f} us, all lowered {choice.all_us:.0f} us, "
        f"bf16 {choice.none_us:.0f} us{symbols}"
    )
    log.info(note)
    note = "\n".join(filter(None, (plan.note, note)))
    predicted = Predicted(choice.us, choice.all_us, choice.none_us)
    return replace(plan, decisions=tuple(decisions), note=note, predicted=predicted)


def _without(decision: Decision, reasons: dict[str, str], symbols: str) -> Decision:
    if not decision.lowered or decision.site.node not in reasons:
        return decision
    reason = reasons[decision.site.node] + symbols
    site = decision.site
    log.info("%s %s stays in high precision: %s", site.name, site.role, reason)
    return Decision(site, reason=reason)


def _symbols(graph: fx.Graph) -> str:
    """The symbolic sizes of the GEMMs and what they stand for, as the end of a sentence."""
    found: dict[str, int] = {}
    for node in gemms(graph):
        for argument in arguments(node)[:2]:
            for size in tensor(argument).shape:
                if isinstance(size, torch.SymInt):
                    found[str(size)] = static_hint(size)
    return "".join(f"; {symbol} = {size} as traced" for symbol, size in found.items())


def _is_compared(decision: Decision, profile: DeviceProfile) -> bool:
    """Whether predictions may give this GEMM back: not where a device has no GEMM of its formats,
    which are chosen for their numbers then, and not for their speed."""
    lhs = decision.lhs
    return lhs is not None and decision.is_native and is_priced(lhs.encoding, profile)


def _part(
    group: Mapping[fx.Node, Reading], decisions: Mapping[str, Decision]
) -> tuple[Part, list[str]]:
    linears: dict[str, int] = {}
    candidates = []
    for node, reading in group.items():
        decision = decisions[node.name]
        assert decision.lhs is not None and decision.rhs is not None
        gemm = reading.gemm(decision.lhs.encoding, decision.rhs.encoding)
        linear = linears.setdefault(decision.site.name, len(linears))
        asked = decision.asked or not reading.known
        candidates.append(Candidate(gemm, decision.site.role, linear, asked))
    return Part(tuple(candidates)), [node.name for node in group]
