"""The verifier: a good graph passes, each kind of broken one is refused by name."""

from __future__ import annotations

import pytest
import torch
from strategies import traced

from hadagraph import ops
from hadagraph.basis import BasisError
from hadagraph.graph import calls
from hadagraph.verify import VerificationError, verify


@pytest.fixture
def graph():
    def function(x, y):
        product = ops.gemm(ops.rotate(x, 1, "h16"), ops.rotate(y, 1, "h16"), None)
        codes, scale = ops.quantize_rows(product, "int8/per_kept_index")
        return ops.scaled_mm(codes, codes, scale, scale, None, torch.float32).relu()

    return traced(function, torch.randn(5, 20), torch.randn(7, 20)).graph


def only(graph, target):
    (node,) = calls(graph, (target,))
    return node


def test_a_good_graph_passes(graph):
    verify(graph, "a pass")


def test_an_exact_op_left_after_lowering(graph):
    with pytest.raises(VerificationError, match="after a pass: gemm was not lowered"):
        verify(graph, "a pass", lowered=True)


def test_missing_metadata(graph):
    del only(graph, torch.ops.aten.relu.default).meta["val"]
    with pytest.raises(VerificationError, match=r"after a pass: relu has no meta\['val'\]"):
        verify(graph, "a pass")


def test_a_stale_shape(graph):
    node = only(graph, ops.gemm)
    node.meta["val"] = node.meta["val"].new_empty(5, 8)
    with pytest.raises(VerificationError, match=r"gemm is recorded as .*\[5, 8\], but computes"):
        verify(graph, "a pass")


def test_a_stale_dtype(graph):
    node = only(graph, ops.scaled_mm)
    node.meta["val"] = node.meta["val"].double()
    with pytest.raises(VerificationError, match=r"scaled_mm is recorded as torch\.float64"):
        verify(graph, "a pass")


def test_a_stale_output_of_several(graph):
    node = only(graph, ops.quantize_rows)
    codes, scale = node.meta["val"]
    node.meta["val"] = (codes, scale.new_empty(9))
    with pytest.raises(VerificationError, match="quantize_rows is recorded as"):
        verify(graph, "a pass")


def test_a_rotation_taken_off_one_side(graph):
    gemm = only(graph, ops.gemm)
    gemm.update_arg(0, gemm.args[0].args[0])
    with pytest.raises((BasisError, RuntimeError)):
        verify(graph, "a pass")


def test_a_type_error_names_its_node():
    def function(x):
        return torch.relu(ops.rotate(x, 1, "h16"))

    with pytest.raises(BasisError, match="relu"):
        verify(traced(function, torch.randn(4, 16)).graph, "a pass")


def test_a_use_before_its_definition(graph):
    gemm = only(graph, ops.gemm)
    gemm.append(gemm.args[0])
    with pytest.raises(RuntimeError, match="before it has been defined"):
        verify(graph, "a pass")
