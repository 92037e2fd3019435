"""cancel_rotations: inverse pairs and duplicates go, through permutes and views; everything that is
not exactly undone stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from asserts import assert_graph_values_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ROTATIONS, Case, cases, copy_of, plan_of, sprinkle, traced, values_for

from hadagraph import ops
from hadagraph.dump import graph_lines
from hadagraph.graph import aten, backward_nodes, calls
from hadagraph.passes.cancel_rotations import cancel_rotations
from hadagraph.passes.insert_rotations import insert_rotations
from hadagraph.passes.normalize import normalize
from hadagraph.rotation import Rotation
from hadagraph.verify import verify

BOTH = (ops.rotate, ops.unrotate)


def rotate(x, dim, rotation="h16"):
    return ops.rotate(x, dim, rotation)


def unrotate(x, dim, rotation="h16", size=None):
    return ops.unrotate(x, dim, rotation, x.shape[dim] if size is None else size)


def cancelled(function, *shapes, check=True):
    """The graph after the pass; values are kept on the way."""
    gm = traced(function, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    before = copy_of(gm)
    cancel_rotations(gm.graph)
    if check:
        verify(gm.graph, "cancel_rotations")
    assert_graph_values_equal(before, gm, values_for(gm))
    return gm.graph


CANCELS = {
    "rotate, unrotate": lambda x: unrotate(rotate(x, 1), 1),
    "along the first dim": lambda x: unrotate(rotate(x, 0), 0),
    "with signs": lambda x: unrotate(rotate(x, 1, "h16:fixed(3)"), 1, "h16:fixed(3)"),
    "rotate, unrotate, rotate, unrotate": lambda x: unrotate(
        rotate(unrotate(rotate(x, 1), 1), 1), 1
    ),
    "through a permute": lambda x: unrotate(rotate(x, 1).permute(1, 0), 0),
    "through t": lambda x: unrotate(aten.t.default(rotate(x, 1)), 0),
    "through transpose": lambda x: unrotate(aten.transpose.int(rotate(x, 1), 0, -1), 0),
    "through a view": lambda x: unrotate(rotate(x, 1).view(4, 8, 32), 2),
    "through two views": lambda x: unrotate(rotate(x, 1).view(4, 8, 32).view(2, 16, 32), 2),
    "through a view and a permute": lambda x: unrotate(
        rotate(x, 1).view(4, 8, 32).permute(2, 0, 1), 0
    ),
    "of three dims": lambda x: unrotate(rotate(x.view(2, 16, 32), 1).permute(1, 2, 0), 0),
}


@pytest.mark.parametrize("name", CANCELS)
def test_inverse_pairs_go(name):
    graph = cancelled(lambda x: CANCELS[name](x) * 2, (32, 32))
    assert not calls(graph, BOTH)


def test_padding_that_is_cut_off_again_goes():
    graph = cancelled(lambda x: unrotate(rotate(x, 1), 1, size=20) * 2, (3, 20))
    assert not calls(graph, BOTH)


def test_a_rotation_of_an_unrotation_goes():
    # x is in the rotated basis by assumption, which the verifier cannot know.
    graph = cancelled(lambda x: rotate(unrotate(x, 1), 1) * 2, (3, 32), check=False)
    assert not calls(graph, BOTH)


STAYS = {
    "other signs": lambda x: unrotate(rotate(x, 1, "h16"), 1, "h16:fixed(1)"),
    "other seeds": lambda x: unrotate(rotate(x, 1, "h16:fixed(2)"), 1, "h16:fixed(1)"),
    "another block": lambda x: unrotate(rotate(x, 1, "h16"), 1, "h32"),
    "another dim": lambda x: unrotate(rotate(x, 1), 0),
    "another dim through a permute": lambda x: unrotate(rotate(x, 1).permute(1, 0), 1),
    "unrotate that cuts the padding of what follows": lambda x: rotate(unrotate(x, 1, size=20), 1),
    "unrotate that cuts whole blocks": lambda x: rotate(unrotate(x, 1, size=16), 1),
    "rotate, cut short": lambda x: unrotate(rotate(x, 1), 1, size=16),
    "a view that regroups": lambda x: unrotate(rotate(x, 1).view(64, 16), 1),
    "a view that splits": lambda x: unrotate(rotate(x, 1).view(32, 2, 16), 2),
    "a view that merges": lambda x: unrotate(rotate(x, 1).view(16, 64), 1),
    "a nonlinearity between": lambda x: unrotate(rotate(x, 1).relu(), 1),
    "a slice between": lambda x: unrotate(rotate(x, 1)[:, :16], 1),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_undone_stays(name):
    graph = cancelled(lambda x: STAYS[name](x) * 2, (32, 32), check=False)
    assert len(calls(graph, BOTH)) == 2


def test_layout_ops_with_arguments_by_name_are_left_alone():
    gm = traced(
        lambda x: (
            unrotate(rotate(x, 1).view(4, 8, 32), 2),
            unrotate(rotate(x, 1).permute(1, 0), 0),
        ),
        torch.randn(32, 32),
    )
    for node, key in zip(
        calls(gm.graph, (aten.view.default, aten.permute.default)), ("size", "dims"), strict=True
    ):
        source, argument = node.args
        node.args, node.kwargs = (source,), {key: argument}
    before = copy_of(gm)
    cancel_rotations(gm.graph)
    assert len(calls(gm.graph, (ops.unrotate,))) == 2
    assert_graph_values_equal(before, gm, values_for(gm), bound=0)


def test_one_rotation_for_many_users():
    def function(x, a, b):
        return tuple(ops.gemm(rotate(x, 1), rotate(w, 1), None) for w in (a, b))

    graph = cancelled(function, (3, 20), (4, 20), (5, 20))
    assert graph_lines(graph)[3:] == [
        "rotate: float64[3, 32] = hadagraph.rotate.default(x_1, 1, h16)",
        "rotate_1: float64[4, 32] = hadagraph.rotate.default(a_1, 1, h16)",
        "gemm: float64[3, 4] = hadagraph.gemm.default(rotate, rotate_1, None)",
        "rotate_3: float64[5, 32] = hadagraph.rotate.default(b_1, 1, h16)",
        "gemm_1: float64[3, 5] = hadagraph.gemm.default(rotate, rotate_3, None)",
        "output (gemm, gemm_1)",
    ]


def test_rotations_along_other_dims_or_with_other_signs_do_not_merge():
    def function(x):
        same = rotate(x, 1), rotate(x, 0), rotate(x, 1, "h32"), rotate(x, 1, "h16:fixed(1)")
        return tuple(y.relu() for y in same)

    assert len(calls(cancelled(function, (32, 32), check=False), BOTH)) == 4


def test_a_transposed_user_shares_the_rotation():
    def function(x):
        return ops.gemm(rotate(x.permute(1, 0), 1), rotate(x.permute(1, 0), 1), None)

    graph = cancelled(function, (32, 20))
    (node,) = calls(graph, BOTH)
    assert node.args[1] == 0


def test_without_an_inverse_a_rotation_stays_behind_its_view():
    graph = cancelled(
        lambda x, w: ops.gemm(rotate(x.view(6, 20), 1), rotate(w, 1), None), (2, 3, 20), (4, 20)
    )
    assert calls(graph, (ops.rotate,))[0].args[0].target is aten.view.default


def test_pairs_over_a_symbolic_batch():
    gm = traced(
        lambda x: unrotate(rotate(x, 2).view(x.shape[0] * x.shape[1], 32), 1, size=32).relu(),
        torch.randn(4, 5, 32, dtype=torch.float64),
        mode="symbolic",
    )
    before = copy_of(gm)
    cancel_rotations(gm.graph)
    assert len(calls(gm.graph, BOTH)) in (0, 2)  # 2 if the last dim's size is only a symbol
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(gm(x), before(x), rtol=0, atol=1e-12)


def test_qkv_share_one_rotation_of_the_input():
    gm = Case("qkv", 16, 32, 32).trace()
    normalize(gm.graph)
    insert_rotations(gm.graph, plan_of(gm.graph, [Rotation(16)]))
    assert len(calls(gm.graph, (ops.rotate,))) == 18
    cancel_rotations(gm.graph)
    # x along both dims; each weight and each gradient along both.
    assert len(calls(gm.graph, (ops.rotate,))) == 2 + 3 * 2 + 3 * 2


exact_rotations = st.sampled_from(ROTATIONS)


@given(cases(), exact_rotations, st.integers(1, 4))
@settings(max_examples=8)
def test_every_sprinkled_pair_goes(case, rotation, every):
    gm = case.trace()
    before = copy_of(gm)
    assert sprinkle(gm.graph, rotation, every) or not calls(gm.graph, (aten.mm.default,))
    cancel_rotations(gm.graph)
    verify(gm.graph, "cancel_rotations")
    assert not calls(gm.graph, BOTH)
    assert_graph_values_equal(before, gm, values_for(gm))


@given(
    cases(),
    st.lists(st.sampled_from((None, *ROTATIONS)), min_size=1, max_size=3),
    exact_rotations,
    st.integers(1, 4),
)
@settings(max_examples=14)
def test_values_are_kept(case, planned, sprinkled, every):
    gm = case.trace()
    before = copy_of(gm)
    normalize(gm.graph)
    sprinkle(gm.graph, sprinkled, every)
    insert_rotations(gm.graph, plan_of(gm.graph, planned))
    verify(gm.graph, "insert_rotations")
    cancel_rotations(gm.graph)
    verify(gm.graph, "cancel_rotations")
    for tokens in (None, 5) if case.dynamic else (None,):
        assert_graph_values_equal(before, gm, values_for(gm, tokens=tokens))


def test_a_sum_of_unrotated_is_unrotated_once():
    def function(x, y, z):
        turned = [unrotate(rotate(t, 1) * 1, 1) for t in (x, y, z)]
        return turned[0] + turned[1] + turned[2]

    gm = traced(function, *(torch.randn(32, 32, dtype=torch.float64) for _ in range(3)))
    before = copy_of(gm)
    cancel_rotations(gm.graph)
    assert len(calls(gm.graph, (ops.unrotate,))) == 1
    assert_graph_values_equal(before, gm, values_for(gm))


def test_gradients_of_one_input_are_unrotated_once():
    gm = Case("qkv", 48, 32, 64).trace()
    before = copy_of(gm)
    normalize(gm.graph)
    backward = {node.name for node in backward_nodes(gm.graph)}
    plan = plan_of(gm.graph, [None])
    outer = [
        replace(d, rhs=replace(d.rhs, outer=Rotation(16))) if d.site.node in backward else d
        for d in plan.decisions
    ]
    insert_rotations(gm.graph, replace(plan, decisions=tuple(outer)))
    made = len(calls(gm.graph, (ops.unrotate,)))
    cancel_rotations(gm.graph)
    verify(gm.graph, "cancel_rotations")
    assert 0 < len(calls(gm.graph, (ops.unrotate,))) < made
    assert_graph_values_equal(before, gm, values_for(gm))


SUMS_THAT_STAY = {
    "other rotations": lambda x, y: unrotate(x, 1) + unrotate(y, 1, "h32"),
    "other dims": lambda x, y: unrotate(x, 0) + unrotate(y, 1),
    "scaled": lambda x, y: torch.add(unrotate(x, 1), unrotate(y, 1), alpha=2),
    "a number": lambda x, y: unrotate(x, 1) + 1,
    "broadcast": lambda x, y: unrotate(x[:1], 1) + unrotate(y, 1),
}


@pytest.mark.parametrize("name", SUMS_THAT_STAY)
def test_a_sum_that_stays(name):
    gm = traced(SUMS_THAT_STAY[name], *(torch.randn(32, 32, dtype=torch.float64) for _ in "xy"))
    before = graph_lines(gm.graph)
    cancel_rotations(gm.graph)
    assert graph_lines(gm.graph) == before


def test_a_sum_whose_term_another_reads_stays():
    def function(x, y):
        back = unrotate(x, 1)
        return back + unrotate(y, 1), back

    gm = traced(function, *(torch.randn(32, 32, dtype=torch.float64) for _ in "xy"))
    before = graph_lines(gm.graph)
    cancel_rotations(gm.graph)
    assert graph_lines(gm.graph) == before
