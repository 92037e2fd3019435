"""The pointwise nodes behind a matrix of an FX graph, as a `Chain`: which operators a chain can
compute, how they read their operands, how far back to go. Changes nothing.

T rows of the matrix, K its columns. A node of shape [..., K] counts as [T, K].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hadagraph.graph import CASTS, VIEWS, arguments, aten, tensor
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import (
    COLUMNS,
    MATRIX,
    ROWS,
    SCALAR,
    Chain,
    ChainInput,
    ChainOutput,
    Step,
    Value,
)

DTYPE_NAMES = {dtype: name for name, dtype in CHAIN_DTYPES.items()}
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Read:
    """An operand of a node that is another node, and its shape as seen by the matrix."""

    node: fx.Node
    shape: str


Operand = Value | float
Add = Callable[..., Value]
"""(op, *operands) -> the value of a new step."""


def _pow(add: Add, x: Operand, exponent: Operand) -> Operand:
    """As Inductor and PyTorch's CPU kernels compute small exponents."""
    if exponent == 1.0:
        return x
    if exponent == 3.0:
        return add("mul", add("square", x), x)
    simple = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    if isinstance(exponent, float) and exponent in simple:
        return add(simple[exponent], x)
    return add("pow", x, exponent)


def _clamp(add: Add, x: Operand, low: Operand | None, high: Operand | None = None) -> Operand:
    x = x if low is None else add("maximum", x, low)
    return x if high is None else add("minimum", x, high)


def _step(op: str) -> Callable[..., Operand]:
    return lambda add, *operands: add(op, *operands)


def _same(add: Add, x: Operand) -> Operand:
    return x


EMIT_RULES: dict[Any, Callable[..., Operand]] = {
    **{
        getattr(getattr(aten, op), overload): _step(op)
        for op in ("add", "sub", "mul", "div")
        for overload in ("Tensor", "Scalar")
    },
    **{
        getattr(aten, op).default: _step(op)
        for op in (
            "maximum",
            "minimum",
            "neg",
            "abs",
            "square",
            "reciprocal",
            "sqrt",
            "rsqrt",
            "exp",
            "log",
            "sigmoid",
            "tanh",
            "erf",
            "relu",
        )
    },
    aten.rsub.Scalar: lambda add, x, y: add("sub", y, x),
    aten.pow.Tensor_Scalar: _pow,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda add, x, high: _clamp(add, x, None, high),
    **dict.fromkeys(CASTS, _same),
    **dict.fromkeys(VIEWS, _same),
    aten.expand.default: _same,
    aten.unsqueeze.default: _same,
    aten.squeeze.dim: _same,
    aten.squeeze.dims: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
}
"""What computes a node, from its operands. Absent: a chain cannot."""
RESHAPES = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
COPIES = (aten.alias.default, aten.detach.default, aten.clone.default)
# Those that read their first argument only; the others say nothing about values.
UNARY = (*CASTS, *RESHAPES, *COPIES, aten.expand.default)
KWARGS_ALLOWED: dict[Any, tuple[str, ...]] = {
    aten._to_copy.default: ("dtype",),
    aten.clone.default: ("memory_format",),
    aten.clamp.default: ("min", "max"),
}
CONSTANTS: dict[Any, int] = {aten.full.default: 1, aten.scalar_tensor.default: 0}
"""Which argument is the value."""


def reads(node: fx.Node) -> tuple[Read | float | None, ...] | None:
    """How a node of shape [..., K] reads its operands; None unless a chain can compute it. An
    operand None is an absent bound of `clamp`."""
    if node.op != "call_function" or node.target not in EMIT_RULES or not _has_dtype(node):
        return None
    allowed = KWARGS_ALLOWED.get(node.target, ())
    if any(name not in allowed and value is not None for name, value in node.kwargs.items()):
        return None
    given = list(arguments(node))
    if node.target is aten.clamp.default:
        given += [node.kwargs.get(name) for name in ("min", "max")[len(given) - 1 :]]
    if node.target in UNARY:
        given = given[:1]
    elif len(given) > 2 and node.target is not aten.clamp.default:  # alpha
        return None
    operands = [_operand(each, node) for each in given]
    if any(each is _UNREADABLE for each in operands):
        return None
    if node.target in RESHAPES and not keeps_columns(node):
        return None
    return tuple(operands)


_UNREADABLE: Any = object()


def _operand(given: Any, reader: fx.Node) -> Any:
    if given is None or (isinstance(given, (int, float)) and not isinstance(given, bool)):
        return given if given is None else _constant(float(given))
    if not isinstance(given, fx.Node) or not isinstance(given.meta.get("val"), torch.Tensor):
        return _UNREADABLE
    if given.target in CONSTANTS:
        value = arguments(given)[CONSTANTS[given.target]]
        if not isinstance(value, (int, float)) or tensor(given).dtype is torch.bool:
            return _UNREADABLE
        return _constant(torch.tensor(value, dtype=tensor(given).dtype).item())
    if not _has_dtype(given) or tensor(given).device != tensor(reader).device:
        return _UNREADABLE  # a number on the CPU may scale a matrix on the GPU
    if reader.target in RESHAPES:
        return Read(given, MATRIX)
    shape = seen_as(tensor(given).shape, tensor(reader).shape)
    if shape == SCALAR and tensor(reader).dtype not in (torch.float32, tensor(given).dtype):
        return _UNREADABLE  # PyTorch rounds it to the dtype of the matrix first
    return _UNREADABLE if shape is None else Read(given, shape)


def _constant(value: float) -> Any:
    return float(value) if math.isfinite(value) else _UNREADABLE


def _has_dtype(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for all values of their symbols. Adds no guard."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _ones(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes)


def seen_as(shape: Sequence[Any], full: Sequence[Any]) -> str | None:
    """How a tensor that broadcasts to `full` [..., K] is seen by the matrix [T, K]; None if it is
    none of a chain's shapes, as [1, S, K] in [B, S, K]."""
    shape = [1] * (len(full) - len(shape)) + list(shape)
    if _equal(shape, full):
        return MATRIX
    if _ones(shape):
        return SCALAR
    if _ones(shape[-1:]) and _equal(shape[:-1], full[:-1]):
        return ROWS
    return COLUMNS if _ones(shape[:-1]) and same_size(shape[-1], full[-1]) else None


def keeps_columns(node: fx.Node) -> bool:
    """Whether a view leaves the last dim whole: [T, K] sees the same matrix before and after."""
    source, view = tensor(arguments(node)[0]).shape, tensor(node).shape
    return bool(source) and bool(view) and same_size(source[-1], view[-1])


def matrix_behind(quantizer: fx.Node) -> fx.Node:
    """What a quantizer reads, behind views that leave the last dim whole."""
    node = arguments(quantizer)[0]
    while node.target in RESHAPES and keeps_columns(node):
        node = arguments(node)[0]
    assert isinstance(node, fx.Node)
    return node


def width(node: fx.Node) -> int:
    """Bytes of one element."""
    return tensor(node).element_size()


@dataclass
class Producers:
    """The nodes that a chain computes (`inside`, with their reads) to make `roots`. `sinks` are the
    readers that disappear with them; `dead` are those of `inside` that only they read: nodes that
    others read are computed twice, except roots, which others get from the chain."""

    roots: tuple[fx.Node, ...]
    sinks: Collection[fx.Node]
    inside: dict[fx.Node, tuple[Read | float | None, ...]] = field(default_factory=dict)

    def matrices(self) -> list[fx.Node]:
        """The tensors [..., K] that the chain reads, without repetition."""
        found = (each for node in self.inside for each in self.inside[node])
        return list(
            dict.fromkeys(
                each.node
                for each in found
                if isinstance(each, Read) and each.shape == MATRIX and each.node not in self.inside
            )
        )

    def dead(self) -> set[fx.Node]:
        """See the class."""
        dead: set[fx.Node] = set()
        grown = True
        while grown:
            grown = False
            for node in self.inside:
                if node not in dead and (node in self.roots or self.exclusive(node, dead)):
                    dead.add(node)
                    grown = True
        return dead

    def exclusive(self, node: fx.Node, dead: Collection[fx.Node]) -> bool:
        """Whether only dead nodes and sinks read the node."""
        return all(user in dead or user in self.sinks for user in node.users)


LOOKAHEAD = 24
"""How many nodes back an operand may be that is computed twice; SwiGLU's need about ten."""


def grow(
    roots: Sequence[fx.Node],
    sinks: Collection[fx.Node],
    most: int | None = None,
) -> Producers | None:
    """The producers of `roots`, as far back as that saves memory traffic; None if a chain cannot
    compute some root. With `most`, no step may make the chain read more matrices than that.

    A tensor that a chain reads is computed by it instead if nothing else reads that tensor (its
    write and read vanish), or if it can be had from tensors that the chain reads anyway, or from
    narrower ones.
    """
    found = Producers(tuple(roots), sinks)
    for root in roots:
        operands = reads(root)
        if operands is None:
            return None
        found.inside[root] = operands
    pulled = True
    while pulled:
        pulled = False
        for node in found.matrices():
            more = _worth(node, found, most)
            found.inside.update(more)
            pulled = pulled or bool(more)
    return found


def _worth(
    node: fx.Node, found: Producers, most: int | None
) -> dict[fx.Node, tuple[Read | float | None, ...]]:
    """The nodes to take inside so that the chain need not read this one; none if it should."""
    known = set(found.matrices()) - {node}
    room = LOOKAHEAD if most is None else most - len(known)
    taken: dict[fx.Node, tuple[Read | float | None, ...]] = {}
    needed = {node}
    while needed and len(taken) < LOOKAHEAD:
        latest = max(needed)
        operands = reads(latest)
        if operands is None:
            break
        taken[latest] = operands
        needed.discard(latest)
        needed |= {
            each.node
            for each in operands
            if isinstance(each, Read)
            and each.shape == MATRIX
            and not any(each.node in nodes for nodes in (found.inside, taken, known))
        }
        added = sum(map(width, needed))
        narrower = added < width(node) or (latest.target in UNARY and added <= width(node))
        exclusive = len(taken) == 1 and found.exclusive(node, found.dead())
        if (narrower or exclusive) and len(needed) <= room:
            return taken
    return {}


@dataclass(frozen=True)
class ReadChain:
    """A chain and the nodes that its inputs are."""

    chain: Chain
    inputs: tuple[Read, ...]


def chain_of(found: Producers, *, rounded: bool) -> ReadChain:
    """The chain that makes the roots, in their order. With `rounded`, every node is rounded to its
    dtype in the graph, as by running them one by one; else only the roots are, as in a kernel that
    a compiler makes of them."""
    nodes = sorted(found.inside)
    needed = [each for node in nodes for each in found.inside[node]]
    inputs = tuple(
        dict.fromkeys(r for r in needed if isinstance(r, Read) and r.node not in found.inside)
    )
    steps: list[Step] = []
    values: dict[Any, Operand] = {read: Value(index) for index, read in enumerate(inputs)}

    def add(op: str, *operands: Operand) -> Value:
        steps.append(Step(op, operands))
        return Value(len(inputs) + len(steps) - 1)

    def value(operand: Read | float | None) -> Operand | None:
        if isinstance(operand, Read):
            return values[operand.node if operand.node in found.inside else operand]
        return operand

    for node in nodes:
        result = EMIT_RULES[node.target](add, *map(value, found.inside[node]))
        dtype = tensor(node).dtype
        rounds = node.target not in (*RESHAPES, *COPIES, aten.expand.default)
        if rounded and rounds and dtype in LOW_PRECISION:
            result = add(f"cast_{DTYPE_NAMES[dtype]}", result)
        values[node] = result
    chain = Chain(
        tuple(ChainInput(DTYPE_NAMES[tensor(read.node).dtype], read.shape) for read in inputs),
        tuple(steps),
        tuple(_output(values[root], root) for root in found.roots),
    )
    return ReadChain(chain, inputs)


def _output(value: Operand, root: fx.Node) -> ChainOutput:
    assert isinstance(value, Value)
    return ChainOutput(value, DTYPE_NAMES[tensor(root).dtype])


def is_dense(node: fx.Node, *, any_row_stride: bool = False) -> bool:
    """Whether a tensor's elements follow each other in memory; with `any_row_stride`, a tensor
    [..., K] may also be a matrix [T, K] of dense rows at equal distances."""
    value = tensor(node)
    step: Any = 1
    for dim in reversed(range(value.dim())):
        if _ones([value.shape[dim]]):
            continue
        free = any_row_stride and value.dim() == 2 and dim == 0
        if not free and not same_size(value.stride(dim), step):
            return False
        step = step * value.shape[dim]
    return True
