"""normalize: one GEMM form, merged layouts, nothing that it does not understand, values kept."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_graph_values_equal
from hypothesis import given, settings
from strategies import Case, cases, copy_of, traced, values_for

from hadagraph import ops
from hadagraph.dump import graph_lines
from hadagraph.graph import aten, calls
from hadagraph.passes.normalize import normalize
from hadagraph.verify import verify

A, B = torch.randn(3, 5), torch.randn(5, 4)


def normalized(function, *inputs, mode="fake"):
    gm = traced(function, *inputs, mode=mode)
    before = copy_of(gm)
    normalize(gm.graph)
    verify(gm.graph, "normalize")
    assert_graph_values_equal(before, gm, values_for(gm))
    return gm.graph


def lines(graph):
    return [line for line in graph_lines(graph) if " = input" not in line]


def test_mm_becomes_a_gemm():
    assert lines(normalized(torch.mm, A, B)) == [
        "permute_default: float32[4, 5] = aten.permute.default(arg1_1, [1, 0])",
        "gemm_default: float32[3, 4] = hadagraph.gemm.default(arg0_1, permute_default, None)",
        "output gemm_default",
    ]


@pytest.mark.parametrize(
    "transpose",
    [
        lambda w: w.permute(1, 0),
        lambda w: w.permute(-1, -2),
        aten.t.default,
        lambda w: aten.transpose.int(w, 0, 1),
        lambda w: aten.transpose.int(w, -1, 0),
        lambda w: w.permute(1, 0).permute(1, 0).permute(1, 0),
    ],
)
def test_a_transposed_weight_is_taken_as_it_is(transpose):
    graph = normalized(lambda x, w: torch.mm(x, transpose(w)), A, torch.randn(4, 5))
    assert lines(graph) == [
        "gemm_default: float32[3, 4] = hadagraph.gemm.default(x_1, w_1, None)",
        "output gemm_default",
    ]


def test_a_transpose_that_swaps_nothing_is_no_transpose():
    graph = normalized(lambda x, w: torch.mm(x, w.permute(0, 1)), A, B)
    (gemm,) = calls(graph, (ops.gemm,))
    assert gemm.args[1].target is aten.permute.default


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 1}, {"beta": 1.0, "alpha": 1.0}])
def test_addmm_becomes_a_gemm_with_bias(kwargs):
    graph = normalized(
        lambda b, x, w: torch.addmm(b, x, w.permute(1, 0), **kwargs),
        torch.randn(4),
        A,
        torch.randn(4, 5),
    )
    assert lines(graph) == [
        "gemm_default: float32[3, 4] = hadagraph.gemm.default(x_1, w_1, b_1)",
        "output gemm_default",
    ]


REFUSED = {
    "alpha": (lambda b, x, w: torch.addmm(b, x, w, alpha=2), (4,)),
    "beta": (lambda b, x, w: torch.addmm(b, x, w, beta=0), (4,)),
    "both": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=-1), (4,)),
    "a bias per element": (torch.addmm, (3, 4)),
    "a bias per row": (torch.addmm, (3, 1)),
    "one bias as a row": (torch.addmm, (1, 4)),
    "one bias": (torch.addmm, (1,)),
    "no dims": (torch.addmm, ()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_addmm_stays(name):
    function, shape = REFUSED[name]
    graph = normalized(function, torch.randn(shape), A, B)
    assert len(calls(graph, (aten.addmm.default,))) == 1
    assert not calls(graph, (ops.gemm,))


@pytest.mark.parametrize("target", [aten.mm.default, aten.addmm.default])
def test_operands_given_by_name_are_left_alone(target):
    graph = traced(torch.addmm, torch.randn(4), A, B).graph
    (node,) = calls(graph, (aten.addmm.default,))
    bias, a, b = node.args
    node.target = target
    node.args = () if target is aten.mm.default else (bias,)
    node.kwargs = {"mat2": b, ("self" if target is aten.mm.default else "mat1"): a}
    normalize(graph)
    assert not calls(graph, (ops.gemm,))


def test_integers_stay():
    integers = torch.randint(-5, 5, (4, 4))
    graph = normalized(lambda x: (x @ x, torch.addmm(x[0], x, x)), integers)
    assert not calls(graph, (ops.gemm,))


def test_complex_numbers_stay():
    graph = normalized(lambda x: x.to(torch.complex64) @ x.to(torch.complex64), torch.randn(4, 4))
    assert not calls(graph, (ops.gemm,))


def test_bmm_stays():
    graph = normalized(torch.bmm, torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    assert lines(graph)[0].endswith("= aten.bmm.default(arg0_1, arg1_1)")


def test_equal_layouts_merge():
    def function(x, w):
        first, second = x.view(6, 5), x.view(6, 5)
        return torch.mm(first, w.permute(1, 0)), torch.mm(second.permute(1, 0), second)

    graph = normalized(function, torch.randn(2, 3, 5), torch.randn(4, 5))
    assert len(calls(graph, (aten.view.default,))) == 1
    assert len(calls(graph, (aten.permute.default,))) == 1


def test_a_matrix_times_its_transpose():
    graph = normalized(lambda x: torch.mm(x, x.T), A)
    (gemm,) = calls(graph, (ops.gemm,))
    assert gemm.args[0] is gemm.args[1]


def test_normalizing_twice_changes_nothing():
    gm = Case("gate_up", 17, 32, 24).trace()
    normalize(gm.graph)
    once = graph_lines(gm.graph)
    normalize(gm.graph)
    assert graph_lines(gm.graph) == once


def test_no_guard_is_added():
    gm = Case("attention", 17, 32, 24, dynamic=True).trace()
    shapes = next(
        n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)
    ).node.shape_env
    before = len(shapes.guards)
    normalize(gm.graph)
    assert len(shapes.guards) == before


@given(cases())
@settings(max_examples=14)
def test_values_are_kept(case):
    gm = case.trace()
    before = copy_of(gm)
    normalize(gm.graph)
    verify(gm.graph, "normalize")
    assert not calls(gm.graph, (aten.mm.default,))
    for tokens in (None, 5) if case.dynamic else (None,):
        assert_graph_values_equal(before, gm, values_for(gm, tokens=tokens))
