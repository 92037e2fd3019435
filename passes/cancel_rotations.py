"""Cancel rotations that meet their inverse, and leave one rotation a tensor however many users.
Exact.

    rotate(permute(x), d)      -> permute(rotate(x, d'))        and so for unrotate
    rotate(view(x), last)      -> view(rotate(x, last))         only to reach an inverse
    rotate(unrotate(x))        -> x                             where nothing was cut off
    unrotate(rotate(x))        -> x
    rotate(x), rotate(x)       -> one rotate(x)
    unrotate(x) + unrotate(y)  -> unrotate(x + y)               through equal views, too
"""

from __future__ import annotations

from typing import Any

from torch import fx

from hadagraph import ops
from hadagraph.basis import keeps_last_dim
from hadagraph.graph import TRANSPOSES, VIEWS, arguments, aten, create, tensor
from hadagraph.rewrite import apply_rules, merge_duplicates
from hadagraph.rotation import Rotation

ROTATIONS = (ops.rotate, ops.unrotate)


def cancel_rotations(graph: fx.Graph) -> None:
    """Rewrite in place to a fixed point."""
    rules: dict[Any, Any] = {
        ops.rotate: (cancel_after_unrotate, through_permute, through_view),
        ops.unrotate: (cancel_after_rotate, through_permute, through_view),
        aten.add.Tensor: (sum_of_unrotated, sum_of_viewed),
    }
    changed = 1
    while changed:
        changed = apply_rules(graph, rules)
        changed += merge_duplicates(graph, (*TRANSPOSES, *VIEWS, *ROTATIONS))
        graph.eliminate_dead_code()


def cancel_after_unrotate(node: fx.Node) -> fx.Node | None:
    """rotate(unrotate(x, d, R), d, R) -> x, if the un-rotation cut no padding off."""
    inner, dim, rotation = arguments(node)[:3]
    if not _is_inverse(node, ops.unrotate):
        return None
    source = arguments(inner)[0]
    before, after = tensor(source).shape[dim], tensor(inner).shape[dim]
    block = Rotation.parse(rotation).block
    if not (isinstance(after, int) and before == after and after % block == 0):
        return None
    return source


def cancel_after_rotate(node: fx.Node) -> fx.Node | None:
    """unrotate(rotate(x, d, R), d, R, size) -> x, if size is x's own."""
    if not _is_inverse(node, ops.rotate):
        return None
    rotated, dim = arguments(node)[:2]
    source = arguments(rotated)[0]
    if str(tensor(source).shape[dim]) != str(tensor(node).shape[dim]):
        return None
    return source


def _is_inverse(node: fx.Node, target: Any) -> bool:
    inner = arguments(node)[0]
    assert isinstance(inner, fx.Node)
    return inner.target is target and arguments(inner)[1:3] == arguments(node)[1:3]


def through_permute(node: fx.Node) -> fx.Node | None:
    """rotate(permute(x, order), d) -> permute(rotate(x, order[d]), order)."""
    moved, dim, *rest = arguments(node)
    assert isinstance(moved, fx.Node) and isinstance(dim, int)
    if moved.target not in TRANSPOSES or moved.kwargs:
        return None
    source = arguments(moved)[0]
    rank = tensor(moved).dim()
    rotated = create(node.graph, node.target, (source, _order(moved, rank)[dim], *rest), node)
    return create(node.graph, moved.target, (rotated, *arguments(moved)[1:]), node)


def _order(node: fx.Node, rank: int) -> list[int]:
    """Where each dim of a transposed tensor comes from."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in arguments(node)[1]]
    first, second = (0, rank - 1) if node.target is aten.t.default else arguments(node)[1:]
    order[int(first)], order[int(second)] = order[int(second)], order[int(first)]
    return order


def through_view(node: fx.Node) -> fx.Node | None:
    """rotate(view(x), last) -> view(rotate(x, last)), if an inverse waits behind the views.

    Elsewhere the rotation stays beside its GEMM, where it becomes part of a quantizer.
    """
    moved, dim, *rest = arguments(node)
    assert isinstance(moved, fx.Node) and isinstance(dim, int)
    if moved.target not in VIEWS or moved.kwargs or dim != tensor(moved).dim() - 1:
        return None
    if tensor(node).shape[-1] != tensor(moved).shape[-1] or not _inverse_behind_views(node):
        return None
    source = arguments(moved)[0]
    assert isinstance(source, fx.Node)
    last = tensor(source).dim() - 1
    rotated = create(node.graph, node.target, (source, last, *rest), node)
    return create(node.graph, moved.target, (rotated, arguments(moved)[1]), node)


def _inverse_behind_views(node: fx.Node) -> bool:
    """Whether behind views that keep the last dim whole stands this rotation's inverse."""
    inverse = ops.unrotate if node.target is ops.rotate else ops.rotate
    source = arguments(node)[0]
    while isinstance(source, fx.Node) and source.target in VIEWS:
        inner = arguments(source)[0]
        if not keeps_last_dim(inner, source):
            return False
        source = inner
    if not isinstance(source, fx.Node) or source.target is not inverse:
        return False
    dim, rotation = arguments(source)[1:3]
    return bool(dim == tensor(source).dim() - 1 and rotation == arguments(node)[2])


def sum_of_unrotated(node: fx.Node) -> fx.Node | None:
    """unrotate(x, ...) + unrotate(y, ...) -> unrotate(x + y, ...), read by nobody else."""
    if node.kwargs or len(node.args) != 2:
        return None
    left, right = arguments(node)
    if not (_is_own(left, (ops.unrotate,)) and _is_own(right, (ops.unrotate,))):
        return None
    (x, *how), (y, *other) = arguments(left), arguments(right)
    if how != other or left is right or not _are_alike(x, y):
        return None
    total = create(node.graph, aten.add.Tensor, (x, y), node)
    return create(node.graph, ops.unrotate, (total, *how), node)


def sum_of_viewed(node: fx.Node) -> fx.Node | None:
    """view(unrotate(x, last)) + view(unrotate(y, last)) -> view(unrotate(x + y, last)), the views
    equal: gradients of one input that several matrices multiply."""
    if node.kwargs or len(node.args) != 2:
        return None
    left, right = arguments(node)
    if not (_is_own(left, VIEWS) and _is_own(right, VIEWS)) or left is right:
        return None
    (x, shape), (y, other) = arguments(left), arguments(right)
    both = _is_own(x, (ops.unrotate,)) and _is_own(y, (ops.unrotate,))
    if not both or shape != other or left.kwargs or right.kwargs or x is y:
        return None
    if arguments(x)[1:] != arguments(y)[1:] or not _are_alike(arguments(x)[0], arguments(y)[0]):
        return None
    total = create(node.graph, aten.add.Tensor, (x, y), node)
    return create(node.graph, left.target, (total, shape), node)


def _is_own(node: Any, targets: tuple[Any, ...]) -> bool:
    """Whether an argument is a call of one of these that has one reader."""
    return isinstance(node, fx.Node) and node.target in targets and len(node.users) == 1


def _are_alike(x: fx.Node, y: fx.Node) -> bool:
    left, right = tensor(x), tensor(y)
    return (str(left.shape), left.dtype) == (str(right.shape), right.dtype)
