"""Tensors as few-bit codes with block scales, written in aten ops that Inductor fuses with what
makes and what reads them. Knows nothing of which tensors are saved, or why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hadagraph.compat import static_hint
from hadagraph.graph import aten, create, tensor

convert = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Code:
    """Codes of `bits` (4 or 8) bits, `rint(x / scale)`, with one bf16 scale for each `block`
    elements along the dim that lies contiguous. In 4 bits the element of the largest magnitude is
    -8 whatever its sign, which gains 1.1 dB over -7..7."""

    bits: int
    block: int

    @property
    def least(self) -> int:
        return -127 if self.bits == 8 else -8

    @property
    def most(self) -> int:
        return 127 if self.bits == 8 else 7


# SQNR of normal data: 43 dB and 21 dB.
EIGHT, FOUR = Code(8, 128), Code(4, 32)


@dataclass(frozen=True)
class Packing:
    """How one tensor is packed: its code, the order of its dims in memory, its dtype."""

    code: Code
    order: tuple[int, ...]
    dtype: torch.dtype


def packing_for(value: torch.Tensor, code: Code) -> Packing | None:
    """The packing of a tensor with this code, its block shortened to what divides the dim that lies
    contiguous. None where no dim does, or it is symbolic or has no such factor."""
    order = _order_in_memory(value)
    size = value.shape[order[-1]] if order else None
    if order is None or not isinstance(size, int):
        return None
    block = min(size & -size, code.block)
    if block < 16 and code.bits == 8 and size <= 4 * code.block:
        block = size
    return Packing(Code(code.bits, block), order, value.dtype) if block >= 16 else None


def pack(node: fx.Node, packing: Packing, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """x[..., K] -> codes[..., K] int8, or [..., K / 2] uint8 with two codes a byte, and scales
    [..., K / block] bf16; dims in memory order.

    A block of zeros has scale 0; inf or NaN makes the scale so, and what is unpacked NaN.
    """
    code = packing.code
    with node.graph.inserting_before(before):
        emit = _Emit(node.graph, node)
        x = emit(aten.permute.default, node, list(packing.order))
        *outer, size = emit.sizes(x)
        blocks = emit.float(emit(aten.view.default, x, [*outer, size // code.block, code.block]))
        # Inductor computes on what a cast to bf16 would have rounded, but rounds to take its bits;
        # codes of another scale than the saved one would be off by up to one.
        rounded = emit(convert, _scale(emit, blocks, code), torch.bfloat16)
        bits = emit(aten.view.dtype, rounded, torch.int16)
        scale = emit(aten.view.dtype, bits, torch.bfloat16)
        # No bf16 number is -1e-30, so nothing is divided by 0.
        divisor = emit(aten.add.Tensor, emit.float(scale), 1e-30)
        codes = emit(aten.mul.Tensor, blocks, emit(aten.reciprocal.default, divisor))
        codes = emit(aten.clamp_min.default, emit(aten.round.default, codes), code.least)
        codes = emit(aten.clamp_max.default, codes, code.most)
        if code.bits == 4:
            codes, size = emit(convert, _pair(emit, codes, code), torch.uint8), size // 2
        else:
            codes = emit(convert, codes, torch.int8)
        codes = emit(aten.view.default, codes, [*outer, size])
        return codes, emit(aten.squeeze.dim, scale, -1)


def unpack(codes: fx.Node, scale: fx.Node, packing: Packing, before: fx.Node) -> fx.Node:
    """The tensor that codes and scales stand for, in its dtype and strides but for gaps."""
    code = packing.code
    with codes.graph.inserting_before(before):
        emit = _Emit(codes.graph, before)
        *outer, size = emit.sizes(codes)
        stored = code.block * code.bits // 8
        values = emit.float(emit(aten.view.default, codes, [*outer, size // stored, stored]))
        if code.bits == 4:
            values, size = _unpair(emit, values), size * 2
        factor = emit(aten.unsqueeze.default, emit.float(scale), -1)
        values = emit(aten.mul.Tensor, values, factor)
        if packing.dtype != torch.float32:
            values = emit(convert, values, packing.dtype)
        values = emit(aten.view.default, values, [*outer, size])
        back = sorted(range(len(packing.order)), key=packing.order.__getitem__)
        return emit(aten.permute.default, values, back)


def _order_in_memory(value: torch.Tensor) -> tuple[int, ...] | None:
    """The dims from outermost to innermost; None for a vector, for repeated elements, and where the
    innermost has gaps."""
    strides = [static_hint(stride) for stride in value.stride()]
    order = sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))
    repeated = any(not s and size != 1 for s, size in zip(strides, value.shape, strict=True))
    if len(order) < 2 or repeated or strides[order[-1]] != 1:
        return None
    return tuple(order)


class _Emit:
    """Nodes at the graph's insertion point, with the metadata of `like` but its recompute tag."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph = graph
        self.like = like

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = create(self.graph, target, args, self.like)
        node.meta.pop("recompute", None)
        return node

    def sizes(self, node: fx.Node) -> list[Any]:
        """The shape of a tensor, with nodes for symbolic sizes."""
        return [
            size if isinstance(size, int) else self(aten.sym_size.int, node, dim)
            for dim, size in enumerate(tensor(node).shape)
        ]

    def float(self, node: fx.Node) -> fx.Node:
        if tensor(node).dtype == torch.float32:
            return node
        return self(convert, node, torch.float32)


def _scale(emit: _Emit, blocks: fx.Node, code: Code) -> fx.Node:
    """Per block the element of the largest magnitude, divided by the code it gets."""
    if code.bits == 8:
        amax = emit(aten.amax.default, emit(aten.abs.default, blocks), [-1], True)
        return emit(aten.mul.Tensor, amax, 1 / code.most)
    highest = emit(aten.amax.default, blocks, [-1], True)
    lowest = emit(aten.amin.default, blocks, [-1], True)
    is_positive = emit(aten.gt.Tensor, highest, emit(aten.neg.default, lowest))
    largest = emit(aten.where.self, is_positive, highest, lowest)
    return emit(aten.mul.Tensor, largest, 1 / code.least)


def _pair(emit: _Emit, codes: fx.Node, code: Code) -> fx.Node:
    """codes[..., block] -> [..., block / 2]: the first half in the low four bits, offset by 8; in
    fp32, which is exact here."""
    half = code.block // 2
    low = emit(aten.slice.Tensor, codes, -1, 0, half)
    high = emit(aten.slice.Tensor, codes, -1, half, code.block)
    return emit(aten.add.Tensor, emit(aten.add.Tensor, low, emit(aten.mul.Tensor, high, 16)), 136)


def _unpair(emit: _Emit, pairs: fx.Node) -> fx.Node:
    """The inverse of _pair."""
    high = emit(aten.floor.default, emit(aten.mul.Tensor, pairs, 1 / 16))
    low = emit(aten.sub.Tensor, pairs, emit(aten.mul.Tensor, high, 16))
    return emit(aten.sub.Tensor, emit(aten.cat.default, [low, high], -1), 8)
