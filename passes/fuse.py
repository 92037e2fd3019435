"""Let each quantizing op of a partitioned graph compute the pointwise chain that makes its input,
where that moves fewer bytes. Changes no value beyond what a compiler that fuses the same pointwise
ops changes: between them nothing is rounded to the graph's dtype, and on a GPU functions such as
silu may be approximated differently, in the last bits of fp32.

    quantize_both(view(mul(silu(g), u))) -> quantize_chain([g, u], "...; mul %3 %1; out ...")
    two quantizers of chains that read the same matrix -> one quantize_chain with two outputs
    a chain's value that others read too -> one more output of the quantize_chain
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from torch import fx

from hadagraph import compat, ops
from hadagraph.graph import arguments, aten, calls, create, getitems, outputs_of, tensor
from hadagraph.producers import (
    EMIT_RULES,
    RESHAPES,
    Producers,
    Read,
    ReadChain,
    chain_of,
    grow,
    is_dense,
    matrix_behind,
)
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Region
from hadagraph.traffic import Layouts, weigh

GEMMS = (ops.scaled_mm, ops.scaled_mm_measured)
MAX_MATRICES = 4
MAX_OUTPUTS = 3
"""What a chain's kernel keeps in registers: more matrices or outputs leave no room for a tile."""


def fuse(graph: fx.Graph, *, producers: bool = True, rounded: bool = False) -> tuple[Region, ...]:
    """Fuse producers in place; returns the regions.

    producers: False only makes the regions. rounded: chains round every node to its dtype in the
    graph, as by running the graph op by op.
    """
    if not producers:
        return tuple(
            Region(node.name, _gemms(node), reason="option fuse=False")
            for node in calls(graph, ops.QUANTIZERS)
        )
    fuser = _Fuser(graph, rounded)
    fuser.run()
    return fuser.regions()


def _gemms(node: fx.Node) -> tuple[str, ...]:
    readers = (reader for output in node.users for reader in output.users)
    return tuple(dict.fromkeys(r.name for r in readers if r.target in GEMMS))


@dataclass(frozen=True)
class Candidate:
    """A `quantize_chain` that could be, and the bytes for one element of its matrices that it and
    the kernels in its place would move."""

    outputs: tuple[Layouts, ...]
    found: Producers
    kept: tuple[bool, ...]
    made: ReadChain
    unfused: int
    fused: int

    @property
    def saved(self) -> int:
        return self.unfused - self.fused


@dataclass
class _Fuser:
    """Chooses and makes the `quantize_chain`s of one graph."""

    graph: fx.Graph
    rounded: bool
    weighed: dict[str, Region] = field(default_factory=dict)

    def run(self) -> None:
        """Join outputs where that saves more than each group alone, then fuse every group."""
        groups = dict(enumerate(self._units().values()))
        plans = {number: self._candidate(group) for number, group in groups.items()}
        joined: dict[tuple[int, int], Candidate | str] = {}

        def gain(pair: tuple[int, int]) -> int:
            """What a join saves beyond its parts; negative unless it is worth it. One that saves
            nothing may with a third."""
            if pair not in joined:
                joined[pair] = self._candidate([*groups[pair[0]], *groups[pair[1]]])
            together = joined[pair]
            if not isinstance(together, Candidate) or together.saved < 0:
                return -1
            return together.saved - sum(_saved(plans[part]) for part in pair)

        while True:
            best = max(_sharing(groups, plans), key=gain, default=None)
            if best is None or gain(best) < 0:
                break
            number = len(plans)
            plans[number] = joined[best]
            groups[number] = [*groups.pop(best[0]), *groups.pop(best[1])]
        for number in sorted(groups, key=lambda number: -_saved(plans[number])):
            self._apply(groups[number])

    def regions(self) -> tuple[Region, ...]:
        """Every quantizing op that is left, in graph order."""
        return tuple(
            self.weighed[node.name]
            for node in calls(self.graph, (*ops.QUANTIZERS, ops.quantize_chain))
        )

    def _units(self) -> dict[fx.Node, list[Layouts]]:
        """The matrices that are quantized, each with its quantizers."""
        units: dict[fx.Node, list[Layouts]] = {}
        for node in calls(self.graph, ops.QUANTIZERS):
            unit = units.setdefault(matrix_behind(node), [])
            if not any(layouts.takes(node) for layouts in unit):
                layouts = Layouts(matrix_behind(node))
                layouts.takes(node)
                unit.append(layouts)
        return units

    def _apply(self, outputs: list[Layouts]) -> None:
        """Fuse if that still saves bytes; else note why not."""
        candidate = self._candidate(outputs)
        if isinstance(candidate, Candidate) and candidate.saved > 0:
            self._rewrite(candidate)
            return
        for node in _quantizers(outputs):
            region = Region(node.name, _gemms(node), reason="saves no bytes")
            if isinstance(candidate, Candidate):
                region = replace(region, unfused=candidate.unfused, fused=candidate.fused)
            else:
                region = replace(region, reason=candidate)
            self.weighed[node.name] = region

    def _candidate(self, outputs: Sequence[Layouts]) -> Candidate | str:
        """The chain that could make these outputs, or why none can."""
        if len(outputs) > MAX_OUTPUTS:
            return f"more than {MAX_OUTPUTS} encodings of one layout"
        roots = tuple(output.root for output in outputs)
        sinks = _sinks(_quantizers(outputs))
        found = grow(roots, sinks)
        if found is None:
            return _made_by(roots)
        if len(found.matrices()) > MAX_MATRICES:
            found = grow(roots, sinks, MAX_MATRICES)
        assert found is not None
        if not found.matrices():
            return "the chain reads no matrix"
        if len(found.matrices()) > MAX_MATRICES:
            return f"the chain reads more than {MAX_MATRICES} matrices"
        made = chain_of(found, rounded=self.rounded)
        refusal = _unreadable(made)
        if refusal is not None:
            return refusal
        dead = found.dead()
        kept = tuple(
            index == roots.index(root)
            and any(user not in dead and user not in sinks for user in root.users)
            for index, root in enumerate(roots)
        )
        blocked = {r for r, keep in zip(roots, kept, strict=True) if keep}
        blocked.update(_quantizers(outputs))
        if _reaches([read.node for read in made.inputs], blocked):
            return "the chain reads what depends on its own codes"
        if any(k and _sizes(root) is None for k, root in zip(kept, roots, strict=True)):
            return "others read the matrix, and several of its sizes are symbolic"
        unfused, fused = weigh(outputs, found, kept, dead)
        return Candidate(tuple(outputs), found, kept, made, unfused, fused)

    def _rewrite(self, candidate: Candidate) -> None:
        graph, outputs = self.graph, candidate.outputs
        quantizers = _quantizers(outputs)
        first = min(quantizers)
        columns = tensor(candidate.found.roots[0]).shape[-1]
        with graph.inserting_before(first):
            inputs = [_as_input(graph, read, columns, first) for read in candidate.made.inputs]
            texts = [output.encodings for output in outputs]
            chain = str(candidate.made.chain)
            rows, cols = [list(each) for each in zip(*texts, strict=True)]
            args = (inputs, chain, rows, cols, list(candidate.kept))
            node = create(graph, ops.quantize_chain, args, first)
        results = iter(outputs_of(graph, node, len(node.meta["val"])))
        gone = candidate.found.dead().union(candidate.found.sinks)
        for output, keep in zip(outputs, candidate.kept, strict=True):
            for quantizer, index in _places(output):
                for offset in (0, 1):
                    result, old = next(results), getitems(quantizer).get(index + offset)
                    if old is not None:
                        old.replace_all_uses_with(result)
            if keep:
                _hand_out(output.root, next(results), gone)
        producers = tuple(n.name for n in sorted(candidate.found.inside))
        late = any(first < read.node for read in candidate.made.inputs)
        _erase(graph, gone)
        if late or any(candidate.kept):  # readers of a value may stand before its quantizer
            compat.stable_topological_sort(graph)
        self.weighed[node.name] = Region(
            node.name,
            _gemms(node),
            producers,
            chain,
            unfused=candidate.unfused,
            fused=candidate.fused,
        )


def _unreadable(made: ReadChain) -> str | None:
    """Why the kernel of a chain could not read its inputs."""
    for read in made.inputs:
        if read.shape == MATRIX and not isinstance(tensor(read.node).shape[-1], int):
            return "the number of columns is symbolic"
        if not is_dense(read.node, any_row_stride=read.shape == MATRIX):
            return f"the chain reads {read.node}, which has gaps"
    return None


def _saved(plan: Candidate | str) -> int:
    return max(plan.saved, 0) if isinstance(plan, Candidate) else 0


def _sharing(
    groups: dict[int, list[Layouts]], plans: dict[int, Candidate | str]
) -> list[tuple[int, int]]:
    """Pairs of groups whose chains read a matrix in common and that one kernel could make."""
    readers: dict[fx.Node, list[int]] = {}
    for number in groups:
        plan = plans[number]
        if isinstance(plan, Candidate):
            for matrix in plan.found.matrices():
                readers.setdefault(matrix, []).append(number)
    pairs = {pair: None for group in readers.values() for pair in combinations(group, 2)}
    return [(a, b) for a, b in pairs if len(groups[a]) + len(groups[b]) <= MAX_OUTPUTS]


def _quantizers(outputs: Sequence[Layouts]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(node for output in outputs for node in output.quantizers))


def _sinks(quantizers: Sequence[fx.Node]) -> set[fx.Node]:
    """The quantizers, and the views before them that nothing else reads."""
    sinks = set(quantizers)
    for quantizer in quantizers:
        node, root = arguments(quantizer)[0], matrix_behind(quantizer)
        while node is not root and all(user in sinks for user in node.users):
            sinks.add(node)
            node = arguments(node)[0]
    return sinks


def _places(output: Layouts) -> list[tuple[fx.Node, int]]:
    """For each layout wanted, its quantizer and where that has the layout's codes."""
    places = [] if output.rows is None else [(output.rows, 0)]
    if output.columns is not None:
        places.append((output.columns, 2 if output.columns is output.rows else 0))
    return places


def _made_by(roots: Sequence[fx.Node]) -> str:
    node = roots[0]
    if node.op == "placeholder":
        return "a graph input"
    if node.target in RESHAPES:
        return f"made by {node.target}, which regroups columns"
    what = "of operands that no chain reads" if node.target in EMIT_RULES else "which no chain does"
    return f"made by {node.target}, {what}"


def _reaches(starts: Sequence[fx.Node], goals: set[fx.Node]) -> bool:
    """Whether some start is computed from some goal."""
    earliest = min(goals)
    seen, pending = set(starts), list(starts)
    while pending:
        node = pending.pop()
        if node in goals:
            return True
        new = {n for n in node.all_input_nodes if not n < earliest} - seen
        seen |= new
        pending.extend(new)
    return False


def _as_input(graph: fx.Graph, read: Read, columns: int, like: fx.Node) -> fx.Node:
    """The tensor in the shape that the chain wants: [T, K], [T], [K] or []."""
    sizes = {MATRIX: [-1, columns], ROWS: [-1], COLUMNS: [columns], SCALAR: []}[read.shape]
    if tensor(read.node).dim() == len(sizes):
        return read.node
    return create(graph, aten.reshape.default, (read.node, sizes), like)


def _sizes(node: fx.Node) -> list[int] | None:
    """The shape as an argument of reshape; None if more than one size is symbolic."""
    sizes = [size if isinstance(size, int) else -1 for size in tensor(node).shape]
    return None if sizes.count(-1) > 1 else sizes


def _hand_out(root: fx.Node, value: fx.Node, gone: Collection[fx.Node]) -> None:
    """Let the readers of `root`, but for those that go, read the chain's value."""
    if tensor(root).dim() != 2:
        with root.graph.inserting_after(value):
            value = create(root.graph, aten.reshape.default, (value, _sizes(root)), root)
    root.replace_all_uses_with(
        value, delete_user_cb=lambda user: user not in gone, propagate_meta=False
    )


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in sorted(nodes, reverse=True):
        for output in list(node.users):
            if output.target is operator.getitem and not output.users:
                graph.erase_node(output)
        graph.erase_node(node)
