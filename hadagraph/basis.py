"""Bases as types: which rotation each dim of each node carries, inferred from the inputs and never
stored. Knows nothing of plans; changes nothing.

A basis is a tuple with a Rotation or None per dim; a node with several outputs has a tuple of
bases. `BASIS_RULES` has one row per op that understands a rotated input. An op without a row takes
plain inputs only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hadagraph import ops
from hadagraph.formats import Encoding
from hadagraph.graph import arguments, aten, tensor
from hadagraph.rotation import Rotation

Basis = tuple[Rotation | None, ...]
Bases = Basis | tuple[Basis, ...]


class BasisError(TypeError):
    """A node whose inputs are in bases that it cannot take: the rewrite broke the maths there."""


def infer_bases(graph: fx.Graph) -> dict[fx.Node, Any]:
    """The basis of every tensor node. BasisError names the first node that does not type-check,
    and any graph output that is not in the plain basis."""
    bases: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                _require(not _rotated(bases.get(source)), source, "is a graph output, but rotated")
        elif node.op == "call_function" and node.target in BASIS_RULES:
            bases[node] = BASIS_RULES[node.target](node, bases)
        else:
            for source in node.all_input_nodes:
                _require(not _rotated(bases.get(source)), node, f"takes {source} in a rotated one")
            bases[node] = _plain(node)
    return bases


def _require(condition: bool, node: fx.Node, message: str) -> None:
    if not condition:
        raise BasisError(f"basis: {node.name} ({node.target}) {message}")


def _rotated(basis: Any) -> bool:
    if isinstance(basis, tuple):
        return any(_rotated(part) for part in basis)
    return basis is not None


def _plain(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (None,) * value.dim()
    if isinstance(value, (tuple, list)):
        return tuple((None,) * v.dim() if isinstance(v, torch.Tensor) else None for v in value)
    return None


def _rotate(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    x, dim, text = arguments(node)
    basis = list(bases[x])
    _require(basis[dim] is None, node, f"rotates dim {dim}, which is rotated already")
    basis[dim] = Rotation.parse(text)
    return tuple(basis)


def _unrotate(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    x, dim, text, _ = arguments(node)
    basis = list(bases[x])
    rotation = Rotation.parse(text)
    _require(basis[dim] == rotation, node, f"un-rotates {text}, but finds {basis[dim]}")
    basis[dim] = None
    return tuple(basis)


def _permute(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    basis = bases[arguments(node)[0]]
    rank = len(basis)
    if node.target is aten.t.default:
        return basis[::-1]
    if node.target is aten.transpose.int:
        order = list(range(rank))
        first, second = (int(dim) % rank for dim in arguments(node)[1:])
        order[first], order[second] = order[second], order[first]
    else:
        order = [int(dim) % rank for dim in arguments(node)[1]]
    return tuple(basis[dim] for dim in order)


def _view(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    source = arguments(node)[0]
    basis = bases[source]
    out: list[Rotation | None] = [None] * tensor(node).dim()
    if not _rotated(basis):
        return tuple(out)
    _require(
        not _rotated(basis[:-1]) and keeps_last_dim(source, node),
        node,
        "regroups a rotated dim",
    )
    out[-1] = basis[-1]
    return tuple(out)


def keeps_last_dim(source: fx.Node, view: fx.Node) -> bool:
    """Whether a view leaves the last dim whole (by symbolic equality; adds no guard)."""
    before, after = tensor(source).shape[-1], tensor(view).shape[-1]
    if isinstance(before, int) and isinstance(after, int):
        return before == after
    return str(before) == str(after)


def _gemm(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    lhs, rhs, bias = arguments(node)
    (lhs_kept, lhs_contracted), (rhs_kept, rhs_contracted) = bases[lhs], bases[rhs]
    _require(
        lhs_contracted == rhs_contracted,
        node,
        f"contracts {lhs_contracted} with {rhs_contracted}",
    )
    _require(bias is None or not rhs_kept, node, "adds a plain bias to a rotated output")
    return (lhs_kept, rhs_kept)


def _same_through(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    return bases[arguments(node)[0]]


def _add(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    terms = [term for term in arguments(node)[:2] if isinstance(term, fx.Node)]
    if not any(_rotated(bases[term]) for term in terms):
        return _plain(node)
    _require(len(terms) == 2, node, "adds a number to a rotated tensor")
    left, right = terms
    same = bases[left] == bases[right] and tensor(left).shape == tensor(right).shape
    _require(same, node, "adds tensors in different bases")
    return bases[left]


def _codes_basis(text: Any) -> tuple[Basis, Basis]:
    return (None, Encoding.parse(text).rotation), (None,)


def _quantize(node: fx.Node, bases: dict[fx.Node, Any]) -> tuple[Basis, ...]:
    x, *encodings = arguments(node)
    _require(not _rotated(bases[x]), node, "rotates and quantizes a rotated tensor")
    return tuple(basis for text in encodings for basis in _codes_basis(text))


def _quantize_chain(node: fx.Node, bases: dict[fx.Node, Any]) -> tuple[Basis, ...]:
    inputs, _, *layouts, values = arguments(node)
    for source in inputs:
        _require(not _rotated(bases[source]), node, f"takes {source} in a rotated one")
    results: list[Basis] = []
    for rows, columns, kept in zip(*layouts, values, strict=True):
        results += [basis for text in (rows, columns) if text for basis in _codes_basis(text)]
        results += [(None, None)] if kept else []
    return tuple(results)


def _getitem(node: fx.Node, bases: dict[fx.Node, Any]) -> Any:
    source, index = arguments(node)
    basis = bases.get(source)
    return basis[index] if isinstance(basis, tuple) else _plain(node)


def _scaled_mm(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    first = 0 if node.target is ops.scaled_mm else 2
    a, b = arguments(node)[first : first + 2]
    left, right = bases[a][1], bases[b][1]
    _require(left == right, node, f"contracts {left} with {right}")
    return (None, None)


BASIS_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Any]], Any]] = {
    ops.rotate: _rotate,
    ops.unrotate: _unrotate,
    ops.gemm: _gemm,
    ops.quantize_rows: _quantize,
    ops.quantize_columns: _quantize,
    ops.quantize_both: _quantize,
    ops.quantize_chain: _quantize_chain,
    ops.scaled_mm: _scaled_mm,
    ops.scaled_mm_measured: _scaled_mm,
    operator.getitem: _getitem,
    aten.permute.default: _permute,
    aten.t.default: _permute,
    aten.transpose.int: _permute,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.neg.default: _same_through,
    aten.clone.default: _same_through,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
}
