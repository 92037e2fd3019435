"""Let an observer see the operands of every GEMM that could be lowered, and lower none.

gemm(lhs, rhs, bias) -> gemm_observed(lhs, rhs, bias, observer, number)
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from hadagraph import ops
from hadagraph.graph import arguments, backward_nodes, create, gemms
from hadagraph.graph import replace as replace_node
from hadagraph.observation import Key, Observer
from hadagraph.plan import Decision, Plan

OBSERVED = "calibration observes it"


def observe_operands(graph: fx.Graph, plan: Plan, observer: Observer) -> Plan:
    """Rewrite in place; values stay. Returns the plan in which those GEMMs stay in high precision.
    An observer with a number of steps leaves graphs without a backward alone."""
    decisions = plan.by_node()
    if observer.steps is None or backward_nodes(graph):
        for node in gemms(graph):
            if node.name in decisions and decisions[node.name].lowered:
                site = decisions[node.name].site
                number = observer.announce(Key(site.name, site.role, site.lhs, site.rhs))
                with graph.inserting_before(node):
                    args = (*arguments(node), observer.number, number)
                    replace_node(node, create(graph, ops.gemm_observed, args, node))
    return replace(plan, decisions=tuple(_observed(decision) for decision in plan.decisions))


def _observed(decision: Decision) -> Decision:
    if not decision.lowered:
        return decision
    return Decision(decision.site, reason=OBSERVED, asked=decision.asked)
