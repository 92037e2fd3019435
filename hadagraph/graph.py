"""FX nodes made and read in one place: creation with complete metadata, layout chains, forward and
backward, module paths, GEMM operands. Knows nothing of recipes or plans."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hadagraph import compat, ops

aten = torch.ops.aten
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
ALIASES = (aten.alias.default, aten.detach.default)
CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
SAVED = "hadagraph_saved"
"""The key in the metadata of what a forward makes for the backward only: the partitioner is told to
make it in the forward (see `hadagraph.partition`)."""


@dataclass(frozen=True)
class Operand:
    """One operand of a normal-form GEMM: the 2-D tensor behind its transposes, and which of that
    tensor's dims the GEMM contracts."""

    base: fx.Node
    contracted_dim: int


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The node's positional arguments; which of them are nodes is the operator's business."""
    return node.args


def create(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call_function node at the graph's insertion point, with `meta["val"]` computed under the
    fake mode and the partitioner's and debugger's metadata taken from `like`."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda argument: argument.meta["val"])
    fake_mode = compat.detect_fake_mode(_tensors(values))
    if fake_mode is None:
        node.meta["val"] = target(*values)
    else:
        with fake_mode:
            node.meta["val"] = ops.FAKE_OF.get(target, target)(*values)
    inherit_meta(node, like)
    return node


def inherit_meta(node: fx.Node, like: fx.Node) -> None:
    """Copy what the partitioner, activation checkpointing and stack traces read."""
    for key in compat.INHERITED_META:
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def seed_for(node: fx.Node) -> fx.Node:
    """The node that holds the seed of a node's graph and device, made after the inputs if there is
    none yet. It is part of the forward, is saved for the backward, and is never made again."""
    graph, device = node.graph, tensor(node).device
    for made in graph.find_nodes(op="call_function", target=ops.next_seed):
        if arguments(made)[0] == device:
            return made
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        seed = graph.call_function(ops.next_seed, (device,))
    seed.meta["val"] = tensor(node).new_empty((1,), dtype=torch.int64)
    seed.meta["partitioner_tag"] = "is_forward"
    seed.meta[SAVED] = True  # if forward and backward each drew one, they would differ
    return seed


def size_of(node: fx.Node, dim: int, like: fx.Node) -> Any:
    """A tensor's size along a dim: a number, or a node where it is symbolic."""
    size = tensor(node).shape[dim]
    if isinstance(size, int):
        return size
    return create(node.graph, aten.sym_size.int, (node, dim), like)


def outputs_of(graph: fx.Graph, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """The getitem nodes of a multi-output node, created after it."""
    results = []
    with graph.inserting_after(node):
        for index in reversed(range(count)):
            results.append(create(graph, operator.getitem, (node, index), node))
    return tuple(reversed(results))


def getitems(node: fx.Node) -> dict[int, fx.Node]:
    """The outputs of a multi-output node that something reads, by number."""
    users = (user for user in node.users if user.target is operator.getitem)
    return {arguments(user)[1]: user for user in users}


def tensor(node: fx.Node) -> torch.Tensor:
    """The fake tensor a node stands for."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is not a tensor"
    return value


def storage_of(node: fx.Node) -> int:
    """An identifier of the memory that a tensor lies in; views share it."""
    return tensor(node).untyped_storage()._cdata


def transposed_source(node: fx.Node) -> fx.Node | None:
    """t/transpose/permute([1, 0]) of a matrix -> the matrix; None for anything else."""
    if node.op != "call_function" or node.target not in TRANSPOSES or node.kwargs:
        return None
    source = arguments(node)[0]
    if not isinstance(source, fx.Node) or tensor(source).dim() != 2:
        return None
    if node.target is aten.permute.default:
        order = [int(dim) % 2 for dim in arguments(node)[1]]
        return source if order == [1, 0] else None
    if node.target is aten.transpose.int:
        dims = {int(dim) % 2 for dim in arguments(node)[1:]}
        return source if dims == {0, 1} else None
    return source


def operand(node: fx.Node) -> Operand:
    """The operand that a GEMM argument [kept, contracted] stands for."""
    contracted_dim = 1
    while (source := transposed_source(node)) is not None:
        node, contracted_dim = source, 1 - contracted_dim
    return Operand(node, contracted_dim)


def inner_rotation(node: fx.Node) -> fx.Node | None:
    """The rotation along the contracted dim that a GEMM argument [kept, contracted] ends in. None
    where there is none, or where it met its inverse: then the operand is rotated already."""
    seen = operand(node)
    inner = seen.base.target is ops.rotate and arguments(seen.base)[1] == seen.contracted_dim
    return seen.base if inner else None


def layout_source(node: fx.Node) -> fx.Node:
    """The node behind any chain of views, transposes and dtype casts."""
    while (
        node.op == "call_function"
        and node.target in (*TRANSPOSES, *VIEWS, *CASTS)
        and isinstance(arguments(node)[0], fx.Node)
    ):
        node = arguments(node)[0]
    return node


def backward_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The transitive users of the tangents: what the partitioner must put in the backward."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(source in backward for source in node.all_input_nodes):
            backward.add(node)
    return frozenset(backward)


def gemms(graph: fx.Graph) -> Iterator[fx.Node]:
    """The normal-form GEMM nodes, in graph order."""
    return iter([n for n in graph.nodes if n.op == "call_function" and n.target is ops.gemm])


def calls(graph: fx.Graph, targets: Sequence[Any]) -> list[fx.Node]:
    """The call_function nodes with one of these targets, in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


_MODULE_STEP = re.compile(r"\['([^']+)'\]|\[?(\d+)\]?|([A-Za-z_]\w*)")


# How a frame reaches the model: a local, a global, a closure's cell, a bound method.
_ROOT = re.compile(
    r"^(?:G\['__import_[^']*'\]\.\w+|[LG]\['[^']+'\])?"
    r"(?:\.?(?:__closure__\[\d+\]\.cell_contents|__self__|_orig_mod))*\.?"
)


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module a node comes from, or "" when none is known."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    innermost = list(stack.values())[-1][0]
    path = _ROOT.sub("", str(innermost))
    steps = [a or b or c for a, b, c in _MODULE_STEP.findall(path)]
    return ".".join(step for step in steps if step not in ("_modules", "_orig_mod"))


def replace(node: fx.Node, replacement: fx.Node) -> None:
    """Let every user of `node` use `replacement` instead, and erase `node`."""
    node.replace_all_uses_with(replacement, propagate_meta=False)
    node.graph.erase_node(node)
