"""fuse: half-read quantizers are narrowed, regions name their producers and GEMMs, values stay."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_graph_values_equal
from strategies import copy_of, traced, values_for

from hadagraph import ops
from hadagraph.graph import calls
from hadagraph.passes.fuse import fuse
from hadagraph.verify import verify

ROWS, COLUMNS = "int8/per_kept_index/h16", "int8/per_tensor"


def fused(function, *shapes):
    gm = traced(function, *(torch.randn(shape) for shape in shapes or [(20, 32)]))
    before = copy_of(gm)
    regions = fuse(gm.graph)
    gm.graph.eliminate_dead_code()
    verify(gm.graph, "fuse")
    assert_graph_values_equal(before, gm, values_for(gm), bound=0)
    return gm.graph, regions


def product(codes, scale):
    return ops.scaled_mm(codes, codes, scale, scale, None, torch.float32)


def half_read(x, first):
    return product(*ops.quantize_both(x, ROWS, COLUMNS)[first : first + 2])


@pytest.mark.parametrize(
    ("first", "target", "encoding"),
    [(0, ops.quantize_rows, ROWS), (2, ops.quantize_columns, COLUMNS)],
)
def test_a_half_read_quantizer_is_narrowed(first, target, encoding):
    graph, regions = fused(lambda x: half_read(x, first))
    (node,) = calls(graph, ops.QUANTIZERS)
    assert (node.target, node.args[1]) == (target, encoding)
    assert [region.quantizer for region in regions] == [node.name]


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_one_output_is_enough_to_keep_its_half(index):
    graph, _ = fused(lambda x: ops.quantize_both(x, COLUMNS, COLUMNS)[index].float())
    (node,) = calls(graph, ops.QUANTIZERS)
    assert node.target is (ops.quantize_rows if index < 2 else ops.quantize_columns)


@pytest.mark.parametrize("pair", [(0, 2), (1, 3), (0, 3), (1, 2)])
def test_a_quantizer_read_on_both_sides_stays(pair):
    def function(x):
        outputs = ops.quantize_both(x, COLUMNS, COLUMNS)
        return tuple(outputs[index].float() for index in pair)

    graph, _ = fused(function)
    assert [n.target for n in calls(graph, ops.QUANTIZERS)] == [ops.quantize_both]


def test_single_layouts_stay():
    graph, _ = fused(lambda x: product(*ops.quantize_rows(x, ROWS)))
    assert [n.target for n in calls(graph, ops.QUANTIZERS)] == [ops.quantize_rows]


def test_a_region_names_its_chain_and_its_gemms():
    def function(x):
        hidden = torch.exp(x.permute(1, 0).sin())
        codes, scale = ops.quantize_rows(hidden, ROWS)
        return product(codes, scale), product(codes, scale)

    graph, (region,) = fused(function)
    assert [graph_target(graph, name) for name in region.producers] == ["permute", "sin", "exp"]
    assert region.gemms == tuple(n.name for n in calls(graph, (ops.scaled_mm,)))


def graph_target(graph, name):
    (node,) = [n for n in graph.nodes if n.name == name]
    return node.target._opname


def test_a_chain_ends_at_another_user_and_at_a_reduction():
    def shared(x):
        hidden = x.sin()
        return hidden, product(*ops.quantize_rows(hidden.cos(), ROWS))

    _, (region,) = fused(shared)
    assert len(region.producers) == 1
    _, (region,) = fused(lambda x: product(*ops.quantize_rows(x.cumsum(1).cos(), ROWS)))
    assert len(region.producers) == 1


def test_a_chain_with_two_tensor_inputs_ends_there():
    _, (region,) = fused(
        lambda x, y: product(*ops.quantize_rows(x.sin() * y.cos(), ROWS)), (20, 32), (20, 32)
    )
    assert len(region.producers) == 1


def test_a_graph_without_quantizers_has_no_regions():
    _, regions = fused(lambda x: x.sin())
    assert regions == ()
