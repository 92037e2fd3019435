"""The dump folder: numbered graphs, a diff a pass, the plan and the kernels."""

from __future__ import annotations

import json

import pytest
import torch
from strategies import traced

from hadagraph.dump import GraphDump, graph_lines
from hadagraph.formats import PER_TENSOR
from hadagraph.graph import aten, calls
from hadagraph.plan import Decision, GemmSite, OperandPlan, Plan
from hadagraph.reports import GraphReport


@pytest.fixture
def graph():
    return traced(lambda x: torch.add(x, x, alpha=2).max(1), torch.randn(2, 3)).graph


def test_a_line_a_node(graph):
    assert graph_lines(graph) == [
        "x_1: float32[2, 3] = input",
        "add: float32[2, 3] = aten.add.Tensor(x_1, x_1, alpha=2)",
        "max_1: (float32[2], int64[2]) = aten.max.dim(add, 1)",
        "getitem: float32[2] = <built-in function getitem>(max_1, 0)",
        "getitem_1: int64[2] = <built-in function getitem>(max_1, 1)",
        "output (getitem, getitem_1)",
    ]


def test_graphs_are_numbered_and_diffed(tmp_path, graph):
    dump = GraphDump(tmp_path)
    dump.observe("input", graph)
    (add,) = calls(graph, (aten.add.Tensor,))
    add.kwargs = {}
    dump.observe("simplify", graph)
    dump.phase("forward", graph)
    folder = tmp_path / "graph_00"
    names = {path.name for path in folder.iterdir()}
    assert names == {"00_input.txt", "01_simplify.txt", "01_simplify.diff", "forward.txt"}
    diff = (folder / "01_simplify.diff").read_text()
    assert "-add: float32[2, 3] = aten.add.Tensor(x_1, x_1, alpha=2)" in diff
    assert "+add: float32[2, 3] = aten.add.Tensor(x_1, x_1)" in diff
    assert (folder / "forward.txt").read_text() == (folder / "01_simplify.txt").read_text()


def test_each_graph_has_its_own_folder(tmp_path):
    folders = [GraphDump(tmp_path / "new").folder.name for _ in range(3)]
    assert folders == ["graph_00", "graph_01", "graph_02"]


def test_the_plan_and_the_kernels(tmp_path):
    site = GemmSite("mlp.up", "output", "gemm", "8", "16", "32", "bfloat16", "input", "weight")
    operand = OperandPlan("int8", PER_TENSOR)
    plan = Plan("int8_rotated", (Decision(site, operand, operand),))
    dump = GraphDump(tmp_path)
    dump.plan(GraphReport("training", True, plan, saved_bytes=2**20, saved=(("x", "int8[8]", 8),)))
    dump.kernels({"quantize.py": "source\n"})
    table = (dump.folder / "plan.txt").read_text()
    assert "mlp.up" in table and "int8/per_tensor" in table and "1.00 MiB" in table
    assert Plan.from_json((dump.folder / "plan.json").read_text()) == plan
    assert json.loads((dump.folder / "plan.json").read_text())["recipe"] == "int8_rotated"
    assert (dump.folder / "kernels" / "quantize.py").read_text() == "source\n"
