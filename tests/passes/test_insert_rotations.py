"""insert_rotations: both contracted dims get the plan's rotation, those along kept dims are taken
back, nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from asserts import assert_graph_values_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ROTATIONS, Case, cases, copy_of, plan_of, traced, values_for

from hadagraph import ops
from hadagraph.dump import graph_lines
from hadagraph.graph import calls, gemms
from hadagraph.passes.cancel_rotations import cancel_rotations
from hadagraph.passes.insert_rotations import insert_rotations
from hadagraph.passes.normalize import normalize
from hadagraph.plan import Plan
from hadagraph.rotation import PerStep, Rotation
from hadagraph.verify import verify


def gemm_graph():
    inputs = torch.randn(3, 20), torch.randn(5, 20), torch.randn(5)
    return traced(lambda x, w, b: ops.gemm(x, w, b), *inputs).graph


def test_both_operands_are_rotated():
    graph = gemm_graph()
    insert_rotations(graph, plan_of(graph, [Rotation(16)]))
    assert graph_lines(graph)[3:] == [
        "rotate_default: float32[3, 32] = hadagraph.rotate.default(x_1, 1, h16)",
        "rotate_default_1: float32[5, 32] = hadagraph.rotate.default(w_1, 1, h16)",
        "gemm: float32[3, 5] = hadagraph.gemm.default(rotate_default, rotate_default_1, b_1)",
        "output gemm",
    ]


def test_gemms_without_a_rotation_stay():
    for plan in (Plan("empty"), plan_of(gemm_graph(), [None])):
        graph = gemm_graph()
        before = graph_lines(graph)
        insert_rotations(graph, plan)
        assert graph_lines(graph) == before


def test_each_gemm_gets_its_own():
    gm = Case("qkv", 16, 32, 32).trace()
    normalize(gm.graph)
    plan = plan_of(gm.graph, [Rotation(16), None, Rotation(32)])
    insert_rotations(gm.graph, plan)
    for node in gemms(gm.graph):
        wanted = plan.by_node()[node.name].lhs.rotation
        for operand in node.args[:2]:
            assert (operand.target is ops.rotate) == (wanted is not None)
            if wanted is not None:
                assert operand.args[1:] == (1, str(wanted))


def test_metadata_comes_from_the_gemm():
    gm = Case("linear", 16, 32, 32).trace()
    normalize(gm.graph)
    insert_rotations(gm.graph, plan_of(gm.graph, [Rotation(16)]))
    for node in calls(gm.graph, (ops.rotate,)):
        (user,) = node.users
        for key in ("seq_nr", "partitioner_tag", "stack_trace"):
            assert node.meta.get(key) == user.meta.get(key)


@given(cases(), st.lists(st.sampled_from((None, *ROTATIONS)), min_size=1, max_size=4))
@settings(max_examples=14)
def test_values_are_kept(case, rotations):
    gm = case.trace()
    before = copy_of(gm)
    normalize(gm.graph)
    insert_rotations(gm.graph, plan_of(gm.graph, rotations))
    verify(gm.graph, "insert_rotations")
    for tokens in (None, 5) if case.dynamic else (None,):
        assert_graph_values_equal(before, gm, values_for(gm, tokens=tokens))


def with_outer(graph, left, right, inner=None):
    """A plan that also rotates the kept dims of every GEMM's operands."""
    plan = plan_of(graph, [inner])
    return replace(
        plan,
        decisions=tuple(
            replace(d, lhs=replace(d.lhs, outer=left), rhs=replace(d.rhs, outer=right))
            for d in plan.decisions
        ),
    )


def test_a_rotation_along_a_kept_dim_is_taken_back_before_the_bias():
    graph = gemm_graph()
    insert_rotations(graph, with_outer(graph, None, Rotation(16), Rotation(32)))
    assert graph_lines(graph)[3:] == [
        "rotate_default: float32[3, 32] = hadagraph.rotate.default(x_1, 1, h32)",
        "rotate_default_1: float32[16, 20] = hadagraph.rotate.default(w_1, 0, h16)",
        "rotate_default_2: float32[16, 32] = hadagraph.rotate.default(rotate_default_1, 1, h32)",
        "gemm: float32[3, 16] = hadagraph.gemm.default(rotate_default, rotate_default_2, None)",
        "unrotate_default: float32[3, 5] = hadagraph.unrotate.default(gemm, 1, h16, 5)",
        "add_tensor: float32[3, 5] = aten.add.Tensor(unrotate_default, b_1)",
        "output add_tensor",
    ]


def test_signs_drawn_in_each_step_share_one_seed():
    graph = gemm_graph()
    signs = Rotation(16, PerStep("here"))
    insert_rotations(graph, with_outer(graph, signs, None, Rotation(32, PerStep("there"))))
    (seed,) = calls(graph, (ops.next_seed,))
    for node in calls(graph, (ops.rotate, ops.unrotate)):
        assert node.args[-1] is seed


@given(
    cases(),
    st.sampled_from((None, *ROTATIONS)),
    st.sampled_from((None, *ROTATIONS)),
    st.sampled_from((None, Rotation(16, PerStep("s")))),
)
@settings(max_examples=14)
def test_values_are_kept_by_outer_rotations(case, left, right, inner):
    gm = case.trace()
    before = copy_of(gm)
    normalize(gm.graph)
    insert_rotations(gm.graph, with_outer(gm.graph, left, right, inner))
    verify(gm.graph, "insert_rotations")
    assert_graph_values_equal(before, gm, values_for(gm))
    cancel_rotations(gm.graph)
    verify(gm.graph, "cancel_rotations")
    for tokens in (None, 5) if case.dynamic else (None,):
        assert_graph_values_equal(before, gm, values_for(gm, tokens=tokens))
