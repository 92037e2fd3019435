"""narrow_quantizers: each layout is made once and only if it is read, values stay."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_graph_values_equal
from strategies import copy_of, traced, values_for

from hadagraph import ops
from hadagraph.graph import calls
from hadagraph.passes.narrow_quantizers import narrow_quantizers
from hadagraph.verify import verify

ROWS, COLUMNS = "int8/per_kept_index/h16", "int8/per_tensor"
BY_COLUMN = "fp8_e4m3/per_kept_index"


def narrowed(function, *shapes):
    """The rewritten graph; bitwise the same values."""
    gm = traced(function, *(torch.randn(shape) for shape in shapes or [(20, 32)]))
    before = copy_of(gm)
    narrow_quantizers(gm.graph)
    gm.graph.eliminate_dead_code()
    verify(gm.graph, "narrow_quantizers")
    assert_graph_values_equal(before, gm, values_for(gm), bound=0)
    return gm.graph


def quantizers(graph):
    return calls(graph, ops.QUANTIZERS)


def product(codes, scale):
    return ops.scaled_mm(codes, codes, scale, scale, None, torch.float32)


def by_rows(x):
    return product(*ops.quantize_rows(x, ROWS))


def both(x):
    outputs = ops.quantize_both(x, ROWS, BY_COLUMN)
    return product(*outputs[:2]), product(*outputs[2:])


def half_read(x, first):
    return product(*ops.quantize_both(x, ROWS, COLUMNS)[first : first + 2])


@pytest.mark.parametrize(
    ("first", "target", "encoding"),
    [(0, ops.quantize_rows, ROWS), (2, ops.quantize_columns, COLUMNS)],
)
def test_a_half_read_quantizer_is_narrowed(first, target, encoding):
    graph = narrowed(lambda x: half_read(x, first))
    (node,) = quantizers(graph)
    assert (node.target, node.args[1]) == (target, encoding)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_one_output_is_enough_to_keep_its_half(index):
    graph = narrowed(lambda x: ops.quantize_both(x, COLUMNS, COLUMNS)[index].float())
    (node,) = quantizers(graph)
    assert node.target is (ops.quantize_rows if index < 2 else ops.quantize_columns)


@pytest.mark.parametrize("pair", [(0, 2), (1, 3), (0, 3), (1, 2)])
def test_a_quantizer_read_on_both_sides_stays(pair):
    def function(x):
        outputs = ops.quantize_both(x, COLUMNS, COLUMNS)
        return tuple(outputs[index].float() for index in pair)

    graph = narrowed(function)
    assert [n.target for n in quantizers(graph)] == [ops.quantize_both]


def test_quantizers_alike_become_one():
    def function(x):
        first, second = x.flatten(0, 1), x.reshape(10, 32)
        scale = ops.quantize_rows(second, ROWS)[1]
        return by_rows(first), scale, ops.quantize_rows(second, COLUMNS)[1]

    graph = narrowed(function, (2, 5, 32))
    assert sorted(n.args[1] for n in quantizers(graph)) == [ROWS, COLUMNS]


def test_a_quantizer_of_both_layouts_serves_those_of_one():
    def function(x):
        first, second = x.flatten(0, 1), x.reshape(10, 32)
        columns = ops.quantize_columns(second, BY_COLUMN)
        return by_rows(first), product(*columns), *both(second)

    graph = narrowed(function, (2, 5, 32))
    assert [n.target for n in quantizers(graph)] == [ops.quantize_both]
