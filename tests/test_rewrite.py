"""The rewriting engine: rules run to a fixed point, duplicates merge only when they are equal."""

from __future__ import annotations

import torch
from strategies import traced

from hadagraph.graph import aten, calls, create
from hadagraph.rewrite import apply_rules, merge_duplicates


def double_negation(node):
    """-(-x) -> x."""
    inner = node.args[0]
    return inner.args[0] if inner.target is aten.neg.default else None


def graph_of(function, *shapes):
    return traced(function, *(torch.randn(shape) for shape in shapes or [(3, 4)])).graph


def test_rules_run_to_a_fixed_point():
    graph = graph_of(lambda x: x.neg().neg().neg().neg().neg())
    assert apply_rules(graph, {aten.neg.default: (double_negation,)}) == 2
    graph.eliminate_dead_code()
    assert len(calls(graph, (aten.neg.default,))) == 1


def test_no_match_changes_nothing():
    graph = graph_of(lambda x: -x)
    before = str(graph)
    assert apply_rules(graph, {aten.neg.default: (double_negation,)}) == 0
    assert apply_rules(graph, {}) == 0
    assert str(graph) == before


def test_the_first_rule_that_matches_wins():
    def to_relu(node):
        return create(node.graph, aten.relu.default, node.args, node)

    graph = graph_of(lambda x: -x)
    apply_rules(graph, {aten.neg.default: (double_negation, to_relu, lambda node: 1 / 0)})
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.relu.default]


def merged(function, *targets):
    graph = graph_of(function)
    count = merge_duplicates(graph, targets)
    graph.lint()
    return count


def test_equal_nodes_merge():
    assert merged(lambda x: x.permute(1, 0) + x.permute(1, 0), aten.permute.default) == 1


def test_merging_follows_what_was_merged():
    def function(x):
        return x.permute(1, 0).neg() * x.permute(1, 0).neg()

    assert merged(function, aten.permute.default, aten.neg.default) == 2


def test_different_arguments_do_not_merge():
    assert merged(lambda x: (x.view(12), x.view(2, 6)), aten.view.default) == 0
    assert merged(lambda x: (x + 1, x + 1.0), aten.add.Tensor) == 0
    assert merged(lambda x: (x + 1, x + True), aten.add.Tensor) == 0


def test_different_kwargs_do_not_merge():
    def function(x):
        return torch.add(x, x, alpha=2), torch.add(x, x), torch.add(x, x, alpha=2)

    assert merged(function, aten.add.Tensor) == 1


def test_other_targets_do_not_merge():
    assert merged(lambda x: x.permute(1, 0) + x.permute(1, 0), aten.view.default) == 0


def test_checkpointed_copies_do_not_merge_with_what_they_recompute():
    graph = graph_of(lambda x: x.permute(1, 0) + x.permute(1, 0))
    calls(graph, (aten.permute.default,))[1].meta["ac_graph_id"] = 1
    assert merge_duplicates(graph, (aten.permute.default,)) == 0
