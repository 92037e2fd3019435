"""Give back to high precision what the device's profile predicts to be slower in 8 bit, quantizers
and launches counted. An analysis: changes the plan, not the graph. Alike parts of a model are
decided alike."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

import torch
from torch import fx

from hadagraph import ops
from hadagraph.compat import static_hint
from hadagraph.cost import Gemm, Matrix, Use
from hadagraph.device import DeviceProfile
from hadagraph.formats import PER_TENSOR, format_named
from hadagraph.graph import (
    CASTS,
    TRANSPOSES,
    VIEWS,
    arguments,
    backward_nodes,
    gemms,
    layout_source,
    operand,
    tensor,
)
from hadagraph.plan import Decision, OperandPlan, Plan
from hadagraph.selection import Candidate, Part, Search

log = logging.getLogger(__name__)


def never_slower(
    graph: fx.Graph, plan: Plan, profile: DeviceProfile, *, host: bool = True, fused: bool = True
) -> Plan:
    """The plan without what would lose, each GEMM with its reason; `plan.note` says what is
    predicted.

    host: whether the host launches kernel by kernel (not so in a captured CUDA graph). fused:
    whether quantizers compute their input where it is pointwise. Sizes that are symbols count as
    they were traced. An override that names a GEMM is obeyed, whatever is predicted.
    """
    members = _parts(graph, plan, fused)
    by_part: dict[Part, list[list[str]]] = defaultdict(list)
    for part, names in members:
        by_part[part].append(names)
    parts = [replace(part, count=len(found)) for part, found in by_part.items()]
    if not parts:
        return plan
    choice = Search(parts, profile, host).run()
    reasons = {
        name: choice.reasons[index][position]
        for index, found in enumerate(by_part.values())
        for names in found
        for position, name in enumerate(names)
        if position not in choice.lowered[index]
    }
    symbols = _symbols(graph)
    decisions = [_without(decision, reasons, symbols) for decision in plan.decisions]
    note = (
        f"predicted on {profile.name} ({profile.source}): GEMMs and their operands "
        f"{choice.us:.0f} us, all lowered {choice.all_us:.0f} us, bf16 {choice.none_us:.0f} us"
        f"{symbols}"
    )
    log.info(note)
    return replace(plan, decisions=tuple(decisions), note=note)


def _without(decision: Decision, reasons: dict[str, str], symbols: str) -> Decision:
    if not decision.lowered or decision.site.node not in reasons:
        return decision
    reason = reasons[decision.site.node] + symbols
    site = decision.site
    log.info("%s %s stays in high precision: %s", site.name, site.role, reason)
    return Decision(site, reason=reason)


def _symbols(graph: fx.Graph) -> str:
    """The symbolic sizes of the GEMMs and what they stand for, as the end of a sentence."""
    found: dict[str, int] = {}
    for node in gemms(graph):
        for argument in arguments(node)[:2]:
            for size in tensor(argument).shape:
                if isinstance(size, torch.SymInt):
                    found[str(size)] = static_hint(size)
    return "".join(f"; {symbol} = {size} as traced" for symbol, size in found.items())


# -------------------------------------------------------------------------- reading the graph


def _parts(graph: fx.Graph, plan: Plan, fused: bool) -> list[tuple[Part, list[str]]]:
    """The parts of a graph, each with its GEMM nodes' names; alike parts are equal."""
    decisions = plan.by_node()
    backward = backward_nodes(graph)
    lowered = [n for n in gemms(graph) if n.name in decisions and decisions[n.name].lowered]
    return [_part(nodes, decisions, backward, fused) for nodes in _connected(lowered)]


def _sources(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = (operand(argument).base for argument in arguments(node)[:2])
    return left, right


def _connected(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """GEMMs that share operands, in graph order."""
    parent = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    reader: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in _sources(node):
            parent[root(node)] = root(reader.setdefault(source, node))
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        groups[root(node)].append(node)
    return list(groups.values())


def _part(
    nodes: list[fx.Node],
    decisions: dict[str, Decision],
    backward: frozenset[fx.Node],
    fused: bool,
) -> tuple[Part, list[str]]:
    matrices: dict[fx.Node, Matrix] = {}
    linears: dict[str, int] = {}
    candidates = []
    for node in nodes:
        decision = decisions[node.name]
        uses = []
        for argument, plan in zip(arguments(node)[:2], (decision.lhs, decision.rhs), strict=True):
            assert plan is not None
            seen = operand(argument)
            matrix = matrices.setdefault(seen.base, _matrix(seen.base, len(matrices), fused))
            kind = _kind(plan)
            encoding = str(plan.encoding)
            uses.append(Use(matrix, seen.contracted_dim, encoding, kind, node in backward))
        left, right = (tensor(argument) for argument in arguments(node)[:2])
        gemm = Gemm(
            static_hint(left.shape[0]),
            static_hint(right.shape[0]),
            static_hint(left.shape[1]),
            _format(decision.lhs),
            "fp32" if left.dtype == torch.float32 else "bf16",
            (uses[0], uses[1]),
        )
        linear = linears.setdefault(decision.site.name, len(linears))
        asked = decision.asked or not all(map(_is_known, (*left.shape, *right.shape)))
        candidates.append(Candidate(gemm, decision.site.role, linear, asked))
    return Part(tuple(candidates)), [node.name for node in nodes]


def _is_known(size: int | torch.SymInt) -> bool:
    """Whether a size had a value when it was traced; one that depends on data had none, and a
    matmul of it stays as the recipe has it."""
    return isinstance(size, int) or size.node.has_hint()


def _matrix(source: fx.Node, key: int, fused: bool) -> Matrix:
    value = tensor(source)
    T, K = (static_hint(size) for size in value.shape)
    maker = layout_source(source)
    target = maker.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return Matrix(
        key,
        T,
        K,
        value.element_size(),
        given=maker.op == "placeholder",
        fused=fused and pointwise and _only_gemms_read(maker),
    )


def _only_gemms_read(node: fx.Node) -> bool:
    """Whether every reader of a tensor, behind views and casts, is a GEMM."""
    layouts = (*VIEWS, *TRANSPOSES, *CASTS)
    return all(
        user.target is ops.gemm or (user.target in layouts and _only_gemms_read(user))
        for user in node.users
    )


def _kind(plan: OperandPlan) -> str:
    if plan.granularity == PER_TENSOR:
        return "per_tensor"
    return "plain" if plan.rotation is None else "rotated"


def _format(plan: OperandPlan | None) -> str:
    assert plan is not None
    return "int8" if format_named(plan.format).is_integer else "fp8"
