"""Put the inner rotations of the plan around its GEMMs. Exact: both contracted dims get the same
rotation, which cancels inside the GEMM.

    gemm(lhs, rhs, bias) -> gemm(rotate(lhs, 1), rotate(rhs, 1), bias)
"""

from __future__ import annotations

from torch import fx

from hadagraph import ops
from hadagraph.graph import arguments, create, gemms
from hadagraph.plan import Plan


def insert_rotations(graph: fx.Graph, plan: Plan) -> None:
    """Rewrite in place; GEMMs without a rotation in the plan stay as they are."""
    decisions = plan.by_node()
    for node in gemms(graph):
        decision = decisions.get(node.name)
        if decision is None or decision.lhs is None or decision.lhs.rotation is None:
            continue
        rotation = str(decision.lhs.rotation)
        lhs, rhs, bias = arguments(node)
        with graph.inserting_before(node):
            rotated_lhs = create(graph, ops.rotate, (lhs, 1, rotation), node)
            rotated_rhs = create(graph, ops.rotate, (rhs, 1, rotation), node)
        node.args = (rotated_lhs, rotated_rhs, bias)
