"""Bases as types: which rotation each dim of each node carries, inferred from the inputs and never
stored. Knows nothing of plans; changes nothing.

A basis is a tuple with a Rotation, a projection (r, b) or None per dim; a node with several outputs
has a tuple of bases. `BASIS_RULES` has one row per op that understands a rotated input. An op
without a row takes plain inputs only.
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

Mixed = Rotation | tuple[int, int] | None
Basis = tuple[Mixed, ...]
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
    x, dim, text = arguments(node)[:3]
    basis = list(bases[x])
    _require(basis[dim] is None, node, f"rotates dim {dim}, which is rotated already")
    basis[dim] = Rotation.parse(text)
    return tuple(basis)


def _unrotate(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    x, dim, text = arguments(node)[:3]
    basis = list(bases[x])
    rotation = Rotation.parse(text)
    _require(basis[dim] == rotation, node, f"un-rotates {text}, but finds {basis[dim]}")
    basis[dim] = None
    return tuple(basis)


def _project(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    x, dim, kept, block = arguments(node)
    basis = list(bases[x])
    _require(basis[dim] is None, node, f"projects dim {dim}, which is rotated")
    basis[dim] = kept, block
    return tuple(basis)


def _unproject(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    x, dim, kept, block, _ = arguments(node)
    basis = list(bases[x])
    _require(basis[dim] == (kept, block), node, f"takes back {kept} of {block} from {basis[dim]}")
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
    out: list[Mixed] = [None] * tensor(node).dim()
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
    lhs, rhs, bias = arguments(node)[:3]
    (lhs_kept, lhs_contracted), (rhs_kept, rhs_contracted) = bases[lhs], bases[rhs]
    _require(
        lhs_contracted == rhs_contracted,
        node,
        f"contracts {lhs_contracted} with {rhs_contracted}",
    )
    _require(bias is None or not rhs_kept, node, "adds a plain bias to a rotated output")
    return (lhs_kept, rhs_kept)


def _mm(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    """mm(a[M, C], b[C, N]), or addmm with a bias [N] before them."""
    bias, a, b = arguments(node) if node.target is aten.addmm.default else (None, *arguments(node))
    (kept, left), (right, other_kept) = bases[a], bases[b]
    _require(left == right, node, f"contracts {left} with {right}")
    plain_bias = bias is None or not _rotated(bases[bias])
    _require(plain_bias and (bias is None or not other_kept), node, "adds a bias across bases")
    return (kept, other_kept)


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


def _codes_basis(basis: Basis, text: str, dim: int, node: fx.Node) -> tuple[Basis, Basis]:
    """Of codes, whose contracted dim comes last, and scales."""
    encoding = Encoding.parse(text)
    kept, contracted = basis[1 - dim], basis[dim]
    own = encoding.rotation or encoding.tokens_kept
    _require(own is None or contracted is None, node, "rotates and quantizes a rotated tensor")
    return (kept, own or contracted), (None,)


def _quantize(node: fx.Node, bases: dict[fx.Node, Any]) -> tuple[Basis, ...]:
    x, *encodings = arguments(node)
    target: Any = node.target
    dims = {ops.quantize_rows: (1,), ops.quantize_columns: (0,), ops.quantize_both: (1, 0)}
    found = zip(encodings, dims[target], strict=True)
    return tuple(b for text, dim in found for b in _codes_basis(bases[x], text, dim, node))


def _encode(node: fx.Node, bases: dict[fx.Node, Any]) -> tuple[Basis, ...]:
    x, _, text, dim, _ = arguments(node)
    return (*_codes_basis(bases[x], text, dim, node), (None,))


def _decode(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    codes, dim = arguments(node)[0], arguments(node)[4]
    kept, contracted = bases[codes]
    return (kept, contracted) if dim == 1 else (contracted, kept)


def _encoded_mm(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    a, b, bias = (arguments(node)[index] for index in (0, 3, 6))
    (kept, left), (other_kept, right) = bases[a], bases[b]
    _require(left == right, node, f"contracts {left} with {right}")
    _require(bias is None or not other_kept, node, "adds a plain bias to a rotated output")
    return (kept, other_kept)


def _where(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    """where(mask, x, other): a mask is in x's basis by construction, a number in any."""
    mask, x, other = arguments(node)
    foreign = _rotated(bases[mask]) or _rotated(bases[other])
    _require(not foreign, node, "chooses between tensors in different bases")
    return bases[x] if _rotated(bases[x]) else _plain(node)


def _of_plain(node: fx.Node, bases: dict[fx.Node, Any]) -> Any:
    rotated = any(_rotated(bases.get(source)) for source in node.all_input_nodes)
    _require(not rotated, node, "takes a rotated tensor")
    return _plain(node)


def _quantize_chain(node: fx.Node, bases: dict[fx.Node, Any]) -> tuple[Basis, ...]:
    inputs, _, *layouts, values = arguments(node)
    for source in inputs:
        _require(not _rotated(bases[source]), node, f"takes {source} in a rotated one")
    results: list[Basis] = []
    for rows, columns, kept in zip(*layouts, values, strict=True):
        for text, dim in ((rows, 1), (columns, 0)):
            results += _codes_basis((None, None), text, dim, node) if text else ()
        results += [(None, None)] if kept else []
    return tuple(results)


def _getitem(node: fx.Node, bases: dict[fx.Node, Any]) -> Any:
    source, index = arguments(node)
    basis = bases.get(source)
    return basis[index] if isinstance(basis, tuple) else _plain(node)


def _scaled_mm(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    first = 0 if node.target is ops.scaled_mm else 2
    a, b, _, _, bias = arguments(node)[first : first + 5]
    (kept, left), (other_kept, right) = bases[a], bases[b]
    _require(left == right, node, f"contracts {left} with {right}")
    _require(bias is None or not other_kept, node, "adds a plain bias to a rotated output")
    return (kept, other_kept)


def _measured(node: fx.Node, bases: dict[fx.Node, Any]) -> Basis:
    result, lhs, rhs, _, left, right, _ = arguments(node)
    same = bases[lhs][1] == bases[rhs][1]
    _require(same, node, f"contracts {bases[lhs][1]} with {bases[rhs][1]}")
    outers = [Rotation.parse(text) if text else None for text in (left, right)]
    kept = bases[lhs][0], bases[rhs][0]
    expected = tuple(outer or own for outer, own in zip(outers, kept, strict=True))
    _require(bases[result] == expected, node, f"expects {expected}, but finds {bases[result]}")
    return expected


BASIS_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Any]], Any]] = {
    ops.rotate: _rotate,
    ops.unrotate: _unrotate,
    ops.project: _project,
    ops.unproject: _unproject,
    ops.gemm: _gemm,
    ops.gemm_observed: _gemm,
    aten.mm.default: _mm,
    aten.addmm.default: _mm,
    ops.encode: _encode,
    ops.decode: _decode,
    ops.encoded_mm: _encoded_mm,
    ops.measured: _measured,
    ops.next_seed: _of_plain,
    ops.clip_mask: _of_plain,
    aten.where.self: _where,
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
    torch.ops.prims.convert_element_type.default: _same_through,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
}
