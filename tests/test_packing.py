"""Packed tensors: the error that each code states, what it keeps exactly, what stays visible, and
which tensors have no packing."""

from __future__ import annotations

import pytest
import torch
from asserts import run_graph
from models import decibels
from strategies import traced

from hadagraph.graph import tensor
from hadagraph.packing import EIGHT, FOUR, Code, pack, packing_for, unpack

CODES = pytest.mark.parametrize("code", [EIGHT, FOUR], ids=["eight", "four"])


def packed(x, code, mode="fake"):
    """(codes, scale, unpacked) of x, through a graph."""
    gm = traced(lambda x: x + 0, x, mode=mode)
    (node,) = [n for n in gm.graph.nodes if "add" in n.name]
    output = gm.graph.output_node()
    packing = packing_for(tensor(node), code)
    codes, scale = pack(node, packing, output)
    output.args = ((codes, scale, unpack(codes, scale, packing, output)),)
    gm.graph.lint()
    gm.recompile()
    return run_graph(gm, [x])


@CODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 128), (3, 5, 4, 32), (40, 448), (7, 16)])
def test_the_error_is_what_the_code_states(code, dtype, shape):
    x = torch.randn(shape).to(dtype)
    codes, scale, got = packed(x, code)
    assert (got.dtype, got.shape, got.stride()) == (dtype, x.shape, x.stride())
    assert codes.numel() * codes.element_size() == x.numel() * code.bits // 8
    assert scale.dtype == torch.bfloat16 and scale.numel() * 16 <= x.numel()
    # Uniform steps of amax / 127 and amax / 8 on normal data, in blocks of 16 to 128.
    assert (42 if code is EIGHT else 20.5) < decibels(got, x) < (52 if code is EIGHT else 26)


def test_rows_whose_length_is_odd_are_one_block_in_8_bits():
    x = torch.randn(9, 33)
    codes, scale, got = packed(x, EIGHT)
    assert codes.shape == (9, 33) and scale.shape == (9, 1)
    assert decibels(got, x) > 42


@CODES
def test_dims_keep_their_order_in_memory(code):
    x = torch.randn(2, 12, 4, 32).transpose(1, 2)
    codes, _, got = packed(x, code)
    assert codes.is_contiguous() and got.stride() == x.stride()
    assert decibels(got, x) > 20


@CODES
def test_gaps_between_rows_are_closed(code):
    x = torch.randn(12, 256)
    gm = traced(lambda x: x[:, :128], x)
    node = [n for n in gm.graph.nodes if "slice" in n.name][-1]
    output = gm.graph.output_node()
    packing = packing_for(tensor(node), code)
    output.args = ((unpack(*pack(node, packing, output), packing, output),),)
    (got,) = run_graph(gm, [x])
    assert got.is_contiguous() and decibels(got, x[:, :128]) > 20


@CODES
@pytest.mark.parametrize("size", [1e-25, 1e4, 1e30])
def test_any_magnitude_is_packed_as_well(code, size):
    x = torch.randn(32, 128)
    _, _, got = packed(x * size, code)
    assert decibels(got, x * size) > (42 if code is EIGHT else 20.5)


@CODES
def test_zeros_and_the_largest_element_are_kept(code):
    x = torch.zeros(4, 128)
    x[1, 5], x[2, 7] = -16.0, 16.0
    _, _, got = packed(x, code)
    assert torch.equal(got == 0, x == 0)
    assert decibels(got, x) > 40


@CODES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_non_finite_element_is_not_finite(code, bad):
    x = torch.randn(4, 256)
    x[2, 131] = bad
    _, _, got = packed(x, code)
    start = 128
    assert not got[2, start : start + code.block].isfinite().any()
    got[2, start : start + code.block] = 0
    assert got.isfinite().all()


@CODES
def test_symbolic_sizes_take_other_values(code):
    x = torch.randn(6, 10, 64)
    gm = traced(
        lambda x: torch.cat((x.sin().flatten(0, 1), x.flatten(0, 1)), 1), x, mode="symbolic"
    )
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function" and "cat" in n.name]
    packing = packing_for(tensor(node), code)
    assert packing is None  # the dim that lies contiguous is a symbol
    gm = traced(lambda x: x[..., :64] * torch.ones(64), x, mode="symbolic")
    (node,) = [n for n in gm.graph.nodes if "mul" in n.name]
    output = gm.graph.output_node()
    packing = packing_for(tensor(node), code)
    output.args = ((unpack(*pack(node, packing, output), packing, output),),)
    for batch in (1, 9):
        x = torch.randn(batch, 3, 64)
        (got,) = run_graph(gm, [x])
        assert decibels(got, x) > 20


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64),
        torch.randn(1, 128).expand(16, 128),
        torch.randn(16, 256)[:, ::2],
        torch.randn(4, 1025),
    ],
    ids=["vector", "expanded", "gaps", "odd"],
)
def test_what_has_no_packing(x):
    assert packing_for(x, EIGHT) is None and packing_for(x, FOUR) is None
    assert packing_for(torch.randn(4, 33), FOUR) is None


def test_blocks_are_shortened_to_a_factor_of_the_dim():
    assert packing_for(torch.randn(4, 448), EIGHT).code == Code(8, 64)
    assert packing_for(torch.randn(4, 48), FOUR).code == Code(4, 16)
    assert packing_for(torch.randn(4, 4096), EIGHT).code == EIGHT
