"""Save activations in few bits: between the forward and the backward of a partitioned graph, codes
and scales in place of high-precision tensors. The forward's results are unchanged; only what the
backward makes of the saved tensors carries their rounding.

    forward saves t, backward reads t -> forward saves pack(t), backward reads unpack(codes, scale)
    saved views that cover their base -> the base saved once, its views taken in the backward

Left alone: what is not floating point, small tensors, inputs, what the user gets, what a softmax
reads or makes (a rounding error there becomes a factor), what the backward divides by or compares,
what the user's checkpointing saves, outliers kept aside, and what opaque operators read, except
attention's operands at `min`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from hadagraph import ops
from hadagraph.graph import CASTS, SAVED, arguments, aten, create, storage_of, tensor
from hadagraph.packing import EIGHT, FOUR, Packing, pack, packing_for, unpack
from hadagraph.recompute import is_cheap, is_view, numel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_ELEMENTS = 1024
MATMULS = (
    *(aten.mm.default, aten.addmm.default, aten.bmm.default),
    *(*ops.QUANTIZERS, ops.encode, ops.rotate, ops.project),
)
SOFTMAX = (aten.amax.default, torch.ops.prims.prepare_softmax_online.default)
POLES = {
    *(aten.rsqrt, aten.sqrt, aten.log, aten.log1p, aten.log2, aten.log10, aten.tan),
    *(aten.digamma, aten.polygamma, aten.lgamma, aten.erfinv),
    *(aten.asin, aten.acos, aten.acosh, aten.atanh, aten.logit),
}
STEPS = {
    *(aten.sign, aten.sgn, aten.signbit, aten.copysign),
    *(aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac),
    *(aten.remainder, aten.fmod, aten.floor_divide),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
    *(aten.logical_not, aten.logical_and, aten.logical_or, aten.logical_xor),
}
DIVIDED_IN_STEPS = (aten.div.Tensor_mode, aten.div.Scalar_mode)
ATTENTION_OPERANDS = {"query", "key", "value", "out"}  # of its backward in aten
NEAR = 8  # pointwise steps; a softmax or a norm takes fewer


def compress_saved(
    forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, memory: str
) -> tuple[str, ...]:
    """Rewrite both graphs of torch's partitioner in place. `memory` is the option, `balanced` or
    `min`. Returns the names of the forward's tensors that are now saved as codes."""
    _save_bases(forward, backward, num_fwd_outputs)
    returned = _returned(forward)
    kept = {storage_of(node) for node in _tensors(returned[:num_fwd_outputs])}
    kept |= {storage_of(node) for node in _tensors(forward.find_nodes(op="placeholder"))}
    done = []
    for node, read in _saved(forward, backward, num_fwd_outputs):
        packing = None if storage_of(node) in kept else _packing(node, read, memory)
        if packing is not None:
            _save_packed(node, read, packing, num_fwd_outputs)
            done.append(node.name)
    forward.lint()
    backward.lint()
    return tuple(done)


def _saved(
    forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int
) -> list[tuple[fx.Node, fx.Node]]:
    """The saved tensors, as (node of the forward, placeholder of the backward)."""
    placeholders = {node.name: node for node in backward.find_nodes(op="placeholder")}
    saved = dict.fromkeys(_tensors(_returned(forward)[num_fwd_outputs:]))
    pairs = [(node, placeholders[node.name]) for node in saved if node.name in placeholders]
    return [(node, read) for node, read in pairs if read.users]


def _packing(node: fx.Node, read: fx.Node, memory: str) -> Packing | None:
    """How a saved tensor can be packed without harm; None leaves it alone."""
    value = tensor(node)
    if value.dtype not in DTYPES or value.dim() < 2 or numel(value) < MIN_ELEMENTS:
        return None
    if any("ac_graph_id" in near.meta for near in (node, *node.users)) or _is_near_softmax(node):
        return None
    if _is_outliers(node) or _is_delicate(read):
        return None
    readers = _readers(read)
    opaque = [pair for pair in readers if not _is_ordinary(pair[1])]
    if opaque and not (memory == "min" and all(_is_attention_operand(*pair) for pair in opaque)):
        return None
    multiplied = bool(opaque) or any(reader.target in MATMULS for _, reader in readers)
    coarse = memory == "min" and not multiplied and not _is_reduced(node)
    return packing_for(value, FOUR if coarse else EIGHT)


def _is_outliers(node: fx.Node) -> bool:
    """Whether these are rows or columns that a recipe keeps aside for their precision."""
    return SAVED in node.meta and node.target is aten.index.Tensor


def _is_delicate(read: fx.Node) -> bool:
    """Whether the backward divides by the tensor, compares it, or takes a function of it with a
    pole or a step: rounding a small value to zero would then cost more than that value. What is
    summed or multiplied as a matrix first, as in a norm, is not followed."""
    seen, pending = {read}, [read]
    while pending:
        node = pending.pop()
        for user in node.users:
            if _is_pole_or_step(user) or _is_below(user, node):
                return True
            if user not in seen and is_cheap(user):
                seen.add(user)
                pending.append(user)
    return False


def _is_pole_or_step(node: fx.Node) -> bool:
    """Whether a node's function has a pole or a step, as a cast to whole numbers has."""
    if node.target in CASTS:
        return not tensor(node).dtype.is_floating_point
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in DIVIDED_IN_STEPS or packet in POLES | STEPS


def _is_below(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the divisor, or the base of a power below one or unknown."""
    if user.target is aten.reciprocal.default:
        return not _is_positive(node)
    if user.target is aten.div.Tensor:
        return arguments(user)[1] is node and not _is_positive(node)
    if user.target is aten.pow.Tensor_Scalar:
        return float(arguments(user)[1]) < 1
    return user.target is aten.pow.Tensor_Tensor


def _is_positive(node: fx.Node) -> bool:
    """Whether a value stays away from zero whatever it is made of, as SiLU's 1 + exp(-x)."""
    if node.target is aten.add.Tensor:
        left, right = arguments(node)[:2]
        return isinstance(right, (int, float)) and right > 0 and _is_positive(left)
    return node.target in (aten.exp.default, aten.sigmoid.default)


def _is_near_softmax(node: fx.Node) -> bool:
    """Whether pointwise steps lead from the tensor to a maximum along a dim, or from one to it."""
    around = _around(node, forwards=True) + _around(node, forwards=False)
    return any(other.target in SOFTMAX for other in around)


def _is_reduced(node: fx.Node) -> bool:
    """Whether pointwise steps lead to a sum, as in a norm. Its input stays in 8 bits: the error is
    in the operand of every GEMM that reads the norm's output."""
    return any(torch.Tag.reduction in _tags(other) for other in _around(node, forwards=True))


def _around(node: fx.Node, *, forwards: bool) -> list[fx.Node]:
    """The nodes that at most NEAR cheap ones lead to (or come from), the ends included."""
    found: dict[fx.Node, None] = {}
    edge = [node]
    for _ in range(NEAR):
        reached = [n for e in edge for n in (e.users if forwards else e.all_input_nodes)]
        edge = [n for n in reached if n not in found and is_cheap(n)]
        found.update(dict.fromkeys(reached))
    return list(found)


def _tags(node: fx.Node) -> Collection[torch.Tag]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()


def _readers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(view of the tensor, who reads it) for every user that is no view itself."""
    found, pending = [], [node]
    while pending:
        operand = pending.pop()
        found += [(operand, user) for user in operand.users if not is_view(user)]
        pending += [user for user in operand.users if is_view(user)]
    return found


def _is_ordinary(node: fx.Node) -> bool:
    """Whether an op takes a rounded operand no worse than a sum or a product of matrices does."""
    if is_cheap(node) or torch.Tag.reduction in _tags(node):
        return True
    return node.target in (*MATMULS, aten.cat.default, aten.clone.default)


def _is_attention_operand(operand: fx.Node, reader: fx.Node) -> bool:
    """Whether the reader is attention's backward and the operand its queries, keys, values or
    output: not the log-sum-exp, nor a mask, for whose -inf there is no code."""
    target = reader.target
    if not isinstance(target, torch._ops.OpOverload) or "attention" not in target.__name__:
        return False
    given = zip(target._schema.arguments, arguments(reader), strict=False)
    names = {argument.name for argument, value in given if value is operand}
    return bool(names) and names <= ATTENTION_OPERANDS


def _save_packed(node: fx.Node, read: fx.Node, packing: Packing, num_fwd_outputs: int) -> None:
    """Save codes and scale in place of the tensor, and unpack them before the first reader."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    packed = pack(node, packing, after)
    for part, suffix in zip(packed, ("", "_scale"), strict=True):
        part.name = f"{node.name}_{packing.code.bits}bit{suffix}"
    _save_instead(node, packed, num_fwd_outputs)
    with read.graph.inserting_before(read):
        codes, scale = (_placeholder(read.graph, part) for part in packed)
    read.replace_all_uses_with(unpack(codes, scale, packing, min(read.users)))
    read.graph.erase_node(read)


def _save_instead(node: fx.Node, instead: Sequence[fx.Node], num_fwd_outputs: int) -> None:
    """Let the forward return other nodes where it saves `node`."""
    if node.meta.get("saved_tensor_with_no_vc_check", False):  # such ones stand together
        for each in instead:
            each.meta["saved_tensor_with_no_vc_check"] = True
    output = node.graph.output_node()
    returned = _returned(node.graph)
    position = returned.index(node, num_fwd_outputs)
    for key in ("desc", "output_stack_traces"):
        described = output.meta.get(key)
        if described is not None and len(described) == len(returned):
            described = list(described)
            described[position : position + 1] = [described[position]] * len(instead)
            output.meta[key] = described
    returned[position : position + 1] = instead
    output.args = (tuple(returned),)


def _placeholder(graph: fx.Graph, like: fx.Node) -> fx.Node:
    node = graph.placeholder(like.name)
    node.meta = dict(like.meta)
    return node


def _save_bases(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> None:
    """Where saved tensors are views that together cover their base, save the base instead."""
    groups: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node, read in _saved(forward, backward, num_fwd_outputs):
        groups[_base(node)].append((node, read))
    returned = _returned(forward)[:num_fwd_outputs]
    for base, saved in groups.items():
        views = {node: _views(node, base) for node, _ in saved}
        covered = sum(numel(tensor(node)) for node in views)
        takes_only_base = all(_is_static(view) for chain in views.values() for view in chain)
        if base.op == "placeholder" or base in returned or not takes_only_base:
            continue
        if list(views) != [base] and covered >= numel(tensor(base)):
            _save_base(base, saved, views, num_fwd_outputs)


def _save_base(
    base: fx.Node,
    saved: Sequence[tuple[fx.Node, fx.Node]],
    views: dict[fx.Node, list[fx.Node]],
    num_fwd_outputs: int,
) -> None:
    reads = dict(saved)
    if base not in reads:
        node, read = saved[0]
        _save_instead(node, (base, node), num_fwd_outputs)
        with read.graph.inserting_before(read):
            reads[base] = _placeholder(read.graph, base)
    for node, read in saved:
        if node is not base:
            _save_instead(node, (), num_fwd_outputs)
            _view_again(reads[base], views[node], read)


def _view_again(base: fx.Node, views: Sequence[fx.Node], read: fx.Node) -> None:
    """Take views of a base in the backward, in place of the placeholder of the last of them."""
    value = base
    with base.graph.inserting_before(min(read.users)):
        for view in views:
            value = create(base.graph, view.target, (value, *arguments(view)[1:]), read)
    read.replace_all_uses_with(value)
    base.graph.erase_node(read)


def _base(node: fx.Node) -> fx.Node:
    while is_view(node):
        node = arguments(node)[0]
    return node


def _views(node: fx.Node, base: fx.Node) -> list[fx.Node]:
    """The views that lead from a base to a node, in order."""
    chain = []
    while node is not base:
        chain.append(node)
        node = arguments(node)[0]
    return chain[::-1]


def _is_static(view: fx.Node) -> bool:
    """Whether a view has no other node among its arguments, such as a symbolic size, and does not
    depend on the strides or the bits of its base."""
    if view.target in (aten.as_strided.default, aten.view.dtype):
        return False
    return len(view.all_input_nodes) == 1 and not view.kwargs


def _returned(graph: fx.Graph) -> list[Any]:
    return list(arguments(graph.output_node())[0])


def _tensors(nodes: Any) -> list[fx.Node]:
    return [
        node
        for node in nodes
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
    ]
