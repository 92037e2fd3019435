"""Give every matmul of two matrices one form, `gemm(lhs[M, C], rhs[N, C], bias)`, and merge equal
layout ops. Exact. Leaves bmm alone: attention is recognized by Inductor from it.

    mm(a, b)                  -> gemm(a, b^T)
    addmm(bias[N], a, b)      -> gemm(a, b^T, bias)
    permute(permute(x))       -> x
    view(x), view(x)          -> one view
"""

from __future__ import annotations

import logging

from torch import fx

from hadagraph import ops
from hadagraph.graph import TRANSPOSES, VIEWS, arguments, aten, create, operand, tensor
from hadagraph.rewrite import apply_rules, merge_duplicates

log = logging.getLogger(__name__)


def normalize(graph: fx.Graph) -> None:
    """Rewrite in place."""
    merge_duplicates(graph, (*VIEWS, *TRANSPOSES))
    apply_rules(graph, {aten.mm.default: (mm_to_gemm,), aten.addmm.default: (addmm_to_gemm,)})
    merge_duplicates(graph, TRANSPOSES)
    graph.eliminate_dead_code()


def mm_to_gemm(node: fx.Node) -> fx.Node | None:
    """mm(a[M, C], b[C, N]) -> gemm(a, b^T)."""
    if node.kwargs or not _floating(node):
        return None
    a, b = arguments(node)
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return create(node.graph, ops.gemm, (a, _transposed(b, node), None), node)


def addmm_to_gemm(node: fx.Node) -> fx.Node | None:
    """addmm(bias[N], a[M, C], b[C, N]) -> gemm(a, b^T, bias); alpha and beta must be 1."""
    scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if scaled or set(node.kwargs) - {"alpha", "beta"} or not _floating(node):
        log.info("%s stays an addmm: kwargs %s", node.name, dict(node.kwargs))
        return None
    bias, a, b = arguments(node)
    assert all(isinstance(arg, fx.Node) for arg in (bias, a, b))
    if tensor(bias).dim() != 1 or str(tensor(bias).shape[0]) != str(tensor(node).shape[1]):
        log.info("%s stays an addmm: its bias is not one number a column", node.name)
        return None
    return create(node.graph, ops.gemm, (a, _transposed(b, node), bias), node)


def _floating(node: fx.Node) -> bool:
    return tensor(node).dtype.is_floating_point


def _transposed(b: fx.Node, like: fx.Node) -> fx.Node:
    """b^T, without a chain of transposes that undo each other."""
    seen = operand(b)
    if seen.contracted_dim == 0:
        return seen.base
    return create(b.graph, aten.permute.default, (seen.base, [1, 0]), like)
