"""What the backward can have without it being saved: which tensors reach it anyway, and which are
made again from those by pointwise arithmetic. Changes nothing but the partitioner's tags."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from hadagraph import compat, ops
from hadagraph.graph import ALIASES, CASTS, TRANSPOSES, VIEWS, arguments, aten

# Pointwise or layout ops that carry no such tag.
CHEAP = (aten._to_copy.default, aten._unsafe_view.default, aten.reshape.default)
LONGEST_CHAIN = 48  # nodes; no norm or activation function has as many


def numel(value: torch.Tensor) -> int:
    """Elements of a tensor, symbolic sizes at their traced value."""
    count = 1
    for dim in value.shape:
        count *= compat.static_hint(dim)
    return count


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensor, symbolic sizes at their traced value; 0 if it is not one tensor."""
    value = node.meta.get("val")
    return numel(value) * value.element_size() if isinstance(value, torch.Tensor) else 0


def is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view or pointwise: free to make again when its inputs are there."""
    target = node.target
    if is_view(node):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return target in CHEAP or torch.Tag.pointwise in target.tags


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares its first argument's memory, a part of a split included."""
    target = node.target
    if target is operator.getitem:
        target = arguments(node)[0].target
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def changed_inputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """The graph inputs that the forward changes in place, by an op of the graph or, where
    AOTAutograd copies the result back outside it, by an output. The backward would find them
    changed."""
    described = graph.output_node().meta.get("desc") or ()
    outside = [d.mutated_input for d in described if hasattr(d, "mutated_input")]
    inputs = graph.find_nodes(op="placeholder")
    changed = {node for node in inputs if node.meta.get("desc") in outside}
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            changed.update(n for n in node.all_input_nodes[:1] if n.op == "placeholder")
    return frozenset(changed)


class Recomputation:
    """The question asked of one joint graph. `ignored` are the GEMMs that are about to read codes
    in place of the tensors."""

    def __init__(
        self, graph: fx.Graph, backward: Collection[fx.Node], ignored: Collection[fx.Node]
    ) -> None:
        self.backward = backward
        self.ignored = ignored
        self.changed = changed_inputs(graph)
        self.tagged: set[fx.Node] = set()

    def tag(self, nodes: Iterable[fx.Node]) -> None:
        """Have the partitioner recompute these, unless the user's checkpointing has a say."""
        for node in nodes:
            if "recompute" not in node.meta:
                node.meta["recompute"] = compat.CheckpointPolicy.PREFER_RECOMPUTE
                self.tagged.add(node)

    def chain(self, source: fx.Node, limit: int) -> tuple[fx.Node, ...] | None:
        """The nodes that make `source` again in the backward: cheap ones, from graph inputs, from
        tensors that reach the backward anyway, and from others of at most `limit` bytes together
        (a norm's statistics). None if there is no such way.
        """
        made: list[fx.Node] = []
        seen: set[fx.Node] = set()
        pending = [source]
        while pending:
            node = pending.pop()
            if node in self.changed:
                return None
            if node in seen or node.op in ("placeholder", "get_attr"):
                continue
            seen.add(node)
            if self.is_there_anyway(node):
                continue
            if is_cheap(node):
                if self._is_the_users(node) or len(made) == LONGEST_CHAIN:
                    return None
                made.append(node)
                pending += node.all_input_nodes
                continue
            limit -= nbytes(node)
            if limit < 0:
                return None
        return tuple(made)

    def sums(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What pointwise ops make of a tensor and others that the backward has anyway, such as the
        residual stream after adding the tensor to it."""
        made: list[fx.Node] = []
        pending = [node]
        while pending:
            current = pending.pop()
            for user in current.users:
                others = [n for n in user.all_input_nodes if n is not current]
                if not is_cheap(user) or self._is_the_users(user) or user in self.backward:
                    continue
                if self.changed.intersection(others):
                    continue
                if all(n.op == "placeholder" or self.is_there_anyway(n) for n in others):
                    made.append(user)
                    pending += [user] if is_view(user) else []
        return tuple(made)

    def _is_the_users(self, node: fx.Node) -> bool:
        """Whether the user's checkpointing decides about a node."""
        return "recompute" in node.meta and node not in self.tagged

    def is_there_anyway(self, node: fx.Node) -> bool:
        """Whether the high-precision tensor reaches the backward whatever we do: something there
        reads it, or something pointwise of no fewer bytes that is made from it alone."""
        made = {node}
        pending = [node]
        while pending:
            for user in pending.pop().users:
                if user in self.ignored or user in made or user.op == "output":
                    continue
                if user in self.backward:
                    return True
                if is_cheap(user) and nbytes(user) >= nbytes(node) and _is_made_of(user, made):
                    made.add(user)
                    pending.append(user)
        return False


def own_chain(source: fx.Node) -> tuple[fx.Node, ...]:
    """The rotations and projections that end in a tensor, the last first."""
    chain = []
    while source.target in (ops.rotate, ops.project):
        chain.append(source)
        source = arguments(source)[0]
    return tuple(chain)


def copies_of_saved(
    node: fx.Node, backward: Collection[fx.Node], changed: Collection[fx.Node]
) -> tuple[fx.Node, ...] | None:
    """The copies and views between a tensor and the graph input, or the operand of an opaque
    backward op such as attention's (which saves it), that it comes from. None if from neither, or
    from an input that is `changed` in place."""
    chain: list[fx.Node] = []
    while True:
        if node.op == "placeholder":
            return None if node in changed else tuple(chain)
        if any(user in backward and _is_opaque_backward(user) for user in _readers(node)):
            return tuple(chain)
        if node.target not in (*VIEWS, *TRANSPOSES, aten.clone.default):
            return None
        chain.append(node)
        node = arguments(node)[0]


def from_input(node: fx.Node, changed: Collection[fx.Node] = ()) -> bool:
    """Whether a tensor is a graph input, none of those `changed` in place, behind casts, views and
    transposes only."""
    while node.op == "call_function" and node.target in (*CASTS, *VIEWS, *TRANSPOSES):
        node = arguments(node)[0]
    return node.op == "placeholder" and node not in changed


def _is_made_of(node: fx.Node, made: Collection[fx.Node]) -> bool:
    """Whether all inputs but small ones are among the nodes in `made`."""
    return all(n in made or 4 * nbytes(n) <= nbytes(node) for n in node.all_input_nodes)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node and of its aliases: autograd saves attention's output by an alias."""
    readers = list(node.users)
    for reader in readers:
        if reader.target in ALIASES:
            readers.extend(reader.users)
    return readers


def _is_opaque_backward(node: fx.Node) -> bool:
    name: Any = getattr(node.target, "__name__", "")
    return "_backward" in name and ("attention" in name or "convolution" in name)
