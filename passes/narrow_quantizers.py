"""Make each layout of a matrix once, and only if something reads it. Codes stay what they are.

quantize_both(x), row codes unread    -> quantize_columns(x)
quantize_both(x), column codes unread -> quantize_rows(x)
quantize_rows(view(x)), quantize_both(view(x)) of equal rows -> quantize_both(view(x))
"""

from __future__ import annotations

import operator

from torch import fx

from hadagraph import compat, ops
from hadagraph.graph import arguments, calls, create, getitems, outputs_of
from hadagraph.producers import matrix_behind
from hadagraph.region import COLUMNS, ROWS


def narrow_quantizers(graph: fx.Graph) -> None:
    """Rewrite in place, on a graph that is either a forward or a backward."""
    for node in calls(graph, (ops.quantize_both,)):
        _narrow(node)
    _share(graph)


def _narrow(node: fx.Node) -> None:
    graph = node.graph
    read = getitems(node)
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


def _share(graph: fx.Graph) -> None:
    """Quantize a matrix once where several views of it are quantized alike."""
    nodes = calls(graph, ops.QUANTIZERS)
    nodes.sort(key=lambda node: node.target is not ops.quantize_both)
    providers: dict[tuple[fx.Node, str, str], tuple[fx.Node, int]] = {}
    shared = False
    for node in nodes:
        root, mine = matrix_behind(node), _layouts(node)
        places = [providers.get((root, *layout)) for layout in mine]
        if None in places:
            for number, layout in enumerate(mine):
                providers.setdefault((root, *layout), (node, 2 * number))
            continue
        made = getitems(node)
        for number, (provider, first) in enumerate(place for place in places if place):
            for offset in (0, 1):
                old = made.get(2 * number + offset)
                if old is not None:
                    old.replace_all_uses_with(_output(provider, first + offset))
                    graph.erase_node(old)
        graph.erase_node(node)
        shared = True
    if shared:  # a provider may stand behind the readers that it got
        compat.stable_topological_sort(graph)


def _layouts(node: fx.Node) -> list[tuple[str, str]]:
    """What a quantizer makes: (ROWS or COLUMNS, encoding), in the order of its outputs."""
    dims = [ROWS] if node.target is ops.quantize_rows else [COLUMNS]
    dims = [ROWS, COLUMNS] if node.target is ops.quantize_both else dims
    return list(zip(dims, arguments(node)[1:], strict=True))


def _output(node: fx.Node, index: int) -> fx.Node:
    """That output of a multi-output node, made if nothing read it yet."""
    made = getitems(node)
    if index not in made:
        with node.graph.inserting_after(node):
            made[index] = create(node.graph, operator.getitem, (node, index), node)
    return made[index]
