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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from hadagraph import ops
from hadagraph.compat import CheckpointPolicy
from hadagraph.encoded_gemms import EncodedGemms
from hadagraph.formats import Encoding
from hadagraph.graph import (
    arguments,
    aten,
    backward_nodes,
    create,
    gemms,
    inner_rotation,
    operand,
    outputs_of,
    tensor,
)
from hadagraph.plan import Decision, OperandPlan, Plan
from hadagraph.recompute import Recomputation, copies_of_saved, from_input, nbytes, own_chain

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


def lower_precision(
    graph: fx.Graph, plan: Plan, *, measure: bool = False, memory: str = "exact"
) -> Plan:
    """Rewrite in place. Returns the plan with what the backward really gets for each operand.

    `measure` emits GEMMs that also compare themselves with fp64 (see `ops.MEASURED`). `memory` is
    the option: with `exact` the backward repeats attention's output projection; with `balanced` and
    `min` it recomputes the operands of all GEMMs that stay, not only those shared with others.
    """
    decisions = plan.by_node()
    lowered = {n: decisions[n.name] for n in gemms(graph) if _is_lowered(decisions, n)}
    general = _general(lowered)
    explicit = _rotated_for_outputs(lowered)
    uses_of = {n: _uses(n, d, explicit) for n, d in lowered.items() if n not in general}
    uses = [use for both in uses_of.values() for use in both]
    stay = [n for n in gemms(graph) if n not in lowered]
    if memory not in ("balanced", "min"):
        stay = _that_share_an_operand(stay, {use.source for use in uses})
    recomputation = Recomputation(graph, backward_nodes(graph), {*lowered, *stay})
    _recompute_operands(stay, recomputation)
    quantized, recomputed = _Quantizer(graph, uses, recomputation).run()
    encoded = EncodedGemms(graph, general, recomputation, measure)
    for node in gemms(graph):
        with graph.inserting_before(node):
            if node in general:
                result = encoded.emit(node)
                if memory == "exact" and _projects_attention(encoded.sources(node), recomputation):
                    recomputation.tag(recomputation.sums(node))
                    recomputation.tag(encoded.made_for(node))
            elif node in lowered:
                left, right = quantized[node, 0], quantized[node, 1]
                site = lowered[node].site
                name = f"{site.name}:{site.role}" if measure else None
                result = _scaled_mm(node, left, right, name)
                sources = (node, *(use.source for use in uses_of[node]))
                if memory == "exact" and _projects_attention(sources, recomputation):
                    recomputation.tag(recomputation.sums(node))
                    recomputation.tag(_with_quantizers(result, (left, right)))
            else:
                result = _high_precision(node)
        result.meta["hadagraph_site"] = node.name
        node.replace_all_uses_with(result)
        encoded.replaced(node, result)
    for node in reversed(list(gemms(graph))):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    recomputed |= encoded.recomputed
    return replace(plan, decisions=tuple(_with_saved(d, recomputed) for d in plan.decisions))


def _general(lowered: dict[fx.Node, Decision]) -> dict[fx.Node, Decision]:
    """The GEMMs that the 8-bit kernels don't take, and those whose codes others of them decode."""
    general = {n: d for n, d in lowered.items() if not (_plain(d.lhs) and _plain(d.rhs))}
    decoded = {
        decision.forward
        for decision in general.values()
        if "forward" in (plan.reads for plan in (decision.lhs, decision.rhs) if plan)
    }
    return {n: d for n, d in lowered.items() if n in general or n.name in decoded}


def _plain(plan: OperandPlan | None) -> bool:
    return plan is not None and plan.is_plain


def _rotated_for_outputs(lowered: dict[fx.Node, Decision]) -> frozenset[fx.Node]:
    """The rotations along a kept dim: tensors of their own, which other GEMMs may contract along
    that dim and then share."""
    found = set()
    for node, decision in lowered.items():
        for argument, plan in zip(arguments(node)[:2], (decision.lhs, decision.rhs), strict=True):
            if plan is None or plan.outer is None:
                continue
            base = operand(argument).base
            if plan.rotation is not None:
                base = arguments(base)[0]
            found.add(base)
    return frozenset(found)


def _that_share_an_operand(stay: list[fx.Node], sources: set[fx.Node]) -> list[fx.Node]:
    """Those GEMMs that read a tensor which others read quantized: a LoRA branch, a router."""
    return [n for n in stay if any(operand(a).base in sources for a in arguments(n)[:2])]


def _recompute_operands(stay: list[fx.Node], recomputation: Recomputation) -> None:
    """Tag what makes the forward operands of the backward GEMMs that stay in high precision."""
    for node in stay:
        for source in (operand(arg).base for arg in arguments(node)[:2]):
            if node not in recomputation.backward or source in recomputation.backward:
                continue
            recomputation.tag(recomputation.chain(source, nbytes(source) // 8) or ())


def _projects_attention(
    gemm_and_operands: tuple[fx.Node, ...], recomputation: Recomputation
) -> bool:
    """Whether a forward GEMM multiplies attention's output, which the backward has anyway, by a
    parameter. One GEMM of the width squared, repeated, saves the residual stream behind it."""
    gemm, x, w = gemm_and_operands
    backward, changed = recomputation.backward, recomputation.changed
    if gemm in backward or from_input(x) or not from_input(w, changed):
        return False
    return x not in backward and copies_of_saved(x, backward, changed) is not None


def _with_quantizers(gemm: fx.Node, operands: Iterable[Quantized]) -> list[fx.Node]:
    outputs = [node for each in operands for node in (each.codes, each.scale)]
    return [gemm, *outputs, *(arguments(node)[0] for node in outputs)]


def _is_lowered(decisions: dict[str, Decision], node: fx.Node) -> bool:
    return node.name in decisions and decisions[node.name].lowered


def _uses(node: fx.Node, decision: Decision, explicit: frozenset[fx.Node]) -> list[Use]:
    sides = ((decision.lhs, decision.site.lhs), (decision.rhs, decision.site.rhs))
    return [
        _use(node, side, plan, named, explicit) for side, (plan, named) in enumerate(sides) if plan
    ]


def _use(
    node: fx.Node, side: int, plan: OperandPlan, named: str, explicit: frozenset[fx.Node]
) -> Use:
    seen = operand(arguments(node)[side])
    source = seen.base
    if plan.rotation is not None:
        inner = inner_rotation(arguments(node)[side])
        if inner is None or inner in explicit:  # the tensor itself is rotated
            plan = replace(plan, rotation=None)
        else:
            source = arguments(inner)[0]
    return Use(node, side, source, seen.contracted_dim, plan.encoding, named)


class _Quantizer:
    """Creates the quantizing ops of one graph: one per tensor, dim and encoding, and a joint one
    where a tensor is needed along both dims in the same place."""

    def __init__(self, graph: fx.Graph, uses: list[Use], recomputation: Recomputation) -> None:
        self.graph = graph
        self.backward = recomputation.backward
        self.recomputation = recomputation
        self.chains: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
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
        return not (row_backward or self._made_again(source) is not None)

    def _made_again(self, source: fx.Node) -> tuple[fx.Node, ...] | None:
        """The nodes to be recomputed so that the backward can quantize the tensor again rather than
        get codes: none where it is there anyway, as an input or as what an opaque backward op
        saves; its cast, or the norm or activation function that made it. None: save the codes."""
        if source not in self.chains:
            own = own_chain(source)
            behind = arguments(own[-1])[0] if own else source
            chain = copies_of_saved(behind, self.backward, self.recomputation.changed)
            if own:  # rotations take a pass of their own: only weights are rotated again
                chain = None if chain is None else (*own, *chain)
            elif chain is None:
                codes = nbytes(source) // tensor(source).element_size()
                chain = self.recomputation.chain(source, codes // 4)
            self.chains[source] = chain
        return self.chains[source]

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
        across = source not in self.backward and any(use.gemm in self.backward for use in uses)
        chain = self._made_again(source) if across else None
        with self.graph.inserting_before(like):
            node = _create_quantizer(self.graph, target, (source, str(uses[0].encoding)), like)
        outputs = outputs_of(self.graph, node, 2)
        if chain is not None:
            self.recomputation.tag((node, *outputs, *chain))
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


def _scaled_mm(node: fx.Node, left: Quantized, right: Quantized, measured: str | None) -> fx.Node:
    """gemm(lhs, rhs, bias) -> scaled_mm of the operands' codes."""
    dtype = tensor(node).dtype
    codes = (left.codes, right.codes, left.scale, right.scale, arguments(node)[2], dtype)
    if measured is None:
        return create(node.graph, ops.scaled_mm, codes, node)
    plain = [_without_rotation(node, side) for side in (0, 1)]
    return create(node.graph, ops.scaled_mm_measured, (*plain, *codes, measured), node)


def _without_rotation(node: fx.Node, side: int) -> fx.Node:
    """The GEMM's operand [kept, contracted] without the rotation along the contracted dim, where
    both of them have one."""
    seen = operand(arguments(node)[side])
    base = seen.base
    if all(inner_rotation(argument) is not None for argument in arguments(node)[:2]):
        base = arguments(base)[0]
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
