"""Small groups of nodes that encoded GEMMs are put together from: outliers apart, masks in bits,
casts and numbers. Knows nothing of plans."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hadagraph.formats import Encoding, format_named
from hadagraph.graph import aten, create, inherit_meta, size_of, tensor

convert = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Encoded:
    """The nodes that hold an operand's codes, scales and tensor scale."""

    codes: fx.Node
    scale: fx.Node
    tensor_scale: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        return self.codes, self.scale, self.tensor_scale


@dataclass(frozen=True)
class Split:
    """An operand's tensor without its outliers, and these: their indices along `axis` of the
    operand seen as [kept, contracted], and their values, compact along that axis."""

    rest: fx.Node
    axis: int
    indices: fx.Node
    values: fx.Node


def between(before: fx.Node, after: fx.Node) -> Iterator[fx.Node]:
    """The nodes that stand between two of a graph."""
    node = before.next
    while node is not after:
        yield node
        node = node.next


def cast(node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    if tensor(node).dtype == dtype:
        return node
    return create(node.graph, convert, (node, dtype), like)


def scalar(value: float, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """A tensor of one number on the device of `like`."""
    kwargs: dict[str, Any] = {"dtype": dtype, "device": tensor(like).device}
    node = like.graph.call_function(aten.full.default, ([], value), kwargs)
    node.meta["val"] = tensor(like).new_empty((), dtype=dtype)
    inherit_meta(node, like)
    return node


def stored_size(encoded: Encoded, encoding: Encoding, like: fx.Node) -> Any:
    """The number of codes along the contracted dim, padding included."""
    stored = size_of(encoded.codes, 1, like)
    bits = format_named(encoding.format).bits
    for target, factor in ((operator.mul, 8), (operator.floordiv, bits)):
        if isinstance(stored, int):
            stored = target(stored, factor)
        else:
            stored = create(like.graph, target, (stored, factor), like)
    return stored


def split_off(source: fx.Node, dim: int, contracted_dim: int, count: int, like: fx.Node) -> Split:
    """The `count` indices along dim whose rms is largest, apart from the rest."""
    graph = source.graph
    wide = cast(source, torch.float32, like)
    square = create(graph, aten.mul.Tensor, (wide, wide), like)
    energy = create(graph, aten.sum.dim_IntList, (square, [1 - dim]), like)
    size = size_of(source, dim, like)
    is_number = isinstance(size, int)
    most = min(count, size) if is_number else create(graph, torch.sym_min, (count, size), like)
    top = create(graph, aten.topk.default, (energy, most), like)
    indices = create(graph, operator.getitem, (top, 1), like)
    view = source
    if contracted_dim == 0:
        view = create(graph, aten.permute.default, (source, [1, 0]), like)
    axis = 0 if dim != contracted_dim else 1
    where = [indices] if axis == 0 else [None, indices]
    values = create(graph, aten.index.Tensor, (view, where), like)
    is_rest = create(graph, aten.ne.Scalar, (energy, -1.0), like)  # all, NaN included
    false = scalar(False, torch.bool, like)
    is_rest = create(graph, aten.index_put.default, (is_rest, [indices], false), like)
    is_rest = create(graph, aten.unsqueeze.default, (is_rest, 1 - dim), like)
    zero = scalar(0.0, tensor(source).dtype, like)
    rest = create(graph, aten.where.self, (is_rest, source, zero), like)
    return Split(rest, axis, indices, values)


def packs_mask(mask: fx.Node, dim: int) -> bool:
    size = tensor(mask).shape[dim]
    return isinstance(size, int) and size % 8 == 0


def packed_mask(mask: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    """bool -> uint8, eight neighbors along dim to the byte."""
    graph, size = mask.graph, tensor(mask).shape[dim]
    total = None
    for bit in range(8):
        part = create(graph, aten.slice.Tensor, (mask, dim, bit, size, 8), like)
        part = create(graph, convert, (part, torch.uint8), like)
        part = create(graph, aten.mul.Tensor, (part, 1 << bit), like)
        total = part if total is None else create(graph, aten.add.Tensor, (total, part), like)
    assert total is not None
    return total


def unpacked_mask(packed: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    """The inverse of `packed_mask`."""
    graph = packed.graph
    bits = []
    for bit in range(8):
        part = create(graph, aten.bitwise_and.Scalar, (packed, 1 << bit), like)
        part = create(graph, aten.ne.Scalar, (part, 0), like)
        bits.append(create(graph, aten.unsqueeze.default, (part, dim + 1), like))
    joined = create(graph, aten.cat.default, (bits, dim + 1), like)
    shape = [size_of(packed, each, like) for each in (0, 1)]
    shape[dim] = tensor(packed).shape[dim] * 8
    return create(graph, aten.reshape.default, (joined, shape), like)
