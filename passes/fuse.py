"""Group each quantizing op of a partitioned graph with the pointwise chain before it and the GEMMs
behind it. Grouping only: the graph is not changed, except that an op which makes both layouts makes
only the one still read.

    quantize_both(x), row codes unread -> quantize_columns(x)
    quantize_both(x), column codes unread -> quantize_rows(x)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from hadagraph import ops
from hadagraph.graph import arguments, calls, create, outputs_of
from hadagraph.region import Region

GEMMS = (ops.scaled_mm, ops.scaled_mm_measured)


def fuse(graph: fx.Graph) -> tuple[Region, ...]:
    """Narrow half-read quantizers in place, and return the regions."""
    for node in calls(graph, (ops.quantize_both,)):
        _narrow(node)
    return tuple(_region(node) for node in calls(graph, ops.QUANTIZERS))


def _narrow(node: fx.Node) -> None:
    graph = node.graph
    read = {arguments(user)[1]: user for user in node.users if user.target is operator.getitem}
    live = {index for index, user in read.items() if user.users}
    x, rows, columns = arguments(node)
    if not live or (live & {0, 1} and live & {2, 3}):
        return
    first, target, encoding = (
        (0, ops.quantize_rows, rows) if live & {0, 1} else (2, ops.quantize_columns, columns)
    )
    with graph.inserting_before(node):
        single = create(graph, target, (x, encoding), node)
    for offset, output in enumerate(outputs_of(graph, single, 2)):
        if first + offset in live:
            read[first + offset].replace_all_uses_with(output)
    for user in read.values():
        graph.erase_node(user)
    graph.erase_node(node)


def _region(node: fx.Node) -> Region:
    readers = [
        reader.name
        for output in node.users
        for reader in output.users
        if reader.op == "call_function" and reader.target in GEMMS
    ]
    return Region(node.name, _producers(node), tuple(dict.fromkeys(readers)))


def _producers(node: fx.Node) -> tuple[str, ...]:
    """The chain of single-use pointwise nodes that ends in the quantizer's input."""
    chain = []
    current = arguments(node)[0]
    while isinstance(current, fx.Node) and len(current.users) == 1 and _is_pointwise(current):
        chain.append(current.name)
        inputs = [n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        current = inputs[0] if len(inputs) == 1 else None
    return tuple(reversed(chain))


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.is_view
