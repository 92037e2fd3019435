"""Device memory traffic of quantizers and the pointwise ops before them, with and without fusion,
in bytes for one element of the matrix, codes left out. Rewrites nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from hadagraph import ops
from hadagraph.formats import PER_TENSOR, Encoding
from hadagraph.graph import arguments
from hadagraph.producers import UNARY, Producers, width


@dataclass
class Layouts:
    """One output of a chain: the matrix, and the quantizer of each of its layouts."""

    root: fx.Node
    rows: fx.Node | None = None
    columns: fx.Node | None = None

    @property
    def quantizers(self) -> tuple[fx.Node, ...]:
        found = (node for node in (self.rows, self.columns) if node is not None)
        return tuple(dict.fromkeys(found))

    def takes(self, node: fx.Node) -> bool:
        """Give the quantizer its place, if that is free."""
        rows = node.target is not ops.quantize_columns
        columns = node.target is not ops.quantize_rows
        if (rows and self.rows) or (columns and self.columns):
            return False
        self.rows = node if rows else self.rows
        self.columns = node if columns else self.columns
        return True

    @property
    def encodings(self) -> tuple[str, str]:
        """Of rows and columns, "" where not wanted."""
        rows = "" if self.rows is None else arguments(self.rows)[1]
        columns = "" if self.columns is None else arguments(self.columns)[-1]
        return rows, columns

    @property
    def reads(self) -> int:
        """How often the quantizers read the matrix: per-row scales need one pass over whole rows;
        other scales a pass for the maxima and one that writes codes. Both layouts share their
        passes unless their rotations differ, or whole rows are rotated faster alone."""
        rows, columns = (Encoding.parse(text) if text else None for text in self.encodings)
        alone = 0 if rows is None else 2 if rows.granularity == PER_TENSOR else 1
        if columns is None:
            return alone
        together = len(self.quantizers) == 1 and rows is not None
        if not together or rows is None or rows.rotation not in (None, columns.rotation):
            return alone + 2
        per_tensor = PER_TENSOR in (rows.granularity, columns.granularity)
        return 2 if per_tensor or columns.rotation is None else alone + 2


def _fused_reads(output: Layouts) -> tuple[int, int] | None:
    """How often a chain's kernels need the output: together with others for the maxima of columns,
    and alone. None if they must read its value, as for one scale a tensor."""
    rows, columns = (Encoding.parse(text) if text else None for text in output.encodings)
    if any(each is not None and each.granularity == PER_TENSOR for each in (rows, columns)):
        return None
    return int(columns is not None), (rows is not None) + (columns is not None)


def weigh(
    outputs: Sequence[Layouts], found: Producers, kept: Sequence[bool], dead: Collection[fx.Node]
) -> tuple[int, int]:
    """Bytes for one element without and with fusion, codes left out.

    Unfused, a compiler's kernel reads the chain's matrices, except those that some other pointwise
    op or reduction has it read anyway, and writes each output, which its quantizers then read.
    Fused, whole rows need one pass over the matrices and columns two, that for the maxima shared
    by all outputs; or the first pass writes the outputs, which later ones read. An output that
    others read too is written; those of them that the compiler would have fused with it now read
    it.
    """
    matrices = found.matrices()
    made = [width(output.root) for output in outputs]
    new_reads = sum(width(node) for node in matrices if not _read_by_loops(node, found, dead))
    unfused = new_reads + sum(
        size * (1 + output.reads) for size, output in zip(made, outputs, strict=True)
    )
    read = sum(map(width, matrices))
    written = sum(size for size, keep in zip(made, kept, strict=True) if keep)
    passes = [_fused_reads(output) for output in outputs]
    after = [
        output.reads if each is None else each[1]
        for output, each in zip(outputs, passes, strict=True)
    ]
    fused = read + sum(size * (1 + count) for size, count in zip(made, after, strict=True))
    if None not in passes:
        again = max(each[0] for each in passes if each) + sum(after)
        fused = min(fused, again * read + written)
    others = sum(
        size
        for size, output in zip(made, outputs, strict=True)
        if _read_by_loops(output.root, found, dead)
    )
    return unfused, fused + others


def _read_by_loops(node: fx.Node, found: Producers, dead: Collection[fx.Node]) -> bool:
    """Whether the tensor is read by pointwise ops or reductions that stay."""
    for user in node.users:
        if user in dead or user in found.sinks or user.op != "call_function":
            continue
        if user.target in UNARY:
            if _read_by_loops(user, found, dead):
                return True
        elif {torch.Tag.pointwise, torch.Tag.reduction} & set(getattr(user.target, "tags", ())):
            return True
    return False
