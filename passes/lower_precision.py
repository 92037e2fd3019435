"""Carry the plan out: rotate-quantize ops and scaled matmuls in place of rotated GEMMs, each tensor
quantized once however many GEMMs read it. The only pass that changes numerics.

    gemm(rotate(x, 1), rotate(w, 1), bias)
        -> scaled_mm(quantize_rows(x), quantize_rows(w), scales, bias)
    x read along both dims             -> quantize_both(x): one op, its column codes are what the
                                          backward gets
    a GEMM that stays in high precision -> the mm or addmm that it was
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from hadagraph import ops
from hadagraph.compat import CheckpointPolicy
from hadagraph.formats import Encoding
from hadagraph.graph import (
    CASTS,
    TRANSPOSES,
    VIEWS,
    arguments,
    aten,
    backward_nodes,
    create,
    gemms,
    operand,
    outputs_of,
    tensor,
)
from hadagraph.plan import Decision, OperandPlan, Plan

ALIASES = (aten.alias.default, aten.detach.default)
ROWS, COLUMNS = 1, 0  # which dim of the tensor the GEMM contracts


@dataclass(frozen=True)
class Use:
    """One operand of one GEMM: the tensor behind its rotation and transposes, the dim contracted,
    how it is to be encoded, and what it is (`input`, `weight`, `grad_output`)."""

    gemm: fx.Node
    side: int
    source: fx.Node
    contracted_dim: int
    encoding: Encoding
    named: str


@dataclass(frozen=True)
class Quantized:
    """The nodes that hold an operand's codes and scales."""

    codes: fx.Node
    scale: fx.Node


def lower_precision(graph: fx.Graph, plan: Plan, *, measure: bool = False) -> Plan:
    """Rewrite in place. Returns the plan with what the backward really gets for each operand.

    `measure` emits GEMMs that also compare themselves with fp64 (see `ops.MEASURED`).
    """
    decisions = plan.by_node()
    lowered = {n: decisions[n.name] for n in gemms(graph) if _is_lowered(decisions, n)}
    uses = [use for node, decision in lowered.items() for use in _uses(node, decision)]
    quantized, recomputed = _Quantizer(graph, uses).run()
    for node in gemms(graph):
        with graph.inserting_before(node):
            if node in lowered:
                left, right = quantized[node, 0], quantized[node, 1]
                site = lowered[node].site
                name = f"{site.name}:{site.role}" if measure else None
                result = _scaled_mm(node, left, right, name)
            else:
                result = _high_precision(node)
        result.meta["hadagraph_site"] = node.name
        node.replace_all_uses_with(result)
    for node in reversed(list(gemms(graph))):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return Plan(plan.recipe, tuple(_with_saved(d, recomputed) for d in plan.decisions))


def _is_lowered(decisions: dict[str, Decision], node: fx.Node) -> bool:
    return node.name in decisions and decisions[node.name].lowered


def _uses(node: fx.Node, decision: Decision) -> list[Use]:
    sides = ((decision.lhs, decision.site.lhs), (decision.rhs, decision.site.rhs))
    return [_use(node, side, plan, named) for side, (plan, named) in enumerate(sides) if plan]


def _use(node: fx.Node, side: int, plan: OperandPlan, named: str) -> Use:
    seen = operand(arguments(node)[side])
    source = seen.base
    if plan.rotation is not None:
        assert source.target is ops.rotate and arguments(source)[1] == seen.contracted_dim, source
        source = arguments(source)[0]
    return Use(node, side, source, seen.contracted_dim, plan.encoding, named)


class _Quantizer:
    """Creates the quantizing ops of one graph: one per tensor, dim and encoding, and a joint one
    where a tensor is needed along both dims in the same place."""

    def __init__(self, graph: fx.Graph, uses: list[Use]) -> None:
        self.graph = graph
        self.backward = backward_nodes(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.groups: dict[tuple[fx.Node, int, str], list[Use]] = defaultdict(list)
        for use in uses:
            self.groups[use.source, use.contracted_dim, str(use.encoding)].append(use)
        self.result: dict[tuple[fx.Node, int], Quantized] = {}
        self.recomputed: set[str] = set()

    def run(self) -> tuple[dict[tuple[fx.Node, int], Quantized], set[str]]:
        """The codes of every (GEMM, side), and the GEMMs whose saved operand is recomputed."""
        by_source: dict[fx.Node, list[tuple[int, list[Use]]]] = defaultdict(list)
        for (source, dim, _), uses in self.groups.items():
            by_source[source].append((dim, uses))
        for source, groups in by_source.items():
            rows = [uses for dim, uses in groups if dim == ROWS]
            columns = [uses for dim, uses in groups if dim == COLUMNS]
            if len(rows) == len(columns) == 1 and self._joined(source, rows[0], columns[0]):
                self._both(source, rows[0], columns[0])
                continue
            for uses in rows:
                self._single(ops.quantize_rows, source, uses)
            for uses in columns:
                self._single(ops.quantize_columns, source, uses)
        return self.result, self.recomputed

    def _joined(self, source: fx.Node, rows: list[Use], columns: list[Use]) -> bool:
        """Whether one op should make both layouts: both are needed in the same phase, or the
        backward's are worth saving from the forward."""
        row_backward, column_backward = (self._in_backward(uses) for uses in (rows, columns))
        if row_backward == column_backward:
            return True
        return not (row_backward or self._recomputable(source, columns))

    def _recomputable(self, source: fx.Node, uses: list[Use]) -> bool:
        """Whether the backward should quantize again rather than get codes: the tensor is there
        anyway, as a parameter, an input, or what an opaque backward op saves."""
        is_parameter = uses[0].named == "weight" and _from_placeholder(source)
        return is_parameter or _saved_anyway(source, self.backward)

    def _in_backward(self, uses: list[Use]) -> bool:
        return all(use.gemm in self.backward for use in uses)

    def _first(self, uses: list[Use]) -> fx.Node:
        return min((use.gemm for use in uses), key=self.order.__getitem__)

    def _both(self, source: fx.Node, rows: list[Use], columns: list[Use]) -> None:
        like = self._first(rows + columns)
        with self.graph.inserting_before(like):
            args = (source, str(rows[0].encoding), str(columns[0].encoding))
            node = _create_quantizer(self.graph, ops.quantize_both, args, like)
        outputs = outputs_of(self.graph, node, 4)
        self._assign(rows, Quantized(*outputs[:2]))
        self._assign(columns, Quantized(*outputs[2:]))

    def _single(self, target: object, source: fx.Node, uses: list[Use]) -> None:
        """One layout. Forward and backward users share it unless it is to be recomputed."""
        like = self._first(uses)
        recompute = (
            source not in self.backward
            and any(use.gemm in self.backward for use in uses)
            and self._recomputable(source, uses)
        )
        with self.graph.inserting_before(like):
            node = _create_quantizer(self.graph, target, (source, str(uses[0].encoding)), like)
        outputs = outputs_of(self.graph, node, 2)
        if recompute:
            for made in (node, *outputs):
                made.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
            _recompute_casts(source)
            self.recomputed.update(use.gemm.name for use in uses)
        self._assign(uses, Quantized(*outputs))

    def _assign(self, uses: list[Use], quantized: Quantized) -> None:
        for use in uses:
            self.result[use.gemm, use.side] = quantized


def _create_quantizer(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node
) -> fx.Node:
    """A quantizing op in the place of a GEMM's operand. A policy that saves the GEMM's output says
    nothing of its operands: those are recomputed, as without us."""
    node = create(graph, target, args, like)
    if node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return node


def _from_placeholder(node: fx.Node) -> bool:
    """Whether a tensor is a graph input behind casts, views and transposes only."""
    while node.op == "call_function" and node.target in (*CASTS, *VIEWS, *TRANSPOSES):
        node = arguments(node)[0]
    return node.op == "placeholder"


def _saved_anyway(node: fx.Node, backward: frozenset[fx.Node]) -> bool:
    """Whether the high-precision tensor reaches the backward whatever we do: it is a graph input,
    or (behind copies and views) an operand of an opaque backward op such as attention's."""
    while True:
        if node.op == "placeholder":
            return True
        if any(user in backward and _is_opaque_backward(user) for user in _readers(node)):
            return True
        if node.target not in (*VIEWS, *TRANSPOSES, aten.clone.default):
            return False
        node = arguments(node)[0]


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node and of its aliases: autograd saves attention's output by an alias."""
    readers = list(node.users)
    for reader in readers:
        if reader.target in ALIASES:
            readers.extend(reader.users)
    return readers


def _is_opaque_backward(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return "_backward" in name and ("attention" in name or "convolution" in name)


def _recompute_casts(node: fx.Node) -> None:
    """Cast a parameter again in the backward rather than save the cast (autocast)."""
    while node.op == "call_function" and node.target in (*CASTS, *VIEWS, *TRANSPOSES):
        node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        node = arguments(node)[0]


def _scaled_mm(node: fx.Node, left: Quantized, right: Quantized, measured: str | None) -> fx.Node:
    """gemm(lhs, rhs, bias) -> scaled_mm of the operands' codes."""
    dtype = tensor(node).dtype
    codes = (left.codes, right.codes, left.scale, right.scale, arguments(node)[2], dtype)
    if measured is None:
        return create(node.graph, ops.scaled_mm, codes, node)
    plain = [_without_rotation(node, side) for side in (0, 1)]
    return create(node.graph, ops.scaled_mm_measured, (*plain, *codes, measured), node)


def _without_rotation(node: fx.Node, side: int) -> fx.Node:
    """The GEMM's operand [kept, contracted] as it was before insert_rotations."""
    seen = operand(arguments(node)[side])
    base = arguments(seen.base)[0] if seen.base.target is ops.rotate else seen.base
    assert isinstance(base, fx.Node)
    if seen.contracted_dim == ROWS:
        return base
    return create(node.graph, aten.permute.default, (base, [1, 0]), node)


def _high_precision(node: fx.Node) -> fx.Node:
    """gemm(lhs, rhs, bias) -> mm(lhs, rhs^T) or addmm(bias, lhs, rhs^T)."""
    lhs, rhs, bias = arguments(node)
    assert isinstance(rhs, fx.Node)
    seen = operand(rhs)
    b = seen.base
    if seen.contracted_dim == ROWS:
        b = create(node.graph, aten.permute.default, (b, [1, 0]), node)
    if bias is None:
        return create(node.graph, aten.mm.default, (lhs, b), node)
    return create(node.graph, aten.addmm.default, (bias, lhs, b), node)


def _with_saved(decision: Decision, recomputed: set[str]) -> Decision:
    """The decision with `saved` as carried out."""
    carried_out = "recompute" if decision.site.node in recomputed else "codes"
    return replace(
        decision,
        lhs=_if_saved(decision.lhs, carried_out),
        rhs=_if_saved(decision.rhs, carried_out),
    )


def _if_saved(plan: OperandPlan | None, carried_out: str) -> OperandPlan | None:
    if plan is None or plan.saved is None:
        return plan
    return replace(plan, saved=carried_out)
