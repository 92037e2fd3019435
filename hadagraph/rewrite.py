"""Apply local rewrite rules to a graph until none matches. A rule is `Node -> Node | None`: the
node that replaces its argument, or None when it does not match. Knows no rule itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from hadagraph.graph import arguments, replace

Rule = Callable[[fx.Node], fx.Node | None]


def apply_rules(graph: fx.Graph, rules: Mapping[Any, Sequence[Rule]]) -> int:
    """Rewrite to a fixed point with rules keyed by the target of the node they match.

    Returns how many replacements were made. Terminates because every rule must shrink the graph or
    move an op strictly towards the graph's inputs.
    """
    replaced = 0
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            for rule in rules.get(node.target, ()):
                with graph.inserting_before(node):
                    replacement = rule(node)
                if replacement is not None:
                    replace(node, replacement)
                    replaced += 1
                    changed = True
                    break
    return replaced


def merge_duplicates(graph: fx.Graph, targets: Sequence[Any]) -> int:
    """f(x), ..., f(x) -> one f(x), for side-effect-free ops of these targets with equal arguments.

    The later one gives way to the earlier. Nodes under different checkpointing tags stay apart.
    """
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in targets:
            continue
        key = (
            node.target,
            _hashable(arguments(node)),
            tuple(sorted((name, _hashable(value)) for name, value in node.kwargs.items())),
            node.meta.get("recompute"),
            node.meta.get("ac_graph_id"),
        )
        if (earlier := first.get(key)) is None:
            first[key] = node
            continue
        replace(node, earlier)
        merged += 1
    return merged


def _hashable(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(_hashable(part) for part in argument)
    return (type(argument).__name__, str(argument))
