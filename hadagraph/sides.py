"""The two operands of a GEMM as general encodings see them, and how a backward GEMM gets what it
reads of the forward: where that is made, and whether it is saved or made again. Encodes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import fx

from hadagraph import ops
from hadagraph.compat import CheckpointPolicy
from hadagraph.encoded_nodes import between
from hadagraph.graph import (
    SAVED,
    arguments,
    aten,
    create,
    inherit_meta,
    inner_rotation,
    operand,
    seed_for,
    size_of,
)
from hadagraph.plan import Decision, OperandPlan
from hadagraph.recompute import Recomputation, copies_of_saved, nbytes, own_chain
from hadagraph.rotation import PerStep, Rotation


@dataclass(frozen=True)
class Side:
    """One operand of one GEMM: the tensor behind its inner rotation and its transposes, which dim
    of that the GEMM contracts, its plan (without the inner rotation, if the tensor is in that basis
    already), what it is, and its GEMM's forward."""

    gemm: fx.Node
    source: fx.Node
    contracted_dim: int
    plan: OperandPlan
    named: str
    forward: fx.Node | None

    @property
    def kept_dim(self) -> int:
        return 1 - self.contracted_dim


def sides_of(node: fx.Node, decision: Decision, named: dict[str, fx.Node]) -> tuple[Side, Side]:
    """The two operands of a GEMM after insert_rotations; `named`: the graph's GEMMs by name."""
    forward = named.get(decision.forward or "")
    apart = any(plan is not None and plan.outliers for plan in (decision.lhs, decision.rhs))
    found = []
    for argument, plan, what in (
        (arguments(node)[0], decision.lhs, decision.site.lhs),
        (arguments(node)[1], decision.rhs, decision.site.rhs),
    ):
        assert plan is not None
        seen = operand(argument)
        source = seen.base
        if plan.rotation is not None and plan.is_quantized:
            inner = inner_rotation(argument)
            if inner is not None:
                source = arguments(inner)[0]
            elif apart:  # products with outliers are of both operands in the plain basis
                source = _unrotated(source, seen.contracted_dim, plan.rotation)
            else:
                plan = replace(plan, rotation=None)
        found.append(Side(node, source, seen.contracted_dim, plan, what, forward))
    return found[0], found[1]


class Handover:
    """What the backward GEMMs of one graph get of the forward; `sources`: what operands are made
    of."""

    def __init__(self, recomputation: Recomputation, sources: Iterable[fx.Node]) -> None:
        self.recomputation = recomputation
        backward = set(recomputation.backward)
        made = {n for n in sources if not backward.isdisjoint(n.all_input_nodes)}
        self.backward = backward | made
        self.chains: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        self.recomputed: set[str] = set()

    def replaced(self, node: fx.Node, result: fx.Node) -> None:
        """Take a result for the backward's where it stands for a node that is."""
        if node in self.backward:
            self.backward.add(result)

    def is_saved(self, side: Side, source: fx.Node) -> bool:
        """Whether a backward GEMM gets what the forward makes of a tensor."""
        return self.is_across(side, source) and self.made_again(source) is None

    def is_across(self, side: Side, source: fx.Node) -> bool:
        """Whether a backward GEMM reads what the forward has."""
        return side.gemm in self.backward and source not in self.backward

    def made_again(self, source: fx.Node) -> tuple[fx.Node, ...] | None:
        """The nodes to be recomputed so that the backward has a tensor: none where it is there
        anyway, else rotations and projections of it, its cast, or the norm or activation function
        that made it. None if there is no such way."""
        if source not in self.chains:
            own = own_chain(source)
            behind = arguments(own[-1])[0] if own else source
            chain = copies_of_saved(behind, self.backward, self.recomputation.changed)
            if chain is None:
                # A norm's statistics are far smaller than its output in the fewest bits.
                chain = self.recomputation.chain(behind, nbytes(source) // 16)
            self.chains[source] = None if chain is None else (*own, *chain)
        return self.chains[source]

    @contextmanager
    def place(self, side: Side, source: fx.Node) -> Iterator[fx.Node]:
        """The insertion point of what is made of a tensor, and the node whose metadata it takes:
        beside the GEMM or, to be saved, in the forward."""
        if self.is_saved(side, source):
            like = side.forward or source
            for node in own_chain(source):
                node.meta.pop("recompute", None)
                inherit_meta(node, like)
                recomputable(node)
            with source.graph.inserting_before(source.next):
                yield like
        else:
            last = side.gemm.prev
            with side.gemm.graph.inserting_before(side.gemm):
                yield side.gemm
            if side.gemm in self.backward:
                self.backward.update(between(last, side.gemm))

    def hand_over(
        self,
        side: Side,
        source: fx.Node,
        made: tuple[fx.Node, ...],
        results: tuple[fx.Node, ...],
    ) -> None:
        """Let the backward have `results`: saved, or made again."""
        if not self.is_across(side, source):
            return
        chain = self.made_again(source)
        if chain is not None:
            self.recomputation.tag((*made, *chain))
            self.recomputed.add(side.gemm.name)
        else:
            for node in results:
                node.meta[SAVED] = True


def _unrotated(node: fx.Node, dim: int, rotation: Rotation) -> fx.Node:
    """A tensor whose rotation met its inverse, un-rotated all the same."""
    with node.graph.inserting_before(node.next):
        seed = (seed_for(node),) if isinstance(rotation.signs, PerStep) else ()
        args = (node, dim, str(rotation), size_of(node, dim, node), *seed)
        return create(node.graph, ops.unrotate, args, node)


def recomputable(node: fx.Node) -> fx.Node:
    """A policy that saves a GEMM's output says nothing of its operands: those are recomputed."""
    if node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return node


def as_operand(node: fx.Node, side: Side, like: fx.Node) -> fx.Node:
    """A tensor in the operand's own orientation as [kept, contracted]."""
    if side.contracted_dim == 1:
        return node
    return create(node.graph, aten.permute.default, (node, [1, 0]), like)
