"""Write what the compiler does to a folder: the graph before and after each pass, a diff per pass,
the plan, the emitted kernels. Only reads what it is given."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

import torch
from torch import fx

from hadagraph.reports import GraphReport


class GraphDump:
    """The files of one compiled graph: DIR/graph_<n>/..."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = _next_folder(Path(folder))
        self._number = 0
        self._previous: list[str] = []

    def observe(self, name: str, graph: fx.Graph) -> None:
        """Write the graph as it is after the pass `name`, and what that pass changed."""
        lines = graph_lines(graph)
        stem = f"{self._number:02d}_{name}"
        (self.folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        if self._number:
            diff = difflib.unified_diff(self._previous, lines, "before", f"after {name}", n=1)
            (self.folder / f"{stem}.diff").write_text("\n".join(diff) + "\n")
        self._previous = lines
        self._number += 1

    def phase(self, name: str, graph: fx.Graph) -> None:
        """Write a partitioned graph (`forward`, `backward`), which follows no single pass."""
        (self.folder / f"{name}.txt").write_text("\n".join(graph_lines(graph)) + "\n")

    def plan(self, report: GraphReport) -> None:
        """Write the plan as a table and as JSON."""
        (self.folder / "plan.txt").write_text(report.text())
        (self.folder / "plan.json").write_text(report.plan.to_json())

    def kernels(self, sources: dict[str, str]) -> None:
        """Write emitted kernels, file name -> Triton source."""
        folder = self.folder / "kernels"
        folder.mkdir(exist_ok=True)
        for name, source in sources.items():
            (folder / name).write_text(source)


def _next_folder(parent: Path) -> Path:
    """A folder of its own, also when several processes write to one parent."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = parent / f"graph_{number:02d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def graph_lines(graph: fx.Graph) -> list[str]:
    """The graph as one line a node: `name: dtype[shape] = op(arguments)`."""
    return [_line(node) for node in graph.nodes]


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"{node.name}: {_value(node.meta.get('val'))} = input"
    if node.op == "output":
        return f"output {node.args[0]}"
    arguments = [str(argument) for argument in node.args]
    arguments += [f"{name}={value}" for name, value in node.kwargs.items()]
    return f"{node.name}: {_value(node.meta.get('val'))} = {node.target}({', '.join(arguments)})"


def _value(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[str(d) for d in value.shape]}".replace(
            "'", ""
        )
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_value(part) for part in value)})"
    return type(value).__name__
