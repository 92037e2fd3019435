"""The GEMMs of a graph as predictions see them: their sizes, the matrices that they read, and which
of them share one. Knows nothing of plans' formats or of what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from hadagraph import ops
from hadagraph.compat import static_hint
from hadagraph.cost import Gemm, Matrix, Use
from hadagraph.device import DeviceProfile
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.graph import (
    CASTS,
    TRANSPOSES,
    VIEWS,
    arguments,
    backward_nodes,
    layout_source,
    operand,
    tensor,
)

SizeOf = Callable[["int | torch.SymInt"], int]


@dataclass(frozen=True)
class Reading:
    """One GEMM, out[M, N] = sum_C lhs[M, C] rhs[N, C]: which matrices it reads, along which of
    their dims it contracts them, and the precision that it has in the graph (`bf16` or `fp32`).
    `known`: whether its sizes had values when they were traced."""

    M: int
    N: int
    C: int
    plain: str
    matrices: tuple[Matrix, Matrix]
    dims: tuple[int, int]
    backward: bool
    known: bool

    def gemm(self, lhs: Encoding, rhs: Encoding) -> Gemm:
        """The GEMM with operands in these encodings."""
        uses = [
            Use(matrix, dim, str(encoding), quantizer_kind(encoding), self.backward)
            for matrix, dim, encoding in zip(self.matrices, self.dims, (lhs, rhs), strict=True)
        ]
        return Gemm(self.M, self.N, self.C, gemm_format(lhs), self.plain, (uses[0], uses[1]))


def quantizer_kind(encoding: Encoding) -> str:
    """Of which kind of `device.KINDS` or `device.BLOCK_KINDS` a quantizer is."""
    if encoding.granularity.block is not None:
        if encoding.rounding == "stochastic":
            return "random"
        return "two_level" if encoding.prescale else "block"
    if encoding.granularity == PER_TENSOR:
        return "per_tensor"
    return "plain" if encoding.rotation is None else "rotated"


def gemm_format(encoding: Encoding) -> str:
    """The `device.GemmRate` that a GEMM of two such operands runs at: `int8`, `fp8`, block-scaled
    `mxfp8` or `fp4`."""
    format = format_named(encoding.format)
    if format.is_integer:
        return "int8"
    if encoding.granularity.block is None:
        return "fp8"
    return "mxfp8" if format.bits == 8 else "fp4"


def is_priced(lhs: Encoding, profile: DeviceProfile | None) -> bool:
    """Whether a GEMM whose left operand is encoded so, and which the device multiplies as it is,
    has a predicted time; without a profile it counts as if."""
    return profile is None or gemm_format(lhs) in {rate.format for rate in profile.gemms}


def readings(
    graph: fx.Graph, nodes: Sequence[fx.Node], fused: bool, size_of: SizeOf = static_hint
) -> list[dict[fx.Node, Reading]]:
    """These GEMMs, those that share operands (directly or through others) together, in graph order.

    fused: whether quantizers compute their input where it is pointwise. size_of: what a symbolic
    size is taken for; by default its value when it was traced. Matrices are numbered within their
    group, so that alike groups are equal.
    """
    backward = backward_nodes(graph)
    return [_group(group, backward, fused, size_of) for group in _connected(nodes)]


def _sources(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = (operand(argument).base for argument in arguments(node)[:2])
    return left, right


def _connected(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
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


def _group(
    nodes: Sequence[fx.Node], backward: frozenset[fx.Node], fused: bool, size_of: SizeOf
) -> dict[fx.Node, Reading]:
    matrices: dict[fx.Node, Matrix] = {}
    found = {}
    for node in nodes:
        seen = [operand(argument) for argument in arguments(node)[:2]]
        for each in seen:
            if each.base not in matrices:
                matrices[each.base] = _matrix(each.base, len(matrices), fused, size_of)
        left, right = (tensor(argument) for argument in arguments(node)[:2])
        found[node] = Reading(
            size_of(left.shape[0]),
            size_of(right.shape[0]),
            size_of(left.shape[1]),
            "fp32" if left.dtype == torch.float32 else "bf16",
            (matrices[seen[0].base], matrices[seen[1].base]),
            (seen[0].contracted_dim, seen[1].contracted_dim),
            node in backward,
            all(map(_is_known, (*left.shape, *right.shape))),
        )
    return found


def _is_known(size: int | torch.SymInt) -> bool:
    """Whether a size had a value when it was traced; one that depends on data had none."""
    return isinstance(size, int) or size.node.has_hint()


def _matrix(source: fx.Node, key: int, fused: bool, size_of: SizeOf) -> Matrix:
    value = tensor(source)
    T, K = (size_of(size) for size in value.shape)
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
