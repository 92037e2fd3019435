"""Put the rotations of the plan around its GEMMs. Exact: both contracted dims get the same
rotation, which cancels inside the GEMM, and one along a kept dim is taken back from the output.

    gemm(lhs, rhs, bias) -> gemm(rotate(lhs, 1), rotate(rhs, 1), bias)                     inner
    gemm(lhs, rhs, bias) -> unrotate(gemm(rotate(lhs, 0), rhs), 0, M) + bias               outer
"""

from __future__ import annotations

from torch import fx

from hadagraph import ops
from hadagraph.graph import arguments, aten, create, gemms, seed_for, size_of
from hadagraph.plan import OperandPlan, Plan
from hadagraph.rotation import PerStep, Rotation

KEPT, CONTRACTED = 0, 1  # dims of a GEMM's operands


def insert_rotations(graph: fx.Graph, plan: Plan) -> None:
    """Rewrite in place; GEMMs without a rotation in the plan stay as they are."""
    decisions = plan.by_node()
    for node in gemms(graph):
        decision = decisions.get(node.name)
        if decision is not None and decision.lhs is not None and decision.rhs is not None:
            _surround(node, decision.lhs, decision.rhs)


def _surround(node: fx.Node, left: OperandPlan, right: OperandPlan) -> None:
    lhs, rhs, bias = arguments(node)
    outers = (left.outer, right.outer)
    sizes: list[object] = []
    with node.graph.inserting_before(node):
        if any(outers):
            sizes = [size_of(argument, KEPT, node) for argument in (lhs, rhs)]
        rotated = [
            _rotated(_rotated(x, KEPT, plan.outer, node), CONTRACTED, plan.rotation, node)
            for x, plan in ((lhs, left), (rhs, right))
        ]
    if not any(outers):
        node.args = (*rotated, bias)
        return
    with node.graph.inserting_before(node):
        # Made anew for its value: a padded output.
        padded = create(node.graph, ops.gemm, (*rotated, None), node)
    node.args, node.meta["val"] = padded.args, padded.meta["val"]
    node.graph.erase_node(padded)
    users = list(node.users)
    with node.graph.inserting_before(node.next):
        result = node
        for dim, outer in enumerate(outers):
            if outer is not None:
                args = (result, dim, str(outer), sizes[dim], *_seed(node, outer))
                result = create(node.graph, ops.unrotate, args, node)
        if bias is not None:
            result = create(node.graph, aten.add.Tensor, (result, bias), node)
    for user in users:
        user.replace_input_with(node, result)


def _rotated(x: fx.Node, dim: int, rotation: Rotation | None, like: fx.Node) -> fx.Node:
    if rotation is None:
        return x
    args = (x, dim, str(rotation), *_seed(x, rotation))
    return create(x.graph, ops.rotate, args, like)


def _seed(node: fx.Node, rotation: Rotation) -> tuple[fx.Node, ...]:
    return (seed_for(node),) if isinstance(rotation.signs, PerStep) else ()
