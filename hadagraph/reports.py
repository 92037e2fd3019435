"""What was done to each graph and why: the record that the backend leaves behind and `explain`
prints. Knows nothing of how it was decided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from hadagraph import compat, ops
from hadagraph.graph import arguments, calls, storage_of, tensor
from hadagraph.plan import PLAN_COLUMNS, Decision, Plan, plan_rows
from hadagraph.region import Region


@dataclass(frozen=True)
class Shared:
    """One quantizing op and every GEMM, `site:role`, that reads its codes."""

    quantizer: str
    source: str
    readers: tuple[str, ...]


@dataclass
class GraphReport:
    """One compiled graph.

    kind: `training` or `inference`. emulated: whether the low-precision GEMMs run as references (no
    GPU). target: the chip that was planned for, where it is not the device. saved_bytes: bytes that
    the forward keeps for the backward besides parameters and inputs,
    symbolic sizes at their traced value; None for an inference graph.
    """

    kind: str
    emulated: bool
    plan: Plan
    shared: tuple[Shared, ...] = ()
    saved_bytes: int | None = None
    saved: tuple[tuple[str, str, int], ...] = ()
    regions: list[Region] = field(default_factory=list)
    target: str | None = None

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The GEMMs of the graph, in graph order."""
        return tuple(SiteReport.of(decision) for decision in self.plan.decisions)

    @property
    def emulated_gemms(self) -> int:
        """How many GEMMs read codes that the device has to decode first."""
        return sum(d.lhs is not None and d.lhs.emulated for d in self.plan.decisions)

    def table(self) -> Table:
        """The plan, for rich."""
        emulated = f", planned for {self.target}" if self.target else ""
        emulated += ", emulated" if self.emulated else ""
        table = Table(title=f"{self.kind} graph: recipe {self.plan.recipe}{emulated}")
        for column in PLAN_COLUMNS:
            table.add_column(column, overflow="fold")
        for row in plan_rows(self.plan.decisions):
            table.add_row(*row)
        return table

    def text(self, width: int = 160) -> str:
        """The plan, what is shared, saved and fused, as plain text."""
        console = Console(width=width, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
            if self.plan.note:
                console.print(self.plan.note)
            if self.emulated_gemms:
                console.print(
                    f"{self.emulated_gemms} GEMMs are emulated: the device multiplies no such "
                    f"codes, which are decoded first; no speed gain is expected of these"
                )
            for shared in self.shared:
                console.print(f"{shared.quantizer}({shared.source}): {', '.join(shared.readers)}")
            if self.saved_bytes is not None:
                console.print(f"saved for backward: {self.saved_bytes / 2**20:.2f} MiB")
                for name, description, size in self.saved:
                    console.print(f"  {name} {description} {size / 2**20:.3f} MiB")
            for region in self.regions:
                console.print(str(region))
        return captured.get()


@dataclass(frozen=True)
class SiteReport:
    """One GEMM: its module path, role, whether it was lowered, the reason if not, and whether the
    device decodes its codes for a GEMM in higher precision."""

    name: str
    role: str
    lowered: bool
    reason: str | None
    emulated: bool = False

    @staticmethod
    def of(decision: Decision) -> SiteReport:
        """The public face of a decision."""
        site, plans = decision.site, (decision.lhs, decision.rhs)
        emulated = any(plan is not None and plan.emulated for plan in plans)
        return SiteReport(site.name, site.role, decision.lowered, decision.reason, emulated)


@dataclass
class Collector:
    """Where a backend leaves its reports."""

    reports: list[GraphReport] = field(default_factory=list)


PROCESS = Collector()


def report() -> list[GraphReport]:
    """The reports of every graph that this process has compiled since `reset_report()`.

    A graph that came out of Inductor's caches ran no pass and has none: use `explain` then.
    """
    return list(PROCESS.reports)


def reset_report() -> None:
    """Forget the reports so far."""
    PROCESS.reports.clear()


def shared_quantizers(graph: fx.Graph, plan: Plan) -> tuple[Shared, ...]:
    """Who reads the codes of each quantizing op of a lowered graph."""
    sites = {d.site.node: f"{d.site.name}:{d.site.role}" for d in plan.decisions}
    readers: dict[fx.Node, list[str]] = defaultdict(list)
    for node in calls(graph, tuple(_CODES)):
        for codes in (arguments(node)[index] for index in _CODES[node.target]):
            readers[arguments(codes)[0]].append(sites.get(node.meta["hadagraph_site"], node.name))
    return tuple(
        Shared(node.name, str(arguments(node)[0]), tuple(readers[node]))
        for node in calls(graph, (*ops.QUANTIZERS, ops.encode))
    )


# Where the codes stand among the arguments.
_CODES: dict[Any, tuple[int, int]] = {
    ops.scaled_mm: (0, 1),
    ops.scaled_mm_measured: (2, 3),
    ops.encoded_mm: (0, 3),
}


def saved_for_backward(
    forward: fx.GraphModule, num_fwd_outputs: int
) -> tuple[tuple[str, str, int], ...]:
    """(name, dtype[shape], bytes) of each tensor that a partitioned forward hands to the backward,
    graph inputs left out. Memory counts whole and once, however many views of it are saved."""
    (outputs,) = next(iter(reversed(forward.graph.nodes))).args
    seen = {storage_of(node) for node in _tensors(forward.graph.find_nodes(op="placeholder"))}
    saved = []
    for node in _tensors(outputs[num_fwd_outputs:]):
        if storage_of(node) in seen:
            continue
        seen.add(storage_of(node))
        value = tensor(node)
        size = compat.static_hint(value.untyped_storage().nbytes())
        dtype = str(value.dtype).removeprefix("torch.")
        saved.append((node.name, f"{dtype}{list(value.shape)}", size))
    return tuple(saved)


def _tensors(nodes: Sequence[Any]) -> list[fx.Node]:
    return [
        node
        for node in nodes
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
    ]
