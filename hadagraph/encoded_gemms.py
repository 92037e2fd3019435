"""Emits the nodes of GEMMs that the 8-bit kernels don't take: general encodings, projections,
outliers kept aside, clip masks, operands made of the forward's codes. Decides nothing; what the
backward gets is placed in the forward and marked with `graph.SAVED`.

    gemm(lhs, rhs, bias) -> encoded_mm(encode(lhs), encode(rhs), bias)
    with outliers        -> encoded_mm of what is left + high-precision products with the outliers
    masked               -> where(mask, gradient in the rotated basis, 0)
    bf16                 -> mm(project(lhs), project(rhs)^T)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from hadagraph import ops
from hadagraph.encoded_nodes import (
    Encoded,
    Split,
    between,
    cast,
    packed_mask,
    packs_mask,
    scalar,
    split_off,
    stored_size,
    unpacked_mask,
)
from hadagraph.graph import (
    arguments,
    aten,
    create,
    operand,
    outputs_of,
    seed_for,
    size_of,
    tensor,
)
from hadagraph.operands import stream_name
from hadagraph.philox import stream_number
from hadagraph.plan import Decision, OperandPlan
from hadagraph.recompute import Recomputation
from hadagraph.rotation import PerStep
from hadagraph.sides import Handover, Side, as_operand, recomputable, sides_of


class EncodedGemms:
    """Emits the general GEMMs of one graph, one encoding a tensor, dim and stream."""

    def __init__(
        self,
        graph: fx.Graph,
        decisions: dict[fx.Node, Decision],
        recomputation: Recomputation,
        measure: bool,
    ) -> None:
        self.graph = graph
        self.decisions = decisions
        self.measure = measure
        named = {node.name: node for node in decisions}
        self.sides = {node: sides_of(node, d, named) for node, d in decisions.items()}
        sources = {side.source for both in self.sides.values() for side in both}
        self.handover = Handover(recomputation, sources)
        self.made: dict[Any, Any] = {}
        self.by_gemm: dict[fx.Node, list[fx.Node]] = {}

    @property
    def recomputed(self) -> set[str]:
        """The names of GEMMs for which the backward makes something of the forward again."""
        return self.handover.recomputed

    def emit(self, node: fx.Node) -> fx.Node:
        """What replaces a GEMM. In graph order, with the insertion point before the node."""
        last = node.prev
        result = self._emit(node)
        self.by_gemm[node] = list(between(last, node))
        return result

    def _emit(self, node: fx.Node) -> fx.Node:
        left, right = self.sides[node]
        bias = arguments(node)[2]
        dtype = tensor(node).dtype
        splits = [self._split(side) for side in (left, right)]
        projected = any(side.plan.outer_tokens_kept for side in (left, right))
        late = projected or any(splits) or self.measure
        wide = torch.float32 if any(splits) or self.measure else dtype
        result = self._product(left, right, splits, None if late else bias, wide)
        for dim, side in enumerate((left, right)):
            result = self._unprojected(result, dim, side)
        for split, side, other in ((splits[0], left, right), (splits[1], right, left)):
            if split is not None:
                result = self._with_outliers(result, split, side, other, splits)
        if self.measure:
            result = self._measured(result, node)
        mask = self._mask(node)
        if mask is not None:
            result = self._masked(result, mask, node)
        if late and bias is not None:
            result = create(self.graph, aten.add.Tensor, (result, bias), node)
        return cast(result, dtype, node)

    def replaced(self, node: fx.Node, result: fx.Node) -> None:
        """Have later GEMMs read what a GEMM of the graph has become."""
        for gemm, (left, right) in self.sides.items():
            if node in (left.source, right.source):
                self.sides[gemm] = _reading(left, node, result), _reading(right, node, result)
        self.handover.replaced(node, result)

    def sources(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """A GEMM and the tensors that its operands are made of."""
        left, right = self.sides[node]
        return node, left.source, right.source

    def made_for(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """All that was made for a GEMM and for none before it."""
        return tuple(self.by_gemm[node])

    # ------------------------------------------------------------------ the product

    def _product(
        self,
        left: Side,
        right: Side,
        splits: list[Split | None],
        bias: fx.Node | None,
        dtype: torch.dtype,
    ) -> fx.Node:
        node = left.gemm
        if not left.plan.is_quantized:
            a, b = (as_operand(self._projected(side), side, node) for side in (left, right))
            b = create(self.graph, aten.permute.default, (b, [1, 0]), node)
            if bias is None:
                return cast(create(self.graph, aten.mm.default, (a, b), node), dtype, node)
            return create(self.graph, aten.addmm.default, (bias, a, b), node)
        one, other = (
            self._encoded(side, None if split is None else split.rest)
            for side, split in zip((left, right), splits, strict=True)
        )
        texts = str(left.plan.encoding), str(right.plan.encoding)
        args = (*one.nodes, *other.nodes, bias, *texts, dtype)
        product = create(self.graph, ops.encoded_mm, args, node)
        product.meta["hadagraph_site"] = node.name
        return product

    def _encoded(self, side: Side, rest: fx.Node | None = None) -> Encoded:
        """The operand's codes; `rest` is what is encoded of it, where outliers are apart."""
        encoding = side.plan.encoding
        source = rest or self._outer_projected(side, self._read(side))
        stream = 0
        if encoding.rounding == "stochastic":
            site = self.decisions[side.gemm].site
            stream = stream_number(f"{stream_name(site)}.{side.named}")
        key = ("encode", source, side.contracted_dim, str(encoding), stream)
        if key not in self.made:
            with self.handover.place(side, source) as like:
                seed = seed_for(side.gemm) if encoding.needs_seed else None
                args = (source, seed, str(encoding), side.contracted_dim, stream)
                node = recomputable(create(self.graph, ops.encode, args, like))
                self.made[key] = Encoded(*outputs_of(self.graph, node, 3))
        encoded: Encoded = self.made[key]
        made = (arguments(encoded.codes)[0], *encoded.nodes)
        self.handover.hand_over(side, source, made, encoded.nodes)
        return encoded

    def _projected(self, side: Side) -> fx.Node:
        """The operand of a high-precision GEMM."""
        source = self._outer_projected(side, self._read(side))
        if side.plan.tokens_kept is None:
            return source
        return self._project(side, source, side.contracted_dim, side.plan.tokens_kept)

    def _outer_projected(self, side: Side, source: fx.Node) -> fx.Node:
        if side.plan.outer_tokens_kept is None:
            return source
        return self._project(side, source, side.kept_dim, side.plan.outer_tokens_kept)

    def _project(
        self, side: Side, source: fx.Node, dim: int, tokens_kept: tuple[int, int]
    ) -> fx.Node:
        key = ("project", source, dim, tokens_kept)
        if key not in self.made:
            with self.handover.place(side, source) as like:
                args = (source, dim, *tokens_kept)
                self.made[key] = recomputable(create(self.graph, ops.project, args, like))
        found: fx.Node = self.made[key]
        self.handover.hand_over(side, source, (found,), (found,))
        return found

    def _unprojected(self, result: fx.Node, dim: int, side: Side) -> fx.Node:
        if side.plan.outer_tokens_kept is None:
            return result
        size = size_of(side.source, side.kept_dim, side.gemm)
        args = (result, dim, *side.plan.outer_tokens_kept, size)
        return create(self.graph, ops.unproject, args, side.gemm)

    def _read(self, side: Side) -> fx.Node:
        """The tensor that an operand is made of: its value, or the forward's codes decoded."""
        forward = side.forward
        if side.plan.reads != "forward" or forward not in self.sides:
            return side.source
        theirs = next(s for s in self.sides[forward] if s.named == side.named)
        key = ("decode", forward, side.named)
        if key not in self.made:
            encoded = self._encoded(theirs)
            again = Side(side.gemm, theirs.source, theirs.contracted_dim, theirs.plan, "", forward)
            made = (arguments(encoded.codes)[0], *encoded.nodes)
            self.handover.hand_over(again, theirs.source, made, encoded.nodes)
            size = size_of(side.source, theirs.contracted_dim, side.gemm)
            dtype = tensor(side.source).dtype
            text = str(theirs.plan.encoding)
            args = (*encoded.nodes, text, theirs.contracted_dim, size, dtype)
            self.made[key] = create(self.graph, ops.decode, args, side.gemm)
            self.handover.backward.add(self.made[key])
        found: fx.Node = self.made[key]
        return found

    # ------------------------------------------------------------------ clip masks

    def _mask(self, node: fx.Node) -> fx.Node | None:
        """Where the forward clipped the operand that this GEMM is the gradient of, in the GEMM's
        orientation; None where it did not, and where an override took the GEMM's operands from
        elsewhere than the forward's codes."""
        decision = self.decisions[node]
        forward = self.sides[node][0].forward
        if forward is None or forward not in self.sides:
            return None
        wanted = {"grad_input": "input", "grad_weight": "weight"}[decision.site.role]
        theirs = next(s for s in self.sides[forward] if s.named == wanted)
        is_in_its_basis = any(side.plan.reads == "forward" for side in self.sides[node])
        if not (theirs.plan.clip_masked and is_in_its_basis):
            return None
        mask = self._clip_mask(theirs, node)
        is_transposed = decision.site.lhs != "grad_output"
        if (theirs.contracted_dim == 1) == is_transposed:
            mask = create(self.graph, aten.permute.default, (mask, [1, 0]), node)
        return mask

    def _clip_mask(self, theirs: Side, node: fx.Node) -> fx.Node:
        """bool, in the forward operand's own orientation; eight to the byte where it is saved."""
        encoding = theirs.plan.encoding
        key = ("mask", theirs.source, theirs.contracted_dim, str(encoding))
        again = Side(node, theirs.source, theirs.contracted_dim, theirs.plan, "", theirs.gemm)
        dim = theirs.contracted_dim
        if key not in self.made:
            with self.handover.place(again, theirs.source) as like:
                seed = seed_for(node) if encoding.needs_seed else None
                args = (theirs.source, seed, str(encoding), dim)
                mask = recomputable(create(self.graph, ops.clip_mask, args, like))
                saved = like is not node and packs_mask(mask, dim)
                kept = packed_mask(mask, dim, like) if saved else mask
            self.handover.hand_over(again, theirs.source, (mask,), (kept,))
            self.made[key] = unpacked_mask(kept, dim, node) if saved else kept
        found: fx.Node = self.made[key]
        return found

    def _masked(self, result: fx.Node, mask: fx.Node, node: fx.Node) -> fx.Node:
        zero = scalar(0.0, tensor(result).dtype, node)
        return create(self.graph, aten.where.self, (mask, result, zero), node)

    # ------------------------------------------------------------------ outliers

    def _split(self, side: Side) -> Split | None:
        """The operand's tensor without its outliers, and these."""
        plan, source = side.plan, self._read(side)
        if not plan.outliers or not plan.is_quantized:
            return None
        dim = side.kept_dim if plan.outlier_axis == "kept" else side.contracted_dim
        key = ("split", source, dim, plan.outliers, side.contracted_dim)
        if key not in self.made:
            with self.handover.place(side, source) as like:
                self.made[key] = split_off(source, dim, side.contracted_dim, plan.outliers, like)
        split: Split = self.made[key]
        self.handover.hand_over(side, source, (), (split.indices, split.values))
        return split

    def _with_outliers(
        self,
        result: fx.Node,
        split: Split,
        side: Side,
        other: Side,
        splits: list[Split | None],
    ) -> fx.Node:
        """The result and the product of one operand's outliers with the other operand: the left
        one's with all of the right one, the right one's with what is left of the left one."""
        node = side.gemm
        is_left = side is self.sides[node][0]
        if not is_left and splits[0] is not None:
            factor = as_operand(splits[0].rest, other, node)
        else:
            factor = self._whole(other, splits[is_left])
        if split.axis == 1:
            factor = create(self.graph, aten.index.Tensor, (factor, [None, split.indices]), node)
        pair = (split.values, factor) if is_left else (factor, split.values)
        b = create(self.graph, aten.permute.default, (pair[1], [1, 0]), node)
        part = create(self.graph, aten.mm.default, (pair[0], b), node)
        part = cast(part, torch.float32, node)
        if split.axis == 1:
            return create(self.graph, aten.add.Tensor, (result, part), node)
        where = [split.indices] if is_left else [None, split.indices]
        old = create(self.graph, aten.index.Tensor, (result, where), node)
        total = create(self.graph, aten.add.Tensor, (old, part), node)
        return create(self.graph, aten.index_put.default, (result, where, total), node)

    def _plans(self, node: fx.Node) -> tuple[OperandPlan, OperandPlan]:
        decision = self.decisions[node]
        assert decision.lhs is not None and decision.rhs is not None
        return decision.lhs, decision.rhs

    def _whole(self, side: Side, split: Split | None) -> fx.Node:
        """An operand in high precision, [kept, contracted]: its tensor or, where the backward has
        only the forward's codes of it, these decoded and its outliers put back."""
        source, node = self._read(side), side.gemm
        if not self.handover.is_saved(side, source):
            return as_operand(source, side, node)
        encoded = self._encoded(side, None if split is None else split.rest)
        encoding, dim = side.plan.encoding, side.contracted_dim
        dtype, size = tensor(source).dtype, size_of(source, dim, node)
        length = size if encoding.rotation is None else stored_size(encoded, encoding, node)
        args = (*encoded.nodes, str(encoding), dim, length, dtype)
        value = create(self.graph, ops.decode, args, node)
        if encoding.rotation is not None:
            per_step = isinstance(encoding.rotation.signs, PerStep)
            seed = (seed_for(node),) if per_step else ()
            args = (value, dim, str(encoding.rotation), size, *seed)
            value = create(self.graph, ops.unrotate, args, node)
        value = as_operand(value, side, node)
        if split is None:
            return value
        where = [split.indices] if split.axis == 0 else [None, split.indices]
        return create(self.graph, aten.index_put.default, (value, where, split.values), node)

    def _measured(self, result: fx.Node, node: fx.Node) -> fx.Node:
        """The result, compared with the product of the operands before anything was done."""
        operands, outers = [], []
        given = arguments(node)[:2]
        # Where a rotation met its inverse, both operands are compared as they are.
        is_plain = all(
            side.plan.rotation == decided.rotation
            for side, decided in zip(self.sides[node], self._plans(node), strict=True)
        )
        for argument, side in zip(given, self.sides[node], strict=True):
            base = operand(argument).base
            while is_plain and base.target is ops.rotate:
                base = arguments(base)[0]
            operands.append(as_operand(base, side, node))
            outer = side.plan.outer if is_plain else None
            outers.append("" if outer is None else str(outer))
        seed = seed_for(node) if any("per_step" in outer for outer in outers) else None
        site = self.decisions[node].site
        args = (result, *operands, seed, *outers, f"{site.name}:{site.role}")
        return create(self.graph, ops.measured, args, node)


def _reading(side: Side, old: fx.Node, new: fx.Node) -> Side:
    return replace(side, source=new) if side.source is old else side
